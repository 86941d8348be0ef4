"""Workstation Blackwell's kernels, as compiled, run on the CPU (tests/support/emulator): a tile of every kind.

All tiles' addressing: test_layout.py; the tiles that layers choose: tests/blackwell/test_emulated.py.
"""

from collections.abc import Callable

import pytest
import torch

from cutedsl_nvfp4 import reference
from cutedsl_nvfp4.family import Layout
from cutedsl_nvfp4.prepare import plain_experts, plain_linear, prepare_experts, prepare_linear
from cutedsl_nvfp4.sm120 import experts, linear
from cutedsl_nvfp4.sm120.tiles import LinearTile, general, shipped, shipped_expert_tiles
from tests.support.emulator import device as emulated

on_device = emulated.on_device


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """Two SMs, so that a CTA takes several tiles; work put off as long as the kernels allow."""
    emulated.Device(monkeypatch, 120, sms=2).lazy = frozenset({"tma", "mma", "store"})


def first(wanted: Callable[[LinearTile], bool]) -> LinearTile:
    """Of the shipped tiles the first that is of the wanted kind."""
    return next(tile for tile in shipped() if wanted(tile))


@pytest.mark.parametrize(
    "tile, bias, dtype",
    [
        (first(lambda tile: tile.k_warps > 1), False, torch.bfloat16),
        (first(lambda tile: tile.token_warps > 1 and not tile.moves_registers), False, torch.bfloat16),
        (first(lambda tile: tile.moves_registers), False, torch.float32),
        *((tile, True, torch.float32) for tile in general()),
    ],
    ids=str,
)
def test_linear(random_weight, tile, bias, dtype):
    """Two tiles of rows in two groups, the second ragged as the tokens are; K ends within a block of 64."""
    m, n, k, groups = tile.tokens - 3, tile.rows + 8, tile.k_blocks * 64 + 80, 1 if bias else 2
    n = n - 1 if bias else n * groups
    weight = prepare_linear(
        *random_weight(n, k), torch.tensor([0.01]), [n], layout=Layout.BLOCK_SCALED, groups=groups
    )
    x = torch.randn(m, groups * k, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    offset = torch.linspace(-1, 1, n) if bias else None
    got = linear.run(
        *map(on_device, (x, weight.codes, weight.block_scales, weight.row_scale)), None,
        None if offset is None else on_device(offset), n=n, k=k, groups=groups, out_dtype=dtype, tile=tile,
    )  # fmt: skip
    expected = reference.linear(
        x, *plain_linear(weight), weight.row_scale, None, offset,
        quantize_activations=True, groups=groups, out_dtype=torch.float32,
    )  # fmt: skip
    error = (got.as_subclass(torch.Tensor) - expected).norm() / expected.norm()
    assert got.dtype == dtype and error < (1e-6 if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize("scales", [torch.tensor([0.05]), None], ids=["tensor", "token"])
@pytest.mark.parametrize("tiles", shipped_expert_tiles(), ids=lambda tiles: str(tiles.tokens))
def test_experts(random_weight, tiles, scales):
    """Two experts with a tile that is not full and none; hidden and intermediate sizes end within a block of k."""
    m, hidden, intermediate = tiles.tokens // 2 + 9, 176, 80
    w13, w2 = (
        random_weight(3, 2 * intermediate, hidden, seed=1),
        random_weight(3, hidden, intermediate, seed=2),
    )
    w = prepare_experts(
        *w13, torch.full((3, 2), 0.01), *w2, torch.full((3,), 0.02), layout=Layout.BLOCK_SCALED
    )
    x = torch.randn(m, hidden, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    ids, weights = torch.tensor([[0, 2]]).repeat(m, 1).to(torch.int32), torch.full((m, 2), 0.5)
    ids[0] = torch.tensor([2, -1])
    operands = (
        w.w13_codes, w.w13_block_scales, w.w13_row_scale, w.w2_codes, w.w2_block_scales, w.w2_row_scale, weights, ids,
        None, scales,
    )  # fmt: skip
    options = {"swiglu_limit": 7.0, "out_dtype": torch.float32}
    got = experts.run(
        *(None if t is None else on_device(t) for t in (x, *operands)),
        hidden=hidden, intermediate=intermediate, tiles=tiles, **options,
    ).as_subclass(torch.Tensor)  # fmt: skip
    plain = plain_experts(w)
    expected = reference.experts(
        x, *plain[:2], w.w13_row_scale, *plain[2:], w.w2_row_scale, weights, ids, None, scales,
        quantize_activations=True, **options,
    )  # fmt: skip
    assert got.isfinite().all() and (got - expected).norm() / expected.norm() < 4e-3
