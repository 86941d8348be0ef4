"""NVFP4 W4A4 mixture of experts on Blackwell: kernels that start before their predecessor is done.

    route     ids -> slots grouped by expert, table of tiles                        device/routing.py
    gather    x[m], rounded to NVFP4, into the slots of its pairs                   gather_kernel.py
    w13       h[slot] = swiglu(w1 @ x, w3 @ x), rounded to NVFP4                    sm1*/experts_kernel.py
    w2        y[pair] = w2 @ h[slot]                     bf16 [M * T, H]            sm1*/experts_kernel.py
    combine   out[m] = sum_t weights[m, t] * y[m * T + t]                           device/routing.py

Without a scale for h, w13 leaves it in bf16 and a second gather rounds every slot with its own. Nothing depends on
the routing but what the kernels read on the device: no host sync, sizes from M alone, one CUDA graph for every
routing. Both families run this; their products and tiles differ.
"""

import math
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch

from ..family import ExpertsProblem, Kernel, arch_of, sm_count
from ..format import padded_k
from ..operands import TYPE_NAMES, addressable, check_experts_call, check_experts_tensor, experts_result
from ..tile_choice import TilePair
from .variants import Result, Scale

TOPKS = (6, 8)  # compiled ahead of time


def _check_weights(w13, w2, act_scales, hidden: int, intermediate: int) -> None:
    """Raise ValueError unless (codes, block scales, row scale) and the activation scales are those of `run`."""
    experts = w13[0].shape[0]
    for name, (codes, block_scales, row_scale), matrices, n, k in (
        ("w13", w13, 2, intermediate, hidden),
        ("w2", w2, 1, hidden, intermediate),
    ):
        check_experts_tensor(f"{name} codes", codes, torch.uint8, (experts, matrices * n, padded_k(k) // 2))
        shape = (experts, matrices * -(-n // 128), -(-k // 64), 32, 16)
        check_experts_tensor(f"{name} block scales", block_scales, torch.uint8, shape)
        check_experts_tensor(f"{name} row_scale", row_scale, torch.float32, (experts, matrices * n))
        if codes.data_ptr() % 16 or block_scales.data_ptr() % 16:
            raise ValueError(f"{name} codes and block scales must be 16-byte aligned")
    for name, scale in zip(("act_scale_13", "act_scale_2"), act_scales, strict=True):
        if scale is not None and (scale.dtype != torch.float32 or scale.numel() not in (1, experts)):
            raise ValueError(
                f"{name} must be f32 [1] or [{experts}], or None for a scale of each token, "
                f"got {scale.dtype} {tuple(scale.shape)}"
            )


def _owner(act_scale: torch.Tensor | None) -> Scale:
    if act_scale is None:
        return Scale.TOKEN
    return Scale.TENSOR if act_scale.numel() == 1 else Scale.EXPERT


@dataclass(frozen=True)
class Experts:
    """family.Experts of a Blackwell family."""

    family: str  # the folder, whose `compile` compiles the products
    tiles: ModuleType  # its `tiles`, which chooses them

    def run(
        self,
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
        tiles: TilePair | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mixture of NVFP4 experts -> [M, H] of `out_dtype`, W4A4, on torch's current stream; see reference.experts.

        Weights come from `prepare_experts` for Layout.BLOCK_SCALED. They, row scales, activation scales,
        topk_weights, topk_ids and expert_map follow the rule of `linear.run`: no kernel that lets its
        successor start early may write them. A pair whose id is negative, unknown or maps to -1 adds nothing. The
        result is the same in every run. `tiles` overrides the choice, `out` receives the result instead of
        new memory. Raises ValueError for operands that do not fit.
        """
        w13, w2 = (w13_codes, w13_block_scales, w13_row_scale), (w2_codes, w2_block_scales, w2_row_scale)
        experts = w13_codes.shape[0]
        check_experts_call(
            x, (*w13, *w2), topk_weights, topk_ids, expert_map, hidden, intermediate, experts, out_dtype
        )
        if batch_invariant:
            raise ValueError("the Blackwell kernels do not promise batch-invariant results")
        _check_weights(w13, w2, (act_scale_13, act_scale_2), hidden, intermediate)
        m, topk = topk_ids.shape
        out = experts_result(out, m, hidden, out_dtype, x.device)
        if m == 0:
            return out
        if topk == 0:
            return out.zero_()
        arch, x = arch_of(x.device), addressable(x)
        ids = topk_ids.to(torch.int32).contiguous().view(-1)
        weights = topk_weights.to(torch.float32).contiguous().view(-1)
        local_of = ids if expert_map is None else expert_map.to(torch.int32).contiguous()
        pairs = m * topk
        if tiles is None:
            tiles = self.tiles.choose_experts(pairs, experts if expert_map is None else expert_map.shape[0])
        most, tokens = tiles.most_tiles(pairs, experts), tiles.tokens
        slots, atoms = most * tokens, most * tiles.w13.scale_atoms

        def scratch(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=x.device)

        pair_of_slot = scratch(slots, dtype=torch.int32)
        places = scratch(pairs, dtype=torch.int32)
        table = scratch(1 + most, 4, dtype=torch.int32)
        local = (int(expert_map is not None), experts)
        _route(arch).load()(ids, local_of, pair_of_slot, places, table, *local, tokens)

        def rounded(rows: int, act_scale: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
            """(codes, block scales, act scale of every slot where none is known) of slots of `rows` values."""
            codes, scales = scratch(slots, padded_k(rows) // 2), scratch(atoms, -(-rows // 64), 32, 16)
            scale = scratch(slots, dtype=torch.float32) if act_scale is None else act_scale.view(-1)
            return codes, scales, scale

        def multiply(
            tile: object, result: Result, weight, source, act_scale, target, out_scales, out_act_scale
        ) -> None:
            codes, scales, scale = source
            of_token, of_expert = act_scale is None, _owner(act_scale) is Scale.EXPERT
            self._product(tile, result, arch).load()(
                *weight, codes, scales, scale, table, pair_of_slot, target, out_scales, out_act_scale,
                int(of_token), int(of_expert), int(out_act_scale.numel() > 1), limit, sm_count(x.device),
            )  # fmt: skip

        limit = math.inf if swiglu_limit is None else swiglu_limit
        gathered = rounded(hidden, act_scale_13)
        _gather(_owner(act_scale_13), False, arch).load()(
            x, places, table, gathered[2], *gathered[:2], topk, tokens
        )
        h = rounded(intermediate, act_scale_2)
        if act_scale_2 is None:
            unrounded = scratch(slots, intermediate, dtype=torch.bfloat16)
            multiply(tiles.w13, Result.BF16, w13, gathered, act_scale_13, unrounded, gathered[1], gathered[2])
            _gather(Scale.TOKEN, True, arch).load()(unrounded, places, table, h[2], *h[:2], 1, tokens)
        else:
            multiply(tiles.w13, Result.NVFP4, w13, gathered, act_scale_13, *h)
        y = scratch(pairs, hidden, dtype=torch.bfloat16)
        multiply(tiles.w2, Result.ROWS, w2, h, act_scale_2, y, h[1], h[2])
        _combine(topk, out_dtype, arch).load()(y, ids, local_of, weights, out, *local)
        return out

    def chosen(self, problem: ExpertsProblem, max_tokens: int, batch_invariant: bool) -> dict[TilePair, int]:
        """Every pair of tiles that `run` takes for 1 .. max_tokens tokens, each with the fewest that take it."""
        return self.tiles.chosen_experts(problem.topk, problem.num_global_experts, max_tokens)

    def kernels(self, problem: ExpertsProblem, tiles: TilePair, arch: str) -> list[Kernel]:
        """The kernels that `run` launches with `tiles`.

        Static activation scales are one of x, one of each expert's h.
        """
        found = [
            _route(arch),
            _gather(Scale.TENSOR if problem.static else Scale.TOKEN, False, arch),
            self._product(tiles.w13, Result.NVFP4 if problem.static else Result.BF16, arch),
            self._product(tiles.w2, Result.ROWS, arch),
            _combine(problem.topk, problem.out_dtype, arch),
        ]
        return found if problem.static else [*found, _gather(Scale.TOKEN, True, arch)]

    def shipped(self, arch: str) -> dict[str, Kernel]:
        """{name: kernel} of everything that a served model's `run` can ask for on `arch`."""
        found = [_route(arch), _gather(Scale.TOKEN, True, arch)]
        found += [_gather(scale, False, arch) for scale in Scale]
        for tiles in self.tiles.shipped_expert_tiles():
            found += [self._product(tiles.w13, result, arch) for result in (Result.NVFP4, Result.BF16)]
            found.append(self._product(tiles.w2, Result.ROWS, arch))
        found += [_combine(topk, dtype, arch) for topk in TOPKS for dtype in TYPE_NAMES]
        return {kernel.name: kernel for kernel in found}

    def choices(self) -> dict[str, TilePair]:
        """{name: tiles} of every pair of tiles that a served model's `run` can take."""
        pairs = self.tiles.shipped_expert_tiles()
        return {f"w13_{_numbers(tiles.w13)} with w2_{_numbers(tiles.w2)}": tiles for tiles in pairs}

    def _product(self, tile: object, result: Result, arch: str) -> Kernel:
        return _product(f"{self.family}.compile", tile, result, arch)


@cache
def _product(module: str, tile: object, result: Result, arch: str) -> Kernel:
    name = f"{_prefix(arch)}_product_{result}_{_numbers(tile)}"
    return Kernel(name, module, "product", (tile, result, arch), tile)


def _numbers(tile: object) -> str:
    return "_".join(str(value) for value in vars(tile).values())


def _prefix(arch: str) -> str:
    return f"nvfp4_experts_{arch.replace('_', '')}"


@cache
def _route(arch: str) -> Kernel:
    return Kernel(f"{_prefix(arch)}_route", "blackwell.compile", "route", (arch,))


@cache
def _gather(scale: Scale, from_slots: bool, arch: str) -> Kernel:
    name = f"{_prefix(arch)}_gather_{scale}{'_slots' * from_slots}"
    return Kernel(name, "blackwell.compile", "gather", (scale, from_slots, arch))


@cache
def _combine(topk: int, out_dtype: torch.dtype, arch: str) -> Kernel:
    name = f"{_prefix(arch)}_combine_{topk}_{TYPE_NAMES[out_dtype]}"
    return Kernel(name, "device.compile", "combine", (topk, out_dtype, arch))
