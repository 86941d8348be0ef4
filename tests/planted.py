"""Products of Hopper's packed operands by the reference, right and with one planted fault each."""

from collections.abc import Callable
from dataclasses import replace

import torch

from cutedsl_nvfp4.reference import linear
from cutedsl_nvfp4.selfcheck import Layer
from cutedsl_nvfp4.sm90.layout import PANEL_ROWS, unpack_linear


def emulated(x: torch.Tensor, layer: Layer, tile, out: torch.Tensor) -> None:
    """What the kernel computes, from the operands the kernel gets."""
    weight = layer.operands
    panels = weight.codes.shape[0] // weight.groups
    grouped = (t.unflatten(0, (weight.groups, panels)) for t in (weight.codes, weight.block_scales))
    plain = unpack_linear(*grouped, weight.n // weight.groups, weight.k)
    codes, scales = (t.flatten(0, 1) for t in plain)
    out.copy_(
        linear(
            x, codes, scales, weight.row_scale, bias=layer.bias, groups=weight.groups, out_dtype=torch.float32
        )
    )


def _with(layer: Layer, **operands: torch.Tensor) -> Layer:
    return replace(layer, operands=replace(layer.operands, **operands))


def wrong_swizzle(multiply: Callable, x, layer: Layer, tile, out) -> None:
    """Two neighbouring rows of every eight change places in the last panel's codes."""
    codes = layer.operands.codes.clone()
    words = codes[-1].view(torch.int32).view(-1, 4, 8, 4, 4)  # [KB, w, r, c, j]
    words[:, :, :2] = words[:, :, :2].flip(2)
    multiply(x, _with(layer, codes=codes), tile, out)


def dropped_tile(multiply: Callable, x, layer: Layer, tile, out) -> None:
    """One tile of the output is never stored."""
    rows, tokens = out[:, -PANEL_ROWS:].shape[1], min(8, len(out))
    before = out[-tokens:, -rows:].clone()
    multiply(x, layer, tile, out)
    out[-tokens:, -rows:] = before


def doubled_scale(multiply: Callable, x, layer: Layer, tile, out) -> None:
    """The first row's global scale counts twice."""
    row_scale = layer.operands.row_scale.clone()
    row_scale[0] *= 2
    multiply(x, _with(layer, row_scale=row_scale), tile, out)


def planted(multiply: Callable) -> dict[str, Callable]:
    """{fault: a product with it}, on top of `multiply`."""
    return {
        fault.__name__: lambda *arguments, fault=fault: fault(multiply, *arguments)
        for fault in (wrong_swizzle, dropped_tile, doubled_scale)
    }


PLANTED = planted(emulated)
