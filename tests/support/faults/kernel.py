"""Products of prepared operands by the reference, right and with one planted fault each."""

from collections.abc import Callable
from dataclasses import replace

import torch

from cutedsl_nvfp4.family import Layout
from cutedsl_nvfp4.prepare import plain_experts, plain_linear
from cutedsl_nvfp4.reference import experts, linear
from cutedsl_nvfp4.selfcheck.products import PANEL_ROWS, ExpertsLayer, Layer


def emulated(inputs: tuple[torch.Tensor, ...], layer: Layer, tile, out: torch.Tensor) -> None:
    """What the kernel computes, from the operands the kernel gets."""
    weight, w4a4 = layer.operands, layer.family.w4a4
    if isinstance(layer, ExpertsLayer):
        w13, w13_scales, w2, w2_scales = plain_experts(weight)
        x, weights, ids = inputs
        result = experts(
            x, w13, w13_scales, weight.w13_row_scale, w2, w2_scales, weight.w2_row_scale, weights, ids,
            layer.act_scale_13, layer.act_scale_2, layer.expert_map, quantize_activations=w4a4,
            swiglu_limit=layer.swiglu_limit,
        )  # fmt: skip
    else:
        result = linear(
            *inputs, *plain_linear(weight), weight.row_scale, layer.act_scale, layer.bias,
            quantize_activations=w4a4, groups=weight.groups, out_dtype=torch.float32,
        )  # fmt: skip
    out.copy_(result)


def _with(layer: Layer, **operands: torch.Tensor) -> Layer:
    return replace(layer, operands=replace(layer.operands, **operands))


def wrong_swizzle(multiply: Callable, inputs, layer: Layer, tile, out) -> None:
    """Two neighbouring rows of every eight change places, in the last panel of a linear's codes, in all of w13's.

    Blackwell: in the block scales of the last row tile, of w13's all, row r % 32 and r // 32 change roles.
    """
    if layer.operands.layout is Layout.BLOCK_SCALED:
        name = "w13_block_scales" if isinstance(layer, ExpertsLayer) else "block_scales"
        scales = getattr(layer.operands, name).clone()
        some = scales if isinstance(layer, ExpertsLayer) else scales[-1:]
        atoms = some.reshape(-1, 32, 4, 4)
        some.copy_(atoms.transpose(1, 2).reshape(some.shape))
        multiply(inputs, _with(layer, **{name: scales}), tile, out)
        return
    name = "w13_codes" if isinstance(layer, ExpertsLayer) else "codes"
    codes = getattr(layer.operands, name).clone()
    words = codes.view(torch.int32).view(*codes.shape[:-1], 4, 8, 4, 4)  # [..., P, KB, w, r, c, j]
    words = words if isinstance(layer, ExpertsLayer) else words[-1:]
    words[..., :2, :, :] = words[..., :2, :, :].flip(-3)
    multiply(inputs, _with(layer, **{name: codes}), tile, out)


def dropped_tile(multiply: Callable, inputs, layer: Layer, tile, out) -> None:
    """One tile of the output is never stored."""
    rows, tokens = out[:, -PANEL_ROWS:].shape[1], min(8, len(out))
    before = out[-tokens:, -rows:].clone()
    multiply(inputs, layer, tile, out)
    out[-tokens:, -rows:] = before


def doubled_scale(multiply: Callable, inputs, layer: Layer, tile, out) -> None:
    """The global scale of a linear's first row, or of w2 in all experts, counts twice."""
    if isinstance(layer, ExpertsLayer):
        multiply(inputs, _with(layer, w2_row_scale=layer.operands.w2_row_scale * 2), tile, out)
        return
    row_scale = layer.operands.row_scale.clone()
    row_scale[0] *= 2
    multiply(inputs, _with(layer, row_scale=row_scale), tile, out)


def planted(multiply: Callable) -> dict[str, Callable]:
    """{fault: a product with it}, on top of `multiply`."""
    return {
        fault.__name__: lambda *arguments, fault=fault: fault(multiply, *arguments)
        for fault in (wrong_swizzle, dropped_tile, doubled_scale)
    }


PLANTED = planted(emulated)
