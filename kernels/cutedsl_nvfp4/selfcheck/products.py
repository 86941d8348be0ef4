"""What the self-check compares: layers with prepared operands, their products, and the error these may have.

Each product is written over NaN, so that what no CTA stored shows, and compared in float64 with the weight decoded
from the operands themselves; under W4A4 with the activations rounded by reference.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..family import ExpertsProblem, Family, LinearProblem, family_for
from ..prepare import PreparedExperts, PreparedLinear, plain_experts, plain_panels
from ..reference import dequantize, dynamic_act_scale, quantize, swiglu

PANEL_ROWS = 64  # weight rows that are compared together
PANELS = 8  # weight panels a product is compared on: the first, the last and random ones
TOKENS = 64  # rows of x it is compared on
EXPERT_TOKENS = 2  # the same for experts, of which each token meets several
W4A4_TOKENS = 4  # and of those that round their intermediate to NVFP4
FLIPPED_LIMIT = 0.25  # relative, of tokens where such a value went to the next code
BF16_LIMIT = 1.5  # times the error of rounding the exact product to bf16
STATIC_SIZE = 400.0  # of random activations, times their act_scale, whose tensor reaches 6 * 448


@dataclass(frozen=True)
class Variant:
    """What stage one runs on operands of its own: a kernel, or the kernels of one choice of experts' tiles.

    All strings and numbers, so that it crosses to the child as JSON; the child looks the names up.
    """

    family: str
    arch: str
    operation: str  # "linear", "experts" or "quantize"
    name: str  # of the kernel; of experts' tiles, as their family's `choices` call them
    static: bool = False  # under W4A4: whether experts' activation scales are known beforehand

    def __str__(self) -> str:
        if self.operation != "experts":
            return self.name
        return f"experts {self.arch}{' static' if self.static else ''} {self.name}"


class SelfCheckFailed(RuntimeError):
    """A kernel is wrong, crashed or hung; the message says which and how. `variant`: of stage one, what it was at."""

    def __init__(self, message: str, variant: Variant | None = None):
        super().__init__(message)
        self.variant = variant


@dataclass(frozen=True)
class LinearLayer:
    """One linear layer with operands prepared for a GPU's layout."""

    name: str
    operands: PreparedLinear
    out_dtype: torch.dtype
    bias: torch.Tensor | None = None
    act_scale: torch.Tensor | None = None  # f32 [1] of W4A4; None: each token's own

    @property
    def family(self) -> Family:
        return family_for(self.operands.layout, self.operands.codes.device)

    @property
    def problem(self) -> LinearProblem:
        weight = self.operands
        static = self.act_scale is not None
        return LinearProblem(weight.n, weight.k, weight.groups, self.out_dtype, self.bias is not None, static)

    def __str__(self) -> str:
        weight = self.operands
        return f"N = {weight.n}, K = {weight.k}, groups = {weight.groups}, {self.out_dtype}"

    def tiles(self, max_tokens: int, batch_invariant: bool) -> dict[Any, int]:
        """Tiles that 1 .. max_tokens tokens take, each with the fewest tokens that take it."""
        return self.family.linear.chosen(self.problem, max_tokens, batch_invariant)

    def variants(self, max_tokens: int, batch_invariant: bool) -> list[Variant]:
        """The kernels behind `tiles`."""
        family, arch = self.family, self.family.arch_of(self.operands.codes.device)
        names: dict[str, str] = {}
        for tile in self.tiles(max_tokens, batch_invariant):
            names |= {kernel.name: kernel.kind for kernel in family.linear.kernels(self.problem, tile, arch)}
        return [Variant(family.name, arch, kind, name) for name, kind in names.items()]

    def multiply(self, inputs: tuple[torch.Tensor, ...], tile: Any, out: torch.Tensor) -> None:
        """What the op computes, with one tile, into `out`."""
        weight = self.operands
        self.family.linear.run(
            *inputs, weight.codes, weight.block_scales, weight.row_scale, self.act_scale, self.bias,
            n=weight.n, k=weight.k, groups=weight.groups, out_dtype=out.dtype, tile=tile, out=out,
        )  # fmt: skip


@dataclass(frozen=True)
class ExpertsLayer:
    """One layer of routed experts prepared for a GPU's layout, E of them local."""

    name: str
    operands: PreparedExperts
    topk: int
    num_global_experts: int  # experts that ids name
    expert_map: torch.Tensor | None = None  # int [global experts] -> local id or -1
    swiglu_limit: float | None = None
    out_dtype: torch.dtype = torch.bfloat16
    ranks: int = 1  # data-parallel ranks whose tokens meet here
    act_scale_13: torch.Tensor | None = None  # f32 [1] of W4A4; None: each token's own
    act_scale_2: torch.Tensor | None = None  # f32 [E]; None with act_scale_13

    @property
    def family(self) -> Family:
        return family_for(self.operands.layout, self.operands.w13_codes.device)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(E, H, I)"""
        experts, hidden = self.operands.w2_row_scale.shape
        return experts, hidden, self.operands.w13_row_scale.shape[1] // 2

    @property
    def problem(self) -> ExpertsProblem:
        experts, hidden, intermediate = self.sizes
        static = self.act_scale_13 is not None
        return ExpertsProblem(
            hidden, intermediate, self.topk, experts, self.num_global_experts, self.out_dtype, static
        )

    def __str__(self) -> str:
        experts, hidden, intermediate = self.sizes
        return f"E = {experts} of {self.num_global_experts}, H = {hidden}, I = {intermediate}, top-k = {self.topk}"

    def tiles(self, max_tokens: int, batch_invariant: bool) -> dict[Any, int]:
        """Pairs of tiles that 1 .. max_tokens tokens take, each with the fewest tokens that take it."""
        return self.family.experts.chosen(self.problem, max_tokens * self.ranks, batch_invariant)

    def variants(self, max_tokens: int, batch_invariant: bool) -> list[Variant]:
        """The kernels behind `tiles`, those of one pair together."""
        family, arch = self.family, self.family.arch_of(self.operands.w13_codes.device)
        name_of = {tiles: name for name, tiles in family.experts.choices().items()}
        return [
            Variant(family.name, arch, "experts", name_of[tiles], self.problem.static)
            for tiles in self.tiles(max_tokens, batch_invariant)
        ]

    def multiply(self, inputs: tuple[torch.Tensor, ...], tiles: Any, out: torch.Tensor) -> None:
        """What the op computes, with one pair of tiles, into `out`."""
        weight, (x, topk_weights, topk_ids), (_, hidden, intermediate) = self.operands, inputs, self.sizes
        self.family.experts.run(
            x, weight.w13_codes, weight.w13_block_scales, weight.w13_row_scale, weight.w2_codes,
            weight.w2_block_scales, weight.w2_row_scale, topk_weights, topk_ids, self.act_scale_13, self.act_scale_2,
            self.expert_map, hidden=hidden, intermediate=intermediate, swiglu_limit=self.swiglu_limit,
            out_dtype=out.dtype, tiles=tiles, out=out,
        )  # fmt: skip


Layer = LinearLayer | ExpertsLayer
# (inputs, layer, tile, out) -> None, writes out; inputs are (x,), or for experts (x, top-k weights, top-k ids)
Multiply = Callable[[tuple[torch.Tensor, ...], Layer, Any, torch.Tensor], None]


def multiply(inputs: tuple[torch.Tensor, ...], layer: Layer, tile: Any, out: torch.Tensor) -> None:
    """What the op computes, with one tile."""
    layer.multiply(inputs, tile, out)


def _pick(count: int, wanted: int, generator: torch.Generator) -> torch.Tensor:
    """`wanted` different indices below `count`, ascending; the first and the last among them."""
    if count <= wanted:
        return torch.arange(count)
    inner = torch.randperm(count - 2, generator=generator)[: wanted - 2] + 1
    return torch.cat([torch.tensor([0, count - 1]), inner]).sort().values


def _panels(weight: PreparedLinear) -> int:
    """Panels of 64 rows that the groups' rows fill."""
    return weight.groups * -(-weight.n // weight.groups // PANEL_ROWS)


def as_multiplied(x: torch.Tensor, act_scale: torch.Tensor | None) -> torch.Tensor:
    """x [T, K] as W4A4 multiplies it, float64, with its global scale.

    Computed on the CPU: torch's own division on a GPU may differ in the last bit, and so the rounding.
    """
    plain = x.cpu()
    scale = (dynamic_act_scale(plain) if act_scale is None else act_scale.cpu()).reshape(-1, 1)
    return (dequantize(*quantize(plain, scale), dtype=torch.float64) * scale.double()).to(x.device)


def _exact(
    x: torch.Tensor, layer: LinearLayer, panels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rows n [R] of `panels`, their products with x in float64 [T, R], what size these have by chance [R])."""
    weight = layer.operands
    panels_per_group = _panels(weight) // weight.groups
    rows_per_group = weight.n // weight.groups
    group = panels // panels_per_group
    row = (panels % panels_per_group * PANEL_ROWS).unsqueeze(1) + torch.arange(PANEL_ROWS, device=x.device)
    real = row < rows_per_group  # the rest is padding
    n = ((group * rows_per_group).unsqueeze(1) + row)[real]
    values = dequantize(*plain_panels(weight, panels), dtype=torch.float64)  # [P, 64, K]
    seen = as_multiplied(x, layer.act_scale) if layer.family.w4a4 else x.double()
    tokens = seen.view(len(x), weight.groups, weight.k)[:, group]
    row_scale = weight.row_scale[n].double()
    exact = torch.einsum("tpk,prk->tpr", tokens, values)[:, real] * row_scale
    size = values.norm(dim=-1)[real] * row_scale
    if layer.act_scale is not None:
        size = size * layer.act_scale.double() * STATIC_SIZE
    if layer.bias is not None:
        bias = layer.bias[n].double()
        exact, size = exact + bias, size + bias.abs()
    return n, exact, torch.where(size > 0, size, torch.ones_like(size))


def _check_finite(out: torch.Tensor) -> None:
    """Raise SelfCheckFailed if a poisoned result was not written everywhere."""
    finite = torch.isfinite(out)
    if not bool(finite.all()):
        missing = (~finite).nonzero()
        raise SelfCheckFailed(
            f"{len(missing)} of {out.numel()} results were not written or are not finite, the first at "
            f"[m, n] = {missing[0].tolist()}"
        )


def check_product(
    layer: LinearLayer, m: int, tile: Any, generator: torch.Generator, multiply: Multiply = multiply
) -> float:
    """Multiply m random tokens by `layer` with `tile` -> the error over its limit, at most 1.

    `generator` is the CPU's. Raises SelfCheckFailed for a result that is not finite or too far from the
    float64 product.
    """
    weight = layer.operands
    device = weight.codes.device
    seed = int(torch.randint(1 << 31, (), generator=generator))
    x = torch.randn(
        m, weight.groups * weight.k, device=device, generator=torch.Generator(device).manual_seed(seed)
    )
    if layer.act_scale is not None:  # what it was chosen for: nothing saturates
        x = x * (layer.act_scale * STATIC_SIZE)
    x = x.to(torch.bfloat16)
    out = torch.full((m, weight.n), float("nan"), device=device, dtype=layer.out_dtype)
    multiply((x,), layer, tile, out)
    _check_finite(out)
    tokens = _pick(m, TOKENS, generator).to(device)
    rows, exact, size = _exact(x[tokens], layer, _pick(_panels(weight), PANELS, generator).to(device))
    # over their size, or rows with a small global scale would not count
    off = (out[tokens][:, rows].double() - exact) / size
    norm = (exact / size).norm()
    if norm == 0:
        if bool(off.any()):
            raise SelfCheckFailed("a weight of zeros gave a result")
        return 0.0
    error = float(off.norm() / norm)
    limit = layer.family.f32_limit
    if layer.out_dtype != torch.float32:
        limit = BF16_LIMIT * float(((exact.to(layer.out_dtype).double() - exact) / size).norm() / norm)
    if not error <= limit:
        worst = int(rows[off.norm(dim=0).argmax()])
        raise SelfCheckFailed(f"relative error {error:.3g}, allowed {limit:.3g}; row {worst} is furthest off")
    return error / limit


def _expert(layer: ExpertsLayer, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Decoded float64 weights of one local expert: (w13 [2I, H], gate rows first, w2 [H, I])."""
    weight = layer.operands
    tensors = {key: value for key, value in vars(weight).items() if isinstance(value, torch.Tensor)}
    one = replace(weight, **{key: value[expert : expert + 1] for key, value in tensors.items()})
    w13_codes, w13_scales, w2_codes, w2_scales = (t[0] for t in plain_experts(one))
    return (
        dequantize(w13_codes, w13_scales, dtype=torch.float64)
        * weight.w13_row_scale[expert].double().unsqueeze(1),
        dequantize(w2_codes, w2_scales, dtype=torch.float64)
        * weight.w2_row_scale[expert].double().unsqueeze(1),
    )


def check_experts(
    layer: ExpertsLayer, m: int, tiles: Any, generator: torch.Generator, multiply: Multiply = multiply
) -> float:
    """m random tokens through random experts of `layer` -> the error over its limit, at most 1.

    The limit follows from rounding to bf16 what every fused path stores: the intermediate, each expert's
    result and their sum. Under W4A4 the intermediate is rounded to NVFP4, where the last bit of a sum can take one of
    its values to the next, a third away: then half of the compared tokens have to keep the limit and all of them
    FLIPPED_LIMIT. Raises as `check_product`.
    """
    w4a4 = layer.family.w4a4
    if w4a4:
        m = max(m, W4A4_TOKENS)
    _, hidden, intermediate = layer.sizes
    device = layer.operands.w13_codes.device
    on_device = torch.Generator(device).manual_seed(int(torch.randint(1 << 31, (), generator=generator)))
    x = torch.randn(m, hidden, device=device, generator=on_device)
    if layer.act_scale_13 is not None:  # what it was chosen for: nothing saturates
        x = x * (layer.act_scale_13 * STATIC_SIZE)
    x = x.to(torch.bfloat16)
    ids = (
        torch.rand(m, layer.num_global_experts, device=device, generator=on_device)
        .topk(layer.topk)
        .indices.to(torch.int32)
    )
    weights = torch.rand(m, layer.topk, device=device, generator=on_device) + 0.5
    out = torch.full((m, hidden), float("nan"), device=device, dtype=layer.out_dtype)
    # the kernels' scratch comes from this memory: what they leave out shows
    scratch = [
        torch.full((m * layer.topk, width), float("nan"), device=device, dtype=torch.bfloat16)
        for width in (intermediate, hidden)
    ]
    del scratch
    multiply((x, weights, ids), layer, tiles, out)
    _check_finite(out)
    local = ids.long() if layer.expert_map is None else layer.expert_map.long()[ids.long()]
    served = (local >= 0).any(dim=1)
    if bool(out[~served].any()):
        raise SelfCheckFailed("tokens without a local expert got a result")
    candidates = served.nonzero().flatten() if bool(served.any()) else torch.arange(m, device=device)
    wanted = W4A4_TOKENS if w4a4 else EXPERT_TOKENS
    tokens = candidates[_pick(len(candidates), wanted, generator).to(device)].tolist()
    exact = torch.zeros(len(tokens), hidden, device=device, dtype=torch.float64)
    rounded = exact.clone()
    for i, token in enumerate(tokens):
        for choice, expert in enumerate(local[token].tolist()):
            if expert < 0:
                continue
            w13, w2 = _expert(layer, expert)
            seen = as_multiplied(x[token : token + 1], layer.act_scale_13)[0] if w4a4 else x[token]
            h = swiglu(*(w13 @ seen.double()).chunk(2), layer.swiglu_limit)
            by = float(weights[token, choice])
            if w4a4:
                of_expert = None if layer.act_scale_2 is None else layer.act_scale_2.view(-1)[expert]
                h = as_multiplied(h.to(torch.bfloat16).unsqueeze(0), of_expert)[0]
                exact[i] += by * (w2 @ h)
                rounded[i] += by * (w2 @ h).to(torch.bfloat16).double()
                continue
            exact[i] += by * (w2 @ h)
            rounded[i] += by * (w2 @ h.to(torch.bfloat16).double()).to(torch.bfloat16).double()
    off, norm = out[tokens].double() - exact, exact.norm()
    if norm == 0:
        if bool(off.any()):
            raise SelfCheckFailed("tokens whose experts are zeros, or elsewhere, got a result")
        return 0.0
    error = float(off.norm() / norm)
    limit = BF16_LIMIT * float((rounded.to(layer.out_dtype).double() - exact).norm() / norm)
    if w4a4 and error <= FLIPPED_LIMIT:
        of_token = (off.norm(dim=1) / exact.norm(dim=1).clamp(min=1e-30)).sort().values
        error = float(of_token[(len(of_token) - 1) // 2])
    if not error <= limit:
        worst = tokens[int(off.norm(dim=1).argmax())]
        raise SelfCheckFailed(
            f"relative error {error:.3g}, allowed {limit:.3g}; token {worst} is furthest off"
        )
    return error / limit
