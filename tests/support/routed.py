"""Hopper's routing kernel against torch, wherever it runs: on a GPU, or emulated."""

from collections.abc import Callable

import torch

EXPERTS, KNOWN, TOKENS = 48, 384, 96
EMPTY = -9  # what was there before


def check_route(route: Callable, pairs: int, mapped: bool, step: int, device: str = "cpu") -> None:
    """Every pair of a local expert has one slot, slots are grouped by expert, tiles cover them evenly."""
    generator = torch.Generator(device).manual_seed(pairs)

    def filled(*shape: int, value: int) -> torch.Tensor:
        return torch.full(shape, value, dtype=torch.int32, device=device)

    expert_map = filled(KNOWN, value=-1)
    expert_map[torch.randperm(KNOWN, device=device, generator=generator)[:EXPERTS]] = torch.arange(
        EXPERTS, dtype=torch.int32, device=device
    )
    ids = torch.randint(-2, 400, (pairs,), dtype=torch.int32, device=device, generator=generator)
    hot = int(expert_map.argmax()) if mapped else 17  # a local one, that many tokens take
    ids[torch.rand(pairs, device=device, generator=generator) < 0.3] = hot
    known = (ids >= 0) & (ids < (KNOWN if mapped else EXPERTS))
    local = torch.where(known, expert_map[ids.clamp(0, KNOWN - 1).long()] if mapped else ids, -1)
    slots = filled(pairs, value=EMPTY)
    table = filled(1 + pairs // TOKENS + EXPERTS, 4, value=EMPTY)
    route(ids, expert_map, slots, table, int(mapped), EXPERTS, TOKENS, step)
    tiles, used = table[0, :2].tolist()
    counts = torch.bincount(local[local >= 0], minlength=EXPERTS)
    of_expert = -(-counts // TOKENS)
    assert used == counts.sum() and tiles == of_expert.sum()
    pair = slots[:used].long()
    assert torch.equal(pair.sort().values, (local >= 0).nonzero()[:, 0])
    every = torch.arange(EXPERTS, device=device)
    assert torch.equal(local[pair].long(), every.repeat_interleave(counts))
    assert bool((slots[used:] == EMPTY).all()) and bool((table[1 + tiles :] == EMPTY).all())
    expert, first, size = table[1 : 1 + tiles, :3].long().unbind(1)
    assert torch.equal(expert, every.repeat_interleave(of_expert))
    assert torch.equal(first, size.cumsum(0) - size)
    assert torch.equal(torch.zeros_like(counts).index_add_(0, expert, size), counts)
    for sizes in size.split(of_expert.tolist()):
        assert len(sizes) == 0 or (sizes.min() > 0 and sizes.max() <= TOKENS)
        assert len(sizes) == 0 or sizes.max() - sizes.min() < 2 * step
        assert bool((sizes[:-1] % step == 0).all())
