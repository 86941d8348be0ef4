"""Compile one kernel's products for sm_100a or sm_103a; needs no GPU."""

from collections.abc import Callable

import cutlass
import torch

from ..blackwell.compile import F32, I32, U8, codes, scales
from ..blackwell.variants import Result
from ..compiled import compile_kernel
from ..device.fake_operands import CUTE_TYPE, integers, sizes, stream, tensor, vector
from .experts_kernel import ExpertsKernel
from .linear_kernel import LinearKernel
from .tiles import GroupedTile, LinearTile


def compile_linear(tile: LinearTile, out_dtype: torch.dtype, arch: str, options: str = "") -> Callable:
    """Compile one tile for `arch`, "sm_100a" or "sm_103a".

    The result is called as f(codes, block scales, x codes, x block scales, act scale, row scale, bias, out, groups,
    stride of act scale, has_bias, token tiles per group, maximum CTAs). Without a bias any f32 [N] tensor stands in
    for it.
    """
    m, n, scale_count, row_tiles, k_blocks, token_tiles, x_k_blocks = sizes(7)
    arguments = (
        codes(n),
        scales(row_tiles, k_blocks),
        codes(m),
        scales(token_tiles, x_k_blocks),
        vector(F32, scale_count),
        vector(F32, n),
        vector(F32, n),
        tensor(CUTE_TYPE[out_dtype], m, n),
        *integers(2),
        F32(1),
        *integers(2),
        stream(),
    )
    return compile_kernel(LinearKernel(tile), *arguments, arch=arch, options=options)


def compile_product(tile: GroupedTile, result: str, arch: str, options: str = "") -> Callable:
    """Compile one product of an experts layer; called as `ExpertsKernel.__call__` without the stream."""
    experts, n, half_k, row_atoms, k_atoms, slots, atoms, entries, pairs, out_k_atoms = sizes(10)
    rows, columns, scale_count, out_scale_count = sizes(4)
    arguments = (
        tensor(U8, experts, n, half_k),
        scales(experts, row_atoms, k_atoms),
        tensor(F32, experts, n, align=4),
        tensor(U8, slots, half_k),
        scales(atoms, k_atoms),
        vector(F32, scale_count),
        tensor(I32, entries, 4),
        vector(I32, pairs),
        tensor(U8 if result == Result.NVFP4 else cutlass.BFloat16, rows, columns),
        scales(atoms, out_k_atoms),
        vector(F32, out_scale_count),
        *integers(3),
        F32(1),
        *integers(1),
        stream(),
    )
    return compile_kernel(ExpertsKernel(tile, result), *arguments, arch=arch, options=options)
