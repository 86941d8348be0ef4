"""Blackwell's experts without the chip: host path with kernels emulated in torch, layouts, machine code."""

from dataclasses import replace

import pytest
import torch

from cutedsl_nvfp4 import reference
from cutedsl_nvfp4.format import swizzle_scales
from cutedsl_nvfp4.sm100.tiles import (
    ExpertTiles,
    GroupedTile,
    choose_experts,
    chosen_experts,
    shipped_expert_tiles,
)
from tests.support.blackwell_experts import SCALES, both, emulate, layer, routing, write

SMALL = ExpertTiles(GroupedTile(16, 2), GroupedTile(16, 2, panels=1))


@pytest.fixture
def launched(monkeypatch):
    """`experts.run` on CPU tensors, with kernels emulated; the list of (kind, arguments) that it launched."""
    return emulate(monkeypatch, 100)


@pytest.mark.parametrize("policy", SCALES)
@pytest.mark.parametrize("m, topk, tokens", [(1, 3, 16), (70, 3, 16), (200, 4, 192)])
def test_host_path_is_the_reference(random_weight, launched, policy, m, topk, tokens):
    x = torch.randn(m, 256, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    tiles = ExpertTiles(
        GroupedTile(tokens, 2, ctas_per_mma=1 + tokens // 192),
        GroupedTile(tokens, 2, ctas_per_mma=1 + tokens // 192),
    )
    got, expected = both(layer(random_weight), x, *routing(m, topk, 5), SCALES[policy], tiles=tiles)
    assert got.isfinite().all()
    error = (got - expected).norm() / expected.norm()
    assert error < 4e-3, error  # y in bf16
    kinds = [call[0] for call in launched]
    dynamic = ["gather"] if SCALES[policy][1] is None else []
    assert kinds == ["route", "gather", "product", *dynamic, "product", "combine"]


def test_experts_elsewhere_add_nothing(random_weight, launched):
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    expert_map = torch.tensor([-1, 3, 0, -1, 4, 1, -1, 2])
    weights, ids = routing(40, 6, 8)
    ids[3], ids[4, 2], ids[5, 1] = -1, 8, 1000
    got, expected = both(layer(random_weight), x, weights, ids, SCALES["tensor"], expert_map, SMALL)
    assert got.isfinite().all() and not got[3].any()
    assert (got - expected).norm() / expected.norm() < 4e-3
    none = torch.full_like(expert_map, -1)
    got, _ = both(layer(random_weight), x, weights, ids, SCALES["token"], none, SMALL)
    assert not got.any()


def test_no_token_and_no_choice(random_weight, launched):
    x = torch.randn(4, 256).to(torch.bfloat16)
    got, _ = both(layer(random_weight), x[:0], torch.ones(0, 3), torch.zeros(0, 3).int(), SCALES["tensor"])
    assert got.shape == (0, 256)
    got, _ = both(layer(random_weight), x, torch.ones(4, 0), torch.zeros(4, 0).int(), SCALES["tensor"])
    assert got.shape == (4, 256) and not got.any() and not launched


# --- the layouts that the compiled kernels take their addresses from ---

TILES = dict.fromkeys(tile for tiles in shipped_expert_tiles() for tile in (tiles.w13, tiles.w2))


def evaluated(function):
    """`function()` inside a CuTe DSL context: layouts it makes are those of a compilation for sm_100a."""
    import cutlass.cute as cute

    found = []

    @cute.jit
    def trace():
        found.append(function(cute))

    cute.compile(trace, options="--gpu-arch sm_100a")
    return found[0]


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_shared_memory_of_a_stage(tile):
    """Codes in rows of 128 bytes with 16-byte pieces swizzled, scales in 128x4 atoms, panels and stages apart."""
    from cutedsl_nvfp4.sm100.experts_kernel import ExpertsKernel, Result

    lines = [0, 1, 7, 8, 31, 127]
    ks = [0, 1, 31, 32, 63, 64, 130, 255]

    def offsets(cute):
        found = ExpertsKernel(tile, Result.ROWS).layouts()
        codes, scales = {}, {}
        for name, layout, rows in (
            ("w", found.weights, 128),
            ("t", found.tokens, tile.tokens // tile.ctas_per_mma),
        ):
            for line in (line for line in lines if line < rows):
                for k in ks:
                    codes[name, line, k] = layout.outer(((line, k % 64), 0, k // 64, 1))
        for name, layout, atoms in (
            ("w", found.weight_scales, 1),
            ("t", found.token_scales, tile.scale_atoms),
        ):
            for line in (line + 128 * atom for line in lines for atom in range(atoms)):
                for k in ks:
                    row, column = ((line % 32, line // 32 % 4), line // 128), (k % 16, k % 64 // 16)
                    scales[name, line, k] = layout(((row, column), 0, k // 64, 1))
        return codes, scales, {str(found.weights.inner), str(found.tokens.inner)}

    codes, scales, swizzles = evaluated(offsets)
    assert swizzles == {"S<3,4,3>"}  # of byte addresses: bits 4..6 take bits 7..9
    bytes_of = {"w": 128 * 128, "t": tile.tokens // tile.ctas_per_mma * 128}
    for (name, line, k), offset in codes.items():
        at = offset // 2 - bytes_of[name]
        at ^= (at >> 7 & 7) << 4
        assert (at, offset % 2) == (line * 128 + ((k // 32) ^ line % 8) * 16 + k % 32 // 2, k % 2)
    for (name, line, k), offset in scales.items():
        atoms = 1 if name == "w" else tile.scale_atoms
        assert (
            offset
            == atoms * 2048
            + (line // 128 * 4 + k // 64) * 512
            + line % 32 * 16
            + line % 128 // 32 * 4
            + k % 64 // 16
        )


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_a_thread_reads_its_lane(tile):
    from cutedsl_nvfp4.sm100.experts_kernel import ExpertsKernel, Result

    def offsets(cute):
        kernel = ExpertsKernel(tile, Result.ROWS)
        mma = kernel.layouts().mma
        shape = cute.append(mma.partition_shape_C(kernel.mma_tile[:2]), tile.panels * tile.accumulator_stages)
        sums = mma.make_fragment_C(shape)
        values = {
            thread: [kernel.accumulator_load(sums, thread)[2][j] for j in range(tile.chunk)]
            for thread in (0, 1, 31, 32, 127)
        }
        view = kernel.accumulator_load(sums, 0)[1].layout
        buffers = range(tile.panels * tile.accumulator_stages)
        columns = {
            (chunk, buffer): view((0, 0, 0, 0, chunk, buffer))
            for chunk in range(tile.tokens // tile.chunk)
            for buffer in buffers
        }
        return values, columns

    values, columns = evaluated(offsets)
    for thread, found in values.items():
        assert found == [(thread, column) for column in range(tile.chunk)]
    for (chunk, buffer), column in columns.items():
        assert column == buffer * tile.tokens + chunk * tile.chunk
    assert max(columns.values()) + tile.chunk + tile.scale_columns <= 512


@pytest.mark.parametrize("activated", [True, False])
def test_operands_as_tma_reads_them(random_weight, activated):
    """Where TMA's view of every code and block scale lies is where prepare_experts and `write` put it."""
    from cutedsl_nvfp4.sm100.experts_kernel import ExpertsKernel, Result

    experts_, hidden, intermediate, tokens = 3, 320, 160, 192
    tile, result = GroupedTile(tokens, 2, ctas_per_mma=2), Result.NVFP4 if activated else Result.ROWS
    n, k = (2 * intermediate, hidden) if activated else (hidden, intermediate)
    matrices = 2 if activated else 1
    points = [
        (row, column, expert * matrices + part)
        for row in (0, 1, 33, 127, 128, n // matrices - 1)
        for column in (0, 17, 63, 64, k - 1)
        for expert in range(experts_)
        for part in range(matrices)
    ]
    slots = [(slot, column) for slot in (0, 5, 130, 191, 192, 192 + 140) for column in (0, 16, 64, k - 1)]

    blocks = -(-k // 64)
    tiles = matrices * -(-n // matrices // 128)

    def offsets(cute):
        weights, codes, weight_scales, scales = ExpertsKernel(tile, result).operand_layouts(
            (experts_, n, k // 2),
            (experts_, tiles, blocks, 32, 16),
            (2 * tokens, k // 2),
            (4, blocks, 32, 16),
        )

        def scale_at(layout, row, column, matrix):
            return layout(
                (
                    ((row % 32, row // 32 % 4), row // 128),
                    ((column % 16, column // 16 % 4), column // 64),
                    matrix,
                )
            )

        return (
            [(weights(point), scale_at(weight_scales, *point)) for point in points],
            [
                (codes((slot, column, 0)), scale_at(scales, slot // tokens * 256 + slot % tokens, column, 0))
                for slot, column in slots
            ],
        )

    of_weights, of_slots = evaluated(offsets)
    _, block_scales = random_weight(experts_, n, k)
    prepared = swizzle_scales(block_scales.view(experts_ * matrices, n // matrices, -1))
    for (row, column, matrix), (code, scale) in zip(points, of_weights, strict=True):
        row += matrix % matrices * (n // matrices)
        expert = matrix // matrices
        assert code == (expert * n + row) * k + column
        assert prepared.flatten()[scale] == block_scales.view(torch.uint8)[expert, row, column // 16]
    written = torch.zeros(4, blocks, 32, 16, dtype=torch.uint8)
    rounded = reference.quantize(torch.randn(2 * tokens, k), torch.tensor(0.01))
    write(
        torch.arange(2 * tokens), rounded, torch.empty(2 * tokens, k // 2, dtype=torch.uint8), written, tokens
    )
    for (slot, column), (code, scale) in zip(slots, of_slots, strict=True):
        assert code == slot * k + column
        assert written.flatten()[scale] == rounded[1].view(torch.uint8)[slot, column // 16]


# --- compiled for both chips, without one ---


# --- which tile ---


def test_every_choice_is_shipped_and_legal():
    for tiles in shipped_expert_tiles():
        tiles.check()
    for known in (8, 32, 256, 384):
        for topk in (6, 8):
            for m in (1, 2, 7, 64, 500, 8192, 65536):
                assert choose_experts(m * topk, known) in shipped_expert_tiles()
            chosen = chosen_experts(topk, known, 8192)
            assert all(choose_experts(m * topk, known) == tiles for tiles, m in chosen.items())


@pytest.mark.parametrize(
    "tile, reason",
    [
        (GroupedTile(24), "multiple of"),
        (GroupedTile(288, 2), "up to 256"),
        (GroupedTile(256, 2), "columns of tensor memory"),
        (GroupedTile(64, 1), "at least 2 stages"),
        (GroupedTile(128, 5), "bytes of shared memory"),
        (GroupedTile(16, ctas_per_mma=2), "for each of ctas_per_mma"),
        (GroupedTile(16, panels=3), "must be 1 or 2"),
    ],
    ids=str,
)
def test_illegal_tiles_are_refused(tile, reason):
    with pytest.raises(ValueError, match=reason):
        tile.check()


def test_tiles_of_the_worst_routing():
    tiles = shipped_expert_tiles()[0]
    assert tiles.most_tiles(6, 256) == 6 and tiles.most_tiles(48, 3) == 5
    assert tiles.most_tiles(48, 1) == 3
    for pairs, count in ((1, 1), (17, 2), (100, 7), (33, 64)):
        worst = max(
            sum(-(-share // 16) for share in shares)
            for shares in ([pairs - other, other] + [0] * (count - 2) for other in range(pairs + 1))
            if count > 1
        ) if count > 1 else -(-pairs // 16)  # fmt: skip
        assert worst <= tiles.most_tiles(pairs, count)


def test_operands_that_do_not_fit_are_refused(random_weight, launched):
    operands = layer(random_weight)
    x, (weights, ids) = torch.zeros(4, 256, dtype=torch.bfloat16), routing(4, 3, 5)
    good = (operands, x, weights, ids, SCALES["tensor"])
    for position, bad, reason in (
        (1, x.float(), "x must be bf16"),
        (2, weights[:2], r"must be \[4, T\]"),
        (4, (torch.ones(3), None), "act_scale_13 must be f32"),
        (4, (None, torch.ones(1).double()), "act_scale_2 must be f32"),
    ):
        arguments = list(good)
        arguments[position] = bad
        with pytest.raises(ValueError, match=reason):
            both(*arguments)
    for name, bad, reason in (
        ("w13_codes", operands.w13_codes[..., :-16], "w13 codes must be contiguous uint8"),
        ("w2_block_scales", operands.w2_block_scales.int(), "w2 block scales must be contiguous uint8"),
        ("w2_row_scale", operands.w2_row_scale.double(), "w2 row_scale must be contiguous float32"),
    ):
        with pytest.raises(ValueError, match=reason):
            both(replace(operands, **{name: bad}), *good[1:])
