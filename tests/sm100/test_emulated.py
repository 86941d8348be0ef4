"""Every tile of Blackwell's experts, as compiled, run on the CPU (tests/support/emulator)."""

import pytest
import torch

from cutedsl_nvfp4.sm100.tiles import shipped_expert_tiles
from tests.support.blackwell_experts import SCALES, both, layer, routing
from tests.support.emulator import device


@pytest.mark.parametrize("policy", ["mixed", "token"])
@pytest.mark.parametrize("tiles", shipped_expert_tiles(), ids=lambda tiles: str(tiles.w13))
def test_every_tile(monkeypatch, random_weight, tiles, policy):
    """Two tiles of slots, the second not full; ragged rows and K; work put off as long as the kernels allow."""
    device.Device(monkeypatch, 100, sms=2).lazy = frozenset({"tma", "mma", "store"})
    m, hidden, intermediate = tiles.tokens + 9, 336, 80
    x = torch.randn(m, hidden, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    operands = layer(random_weight, 1, hidden, intermediate)
    weights, ids = routing(m, 1, 1)
    got, expected = both(operands, x, weights, ids, SCALES[policy], tiles=tiles, place=device.on_device)
    got = got.as_subclass(torch.Tensor)
    assert got.isfinite().all()
    assert (got - expected).norm() / expected.norm() < 4e-3
