"""The routing of Hopper's experts, as compiled, run on the CPU (tests/gpu_emulator)."""

import pytest
import torch
from gpu_emulator.host import EmulatedKernel

from cutedsl_nvfp4.sm90.compile import compile_route
from cutedsl_nvfp4.sm90.experts import ROUTE_CTAS

EXPERTS, KNOWN, TOKENS = 48, 384, 96
EMPTY = -9  # what was there before


@pytest.fixture(scope="module", params=ROUTE_CTAS)
def route(request) -> EmulatedKernel:
    return EmulatedKernel(lambda: compile_route(request.param))


@pytest.mark.parametrize("pairs, mapped, step", [(1, False, 32), (777, True, 32), (3000, False, 96)])
def test_every_local_pair_has_a_slot_and_tiles_are_even(route, pairs, mapped, step):
    generator = torch.Generator().manual_seed(pairs)
    expert_map = torch.full((KNOWN,), -1, dtype=torch.int32)
    expert_map[torch.randperm(KNOWN, generator=generator)[:EXPERTS]] = torch.arange(
        EXPERTS, dtype=torch.int32
    )
    ids = torch.randint(-2, 400, (pairs,), dtype=torch.int32, generator=generator)
    ids[torch.rand(pairs, generator=generator) < 0.3] = 17  # one that many tokens take
    known = (ids >= 0) & (ids < (KNOWN if mapped else EXPERTS))
    local = torch.where(known, expert_map[ids.clamp(0, KNOWN - 1).long()] if mapped else ids, -1)
    slots = torch.full((pairs,), EMPTY, dtype=torch.int32)
    table = torch.full((1 + pairs // TOKENS + EXPERTS, 4), EMPTY, dtype=torch.int32)
    route(ids, expert_map, slots, table, int(mapped), EXPERTS, TOKENS, step)
    tiles, used = table[0, :2].tolist()
    counts = torch.bincount(local[local >= 0], minlength=EXPERTS)
    of_expert = -(-counts // TOKENS)
    assert used == counts.sum() and tiles == of_expert.sum()
    pair = slots[:used].long()
    assert torch.equal(pair.sort().values, (local >= 0).nonzero()[:, 0])
    assert torch.equal(local[pair], torch.arange(EXPERTS, dtype=torch.int32).repeat_interleave(counts))
    assert bool((slots[used:] == EMPTY).all()) and bool((table[1 + tiles :] == EMPTY).all())
    expert, first, size = table[1 : 1 + tiles, :3].long().unbind(1)
    assert torch.equal(expert, torch.arange(EXPERTS).repeat_interleave(of_expert))
    assert torch.equal(first, size.cumsum(0) - size)
    assert torch.equal(torch.zeros_like(counts).index_add_(0, expert, size), counts)
    for sizes in size.split(of_expert.tolist()):
        assert len(sizes) == 0 or (sizes.min() > 0 and sizes.max() <= TOKENS)
        assert len(sizes) == 0 or sizes.max() - sizes.min() < 2 * step
