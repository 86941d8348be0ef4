"""Compile one Hopper kernel; needs no GPU."""

from collections.abc import Callable

import cutlass
import torch

from ..compiled import compile_kernel
from ..device.fake_operands import CUTE_TYPE, activations, integers, sizes, stream, tensor, vector
from ..device.routing import Route
from .experts_narrow import NarrowExpertsKernel
from .experts_streaming import StreamingExpertsKernel
from .experts_wide import WideExpertsKernel
from .layout import CODE_WORDS, SCALE_WORDS
from .linear_narrow import NarrowLinearKernel
from .linear_wide import WideLinearKernel
from .tiles import LinearTile, NarrowTile, WideTile

ARCH = "sm_90a"


def compile_linear(
    tile: LinearTile,
    out_dtype: torch.dtype,
    has_bias: bool = False,
    aligned_rows: bool = True,
    options: str = "",
) -> Callable:
    """Compile one tile's linear kernel for sm_90a.

    The result is called as f(x, codes, block scales, row scale, bias, out, k, panels per group, SCALE_BIAS), for a
    WideTile followed by (token tiles per group, maximum CTAs). Without a bias any f32 [N] tensor stands in for it.
    """
    m, n, k_all, panels, blocks = sizes(5)
    if isinstance(tile, NarrowTile):
        kernel, numbers = NarrowLinearKernel(tile, has_bias), 3
    else:
        kernel, numbers = WideLinearKernel(tile, has_bias, aligned_rows), 5
    arguments = (
        activations(m, k_all),
        tensor(cutlass.Int64, panels, blocks, CODE_WORDS),
        tensor(cutlass.Int32, panels, blocks, SCALE_WORDS),
        vector(cutlass.Float32, n),
        vector(cutlass.Float32, n),
        tensor(CUTE_TYPE[out_dtype], m, n),
        *integers(numbers),
        stream(),
    )
    return compile_kernel(kernel, *arguments, arch=ARCH, options=options)


def compile_product(tile: LinearTile, activated: bool, options: str = "") -> Callable:
    """Compile one tile's kernel for the experts' w13 (`activated`) or w2, for sm_90a.

    The result is called as f(x, codes, block scales, row scale, pair of slot, table, out, top-k, limit, SCALE_BIAS,
    maximum CTAs).
    """
    m, k, experts, panels, blocks, rows, columns, slots, pairs, entries = sizes(10)
    if isinstance(tile, WideTile):
        kernel = WideExpertsKernel(tile, activated)
    elif tile.streams:
        kernel = StreamingExpertsKernel(tile, activated)
    else:
        kernel = NarrowExpertsKernel(tile, activated)
    arguments = (
        activations(m, k),
        tensor(cutlass.Int64, experts, panels, blocks, CODE_WORDS),
        tensor(cutlass.Int32, experts, panels, blocks, SCALE_WORDS),
        tensor(cutlass.Float32, experts, rows, align=4),
        vector(cutlass.Int32, pairs),
        tensor(cutlass.Int32, entries, 4),
        tensor(cutlass.BFloat16, slots, columns),
        cutlass.Int32(1),
        cutlass.Float32(1),
        *integers(2),
        stream(),
    )
    return compile_kernel(kernel, *arguments, arch=ARCH, options=options)


def compile_route(ctas: int, options: str = "") -> Callable:
    """f(ids [M * T], expert map, pair of slot, table, has a map, local experts, tokens of a tile, step)."""
    pairs, global_experts, entries = sizes(3)
    i32 = cutlass.Int32
    arguments = (
        vector(i32, pairs), vector(i32, global_experts), vector(i32, pairs), tensor(i32, entries, 4),
        *integers(4), stream(),
    )  # fmt: skip
    return compile_kernel(Route(ctas), *arguments, arch=ARCH, options=options)
