"""Compile one Blackwell kernel; needs no GPU."""

from collections.abc import Callable

import cutlass
import cutlass.cute as cute
import torch
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from ..blackwell.quantize_kernel import Quantize
from ..compiled import compile_kernel
from .linear_kernel import LinearKernel
from .tiles import LinearTile

_CUTE_TYPE = {torch.bfloat16: cutlass.BFloat16, torch.float32: cutlass.Float32}


def _codes(rows) -> object:
    return make_fake_compact_tensor(
        cutlass.Uint8, (rows, cute.sym_int(divisibility=16)), stride_order=(1, 0), assumed_align=16
    )


def _scales() -> object:
    return make_fake_compact_tensor(
        cutlass.Uint8, (cute.sym_int(), cute.sym_int(), 32, 16), stride_order=(3, 2, 1, 0), assumed_align=16
    )


def _vector(element, length) -> object:
    return make_fake_compact_tensor(element, (length,), assumed_align=4)


def compile_linear(tile: LinearTile, out_dtype: torch.dtype, arch: str, options: str = "") -> Callable:
    """Compile one tile for `arch`, "sm_100a" or "sm_103a".

    The result is called as f(codes, scales, x codes, x scales, act_scale, row_scale, bias, out, groups, stride of
    act_scale, has_bias, token tiles per group, most CTAs). Without a bias any f32 [N] tensor stands in for it.
    """
    m, n = cute.sym_int(), cute.sym_int()
    out = make_fake_compact_tensor(_CUTE_TYPE[out_dtype], (m, n), stride_order=(1, 0), assumed_align=16)
    numbers = (cutlass.Int32(1), cutlass.Int32(1), cutlass.Float32(1), cutlass.Int32(1), cutlass.Int32(1))
    arguments = (
        _codes(n), _scales(), _codes(m), _scales(), _vector(cutlass.Float32, cute.sym_int()),
        _vector(cutlass.Float32, n), _vector(cutlass.Float32, n), out, *numbers,
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )  # fmt: skip
    return compile_kernel(LinearKernel(tile), *arguments, arch=arch, options=options)


def compile_quantize(dynamic: bool, arch: str, options: str = "") -> Callable:
    """Compile one kernel for `arch`: f(x, act_scale, codes, scales, groups, k, stride of act_scale)."""
    m = cute.sym_int()
    x = make_fake_tensor(
        cutlass.BFloat16, (m, cute.sym_int()), (cute.sym_int64(divisibility=8), 1), assumed_align=16
    )
    act_scale = _vector(cutlass.Float32, cute.sym_int())
    numbers = (cutlass.Int32(1),) * 3
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    return compile_kernel(
        Quantize(dynamic), x, act_scale, _codes(m), _scales(), *numbers, stream, arch=arch, options=options
    )
