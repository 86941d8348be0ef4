"""Global scales between vLLM's loader and the kernels: kept per segment, or refused; never merged.

vLLM's loader gives fused layers one `weight_scale_2` per segment and then takes the maximum (linear
layers) or w1's (experts), which scales every other segment wrong. Patches call these functions at the
points where it does. Imports no vLLM: the patched modules import this one.
"""

import torch
from torch.nn import Module, Parameter

from ..format import check_block_scales


def _name(layer: Module) -> str:
    return getattr(layer, "prefix", None) or getattr(layer, "layer_name", None) or type(layer).__name__


def _check_loaded(scales: torch.Tensor, name: str, tensor: str) -> None:
    if bool(torch.isnan(scales).any()):
        raise ValueError(
            f"{name}: {tensor} is missing from the checkpoint ({int(torch.isnan(scales).sum())} of "
            f"{scales.numel()} values were never loaded); the export is incomplete, or the layer is not "
            f"NVFP4 and must be listed under quantization_config.ignore"
        )


def mark_unloaded(experts_cls: type, *block_scales: Parameter) -> None:
    """Fill block scales with NaN until they are loaded, for an experts class that refuses NaN."""
    if getattr(experts_cls, "scales_each_row", False):
        for scales in block_scales:
            scales.data.fill_(torch.nan)


def require_weight_scale(layer: Module) -> None:
    """Raise ValueError where `weight_scale` was never loaded (all NaN) or holds a NaN or negative scale."""
    name = _name(layer)
    if bool(torch.isnan(layer.weight_scale.float()).all()):
        raise ValueError(
            f"{name}: weight_scale is missing from the checkpoint (never loaded); the export is incomplete, or "
            f"the layer is not NVFP4 and must be listed under quantization_config.ignore"
        )
    if not getattr(layer.quant_method.kernel, "scales_each_row", False):  # ours checks when it prepares
        check_block_scales(layer.weight_scale.data, name)


def keep_segment_scales(layer: Module) -> None:
    """Before a fused linear layer's scales are merged: keep one per segment for a kernel that scales rows.

    Sets `layer.segment_global_scales` (f32 [S]). Raises ValueError where a scale was never loaded, and
    where segments differ but the selected kernel has a single global scale.
    """
    scales = layer.weight_scale_2.detach().float()
    name = _name(layer)
    _check_loaded(scales, name, "weight_scale_2")
    kernel = layer.quant_method.kernel
    if getattr(kernel, "scales_each_row", False):
        layer.segment_global_scales = Parameter(scales.clone(), requires_grad=False)
    elif scales.unique().numel() != 1:
        raise ValueError(
            f"{name}: the fused segments have different global scales ({scales.tolist()}), and "
            f"{type(kernel).__name__} has a single one, which would scale the others wrong. Use "
            f"--linear-backend cutedsl where its kernel runs, or export the checkpoint with one "
            f"weight_scale_2 per fused layer"
        )


def require_input_scale(layer: Module) -> None:
    """Raise ValueError where the selected kernel needs `input_scale` and the checkpoint has none."""
    kernel = layer.quant_method.kernel
    if not getattr(kernel, "scales_each_row", False):
        _check_loaded(layer.input_scale.float(), _name(layer), "input_scale")


def w13_global_scales(layer: Module, experts_cls: type, is_gated: bool) -> torch.Tensor:
    """The global scales of w13, f32 [E, 2] for an experts class that scales w1 and w3 apart, else f32 [E].

    Raises ValueError where a scale was never loaded, and where w1's and w3's differ but the selected
    experts class cannot scale them apart.
    """
    scales = layer.w13_weight_scale_2.detach()
    name = _name(layer)
    _check_loaded(scales, name, "w1 or w3 weight_scale_2")
    _check_loaded(layer.w2_weight_scale_2.detach(), name, "w2 weight_scale_2")
    if getattr(experts_cls, "scales_each_row", False):
        return scales
    if is_gated and not torch.equal(scales[:, 0], scales[:, 1]):
        expert = int((scales[:, 0] != scales[:, 1]).nonzero()[0])
        raise ValueError(
            f"{name}: w1 and w3 of expert {expert} have different global scales "
            f"({scales[expert].tolist()}), and {experts_cls.__name__} applies one to both. Use "
            f"--moe-backend cutedsl where its kernel runs, or export the checkpoint with one "
            f"weight_scale_2 for w1 and w3"
        )
    return scales[:, 0].contiguous()
