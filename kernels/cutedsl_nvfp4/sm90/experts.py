"""NVFP4 W4A16 mixture of experts on Hopper: four kernels that start before their predecessor has finished.

    route    ids -> slots grouped by expert, table of tiles                       device/routing.py
    w13      h[slot] = swiglu(w1 @ x[m], w3 @ x[m])   bf16 [M * T, I]             experts_{narrow,wide,streaming}.py
    w2       y[pair] = w2 @ h[slot]                   bf16 [M * T, H]             experts_{narrow,wide,streaming}.py
    combine  out[m] = sum_t weights[m, t] * y[m * T + t]                          device/routing.py

Nothing depends on the routing but what the kernels read on the device: no host sync, sizes from M alone, one
CUDA graph for every routing. Keeps family.Experts.
"""

import math
from functools import cache

import torch

from ..family import ExpertsProblem, Kernel, sm_count
from ..operands import TYPE_NAMES, addressable, check_experts_call, check_experts_tensor, experts_result
from . import FAMILY
from .decode import SCALE_BIAS
from .layout import CODE_WORDS, SCALE_WORDS, packed_shape
from .tiles import (
    ExpertTiles,
    LinearTile,
    NarrowTile,
    choose_experts,
    chosen_experts,
    shipped_expert_tiles,
    shipped_experts,
)

TOPKS = (6, 8)  # compiled ahead of time
ROUTE_CTAS = (1, 8)
ROUTED_BY_ONE = 4096  # pairs up to which one CTA is as fast as a cluster


def _check_weights(w13, w2, hidden: int, intermediate: int) -> None:
    """Raise ValueError unless (codes, block scales, row scale) of w13 and w2 come from prepare_experts."""
    experts = w13[0].shape[0]
    for name, (codes, block_scales, row_scale), n, k in (
        ("w13", w13, 2 * intermediate, hidden),
        ("w2", w2, hidden, intermediate),
    ):
        shape = (experts, *packed_shape(n, k))
        check_experts_tensor(f"{name} codes", codes, torch.int64, (*shape, CODE_WORDS))
        check_experts_tensor(f"{name} block scales", block_scales, torch.int32, (*shape, SCALE_WORDS))
        check_experts_tensor(f"{name} row_scale", row_scale, torch.float32, (experts, n))


def run(
    x: torch.Tensor,  # bf16 [M, H]
    w13_codes: torch.Tensor,  # int64 [E, P, KB, 256], rows interleaved
    w13_block_scales: torch.Tensor,  # int32 [E, P, KB, 64]
    w13_row_scale: torch.Tensor,  # f32 [E, 2I], gate rows first
    w2_codes: torch.Tensor,  # int64 [E, P, KB, 256]
    w2_block_scales: torch.Tensor,  # int32 [E, P, KB, 64]
    w2_row_scale: torch.Tensor,  # f32 [E, H]
    topk_weights: torch.Tensor,  # f32 [M, T]
    topk_ids: torch.Tensor,  # int [M, T], global expert ids; others are skipped
    act_scale_13: torch.Tensor | None = None,  # None: activations stay bf16
    act_scale_2: torch.Tensor | None = None,  # None: the intermediate stays bf16
    expert_map: torch.Tensor | None = None,  # int [global experts] -> local id or -1
    *,
    hidden: int,
    intermediate: int,
    swiglu_limit: float | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    batch_invariant: bool = False,
    tiles: ExpertTiles | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mixture of NVFP4 experts -> [M, H] of `out_dtype`, on torch's current stream; see reference.experts.

    Weights come from `prepare_experts` for Layout.SM90. They, row scales, topk_weights, topk_ids and
    expert_map follow the rule of `linear.run`: no kernel that lets its successor start early may write them.
    A pair whose id is negative, unknown or maps to -1 adds nothing. The result is the same in every run; with
    `batch_invariant` a row's does not depend on the other rows. `tiles` overrides the measured choice,
    `out` receives the result instead of new memory. Raises ValueError for operands that do not fit.
    """
    w13, w2 = (w13_codes, w13_block_scales, w13_row_scale), (w2_codes, w2_block_scales, w2_row_scale)
    experts = w13_codes.shape[0]
    if act_scale_13 is not None or act_scale_2 is not None:
        raise ValueError("activation scales must be None: Hopper's kernels multiply bf16 activations (W4A16)")
    check_experts_call(
        x, (*w13, *w2), topk_weights, topk_ids, expert_map, hidden, intermediate, experts, out_dtype
    )
    _check_weights(w13, w2, hidden, intermediate)
    m, topk = topk_ids.shape
    out = experts_result(out, m, hidden, out_dtype, x.device)
    if m == 0:
        return out
    if topk == 0:
        return out.zero_()
    x = addressable(x)
    ids = topk_ids.to(torch.int32).contiguous().view(-1)
    weights = topk_weights.to(torch.float32).contiguous().view(-1)
    local_of = ids if expert_map is None else expert_map.to(torch.int32).contiguous()
    pairs = m * topk
    if tiles is None:
        num_global_experts = experts if expert_map is None else expert_map.shape[0]
        tiles = choose_experts(hidden, intermediate, pairs, experts, num_global_experts, batch_invariant)

    def scratch(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    pair_of_slot = scratch(pairs, dtype=torch.int32)
    table = scratch(1 + tiles.most_tiles(pairs, experts), 4, dtype=torch.int32)
    h = scratch(pairs, intermediate, dtype=torch.bfloat16)
    y = scratch(pairs, hidden, dtype=torch.bfloat16)
    local = (int(expert_map is not None), experts)
    route = _route(ROUTE_CTAS[pairs > ROUTED_BY_ONE]).load()
    route(ids, local_of, pair_of_slot, table, *local, tiles.tokens, tiles.step)
    limit = math.inf if swiglu_limit is None else swiglu_limit
    for tile, activated, source, operands, target in (
        (tiles.w13, True, x, w13, h),
        (tiles.w2, False, h, w2, y),
    ):
        numbers = (topk, limit, SCALE_BIAS, sm_count(x.device) * tile.ctas_per_sm)
        _product(tile, activated).load()(source, *operands, pair_of_slot, table, target, *numbers)
    _combine(topk, out_dtype).load()(y, ids, local_of, weights, out, *local)
    return out


def chosen(problem: ExpertsProblem, max_tokens: int, batch_invariant: bool) -> dict[ExpertTiles, int]:
    """Every pair of tiles that `run` takes for 1 .. max_tokens tokens, each with the fewest that take it."""
    return chosen_experts(
        problem.hidden, problem.intermediate, problem.topk, problem.num_local_experts, problem.num_global_experts,
        max_tokens, batch_invariant,
    )  # fmt: skip


def kernels(problem: ExpertsProblem, tiles: ExpertTiles, arch: str) -> list[Kernel]:
    """The kernels that `run` launches with `tiles`; of the routing both, which the number of tokens decides on."""
    return [
        *map(_route, ROUTE_CTAS),
        _product(tiles.w13, True),
        _product(tiles.w2, False),
        _combine(problem.topk, problem.out_dtype),
    ]


@cache
def shipped(arch: str) -> dict[str, Kernel]:
    """{name: kernel} of everything that a served model's `run` can ask for."""
    found = [
        *map(_route, ROUTE_CTAS),
        *(_product(tile, activated) for tile, activated in shipped_experts()),
        *(_combine(topk, dtype) for topk in TOPKS for dtype in TYPE_NAMES),
    ]
    return {kernel.name: kernel for kernel in found}


@cache
def choices() -> dict[str, ExpertTiles]:
    """{name: tiles} of every pair of tiles that a served model's `run` can take."""
    return {_choice_name(tiles): tiles for tiles in shipped_expert_tiles()}


def _choice_name(tiles: ExpertTiles) -> str:
    return f"{_product(tiles.w13, True).name} with {_product(tiles.w2, False).name}"


@cache
def _route(ctas: int) -> Kernel:
    return Kernel(f"nvfp4_experts_sm90_route_{ctas}", "sm90.compile", "route", (ctas,))


@cache
def _product(tile: LinearTile, activated: bool) -> Kernel:
    matrix, width = "w13" if activated else "w2", "narrow" if isinstance(tile, NarrowTile) else "wide"
    numbers = "_".join(str(int(value)) for value in vars(tile).values())
    name = f"nvfp4_experts_sm90_{matrix}_{width}_{numbers}"
    return Kernel(name, "sm90.compile", "product", (tile, activated), tile)


@cache
def _combine(topk: int, out_dtype: torch.dtype) -> Kernel:
    name = f"nvfp4_experts_sm90_combine_{topk}_{TYPE_NAMES[out_dtype]}"
    return Kernel(name, "device.compile", "combine", (topk, out_dtype, FAMILY.architectures[0]))
