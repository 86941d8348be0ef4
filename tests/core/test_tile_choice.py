"""The tiles that the self-check is told of are all the tiles that serving can take."""

from functools import partial

import pytest

from bench.shapes import EXPERT_CASES, model_shapes
from cutedsl_nvfp4.sm90 import tiles
from cutedsl_nvfp4.sm100 import tiles as tiles100
from cutedsl_nvfp4.sm120 import tiles as tiles120

MAX_TOKENS = 8192

# {family: (choose(n, k, m, groups), chosen(n, k, groups, max_tokens))}
LINEAR = {
    "sm90": (
        lambda n, k, m, groups: tiles.choose(n, k, m, groups, False),
        partial(tiles.chosen, batch_invariant=False),
    ),
    "sm90 batch invariant": (
        lambda n, k, m, groups: tiles.choose(n, k, m, groups, True),
        partial(tiles.chosen, batch_invariant=True),
    ),
    "sm90 with a bias": (
        lambda n, k, m, groups: tiles.choose(n, k, m, groups, False, False),
        partial(tiles.chosen, batch_invariant=False, plain=False),
    ),
    "sm100": (tiles100.choose, tiles100.chosen),
    "sm120": (tiles120.choose, tiles120.chosen),
    "sm120 with a bias": (partial(tiles120.choose, plain=False), partial(tiles120.chosen, plain=False)),
}


@pytest.mark.parametrize("family", LINEAR)
@pytest.mark.parametrize("shape", model_shapes(), ids=lambda shape: shape.name)
def test_every_tile_that_a_linear_layer_can_take_is_listed(family, shape):
    choose, chosen = LINEAR[family]
    taken = {choose(shape.n, shape.k, m, shape.groups) for m in range(1, MAX_TOKENS + 1)}
    listed = chosen(shape.n, shape.k, shape.groups, MAX_TOKENS)
    assert set(listed) == taken
    assert all(choose(shape.n, shape.k, m, shape.groups) == tile for tile, m in listed.items())


def _sm90_experts(case, batch_invariant):
    local = case.experts, case.known

    def choose(m):
        return tiles.choose_experts(case.hidden, case.intermediate, m * case.topk, *local, batch_invariant)

    return choose, tiles.chosen_experts(
        case.hidden, case.intermediate, case.topk, *local, MAX_TOKENS, batch_invariant
    )


def _blackwell_experts(module, case):
    return lambda m: module.choose_experts(m * case.topk, case.known), module.chosen_experts(
        case.topk, case.known, MAX_TOKENS
    )


EXPERTS = {
    "sm90": partial(_sm90_experts, batch_invariant=False),
    "sm90 batch invariant": partial(_sm90_experts, batch_invariant=True),
    "sm100": partial(_blackwell_experts, tiles100),
    "sm120": partial(_blackwell_experts, tiles120),
}


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("case", EXPERT_CASES, ids=lambda case: case.name)
def test_every_choice_that_an_experts_layer_can_take_is_listed(family, case):
    choose, listed = EXPERTS[family](case)
    assert set(listed) == {choose(m) for m in range(1, MAX_TOKENS + 1)}
    assert all(choose(m) == found for found, m in listed.items())


def test_tiles_between_two_powers_of_two_are_listed():
    """Taken for 513 to 576 tokens alone: a list of powers of two, or of their halves, does not hold it."""
    tile = tiles100.choose(2048, 7168, 540)
    assert all(tiles100.choose(2048, 7168, m) != tile for m in (256, 362, 512, 724, 1024))
    assert tiles100.chosen(2048, 7168, 1, MAX_TOKENS)[tile] == 513
