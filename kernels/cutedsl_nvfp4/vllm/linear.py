"""CuTeDSLNvFp4LinearKernel: vLLM's NVFP4 linear layers on torch.ops.cutedsl.nvfp4_linear."""

import torch
from torch.nn import Module, Parameter
from vllm import envs
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear.nvfp4.base import NvFp4LinearKernel, NvFp4LinearLayerConfig
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import current_platform

from .. import ops, settings, support
from ..activation_scale import ActivationScales
from ..prepare import PreparedLinear, prepare_linear
from ..reference import dequantize
from .plugin import BACKEND
from .refusals import refuse_unsupported

logger = init_logger(__name__)

INPUT = "x"


def _device_support(operation) -> support.Support:
    if current_platform.is_cpu():
        return operation("cpu", None)
    if not current_platform.is_cuda():
        return operation(current_platform.device_type, None)
    capability = current_platform.get_device_capability()
    return operation("cuda", capability.to_int() if capability is not None else None)


def current_support(operation) -> support.Support:
    """Support for `operation` (support.linear or support.experts) on vLLM's current platform, as it is configured.

    Kernels that this project never ran on such a device serve only where their backend was asked for by name.
    """
    found = _device_support(operation)
    return found if found.proven else _opted_in(found, "linear" if operation is support.linear else "moe")


def _opted_in(found: support.Support, kind: str) -> support.Support:
    """`found` if --`kind`-backend names ours, else no support and why."""
    vllm_config = get_current_vllm_config_or_none()
    if vllm_config is not None:
        config = vllm_config.kernel_config
        asked = {getattr(config, f"{kind}_backend")}
        if kind == "linear":
            asked |= set((config.linear_backend_per_quant or {}).values())
        if BACKEND in asked:
            return found
    return support.Support(
        None,
        "none",
        f"{found.implementation} kernels are compiled and were never run by their authors; --{kind}-backend {BACKEND} "
        f"serves with them if they pass their self-check on this device",
    )


def refuse_second_preparation(layer: Module, name: str) -> None:
    """Raise if `layer` already holds prepared operands: vLLM is reloading its weights."""
    if getattr(layer, "nvfp4_prepared", False):
        raise ValueError(
            f"{name}: reloading weights into prepared NVFP4 operands is not supported; restart the server "
            f"with the new checkpoint"
        )
    layer.nvfp4_prepared = True


def _prepare(layer: Module, layout: support.Layout) -> PreparedLinear:
    """`layer`'s checkpoint parameters, checked, as operands of `layout`; refuses a second time."""
    refuse_second_preparation(layer, layer.prefix)
    return prepare_linear(
        layer.weight.data, layer.weight_scale.data, layer.segment_global_scales.data, layer.logical_widths,
        layout=layout, groups=layer.bmm_batch_size if getattr(layer, "is_bmm", False) else 1, name=layer.prefix,
    )  # fmt: skip


def _drop_loader_scales(layer: Module) -> None:
    """Delete the scales vLLM's loader left on `layer`: nothing may read them once it is prepared."""
    for name in ("segment_global_scales", "weight_global_scale", "input_global_scale",
                 "input_global_scale_inv", "alpha"):  # fmt: skip
        if hasattr(layer, name):
            delattr(layer, name)


class CuTeDSLNvFp4LinearKernel(NvFp4LinearKernel):
    """First in vLLM's NVFP4 list wherever this build has a kernel, W4A16 and W4A4 alike."""

    scales_each_row = True  # fused segments keep their own global scale (scales.py)

    def __init__(self, config: NvFp4LinearLayerConfig) -> None:
        super().__init__(config)
        vllm_config = get_current_vllm_config_or_none()
        if vllm_config is not None:
            refuse_unsupported(vllm_config, type(self).__name__, current_support(support.linear).layout)
        self.support = current_support(support.linear)
        self.quantize_activations = support.quantizes_activations(self.support.layout)
        self.batch_invariant = envs.VLLM_BATCH_INVARIANT and self.supports_batch_invariance()

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Whether rows can be computed independently of the batch on this platform (nvfp4-linear-kernel-list)."""
        return current_support(support.linear).layout is support.Layout.SM90

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        if compute_capability is not None:
            found = support.linear("cuda", compute_capability)
            found = found if found.proven else _opted_in(found, "linear")
        else:
            found = current_support(support.linear)
        return bool(found), found.reason

    @classmethod
    def can_implement(cls, config: NvFp4LinearLayerConfig) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: Module) -> None:
        """Checkpoint parameters of `layer` -> operands: weight, weight_scale, row_scale, act_scale."""
        prepared = _prepare(layer, self.support.layout)
        replace_parameter(layer, "weight", prepared.codes)
        replace_parameter(layer, "weight_scale", prepared.block_scales)
        layer.row_scale = Parameter(prepared.row_scale, requires_grad=False)
        layer.nvfp4_n, layer.nvfp4_k, layer.nvfp4_groups = prepared.n, prepared.k, prepared.groups
        layer.act_scales = None
        layer.act_scale = None
        if self.quantize_activations:
            input_scale = getattr(layer, "input_global_scale", None)
            layer.act_scales = ActivationScales.from_checkpoint(
                settings.activation_scale(), {INPUT: input_scale}, layer.prefix
            )
            if layer.act_scales.policy is not settings.ActivationScale.DYNAMIC:
                if (
                    layer.act_scales.policy is settings.ActivationScale.WARMUP
                ):  # not read before it is measured
                    input_scale = torch.ones(1, device=layer.weight.device)
                layer.act_scale = Parameter(input_scale.float().reshape(1), requires_grad=False)
        _drop_loader_scales(layer)

    def apply_weights(self, layer: Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., groups * K] -> [..., N] in x's dtype, or float32 where the layer asks for it.

        While activations are observed no scale is known: they stay unquantized, or where kernels have W4A4
        alone, are quantized per token.
        """
        flat = x.reshape(-1, x.shape[-1])
        scales = layer.act_scales
        observing = scales is not None and scales.observed is not None
        if observing:
            scales.observe(0, flat)
        out = torch.ops.cutedsl.nvfp4_linear(
            flat, layer.weight, layer.weight_scale, layer.row_scale,
            None if observing else layer.act_scale, bias,
            layer.nvfp4_n, layer.nvfp4_k, layer.nvfp4_groups,
            self.quantize_activations and not (observing and self.support.layout is support.Layout.PLAIN),
            getattr(layer, "nvfp4_out_dtype", x.dtype), self.batch_invariant,
        )  # fmt: skip
        return out.view(*x.shape[:-1], layer.nvfp4_n)


class DequantizedGroupedLinearKernel(NvFp4LinearKernel):
    """wo_a where this build has no kernel: no other NVFP4 kernel multiplies a block-diagonal weight.

    Decodes the weight to bf16 once, at load; vLLM's own batched matmul then serves it.
    """

    scales_each_row = True

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, config: NvFp4LinearLayerConfig) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: Module) -> None:
        prepared = _prepare(layer, support.Layout.PLAIN)
        weight = dequantize(
            prepared.codes, prepared.block_scales, prepared.row_scale.unsqueeze(1), torch.bfloat16
        )
        layer.weight = Parameter(weight, requires_grad=False)
        del layer.weight_scale
        _drop_loader_scales(layer)

    def apply_weights(self, layer: Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        raise RuntimeError(f"{layer.prefix} is served by vLLM's output projection, not through its forward")


assert ops  # registers torch.ops.cutedsl
