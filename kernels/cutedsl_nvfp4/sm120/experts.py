"""NVFP4 W4A4 mixture of experts on workstation Blackwell: sm100/experts.py's six kernels with products of our own.

route, gather, combine    as on data-centre Blackwell, compiled for this one
w13, w2                   grouped.py
"""

from collections.abc import Callable
from functools import cache

import torch

from ..blackwell.quantize import arch_of_name
from ..sm100 import experts
from .tiles import ExpertTiles, choose_experts, chosen_experts, shipped_expert_tiles

__all__ = [
    "chosen_experts",
    "load_tiles",
    "run",
    "shipped_kernels",
    "tiles_by_name",
    "tiles_name",
]  # of every family


def run(
    x: torch.Tensor,  # bf16 [M, H]
    w13_codes: torch.Tensor,  # uint8 [E, 2I, H' / 2], gate rows first
    w13_scales: torch.Tensor,  # uint8 [E, 2 * ceil(I / 128), ceil(H / 64), 32, 16], gate's tiles first
    w13_row_scale: torch.Tensor,  # f32 [E, 2I]
    w2_codes: torch.Tensor,  # uint8 [E, H, I' / 2]
    w2_scales: torch.Tensor,  # uint8 [E, ceil(H / 128), ceil(I / 64), 32, 16]
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
    config: ExpertTiles | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mixture of NVFP4 experts -> [M, H] of `out_dtype`, W4A4, on torch's current stream; as sm100.experts.run."""
    if config is None:
        known = w13_codes.shape[0] if expert_map is None else expert_map.shape[0]
        config = choose_experts(topk_ids.numel(), known)
    return experts.run(
        x, w13_codes, w13_scales, w13_row_scale, w2_codes, w2_scales, w2_row_scale, topk_weights, topk_ids,
        act_scale_13, act_scale_2, expert_map, hidden=hidden, intermediate=intermediate, swiglu_limit=swiglu_limit,
        out_dtype=out_dtype, config=config, out=out,
    )  # fmt: skip


@cache
def shipped_kernels(arch: str) -> dict[str, tuple]:
    """{name: arguments of `build`} of every kernel a served model's `run` can ask for on `arch`."""
    kernels = [kernel[1:] for kernel in experts.shipped_kernels(arch).values() if kernel[1] != "product"]
    for tiles in shipped_expert_tiles():
        kernels += [("product", tiles.w13, result) for result in experts.RESULTS[:2]]
        kernels.append(("product", tiles.w2, experts.RESULTS[2]))
    return {experts.kernel_name(arch, *kernel): (arch, *kernel) for kernel in kernels}


@cache
def tiles_by_name() -> dict[str, ExpertTiles]:
    """{name: tiles} of every choice of tiles a served model's `run` can take; one is several kernels."""
    return {experts.tiles_name(tiles): tiles for tiles in shipped_expert_tiles()}


def load(name: str) -> Callable:
    """The kernel called `name`, one of `shipped_kernels`, compiled or loaded now instead of at its first use."""
    return experts._kernel(*shipped_kernels(arch_of_name(name))[name])


tiles_name, load_tiles, build = experts.tiles_name, experts.load_tiles, experts.build
