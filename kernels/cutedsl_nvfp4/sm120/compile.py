"""Compile one kernel's products for sm_120a or sm_121a; needs no GPU."""

from collections.abc import Callable

import cutlass
import torch

from ..blackwell.compile import F32, I32, U8, codes, scales
from ..blackwell.variants import Result
from ..compiled import compile_kernel
from ..device.fake_operands import CUTE_TYPE, integers, sizes, stream, tensor, vector
from .experts_kernel import ExpertsKernel
from .linear_kernel import LinearKernel
from .tiles import LinearTile


def compile_linear(
    tile: LinearTile,
    out_dtype: torch.dtype,
    has_bias: bool = False,
    aligned_rows: bool = True,
    arch: str = "sm_120a",
    options: str = "",
) -> Callable:
    """Compile one tile's kernel for `arch`.

    The result is called as f(x codes, x block scales, act scale, codes, block scales, row scale, bias, out, stride of
    act scale, groups, token tiles per group, maximum CTAs). Without a bias any f32 [N] tensor stands in for it.
    """
    m, n, k_blocks, token_tiles, x_k_blocks, scale_count, row_tiles = sizes(7)
    arguments = (
        codes(m),
        scales(token_tiles, x_k_blocks),
        vector(F32, scale_count),
        codes(n),
        scales(row_tiles, k_blocks),
        vector(F32, n),
        vector(F32, n),
        tensor(CUTE_TYPE[out_dtype], m, n),
        *integers(4),
        stream(),
    )
    return compile_kernel(LinearKernel(tile, has_bias, aligned_rows), *arguments, arch=arch, options=options)


def compile_product(tile: LinearTile, result: str, arch: str, options: str = "") -> Callable:
    """Compile one product of an experts layer; called as `ExpertsKernel.__call__` without the stream."""
    experts, n, k_blocks, slots, tiles, pairs = sizes(6)
    row_tiles, x_k_blocks, scale_count, entries, pair_count, out_tiles, out_k_blocks, out_scales = sizes(8)
    rounded = Result(result) is Result.NVFP4
    (columns,) = sizes(1, divisibility=16 if rounded else 8)
    arguments = (
        codes(experts, n),
        scales(experts, row_tiles, k_blocks),
        tensor(F32, experts, n, align=4),
        codes(slots),
        scales(tiles, x_k_blocks),
        vector(F32, scale_count),
        tensor(I32, entries, 4),
        vector(I32, pair_count),
        tensor(U8 if rounded else cutlass.BFloat16, pairs, columns),
        scales(out_tiles, out_k_blocks),
        vector(F32, out_scales),
        *integers(3),
        F32(1),
        *integers(1),
        stream(),
    )
    return compile_kernel(ExpertsKernel(tile, result), *arguments, arch=arch, options=options)
