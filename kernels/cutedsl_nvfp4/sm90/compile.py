"""Compile one Hopper kernel; needs no GPU."""

from collections.abc import Callable

import cutlass
import cutlass.cute as cute
import torch
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from ..compiled import compile_kernel
from ..device.routing import Combine, Route
from .experts_narrow import NarrowExpertsKernel
from .experts_streaming import StreamingExpertsKernel
from .experts_wide import WideExpertsKernel
from .layout import CODE_WORDS, SCALE_WORDS
from .linear_narrow import NarrowLinearKernel
from .linear_wide import WideLinearKernel
from .tiles import LinearTile, NarrowTile, WideTile

ARCH = "sm_90a"
_CUTE_TYPE = {torch.bfloat16: cutlass.BFloat16, torch.float32: cutlass.Float32}


def compile_linear(
    config: LinearTile,
    out_dtype: torch.dtype,
    has_bias: bool = False,
    aligned_rows: bool = True,
    options: str = "",
) -> Callable:
    """Compile one configuration for sm_90a; needs no GPU.

    The result is called as f(x, codes, scales, row_scale, bias, out, k, panels per group, SCALE_BIAS), for
    WideTile followed by (token tiles per group, most CTAs). Without a bias any f32 [N] tensor stands in for it.
    """
    m, n, k_all, panels, blocks = (cute.sym_int() for _ in range(5))
    x = make_fake_tensor(cutlass.BFloat16, (m, k_all), (cute.sym_int64(divisibility=8), 1), assumed_align=16)
    codes = make_fake_compact_tensor(
        cutlass.Int64, (panels, blocks, CODE_WORDS), stride_order=(2, 1, 0), assumed_align=16
    )
    scales = make_fake_compact_tensor(
        cutlass.Int32, (panels, blocks, SCALE_WORDS), stride_order=(2, 1, 0), assumed_align=16
    )
    row_scale = make_fake_compact_tensor(cutlass.Float32, (n,), assumed_align=4)
    bias = make_fake_compact_tensor(cutlass.Float32, (n,), assumed_align=4)
    out = make_fake_compact_tensor(_CUTE_TYPE[out_dtype], (m, n), stride_order=(1, 0), assumed_align=16)
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    if isinstance(config, NarrowTile):
        kernel, numbers = NarrowLinearKernel(config, has_bias), 3
    else:
        kernel, numbers = WideLinearKernel(config, has_bias, aligned_rows), 5
    arguments = (x, codes, scales, row_scale, bias, out, *(cutlass.Int32(1),) * numbers, stream)
    return compile_kernel(kernel, *arguments, arch=ARCH, options=options)


def compile_experts(config: LinearTile, activated: bool, options: str = "") -> Callable:
    """Compile one configuration of the experts' w13 (`activated`) or w2 for sm_90a; needs no GPU.

    The result is called as f(x, codes, scales, row_scale, pairs, table, out, top-k, limit, SCALE_BIAS, most
    CTAs).
    """
    m, k, experts, panels, blocks, rows, columns, slots, pairs, entries = (cute.sym_int() for _ in range(10))
    x = make_fake_tensor(cutlass.BFloat16, (m, k), (cute.sym_int64(divisibility=8), 1), assumed_align=16)
    codes = make_fake_compact_tensor(
        cutlass.Int64, (experts, panels, blocks, CODE_WORDS), stride_order=(3, 2, 1, 0), assumed_align=16
    )
    scales = make_fake_compact_tensor(
        cutlass.Int32, (experts, panels, blocks, SCALE_WORDS), stride_order=(3, 2, 1, 0), assumed_align=16
    )
    row_scale = make_fake_compact_tensor(
        cutlass.Float32, (experts, rows), stride_order=(1, 0), assumed_align=4
    )
    pair_of_slot = make_fake_compact_tensor(cutlass.Int32, (pairs,), assumed_align=4)
    table = make_fake_compact_tensor(cutlass.Int32, (entries, 4), stride_order=(1, 0), assumed_align=16)
    out = make_fake_compact_tensor(cutlass.BFloat16, (slots, columns), stride_order=(1, 0), assumed_align=16)
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    numbers = (cutlass.Int32(1), cutlass.Float32(1), cutlass.Int32(1), cutlass.Int32(1))
    if isinstance(config, WideTile):
        kernel = WideExpertsKernel(config, activated)
    elif config.streams:
        kernel = StreamingExpertsKernel(config, activated)
    else:
        kernel = NarrowExpertsKernel(config, activated)
    arguments = (x, codes, scales, row_scale, pair_of_slot, table, out, *numbers, stream)
    return compile_kernel(kernel, *arguments, arch=ARCH, options=options)


def _vector(element, length) -> object:
    return make_fake_compact_tensor(element, (length,), assumed_align=4)


def compile_route(ctas: int, options: str = "") -> Callable:
    """f(ids [M * T], expert map, pairs, table, whether there is a map, local experts, tokens of a tile, step)."""
    pairs, known, entries = (cute.sym_int() for _ in range(3))
    table = make_fake_compact_tensor(cutlass.Int32, (entries, 4), stride_order=(1, 0), assumed_align=16)
    ids, pair_of_slot = _vector(cutlass.Int32, pairs), _vector(cutlass.Int32, pairs)
    numbers = (cutlass.Int32(1),) * 4
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    arguments = (ids, _vector(cutlass.Int32, known), pair_of_slot, table, *numbers, stream)
    return compile_kernel(Route(ctas), *arguments, arch=ARCH, options=options)


def compile_combine(topk: int, out_dtype: torch.dtype, options: str = "") -> Callable:
    """f(y [M * T, H], ids [M * T], expert map, weights [M * T], out, whether there is a map, local experts)."""
    m, pairs, known, hidden = (cute.sym_int() for _ in range(4))
    y = make_fake_compact_tensor(cutlass.BFloat16, (pairs, hidden), stride_order=(1, 0), assumed_align=16)
    out = make_fake_compact_tensor(_CUTE_TYPE[out_dtype], (m, hidden), stride_order=(1, 0), assumed_align=16)
    ids, weights = _vector(cutlass.Int32, pairs), _vector(cutlass.Float32, pairs)
    numbers = (cutlass.Int32(1),) * 2
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    arguments = (y, ids, _vector(cutlass.Int32, known), weights, out, *numbers, stream)
    return compile_kernel(Combine(topk), *arguments, arch=ARCH, options=options)
