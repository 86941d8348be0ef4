"""NVFP4 W4A4 mixture of experts on Blackwell (sm_100a, sm_103a): kernels that start before their predecessor is done.

    route     ids -> slots grouped by expert, table of tiles                        sm90/routing.py
    gather    x[m], rounded to NVFP4, into the slots of its pairs                   gather.py
    w13       h[slot] = swiglu(w1 @ x, w3 @ x), rounded to NVFP4                    grouped.py
    w2        y[pair] = w2 @ h[slot]                     bf16 [M * T, H]            grouped.py
    combine   out[m] = sum_t weights[m, t] * y[m * T + t]                           sm90/routing.py

Without a scale for h, w13 leaves it in bf16 and a second gather rounds every slot with its own. Nothing depends on
the routing but what the kernels read on the device: no host sync, sizes from M alone, one CUDA graph for every
routing.
"""

import math
from collections.abc import Callable
from functools import cache

import torch

from ..blackwell.quantize import arch_of, arch_of_name
from ..compiled import compiled
from ..format import GROUP_SIZE, padded_k
from ..support import sm_count
from .linear import TYPE_NAMES
from .tiles import ExpertTiles, GroupedTile, choose_experts, chosen_experts, shipped_expert_tiles

__all__ = [
    "chosen_experts",
    "load_tiles",
    "run",
    "shipped_kernels",
    "tiles_by_name",
    "tiles_name",
]  # of every family

MAX_EXPERTS = 1024  # local ones (sm90/routing.py)
TOPKS = (6, 8)  # compiled ahead of time
SCALES = ("tensor", "expert", "token")  # gather.Scale
RESULTS = ("nvfp4", "bf16", "rows")  # grouped.Result


def _check_shapes(
    x, w13, w2, topk_weights, topk_ids, act_scales, expert_map, hidden, intermediate, out_dtype
) -> None:
    if x.dtype != torch.bfloat16 or x.dim() != 2 or x.shape[1] != hidden:
        raise ValueError(f"x must be bf16 [M, {hidden}], got {x.dtype} {tuple(x.shape)}")
    if hidden % GROUP_SIZE or intermediate % GROUP_SIZE:
        raise ValueError(f"hidden size {hidden} and intermediate size {intermediate} must be multiples of 16")
    experts = w13[0].shape[0]
    if not 1 <= experts <= MAX_EXPERTS:
        raise ValueError(f"{experts} local experts; the routing kernel takes 1 to {MAX_EXPERTS}")
    for name, (codes, scales, row_scale), matrices, n, k in (
        ("w13", w13, 2, intermediate, hidden),
        ("w2", w2, 1, hidden, intermediate),
    ):
        shape = (experts, matrices * n, padded_k(k) // 2)
        if codes.dtype != torch.uint8 or codes.shape != shape or not codes.is_contiguous():
            raise ValueError(
                f"{name} codes must be contiguous uint8 {shape} from prepare_experts, "
                f"got {codes.dtype} {tuple(codes.shape)}"
            )
        shape = (experts, matrices * -(-n // 128), -(-k // 64), 32, 16)
        if scales.dtype != torch.uint8 or scales.shape != shape or not scales.is_contiguous():
            raise ValueError(
                f"{name} scales must be contiguous uint8 {shape} from prepare_experts, "
                f"got {scales.dtype} {tuple(scales.shape)}"
            )
        if codes.data_ptr() % 16 or scales.data_ptr() % 16:
            raise ValueError(f"{name} codes and scales must be 16-byte aligned")
        if row_scale.dtype != torch.float32 or row_scale.shape != (experts, matrices * n):
            raise ValueError(
                f"{name} row_scale must be f32 {(experts, matrices * n)}, "
                f"got {row_scale.dtype} {tuple(row_scale.shape)}"
            )
    for name, scale in zip(("act_scale_13", "act_scale_2"), act_scales, strict=True):
        if scale is not None and (scale.dtype != torch.float32 or scale.numel() not in (1, experts)):
            raise ValueError(
                f"{name} must be f32 [1] or [{experts}], or None for a scale of each token, "
                f"got {scale.dtype} {tuple(scale.shape)}"
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
    w13_codes: torch.Tensor,  # uint8 [E, 2I, H'/2], gate rows first; H' = H rounded up to 32
    w13_scales: torch.Tensor,  # uint8 [E, 2 * ceil(I/128), ceil(H/64), 32, 16], gate's tiles first
    w13_row_scale: torch.Tensor,  # f32 [E, 2I]
    w2_codes: torch.Tensor,  # uint8 [E, H, I'/2]
    w2_scales: torch.Tensor,  # uint8 [E, ceil(H/128), ceil(I/64), 32, 16]
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
    """Mixture of NVFP4 experts -> [M, H] of `out_dtype`, W4A4, on torch's current stream; see reference.experts.

    Weights come from `prepare_experts` for Layout.BLOCK_SCALED. They, row scales, activation scales,
    topk_weights, topk_ids and expert_map follow the rule of `sm90.linear.run`: no kernel that lets its
    successor start early may write them. A pair whose id is negative, unknown or maps to -1 adds nothing. The
    result is the same in every run. `config` overrides the choice of tiles, `out` receives the result instead of
    new memory. Raises ValueError for operands that do not fit.
    """
    arch = arch_of(x.device)
    w13, w2 = (w13_codes, w13_scales, w13_row_scale), (w2_codes, w2_scales, w2_row_scale)
    if any(t.device != x.device for t in (*w13, *w2, topk_weights, topk_ids)):
        raise ValueError(f"x, weights and routing must be on one CUDA device, x is on {x.device}")
    act_scales = (act_scale_13, act_scale_2)
    _check_shapes(x, w13, w2, topk_weights, topk_ids, act_scales, expert_map, hidden, intermediate, out_dtype)
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
        x = x.clone(memory_format=torch.contiguous_format)  # what 16-byte loads can address
    ids = topk_ids.to(torch.int32).contiguous().view(-1)
    weights = topk_weights.to(torch.float32).contiguous().view(-1)
    known = ids if expert_map is None else expert_map.to(torch.int32).contiguous()
    experts, pairs = w13_codes.shape[0], m * topk
    if config is None:
        config = choose_experts(pairs, experts if expert_map is None else expert_map.shape[0])
    tiles, tokens = config.most_tiles(pairs, experts), config.tokens
    slots, atoms = tiles * tokens, tiles * config.w13.scale_atoms

    def scratch(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    pair_of_slot = scratch(slots, dtype=torch.int32)
    places = scratch(pairs, dtype=torch.int32)
    table = scratch(1 + tiles, 4, dtype=torch.int32)
    local = (int(expert_map is not None), experts)
    _kernel(arch, "route")(ids, known, pair_of_slot, places, table, *local, tokens)

    def rounded(rows: int, act_scale: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """(codes, block scales, act scale of every slot where none is known) of slots of `rows` values."""
        codes, scales = scratch(slots, padded_k(rows) // 2), scratch(atoms, -(-rows // 64), 32, 16)
        return codes, scales, scratch(slots, dtype=torch.float32) if act_scale is None else act_scale.view(-1)

    def owner(act_scale: torch.Tensor | None) -> str:
        return "token" if act_scale is None else "tensor" if act_scale.numel() == 1 else "expert"

    def product(
        tile: GroupedTile, result: str, weight, source, act_scale, target, out_scales, out_act_scale
    ) -> None:
        codes, scales, scale = source
        whose = (int(act_scale is None), int(owner(act_scale) == "expert"), int(out_act_scale.numel() > 1))
        _kernel(arch, "product", tile, result)(
            *weight, codes, scales, scale, table, pair_of_slot, target, out_scales, out_act_scale,
            *whose, limit, sm_count(x.device),
        )  # fmt: skip

    limit = math.inf if swiglu_limit is None else swiglu_limit
    gathered = rounded(hidden, act_scale_13)
    _kernel(arch, "gather", owner(act_scale_13), False)(
        x, places, table, gathered[2], *gathered[:2], topk, tokens
    )
    h = rounded(intermediate, act_scale_2)
    if act_scale_2 is None:
        unrounded = scratch(slots, intermediate, dtype=torch.bfloat16)
        product(config.w13, "bf16", w13, gathered, act_scale_13, unrounded, gathered[1], gathered[2])
        _kernel(arch, "gather", "token", True)(unrounded, places, table, h[2], *h[:2], 1, tokens)
    else:
        product(config.w13, "nvfp4", w13, gathered, act_scale_13, *h)
    y = scratch(pairs, hidden, dtype=torch.bfloat16)
    product(config.w2, "rows", w2, h, act_scale_2, y, h[1], h[2])
    _kernel(arch, "combine", topk, out_dtype)(y, ids, known, weights, out, *local)
    return out


def shipped_kernels(arch: str) -> dict[str, tuple]:
    """{name: arguments of `build`} of every kernel a served model's `run` can ask for on `arch`."""
    kernels = [("route",), ("gather", "token", True)]
    kernels += [("gather", scale, False) for scale in SCALES]
    for tiles in shipped_expert_tiles():
        kernels += [("product", tiles.w13, result) for result in RESULTS[:2]]
        kernels.append(("product", tiles.w2, RESULTS[2]))
    kernels += [("combine", topk, dtype) for topk in TOPKS for dtype in (torch.bfloat16, torch.float32)]
    return {kernel_name(arch, *kernel): (arch, *kernel) for kernel in kernels}


@cache
def tiles_by_name() -> dict[str, ExpertTiles]:
    """{name: tiles} of every choice of tiles a served model's `run` can take; one is several kernels."""
    return {tiles_name(tiles): tiles for tiles in shipped_expert_tiles()}


def tiles_name(tiles: ExpertTiles) -> str:
    w13, w2 = (_tile_name(tile) for tile in (tiles.w13, tiles.w2))
    return f"w13_{w13} with w2_{w2}"


def load_tiles(tiles: ExpertTiles, topk: int, out_dtype: torch.dtype, device: torch.device, scales) -> None:
    """Compile or load now every kernel that `run` needs with `tiles` and (act_scale_13, act_scale_2)."""
    arch = arch_of(device)
    of_x = "token" if scales[0] is None else "tensor" if scales[0].numel() == 1 else "expert"
    kernels = [
        ("route",),
        ("gather", of_x, False),
        ("product", tiles.w2, "rows"),
        ("combine", topk, out_dtype),
    ]
    kernels.append(("product", tiles.w13, "bf16" if scales[1] is None else "nvfp4"))
    if scales[1] is None:
        kernels.append(("gather", "token", True))
    for kernel in kernels:
        _kernel(arch, *kernel)


def load(name: str) -> Callable:
    """The kernel called `name`, one of `shipped_kernels`, compiled or loaded now instead of at its first use."""
    return _kernel(*shipped_kernels(arch_of_name(name))[name])


def _tile_name(tile: GroupedTile) -> str:
    return "_".join(str(value) for value in vars(tile).values())


@cache
def kernel_name(arch: str, kind: str, *arguments) -> str:
    """The name a kernel has in `compiled` and in the ahead-of-time library."""
    prefix = f"nvfp4_experts_{arch.replace('_', '')}_{kind}"
    if kind == "product":
        tile, result = arguments
        return f"{prefix}_{result}_{_tile_name(tile)}"
    if kind == "gather":
        scale, from_slots = arguments
        return f"{prefix}_{scale}{'_slots' * from_slots}"
    if kind == "combine":
        topk, dtype = arguments
        return f"{prefix}_{topk}_{TYPE_NAMES[dtype]}"
    return prefix


def build(arch: str, kind: str, *arguments, options: str = "") -> Callable:
    """Compile "route", "gather" (whose scale, from slots), "product" (tile, result) or "combine" (top-k, type)."""
    from ..blackwell import compile as compiler  # needs CuTe DSL, which ahead-of-time kernels do not
    from . import compile as products

    compile_kind = {
        "route": compiler.compile_route,
        "gather": compiler.compile_gather,
        "product": products.compile_product,
        "combine": compiler.compile_combine,
    }[kind]
    if kind == "product" and not isinstance(arguments[0], GroupedTile):
        from ..sm120.compile import compile_product as compile_kind
    return compile_kind(*arguments, arch=arch, options=options)


def _kernel(arch: str, kind: str, *arguments) -> Callable:
    return compiled(kernel_name(arch, kind, *arguments), lambda: build(arch, kind, *arguments))
