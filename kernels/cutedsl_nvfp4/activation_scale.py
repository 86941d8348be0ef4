"""The activations' global scale under W4A4: from the checkpoint, from a warm-up text, or per token.

    checkpoint  input_scale as exported. Guarded: where the warm-up text shows an amax / (6 * 448) above
                it, the layer is reported and its scale raised, because values beyond it would saturate.
                A layer whose checkpoint has no input_scale uses `dynamic`.
    warmup      amax / (6 * 448) of the warm-up text. A layer that saw only zeros is refused.
    dynamic     per token, amax of the token itself / (6 * 448); computed inside the op.

One `ActivationScales` serves one layer. It holds a scale per activation the layer quantizes: one for a
linear layer; for experts the input of w13 and, for each expert, the input of w2.

Saturation is looked for on the warm-up text and nowhere else: no kernel counts clipped values while
serving. Only `dynamic` cannot saturate on any text.
"""

import logging

import torch

from .format import AMAX_PER_GLOBAL_SCALE
from .settings import ActivationScale

logger = logging.getLogger(__name__)

LISTED = 8  # experts named in a report
LOOSE = 1024  # a scale this many times too large is reported; up to it NVFP4 loses nothing


class ActivationScales:
    """Where one layer's activation global scales come from, and their values once known."""

    def __init__(
        self,
        policy: ActivationScale,
        inputs: tuple[str, ...],
        name: str,
        sizes: tuple[int, ...] | None = None,
    ):
        """`inputs` names what is quantized, e.g. ("x",) or ("w13 input", "w2 input"); `name`, the layer.

        `sizes` is the number of scales of each input: 1, or one per expert; None is 1 for all.
        """
        self.policy = policy
        self.inputs = inputs
        self.name = name
        self.sizes = sizes or (1,) * len(inputs)
        self.observed: list[torch.Tensor] | None = None  # f32 [size] per input, running amax while observing

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
        sizes = tuple(1 if scale is None else scale.numel() for scale in scales.values())
        return cls(policy, tuple(scales), name, sizes)

    def start_observing(self, device: torch.device) -> None:
        self.observed = [torch.zeros(size, dtype=torch.float32, device=device) for size in self.sizes]

    def observe(self, index: int, x: torch.Tensor, experts: torch.Tensor | None = None) -> None:
        """Fold |x|, x [M, K], into the running amax of input `index`; a no-op unless observing.

        `experts` int64 [M] tells which expert's scale each row is quantized with; None: every scale's.
        """
        if self.observed is None or not x.numel():
            return
        if experts is None or self.sizes[index] == 1:
            self.observed[index] = torch.maximum(self.observed[index], x.abs().amax().float())
        else:
            self.observed[index].scatter_reduce_(0, experts, x.abs().amax(-1).float(), "amax")

    def observe_what(self, twin: "ActivationScales") -> None:
        """Fold in what `twin`, a layer that reads the same tensor, has observed."""
        if self.observed is not None and twin.observed is not None:
            self.observed = [torch.maximum(own, other) for own, other in zip(self.observed, twin.observed)]

    def stop_observing(self, scales: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """End the warm-up: {input: current scale, f32 [1] or [E]} -> {input: scale to use from now on}.

        Raises ValueError under `warmup` where an input was never seen or only zeros, and for non-finite
        activations under every policy.
        """
        assert self.observed is not None, f"{self.name}: stop_observing without start_observing"
        observed, self.observed = [amax / AMAX_PER_GLOBAL_SCALE for amax in self.observed], None
        result = {}
        for seen, key in zip(observed, self.inputs):
            if not bool(torch.isfinite(seen).all()):
                raise ValueError(
                    f"{self.name}: the warm-up text gave non-finite activations at {key}; "
                    f"the weights before this layer are damaged"
                )
            if self.policy is ActivationScale.WARMUP:
                if not bool((seen > 0).any()):
                    raise ValueError(
                        f"{self.name}: the warm-up text gave {key} an amax of 0, so it has no scale; "
                        f"set CUTEDSL_NVFP4_ACTIVATION_SCALE=dynamic or checkpoint"
                    )
                result[key] = torch.full_like(scales[key], float(seen.max()))
            else:
                result[key] = self._guarded(key, scales[key], seen)
        return result

    def _guarded(self, key: str, scale: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """`scale` where it holds what was `seen` (f32 [1] or like `scale`), else what was seen; reports both."""
        seen = seen.expand_as(scale)
        if not bool((seen > 0).all()):
            logger.info(
                "%s: the warm-up text reached %d of %d scales of %s; the others are taken as exported, unchecked",
                self.name, int((seen > 0).sum()), seen.numel(), key,
            )  # fmt: skip
        if bool((seen > 0).any()) and bool((scale > LOOSE * seen)[seen > 0].all()):
            logger.warning(
                "%s: input_scale of %s is %.6g, %.3g times what the warm-up text needs; small values become zero. "
                "It multiplies when dequantizing (amax / 2688): export it so if it is the reciprocal, or set "
                "CUTEDSL_NVFP4_ACTIVATION_SCALE=dynamic",
                self.name, key, float(scale.max()), float(scale.max() / seen.max()),
            )  # fmt: skip
        too_small = seen > scale
        if not bool(too_small.any()):
            return scale
        factors = seen / scale
        worst = int(factors.argmax())
        which = too_small.nonzero().flatten().tolist()
        of_experts = ""
        if scale.numel() > 1:
            listed = ", ".join(map(str, which[:LISTED])) + (", ..." if len(which) > LISTED else "")
            of_experts = f" of expert {worst}, the worst of {len(which)} too small ones ({listed}),"
        logger.warning(
            "%s: input_scale of %s%s is %.6g, but the warm-up text needs %.6g, %.3g times as much; values "
            "beyond it saturate. Raised to what the text needs (recalibrate the checkpoint to silence this)",
            self.name, key, of_experts, float(scale[worst]), float(seen[worst]), float(factors[worst]),
        )  # fmt: skip
        return torch.where(too_small, seen, scale)
