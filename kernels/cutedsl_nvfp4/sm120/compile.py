"""Compile one sm_120a or sm_121a kernel; needs no GPU."""

from collections.abc import Callable

import cutlass
import cutlass.cute as cute
import torch
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from ..compiled import compile_kernel
from ..sm100.experts_kernel import Result
from .experts_kernel import ExpertsKernel
from .linear_kernel import LinearKernel
from .tiles import LinearTile

_CUTE_TYPE = {torch.bfloat16: cutlass.BFloat16, torch.float32: cutlass.Float32}


def _codes(rows: int, *batch: int):
    """uint8 [..., rows, K / 2] in pieces that TMA can address."""
    shape = (*batch, rows, cute.sym_int(divisibility=16))
    return make_fake_compact_tensor(
        cutlass.Uint8, shape, stride_order=tuple(reversed(range(len(shape)))), assumed_align=16
    )


def _scales(*tiles: int):
    """uint8 [..., KB, 32, 16]"""
    shape = (*tiles, 32, 16)
    return make_fake_compact_tensor(
        cutlass.Uint8, shape, stride_order=tuple(reversed(range(len(shape)))), assumed_align=16
    )


def _vector(element, length):
    return make_fake_compact_tensor(element, (length,), assumed_align=4)


def compile_linear(
    tile: LinearTile,
    out_dtype: torch.dtype,
    has_bias: bool = False,
    aligned_rows: bool = True,
    arch: str = "sm_120a",
    options: str = "",
) -> Callable:
    """Compile one tile's kernel for `arch`.

    The result is called as f(x codes, x scales, act scale, codes, scales, row scale, bias, out, act stride, groups,
    token tiles per group, most CTAs). Without a bias any f32 [N] tensor stands in for it.
    """
    m, n = cute.sym_int(), cute.sym_int()
    k_blocks = cute.sym_int()
    out = make_fake_compact_tensor(_CUTE_TYPE[out_dtype], (m, n), stride_order=(1, 0), assumed_align=16)
    arguments = (
        _codes(m),
        _scales(cute.sym_int(), cute.sym_int()),
        _vector(cutlass.Float32, cute.sym_int()),
        _codes(n),
        _scales(cute.sym_int(), k_blocks),
        _vector(cutlass.Float32, n),
        _vector(cutlass.Float32, n),
        out,
        *(cutlass.Int32(1),) * 4,
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
    return compile_kernel(LinearKernel(tile, has_bias, aligned_rows), *arguments, arch=arch, options=options)


def compile_product(tile: LinearTile, result: str, arch: str, options: str = "") -> Callable:
    """Compile one product of an experts layer; called as `ExpertsKernel.__call__` without the stream."""
    experts, n, k_blocks, slots, tiles, pairs = (cute.sym_int() for _ in range(6))
    rounded = Result(result) is Result.NVFP4
    columns = cute.sym_int(divisibility=16 if rounded else 8)
    out = make_fake_compact_tensor(
        cutlass.Uint8 if rounded else cutlass.BFloat16,
        (pairs, columns),
        stride_order=(1, 0),
        assumed_align=16,
    )
    row_scale = make_fake_compact_tensor(cutlass.Float32, (experts, n), stride_order=(1, 0), assumed_align=4)
    table = make_fake_compact_tensor(
        cutlass.Int32, (cute.sym_int(), 4), stride_order=(1, 0), assumed_align=16
    )
    arguments = (
        _codes(n, experts),
        _scales(experts, cute.sym_int(), k_blocks),
        row_scale,
        _codes(slots),
        _scales(tiles, cute.sym_int()),
        _vector(cutlass.Float32, cute.sym_int()),
        table,
        _vector(cutlass.Int32, cute.sym_int()),
        out,
        _scales(cute.sym_int(), cute.sym_int()),
        _vector(cutlass.Float32, cute.sym_int()),
        *(cutlass.Int32(1),) * 3,
        cutlass.Float32(1),
        cutlass.Int32(1),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
    return compile_kernel(ExpertsKernel(tile, result), *arguments, arch=arch, options=options)
