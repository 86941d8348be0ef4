"""NVFP4 W4A16 mixture of experts on Hopper: four kernels that start before their predecessor has finished.

    route    ids -> slots grouped by expert, table of tiles                       routing.py
    w13      h[slot] = swiglu(w1 @ x[m], w3 @ x[m])   bf16 [M * T, I]             {narrow,wide}_experts.py
    w2       y[pair] = w2 @ h[slot]                   bf16 [M * T, H]             {narrow,wide}_experts.py
    combine  out[m] = sum_t weights[m, t] * y[m * T + t]                          routing.py

Nothing depends on the routing but what the kernels read on the device: no host sync, sizes from M alone, one
CUDA graph for every routing.
"""

import math
from collections.abc import Callable
from functools import cache

import torch

from ..compiled import compiled
from ..support import sm_count
from .decode import SCALE_BIAS
from .layout import CODE_WORDS, SCALE_WORDS, packed_shape
from .linear import TYPE_NAMES
from .tiles import ExpertTiles, NarrowTile, choose_experts, shipped_expert_tiles, shipped_experts

MAX_EXPERTS = 1024  # local ones (routing.py)
TOPKS = (6, 8)  # compiled ahead of time
ROUTE_CTAS = (1, 8)
ROUTED_BY_ONE = 4096  # pairs up to which one CTA is as fast as a cluster


def _check_shapes(x, w13, w2, topk_weights, topk_ids, expert_map, hidden, intermediate, out_dtype) -> None:
    if x.dtype != torch.bfloat16 or x.dim() != 2 or x.shape[1] != hidden:
        raise ValueError(f"x must be bf16 [M, {hidden}], got {x.dtype} {tuple(x.shape)}")
    if hidden % 16 or intermediate % 16:
        raise ValueError(f"hidden size {hidden} and intermediate size {intermediate} must be multiples of 16")
    experts = w13[0].shape[0]
    if not 1 <= experts <= MAX_EXPERTS:
        raise ValueError(f"{experts} local experts; the routing kernel takes 1 to {MAX_EXPERTS}")
    for name, (codes, scales, row_scale), n, k in (
        ("w13", w13, 2 * intermediate, hidden),
        ("w2", w2, hidden, intermediate),
    ):
        shape = (experts, *packed_shape(n, k))
        if codes.dtype != torch.int64 or codes.shape != (*shape, CODE_WORDS) or not codes.is_contiguous():
            raise ValueError(
                f"{name} codes must be contiguous int64 {(*shape, CODE_WORDS)} from prepare_experts, "
                f"got {codes.dtype} {tuple(codes.shape)}"
            )
        if scales.dtype != torch.int32 or scales.shape != (*shape, SCALE_WORDS) or not scales.is_contiguous():
            raise ValueError(
                f"{name} scales must be contiguous int32 {(*shape, SCALE_WORDS)} from prepare_experts, "
                f"got {scales.dtype} {tuple(scales.shape)}"
            )
        if row_scale.dtype != torch.float32 or row_scale.shape != (experts, n):
            raise ValueError(
                f"{name} row_scale must be f32 {(experts, n)}, got {row_scale.dtype} {tuple(row_scale.shape)}"
            )
    if topk_ids.dim() != 2 or topk_ids.shape[0] != x.shape[0] or topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"topk_ids and topk_weights must be [{x.shape[0]}, T], got {tuple(topk_ids.shape)} "
            f"and {tuple(topk_weights.shape)}"
        )
    if expert_map is not None and (expert_map.dim() != 1 or expert_map.device != x.device):
        raise ValueError(f"expert_map must be [experts] on {x.device}, got {tuple(expert_map.shape)}")
    if out_dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"out_dtype must be torch.bfloat16 or torch.float32, got {out_dtype}")


def run(
    x: torch.Tensor,  # bf16 [M, H]
    w13_codes: torch.Tensor,  # int64 [E, P, KB, 256], rows interleaved
    w13_scales: torch.Tensor,  # int32 [E, P, KB, 64]
    w13_row_scale: torch.Tensor,  # f32 [E, 2I], gate rows first
    w2_codes: torch.Tensor,  # int64 [E, P, KB, 256]
    w2_scales: torch.Tensor,  # int32 [E, P, KB, 64]
    w2_row_scale: torch.Tensor,  # f32 [E, H]
    topk_weights: torch.Tensor,  # f32 [M, T]
    topk_ids: torch.Tensor,  # int [M, T], global expert ids; others are skipped
    expert_map: torch.Tensor | None = None,  # int [global experts] -> local id or -1
    *,
    hidden: int,
    intermediate: int,
    swiglu_limit: float | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    batch_invariant: bool = False,
    config: ExpertTiles | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mixture of NVFP4 experts -> [M, H] of `out_dtype`, on torch's current stream; see reference.experts.

    Weights come from `prepare_experts` for Layout.SM90. They, row scales, topk_weights, topk_ids and
    expert_map follow the rule of `linear.run`: no kernel that lets its successor start early may write them.
    A pair whose id is negative, unknown or maps to -1 adds nothing. The result is the same in every run; with
    `batch_invariant` a row's does not depend on the other rows. `config` overrides the measured choice,
    `out` receives the result instead of new memory. Raises ValueError for operands that do not fit.
    """
    w13, w2 = (w13_codes, w13_scales, w13_row_scale), (w2_codes, w2_scales, w2_row_scale)
    if x.device.type != "cuda" or any(t.device != x.device for t in (*w13, *w2, topk_weights, topk_ids)):
        raise ValueError(f"x, weights and routing must be on one CUDA device, x is on {x.device}")
    _check_shapes(x, w13, w2, topk_weights, topk_ids, expert_map, hidden, intermediate, out_dtype)
    m, topk = topk_ids.shape
    if out is None:
        out = torch.empty((m, hidden), dtype=out_dtype, device=x.device)
    elif out.shape != (m, hidden) or out.dtype != out_dtype or not out.is_contiguous() or out.data_ptr() % 16:
        raise ValueError(
            f"out must be contiguous, 16-byte aligned {out_dtype} {(m, hidden)}, got {out.dtype} "
            f"{tuple(out.shape)}, strides {out.stride()}, address {out.data_ptr():#x}"
        )
    if m == 0:
        return out
    if topk == 0:
        return out.zero_()
    if x.stride(1) != 1 or x.stride(0) % 8 or x.stride(0) < hidden or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)  # what 16-byte copies can address
    ids = topk_ids.to(torch.int32).contiguous().view(-1)
    weights = topk_weights.to(torch.float32).contiguous().view(-1)
    known = ids if expert_map is None else expert_map.to(torch.int32).contiguous()
    experts, pairs = w13_codes.shape[0], m * topk
    if config is None:
        total = experts if expert_map is None else expert_map.shape[0]
        config = choose_experts(hidden, intermediate, pairs, experts, total, batch_invariant)

    def scratch(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    pair_of_slot = scratch(pairs, dtype=torch.int32)
    table = scratch(1 + config.most_tiles(pairs, experts), 4, dtype=torch.int32)
    h = scratch(pairs, intermediate, dtype=torch.bfloat16)
    y = scratch(pairs, hidden, dtype=torch.bfloat16)
    local = (int(expert_map is not None), experts)
    route = _kernel("route", ROUTE_CTAS[pairs > ROUTED_BY_ONE])
    route(ids, known, pair_of_slot, table, *local, config.tokens, config.step)
    limit = math.inf if swiglu_limit is None else swiglu_limit
    for tiles, activated, source, operands, target in (
        (config.w13, True, x, w13, h),
        (config.w2, False, h, w2, y),
    ):
        numbers = (topk, limit, SCALE_BIAS, sm_count(x.device) * tiles.ctas_per_sm)
        _kernel("product", tiles, activated)(source, *operands, pair_of_slot, table, target, *numbers)
    _kernel("combine", topk, out_dtype)(y, ids, known, weights, out, *local)
    return out


def shipped_kernels() -> dict[str, tuple]:
    """{name: arguments of `build`} of every kernel a served model's `run` can ask for."""
    kernels = [("route", ctas) for ctas in ROUTE_CTAS]
    kernels += [("product", config, activated) for config, activated in shipped_experts()]
    kernels += [("combine", topk, dtype) for topk in TOPKS for dtype in (torch.bfloat16, torch.float32)]
    return {kernel_name(*kernel): kernel for kernel in kernels}


@cache
def tiles_by_name() -> dict[str, ExpertTiles]:
    """{name: tiles} of every choice of tiles a served model's `run` can take; one is several kernels."""
    return {tiles_name(tiles): tiles for tiles in shipped_expert_tiles()}


def tiles_name(tiles: ExpertTiles) -> str:
    return f"{kernel_name('product', tiles.w13, True)} with {kernel_name('product', tiles.w2, False)}"


def load_tiles(tiles: ExpertTiles, topk: int, out_dtype: torch.dtype) -> None:
    """Compile or load now every kernel that `run` needs with `tiles`."""
    for kernel in (
        *(("route", ctas) for ctas in ROUTE_CTAS),
        ("product", tiles.w13, True),
        ("product", tiles.w2, False),
        ("combine", topk, out_dtype),
    ):
        _kernel(*kernel)


def load(name: str) -> Callable:
    """The kernel called `name`, one of `shipped_kernels`, compiled or loaded now instead of at its first use."""
    return _kernel(*shipped_kernels()[name])


@cache
def kernel_name(kind: str, *arguments) -> str:
    """The name a kernel has in `compiled` and in the ahead-of-time library."""
    if kind == "product":
        config, activated = arguments
        matrix, tile = "w13" if activated else "w2", "narrow" if isinstance(config, NarrowTile) else "wide"
        numbers = "_".join(str(int(value)) for value in vars(config).values())
        return f"nvfp4_experts_sm90_{matrix}_{tile}_{numbers}"
    if kind == "combine":
        topk, dtype = arguments
        return f"nvfp4_experts_sm90_combine_{topk}_{TYPE_NAMES[dtype]}"
    return f"nvfp4_experts_sm90_{kind}_{arguments[0]}"


def build(kind: str, *arguments, options: str = "") -> Callable:
    """Compile "route" (CTAs), "product" (configuration, whether w13) or "combine" (top-k, result type)."""
    from . import compile as compiler  # needs CuTe DSL, which ahead-of-time kernels do not

    compile_kind = {
        "route": compiler.compile_route,
        "product": compiler.compile_product,
        "combine": compiler.compile_combine,
    }[kind]
    return compile_kind(*arguments, options=options)


def _kernel(kind: str, *arguments) -> Callable:
    return compiled(kernel_name(kind, *arguments), lambda: build(kind, *arguments))
