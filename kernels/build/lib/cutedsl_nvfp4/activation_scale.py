"""The activations' global scale under W4A4: from the checkpoint, from a warm-up text, or per token.

    checkpoint  input_scale as exported. Guarded: where the warm-up text shows an amax / (6 * 448) above
                it, the layer is reported and its scale raised, because values beyond it would saturate.
                A layer whose checkpoint has no input_scale uses `dynamic`.
    warmup      amax / (6 * 448) of the warm-up text. A layer that saw only zeros is refused.
    dynamic     per token, amax of the token itself / (6 * 448); computed inside the op.

One `ActivationScales` serves one layer. It holds a scale per activation the layer quantizes: one for a
linear layer; for experts the input of w13 and the input of w2.
"""

import logging

import torch

from .format import AMAX_PER_GLOBAL_SCALE
from .settings import ActivationScale

logger = logging.getLogger(__name__)


class ActivationScales:
    """Where one layer's activation global scales come from, and their values once known."""

    def __init__(self, policy: ActivationScale, inputs: tuple[str, ...], name: str):
        """`inputs` names what is quantized, e.g. ("x",) or ("w13 input", "w2 input"); `name`, the layer."""
        self.policy = policy
        self.inputs = inputs
        self.name = name
        self.observed: torch.Tensor | None = None  # f32 [len(inputs)], running amax while observing

    @classmethod
    def from_checkpoint(
        cls, policy: ActivationScale, scales: dict[str, torch.Tensor | None], name: str
    ) -> "ActivationScales":
        """Resolve `policy` for a layer whose checkpoint gives `scales` (NaN or None where it has none)."""
        missing = [key for key, scale in scales.items() if scale is None or bool(torch.isnan(scale).any())]
        if policy is ActivationScale.CHECKPOINT and missing:
            logger.info(
                "%s: checkpoint has no input_scale for %s; using dynamic scales", name, ", ".join(missing)
            )
            policy = ActivationScale.DYNAMIC
        for key, scale in scales.items():
            if policy is ActivationScale.CHECKPOINT and not bool((torch.isfinite(scale) & (scale > 0)).all()):
                raise ValueError(
                    f"{name}: input_scale of {key} must be finite and positive, got {scale.flatten().tolist()[:4]}; "
                    f"calibrate the checkpoint again or set CUTEDSL_NVFP4_ACTIVATION_SCALE=dynamic"
                )
        return cls(policy, tuple(scales), name)

    def start_observing(self, device: torch.device) -> None:
        self.observed = torch.zeros(len(self.inputs), dtype=torch.float32, device=device)

    def observe(self, index: int, x: torch.Tensor) -> None:
        """Fold |x| into the running amax of input `index`; a no-op unless observing."""
        if self.observed is not None and x.numel():
            self.observed[index] = torch.maximum(self.observed[index], x.abs().amax().float())

    def stop_observing(self, scales: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """End the warm-up: {input: current scale, f32 [1] or [E]} -> {input: scale to use from now on}.

        Raises ValueError under `warmup` where an input was never seen or only zeros, and for non-finite
        activations under every policy.
        """
        assert self.observed is not None, f"{self.name}: stop_observing without start_observing"
        observed, self.observed = self.observed / AMAX_PER_GLOBAL_SCALE, None
        result = {}
        for index, key in enumerate(self.inputs):
            seen = observed[index]
            if not bool(torch.isfinite(seen)):
                raise ValueError(
                    f"{self.name}: the warm-up text gave non-finite activations at {key}; "
                    f"the weights before this layer are damaged"
                )
            if self.policy is ActivationScale.WARMUP:
                if not bool(seen > 0):
                    raise ValueError(
                        f"{self.name}: the warm-up text gave {key} an amax of 0, so it has no scale; "
                        f"set CUTEDSL_NVFP4_ACTIVATION_SCALE=dynamic or checkpoint"
                    )
                result[key] = torch.full_like(scales[key], float(seen))
            else:
                result[key] = self._guarded(key, scales[key], seen)
        return result

    def _guarded(self, key: str, scale: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        too_small = scale < seen
        if not bool(too_small.any()):
            return scale
        logger.warning(
            "%s: input_scale of %s is %.6g, but the warm-up text needs %.6g; values beyond it saturate. "
            "Raised to the larger one (recalibrate the checkpoint to silence this)",
            self.name, key, float(scale.min()), float(seen),
        )  # fmt: skip
        return torch.where(too_small, seen, scale)
