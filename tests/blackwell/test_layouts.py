"""Where operands lie on Blackwell: CuTe DSL's layout objects, the PTX manual's rules, and format.py say the same."""

from collections.abc import Callable

import cutlass
import cutlass.cute as cute
import cutlass.utils.blackwell_helpers as helpers
import cutlass.utils.blockscaled_layout as block_scaled
import numpy as np
import pytest
import torch
from cutlass.cute.nvgpu import tcgen05
from cutlass.cute.nvgpu.common import OperandMajorMode

from cutedsl_nvfp4.format import swizzle_scales
from tests.support.emulator import memory, mma

LANE = 1 << 16  # of a tensor memory address; CuTe counts bytes, four to a column


def layouts(make: Callable[[], dict]) -> dict:
    """What `make` returns inside CuTe DSL: {name: layout} -> {name: (shape, stride)}, all of them static."""
    found = {}

    @cute.jit
    def host():
        for name, layout in make().items():
            found[name] = (layout.shape, layout.stride)

    host()
    return found


def offset(shape, stride, index: int) -> int:
    """The layout function: `index` runs through `shape` leftmost fastest."""
    if not isinstance(shape, tuple):
        return index * stride
    total = 0
    for inner, step in zip(shape, stride):
        size = int(np.prod(_flat(inner)))
        total += offset(inner, step, index % size)
        index //= size
    return total


def _flat(shape) -> list[int]:
    return [leaf for part in shape for leaf in _flat(part)] if isinstance(shape, tuple) else [shape]


def at(layout: tuple, *coordinate: int) -> int:
    """Offset of a coordinate, one number a mode."""
    return sum(offset(s, d, c) for s, d, c in zip(*layout, coordinate))


@pytest.mark.parametrize("rows, k", [(128, 64), (256, 512), (384, 192)])
def test_scales_lie_where_nvidias_tile_atom_puts_them(rows, k):
    nvidias = layouts(lambda: {"sf": block_scaled.tile_atom_to_shape_SF((rows, k, 1), 16)})["sf"]
    marks = torch.randint(
        0, 127, (rows, k // 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    swizzled = swizzle_scales(marks.clone().view(torch.float8_e4m3fn)).flatten()
    for row in range(0, rows, 7):
        for group in range(k // 16):
            by_hand = (
                (row // 128 * (k // 64) + group // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group % 4
            )
            assert at(nvidias, row, 16 * group, 0) == at(nvidias, row, 16 * group + 15, 0) == by_hand
            assert swizzled[by_hand] == marks[row, group]


def blackwell(cta_group, m: int, n: int) -> dict:
    """Layouts of a stage of 256 k for an MMA of m x n."""
    k_major = OperandMajorMode.K
    tiled = helpers.make_blockscaled_trivial_tiled_mma(
        cutlass.Float4E2M1FN, k_major, k_major, cutlass.Float8E4M3FN, 16, cta_group, (m, n)
    )
    tiler = (m, n, 256)
    a = helpers.make_smem_layout_a(tiled, tiler, cutlass.Float4E2M1FN, 2)
    assert str(a.inner) == "S<3,4,3>"
    sfa = block_scaled.make_smem_layout_sfa(tiled, tiler, 16, 2)
    sfb = block_scaled.make_smem_layout_sfb(tiled, tiler, 16, 2)
    one = (None, None, None, 0)
    return {
        "a": a.outer,
        "sfa": sfa,
        "sfb": sfb,
        "tmem_sfa": block_scaled.make_tmem_layout_sfa(tiled, tiler, 16, cute.slice_(sfa, one)),
        "tmem_sfb": block_scaled.make_tmem_layout_sfb(tiled, tiler, 16, cute.slice_(sfb, one)),
    }


SHAPES = [(tcgen05.CtaGroup.ONE, 128, 64), (tcgen05.CtaGroup.ONE, 128, 128), (tcgen05.CtaGroup.TWO, 256, 256)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[1]}x{s[2]}")
def test_codes_in_shared_memory(shape):
    """A[row, k] by CuTe's layout and swizzle is what the matrix descriptor's rules read."""
    found = layouts(lambda: blackwell(*shape))["a"]
    shared = np.zeros(1 << 16, np.uint8)
    rows, marks = 128, np.random.default_rng(0).integers(0, 256, (128, 128)).astype(np.uint8)
    for row in range(rows):
        for byte in range(128):  # of 256 k: instruction byte // 32, element 2 * (byte % 32) of its 64
            element = at(found, row + rows * (2 * (byte % 32)), 0, byte // 32, 0)
            shared[memory.swizzled(np.array(element // 2), 128)] = marks[row, byte]
    for step in range(4):
        descriptor = mma.Descriptor(32 * step, 0, 1024, 128)
        assert (
            mma.read_rows(shared, descriptor, rows, 32, "test") == marks[:, 32 * step : 32 * step + 32]
        ).all()


@pytest.mark.parametrize("operand", ["sfa", "sfb"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[1]}x{s[2]}")
def test_scales_from_shared_to_tensor_memory(shape, operand):
    """Row r's group g: byte r % 32 * 16 + r // 32 * 4 + g of an atom; then lane r % 32, column r // 32, byte g."""
    found = layouts(lambda: blackwell(*shape))
    shared, tensor = found[operand], found[f"tmem_{operand}"]
    rows = 128 if operand == "sfa" else max(128, shape[2])
    for row in range(0, rows, 5):
        for group in range(4):
            inside = row + rows * 16 * group  # of one MMA's rows x 64 k
            for step in range(4):
                # atoms of a row tile's k steps follow each other
                assert at(shared, inside, 0, step, 0) == (
                    row // 128 * 2048 + step * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group
                )
            for copy in range(4):
                # its rows come four times, 32 lanes apart
                address = at(tensor, row + rows * (copy + 4 * 16 * group), 0, 0)
                assert address == (row % 32 + 32 * copy) * 4 * LANE + row // 32 * 4 + group


def test_scales_read_by_the_emulated_tensor_cores():
    tmem = np.zeros((128, 512), np.uint32)
    scales = np.random.default_rng(0).integers(1, 127, (128, 4)).astype(np.uint8)
    for row in range(128):
        for copy in range(4):
            tmem[row % 32 + 32 * copy, 8 + row // 32] = int.from_bytes(scales[row].tobytes(), "little")
    assert (mma._scales(tmem, 8, 128, "test") == mma.E4M3[scales]).all()
    tmem[40, 9] ^= 1
    with pytest.raises(mma.Fault, match="copies"):
        mma._scales(tmem, 8, 128, "test")
