"""Products of prepared operands by the reference, right and with one planted fault each."""

from collections.abc import Callable
from dataclasses import replace

import torch

from cutedsl_nvfp4.prepare import plain_experts, plain_linear
from cutedsl_nvfp4.reference import experts, linear
from cutedsl_nvfp4.selfcheck.child import ExpertsLayer, Layer
from cutedsl_nvfp4.sm90.layout import PANEL_ROWS, separate_gate_up, unpack_linear


def emulated(inputs: tuple[torch.Tensor, ...], layer: Layer | ExpertsLayer, tile, out: torch.Tensor) -> None:
    """What the kernel computes, from the operands the kernel gets."""
    weight = layer.operands
    if isinstance(layer, ExpertsLayer):
        _, hidden, intermediate = layer.sizes
        if layer.block_scaled:
            w13, w13_scales, w2, w2_scales = plain_experts(weight)
            x, weights, ids = inputs
            out.copy_(
                experts(
                    x, w13, w13_scales, weight.w13_row_scale, w2, w2_scales, weight.w2_row_scale, weights, ids,
                    layer.act_scale_13, layer.act_scale_2, layer.expert_map, quantize_activations=True,
                    swiglu_limit=layer.swiglu_limit,
                )
            )  # fmt: skip
            return
        w13 = unpack_linear(weight.w13_codes, weight.w13_block_scales, 2 * intermediate, hidden)
        w2 = unpack_linear(weight.w2_codes, weight.w2_block_scales, hidden, intermediate)
        x, weights, ids = inputs
        out.copy_(
            experts(
                x, *(separate_gate_up(t) for t in w13), weight.w13_row_scale, *w2, weight.w2_row_scale,
                weights, ids, expert_map=layer.expert_map, swiglu_limit=layer.swiglu_limit,
            )
        )  # fmt: skip
        return
    (x,) = inputs
    if layer.block_scaled:
        out.copy_(
            linear(
                x, *plain_linear(weight), weight.row_scale, layer.act_scale, layer.bias,
                quantize_activations=True, groups=weight.groups, out_dtype=torch.float32,
            )
        )  # fmt: skip
        return
    panels = weight.codes.shape[0] // weight.groups
    grouped = (t.unflatten(0, (weight.groups, panels)) for t in (weight.codes, weight.block_scales))
    plain = unpack_linear(*grouped, weight.n // weight.groups, weight.k)
    codes, scales = (t.flatten(0, 1) for t in plain)
    out.copy_(
        linear(
            x, codes, scales, weight.row_scale, bias=layer.bias, groups=weight.groups, out_dtype=torch.float32
        )
    )


def _with(layer: Layer | ExpertsLayer, **operands: torch.Tensor) -> Layer | ExpertsLayer:
    return replace(layer, operands=replace(layer.operands, **operands))


def wrong_swizzle(multiply: Callable, inputs, layer: Layer | ExpertsLayer, tile, out) -> None:
    """Two neighbouring rows of every eight change places, in the last panel of a linear's codes, in all of w13's.

    Blackwell: in the block scales of the last row tile, of w13's all, row r % 32 and r // 32 change roles.
    """
    if layer.block_scaled:
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


def dropped_tile(multiply: Callable, inputs, layer: Layer | ExpertsLayer, tile, out) -> None:
    """One tile of the output is never stored."""
    rows, tokens = out[:, -PANEL_ROWS:].shape[1], min(8, len(out))
    before = out[-tokens:, -rows:].clone()
    multiply(inputs, layer, tile, out)
    out[-tokens:, -rows:] = before


def doubled_scale(multiply: Callable, inputs, layer: Layer | ExpertsLayer, tile, out) -> None:
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
