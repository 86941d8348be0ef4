"""Compile one of the experts' kernels for sm_100a or sm_103a; needs no GPU."""

from collections.abc import Callable

import cutlass
import cutlass.cute as cute
import torch
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from ..compiled import compile_kernel
from ..device.routing import Combine, SlotRoute
from ..sm100.expert_tiles import GroupedTile
from ..sm100.experts_kernel import ExpertsKernel, Result
from .gather_kernel import Gather

_CUTE_TYPE = {torch.bfloat16: cutlass.BFloat16, torch.float32: cutlass.Float32}


def _tensor(element, *shape, align: int = 16) -> object:
    order = tuple(reversed(range(len(shape))))
    return make_fake_compact_tensor(element, shape, stride_order=order, assumed_align=align)


def _sizes(count: int) -> tuple:
    return tuple(cute.sym_int() for _ in range(count))


def compile_product(config: GroupedTile, result: str, arch: str, options: str = "") -> Callable:
    """Compile one product; called as `ExpertsKernel.__call__` without the stream."""
    experts, n, half_k, row_atoms, k_atoms, slots, atoms, entries, pairs, out_k_atoms = _sizes(10)
    rows, columns, scales, out_scales = _sizes(4)
    u8, i32, f32 = cutlass.Uint8, cutlass.Int32, cutlass.Float32
    out = cutlass.Uint8 if result == Result.NVFP4 else cutlass.BFloat16
    arguments = (
        _tensor(u8, experts, n, half_k),
        _tensor(u8, experts, row_atoms, k_atoms, 32, 16),
        _tensor(f32, experts, n, align=4),
        _tensor(u8, slots, half_k),
        _tensor(u8, atoms, k_atoms, 32, 16),
        _tensor(f32, scales, align=4),
        _tensor(i32, entries, 4),
        _tensor(i32, pairs, align=4),
        _tensor(out, rows, columns),
        _tensor(u8, atoms, out_k_atoms, 32, 16),
        _tensor(f32, out_scales, align=4),
        i32(1), i32(1), i32(1), f32(1), i32(1),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )  # fmt: skip
    return compile_kernel(ExpertsKernel(config, result), *arguments, arch=arch, options=options)


def compile_gather(scale: str, from_slots: bool, arch: str, options: str = "") -> Callable:
    """f(x, places, table, scale, codes, block scales, top-k, slots of a tile)."""
    m, k, places, entries, scales, slots, half_k, atoms, k_atoms = _sizes(9)
    x = make_fake_tensor(cutlass.BFloat16, (m, k), (cute.sym_int64(divisibility=8), 1), assumed_align=16)
    u8, i32, f32 = cutlass.Uint8, cutlass.Int32, cutlass.Float32
    arguments = (
        x,
        _tensor(i32, places, align=4),
        _tensor(i32, entries, 4),
        _tensor(f32, scales, align=4),
        _tensor(u8, slots, half_k),
        _tensor(u8, atoms, k_atoms, 32, 16),
        i32(1), i32(1),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )  # fmt: skip
    return compile_kernel(Gather(scale, from_slots), *arguments, arch=arch, options=options)


def compile_route(arch: str, options: str = "") -> Callable:
    """f(ids [M * T], expert map, pairs, places, table, whether there is a map, local experts, slots of a tile)."""
    pairs, known, slots, entries = _sizes(4)
    i32 = cutlass.Int32
    arguments = (
        _tensor(i32, pairs, align=4),
        _tensor(i32, known, align=4),
        _tensor(i32, slots, align=4),
        _tensor(i32, pairs, align=4),
        _tensor(i32, entries, 4),
        i32(1), i32(1), i32(1),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )  # fmt: skip
    return compile_kernel(SlotRoute(), *arguments, arch=arch, options=options)


def compile_combine(topk: int, out_dtype: torch.dtype, arch: str, options: str = "") -> Callable:
    """f(y [M * T, H], ids [M * T], expert map, weights [M * T], out, whether there is a map, local experts)."""
    m, pairs, known, hidden = _sizes(4)
    i32 = cutlass.Int32
    arguments = (
        _tensor(cutlass.BFloat16, pairs, hidden),
        _tensor(i32, pairs, align=4),
        _tensor(i32, known, align=4),
        _tensor(cutlass.Float32, pairs, align=4),
        _tensor(_CUTE_TYPE[out_dtype], m, hidden),
        i32(1), i32(1),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )  # fmt: skip
    return compile_kernel(Combine(topk), *arguments, arch=arch, options=options)
