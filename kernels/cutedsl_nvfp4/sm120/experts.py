"""NVFP4 W4A4 mixture of experts on workstation Blackwell: blackwell/experts.py with products of experts_kernel.py.

Keeps family.Experts.
"""

from functools import cache, partial

import torch

from ..blackwell import experts
from ..family import ExpertsProblem, Kernel
from .tiles import ExpertTiles, choose_experts, chosen_experts, shipped_expert_tiles

_product = cache(partial(experts.product_kernel, "sm120.compile"))


def run(
    x: torch.Tensor,  # bf16 [M, H]
    w13_codes: torch.Tensor,  # uint8 [E, 2I, H'/2], gate rows first; H' = H rounded up to 32
    w13_block_scales: torch.Tensor,  # uint8 [E, 2 * ceil(I/128), ceil(H/64), 32, 16], gate's tiles first
    w13_row_scale: torch.Tensor,  # f32 [E, 2I]
    w2_codes: torch.Tensor,  # uint8 [E, H, I'/2]
    w2_block_scales: torch.Tensor,  # uint8 [E, ceil(H/128), ceil(I/64), 32, 16]
    w2_row_scale: torch.Tensor,  # f32 [E, H]
    topk_weights: torch.Tensor,  # f32 [M, T]
    topk_ids: torch.Tensor,  # int [M, T], global expert ids; others are skipped
    act_scale_13: torch.Tensor | None = None,  # f32 [1] or [E]; None: per token
    act_scale_2: torch.Tensor | None = None,  # f32 [1] or [E]; None: per pair
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
    """Mixture of NVFP4 experts -> [M, H] of `out_dtype`, W4A4, on torch's current stream; see reference.experts.

    Weights come from `prepare_experts` for Layout.BLOCK_SCALED. They, row scales, activation scales,
    topk_weights, topk_ids and expert_map follow the rule of `linear.run`: no kernel that lets its
    successor start early may write them. A pair whose id is negative, unknown or maps to -1 adds nothing. The
    result is the same in every run. `tiles` overrides the choice, `out` receives the result instead of
    new memory. Raises ValueError for operands that do not fit.
    """
    return experts.run(
        x, (w13_codes, w13_block_scales, w13_row_scale), (w2_codes, w2_block_scales, w2_row_scale),
        topk_weights, topk_ids, (act_scale_13, act_scale_2), expert_map,
        hidden=hidden, intermediate=intermediate, swiglu_limit=swiglu_limit, out_dtype=out_dtype,
        batch_invariant=batch_invariant, choose=choose_experts if tiles is None else lambda *_: tiles,
        product=_product, out=out,
    )  # fmt: skip


def chosen(problem: ExpertsProblem, max_tokens: int, batch_invariant: bool) -> dict[ExpertTiles, int]:
    """Every pair of tiles that `run` takes for 1 .. max_tokens tokens, each with the fewest that take it."""
    return chosen_experts(problem.topk, problem.num_global_experts, max_tokens)


def kernels(problem: ExpertsProblem, tiles: ExpertTiles, arch: str) -> list[Kernel]:
    """The kernels that `run` launches with `tiles`, each once."""
    return experts.kernels(problem, tiles, arch, _product)


@cache
def shipped(arch: str) -> dict[str, Kernel]:
    """{name: kernel} of everything that a served model's `run` can ask for on `arch`."""
    return experts.shipped(arch, shipped_expert_tiles(), _product)


@cache
def choices() -> dict[str, ExpertTiles]:
    """{name: tiles} of every pair of tiles that a served model's `run` can take."""
    return experts.choices(shipped_expert_tiles())
