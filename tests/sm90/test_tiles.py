"""The host's part of the Hopper experts: which tiles, how many of them, and weights where the kernels read them."""

import pytest
import torch

from cutedsl_nvfp4.family import ExpertsProblem, Layout
from cutedsl_nvfp4.prepare import prepare_experts
from cutedsl_nvfp4.sm90 import experts
from cutedsl_nvfp4.sm90.layout import interleave_gate_up, pack_experts, pack_linear
from cutedsl_nvfp4.sm90.tiles import (
    ExpertTiles,
    NarrowTile,
    WideTile,
    choose_experts,
    expert_widths,
    shipped_experts,
)

LAYERS = [
    (256, 256, 4096, 2048),
    (384, 384, 7168, 384),
    (48, 384, 7168, 3072),
    (8, 8, 1024, 512),
    (1, 64, 80, 48),
]


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_every_choice_is_legal_and_shipped(layer, batch_invariant):
    local, known, hidden, intermediate = layer
    for m in (*range(1, 70), 255, 256, 1000, 4096, 16384):
        for topk in (1, 6, 8):
            tiles = choose_experts(hidden, intermediate, m * topk, local, known, batch_invariant)
            tiles.check()
            assert {(tiles.w13, True), (tiles.w2, False)} <= set(shipped_experts())
            problem = ExpertsProblem(hidden, intermediate, topk, local, known)
            kernels = experts.kernels(problem, tiles, "sm_90a")
            products = {kernel.name for kernel in kernels if kernel.kind == "product"}
            assert len(products) == 2 and products <= set(experts.shipped("sm_90a"))


def test_batch_invariant_tiles_add_in_one_order():
    """No split of K: a row's sums run over ascending k whatever the batch."""
    for m in (1, 5, 40, 300, 5000):
        tiles = choose_experts(4096, 2048, 6 * m, 256, 256, True)
        assert isinstance(tiles.w13, WideTile) and tiles.w13 == tiles.w2 and tiles.w13.split_k == 1


@pytest.mark.parametrize("tokens", [8, 16, 96])
def test_no_routing_needs_more_tiles_than_there_is_room_for(tokens):
    tiles = ExpertTiles(NarrowTile(tokens), NarrowTile(tokens))
    generator = torch.Generator().manual_seed(tokens)
    for pairs, local in ((1, 1), (6, 256), (97, 3), (960, 7), (5000, 48)):
        most = tiles.most_tiles(pairs, local)
        for _ in range(20):
            weights = torch.rand(local, generator=generator) ** 8 + 1e-9  # from even to one expert only
            counts = torch.bincount(torch.multinomial(weights, pairs, True, generator=generator))
            assert int((-(-counts // tokens)).sum()) <= most
        used = min(local, pairs)  # the worst: one slot each, the rest of them whole tiles and one slot
        rest = pairs - used
        worst = used + rest // tokens
        assert worst <= most <= worst + used


def test_widths_end_at_the_tile_and_are_whole_chunks():
    for tile, first in shipped_experts():
        if isinstance(tile, WideTile):
            widths = expert_widths(tile)
            assert widths[-1] == tile.tokens and list(widths) == sorted(set(widths)), first
            assert all(width % 32 == 0 for width in widths)


@pytest.mark.parametrize(
    "tiles",
    [
        ExpertTiles(NarrowTile(8), NarrowTile(16)),
        ExpertTiles(NarrowTile(8, split_k=8), NarrowTile(8)),
        ExpertTiles(WideTile(2, 64, split_k=2), WideTile(2, 64)),
        ExpertTiles(WideTile(2, 16), WideTile(2, 16)),
        ExpertTiles(WideTile(2, 64, persistent=True, multicast=2), WideTile(2, 64)),
        ExpertTiles(WideTile(3, 64), WideTile(2, 64)),
        ExpertTiles(WideTile(2, 64), WideTile(2, 64, bulk=True)),
        ExpertTiles(WideTile(2, 64), WideTile(2, 64, persistent=True, tail=32)),
        ExpertTiles(NarrowTile(8, split_k=2, signal=True), NarrowTile(8)),
    ],
    ids=str,
)
def test_illegal_tiles_are_refused(tiles):
    with pytest.raises(ValueError, match=r"Narrow|WideTile"):
        tiles.check()


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (WideTile(3, 64), "panels of an experts' tile must be 1 or 2 or 4, got 3"),
        (WideTile(2, 64, split_k=2), "split_k of an experts' tile must be 1, got 2"),
        (WideTile(2, 16), r"tokens of an experts' tile must be 32 or .* or 256, got 16"),
        (NarrowTile(8, split_k=2, signal=True), "signal of an experts' tile must be False, got True"),
    ],
    ids=str,
)
def test_a_refusal_names_the_field(wrong, reason):
    with pytest.raises(ValueError, match=reason):
        ExpertTiles(wrong, wrong).check()


def random_weight(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    *rows, k = shape
    codes = torch.randint(0, 256, (*rows, k // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 127, (*rows, k // 16), dtype=torch.uint8, generator=generator)
    return codes, scales.view(torch.float8_e4m3fn)


def test_gate_and_up_rows_alternate_in_eights():
    rows = torch.arange(64, dtype=torch.uint8).view(1, 64, 1)
    got = interleave_gate_up(rows)[0, :, 0].tolist()
    expected = [half * 32 + 8 * block + r for block in range(4) for half in (0, 1) for r in range(8)]
    assert got == expected
    with pytest.raises(ValueError, match="multiple of 8"):
        interleave_gate_up(torch.zeros(1, 24, 1, dtype=torch.uint8))


@pytest.mark.parametrize("gate_up", [True, False])
@pytest.mark.parametrize(
    "shape", [(3, 128, 64), (130, 64, 64), (2, 512, 192), (2, 96, 80), (1, 32, 48)], ids=str
)
def test_experts_are_packed_like_single_ones(shape, gate_up):
    codes, scales = random_weight(*shape)
    expected = [
        pack_linear(*(interleave_gate_up(t[e]) if gate_up else t[e] for t in (codes, scales)))
        for e in range(shape[0])
    ]
    storage = codes.data_ptr()
    packed = pack_experts(codes, scales, gate_up)
    for expert, single in enumerate(expected):
        assert all(torch.equal(p[expert], s) for p, s in zip(packed, single, strict=True)), expert
    whole = shape[1] % 64 == 0 and shape[2] % 64 == 0
    assert (packed[0].data_ptr() == storage) == whole


def test_prepared_experts_are_the_kernels_operands():
    w13, w2 = random_weight(4, 128, 128), random_weight(4, 128, 64)
    expected = pack_experts(*(t.clone() for t in w13), gate_up=True)
    prepared = prepare_experts(
        *(t.clone() for t in w13), torch.rand(4, 2) + 0.1, *(t.clone() for t in w2), torch.rand(4) + 0.1,
        layout=Layout.SM90,
    )  # fmt: skip
    assert torch.equal(prepared.w13_codes, expected[0])
    assert torch.equal(prepared.w13_block_scales, expected[1])
    assert prepared.w2_codes.shape == (4, 2, 1, 256) and prepared.w2_codes.dtype == torch.int64
    assert prepared.w13_row_scale.shape == (4, 128) and prepared.layout is Layout.SM90


def test_run_refuses_operands_on_the_cpu():
    w13, w2 = random_weight(2, 64, 64), random_weight(2, 64, 32)
    prepared = prepare_experts(
        *w13, torch.ones(2, 2), *w2, torch.ones(2), layout=Layout.SM90,
    )  # fmt: skip
    with pytest.raises(ValueError, match="on a CUDA device, got cpu"):
        experts.run(
            torch.zeros(1, 64, dtype=torch.bfloat16), prepared.w13_codes, prepared.w13_block_scales,
            prepared.w13_row_scale, prepared.w2_codes, prepared.w2_block_scales, prepared.w2_row_scale,
            torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32), hidden=64, intermediate=32,
        )  # fmt: skip
