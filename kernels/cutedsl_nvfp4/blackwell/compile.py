"""Compile the kernels that both Blackwell families launch around their products; needs no GPU."""

from collections.abc import Callable

import cutlass

from ..compiled import compile_kernel
from ..device.fake_operands import activations, integers, sizes, stream, tensor, vector
from ..device.routing import SlotRoute
from .gather_kernel import Gather
from .quantize_kernel import Quantize

U8, I32, F32 = cutlass.Uint8, cutlass.Int32, cutlass.Float32


def codes(*rows) -> object:
    """uint8 [..., rows, K / 2] in pieces that TMA can address."""
    return tensor(U8, *rows, *sizes(1, divisibility=16))


def scales(*tiles) -> object:
    """uint8 [..., KB, 32, 16]: block scales in 128x4 tiles."""
    return tensor(U8, *tiles, 32, 16)


def compile_quantize(dynamic: bool, arch: str, options: str = "") -> Callable:
    """f(x, act scale, codes, block scales, groups, k, stride of act scale)."""
    m, k, scale_count, row_tiles, k_blocks = sizes(5)
    arguments = (
        activations(m, k), vector(F32, scale_count), codes(m), scales(row_tiles, k_blocks), *integers(3), stream()
    )  # fmt: skip
    return compile_kernel(Quantize(dynamic), *arguments, arch=arch, options=options)


def compile_gather(scale: str, from_slots: bool, arch: str, options: str = "") -> Callable:
    """f(x, places, table, act scale, codes, block scales, top-k, slots of a tile)."""
    m, k, places, entries, scale_count, slots, half_k, atoms, k_atoms = sizes(9)
    arguments = (
        activations(m, k),
        vector(I32, places),
        tensor(I32, entries, 4),
        vector(F32, scale_count),
        tensor(U8, slots, half_k),
        scales(atoms, k_atoms),
        *integers(2),
        stream(),
    )
    return compile_kernel(Gather(scale, from_slots), *arguments, arch=arch, options=options)


def compile_route(arch: str, options: str = "") -> Callable:
    """f(ids [M * T], expert map, pair of slot, places, table, has a map, local experts, slots of a tile)."""
    pairs, global_experts, slots, entries = sizes(4)
    arguments = (
        vector(I32, pairs), vector(I32, global_experts), vector(I32, slots), vector(I32, pairs),
        tensor(I32, entries, 4), *integers(3), stream(),
    )  # fmt: skip
    return compile_kernel(SlotRoute(), *arguments, arch=arch, options=options)
