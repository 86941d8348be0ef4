"""CuTeDSLNvFp4LinearKernel: vLLM's NVFP4 linear layers on torch.ops.cutedsl.nvfp4_linear."""

import torch
from torch.nn import Module, Parameter
from vllm import envs
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.kernels.linear.nvfp4.base import NvFp4LinearKernel, NvFp4LinearLayerConfig
from vllm.model_executor.utils import replace_parameter

from .. import ops, settings, support  # noqa: F401  ops registers torch.ops.cutedsl
from ..activation_scale import ActivationScales
from ..family import Layout
from ..prepare import PreparedLinear, prepare_linear
from ..reference import dequantize
from .backend import INPUT, current_support, opted_in, refuse_second_preparation
from .refusals import refuse_unsupported


def _prepare(layer: Module, layout: Layout) -> PreparedLinear:
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
        self.layout = str(self.support.layout)  # a plain string: what torch.compile hands to the op
        self.quantize_activations = support.quantizes_activations(self.support)
        self.batch_invariant = envs.VLLM_BATCH_INVARIANT and self.supports_batch_invariance()

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Whether rows can be computed independently of the batch on this platform (nvfp4-linear-kernel-list)."""
        return current_support(support.linear).batch_invariant

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        if compute_capability is not None:
            found = opted_in(support.linear("cuda", compute_capability), "linear")
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
            self.quantize_activations and not (observing and self.support.layout is Layout.PLAIN),
            getattr(layer, "nvfp4_out_dtype", x.dtype), self.layout, self.batch_invariant,
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
        prepared = _prepare(layer, Layout.PLAIN)
        weight = dequantize(
            prepared.codes, prepared.block_scales, prepared.row_scale.unsqueeze(1), torch.bfloat16
        )
        layer.weight = Parameter(weight, requires_grad=False)
        del layer.weight_scale
        _drop_loader_scales(layer)

    def apply_weights(self, layer: Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        raise RuntimeError(f"{layer.prefix} is served by vLLM's output projection, not through its forward")
