"""What the self-check compares: layers with prepared operands, their products, and the error these may have.

Each product is written over NaN, so that what no CTA stored shows, and compared in float64 with the weight decoded
from the operands themselves; under W4A4 with the activations rounded by reference.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

from ..blackwell.quantize import arch_of
from ..format import SCALE_DTYPE
from ..prepare import PreparedExperts, PreparedLinear, plain_experts, plain_linear
from ..reference import dequantize, dynamic_act_scale, quantize, swiglu
from ..sm90 import experts as sm90_experts
from ..sm90 import linear as sm90_linear
from ..sm90.layout import PANEL_ROWS, separate_gate_up, unpack_linear
from ..sm90.tiles import ExpertTiles, LinearTile, chosen, chosen_experts
from ..support import Layout, block_scaled_kernels

PANELS = 8  # weight panels a product is compared on: the first, the last and random ones
TOKENS = 64  # rows of x it is compared on
EXPERT_TOKENS = 2  # the same for experts, of which each token meets several
W4A4_TOKENS = 4  # and of those that round their intermediate to NVFP4
FLIPPED_LIMIT = 0.25  # relative, of tokens where such a value went to the next code
BF16_LIMIT = 1.5  # times the error of rounding the exact product to bf16
F32_LIMIT = 2e-5  # relative, of a float32 result
BLACKWELL_F32_LIMIT = 2e-4  # the same of FP4 tensor cores, whose accumulation nobody here has measured
STATIC_SIZE = 400.0  # of random activations, times their act_scale, whose tensor reaches 6 * 448
EXPERTS = "nvfp4_experts_w4a4 "  # how names of experts' kernels for W4A4 begin


class SelfCheckFailed(RuntimeError):
    """A kernel is wrong, crashed or hung; the message says which and how."""


@dataclass(frozen=True)
class Layer:
    """One linear layer with prepared operands (Layout.SM90 or BLOCK_SCALED)."""

    name: str
    operands: PreparedLinear
    out_dtype: torch.dtype
    bias: torch.Tensor | None = None
    act_scale: torch.Tensor | None = None  # f32 [1] of W4A4; None: each token's own

    @property
    def block_scaled(self) -> bool:
        return self.operands.layout is Layout.BLOCK_SCALED

    @property
    def shape(self) -> tuple:
        dynamic = self.act_scale is None
        return (
            self.operands.n, self.operands.k, self.operands.groups, self.out_dtype, self.bias is not None, dynamic
        )  # fmt: skip

    def __str__(self) -> str:
        weight = self.operands
        return f"N = {weight.n}, K = {weight.k}, groups = {weight.groups}, {self.out_dtype}"

    def tiles(self, max_tokens: int, batch_invariant: bool) -> dict[LinearTile, int]:
        """Tiles that 1 .. max_tokens tokens take, each with a number of tokens that takes it."""
        if self.block_scaled:
            weight = self.operands
            kernels = block_scaled_kernels("linear", weight.codes.device)
            plain = self.bias is None and self._aligned()
            return kernels.chosen(weight.n, weight.k, weight.groups, max_tokens, plain)
        return chosen(
            *self._problem(), max_tokens, batch_invariant, plain=self.bias is None and self._aligned()
        )

    def kernels(self, max_tokens: int, batch_invariant: bool) -> list[str]:
        """Names of the kernels behind `tiles`."""
        tiles = self.tiles(max_tokens, batch_invariant)
        if self.block_scaled:
            weight = self.operands
            kernels = block_scaled_kernels("linear", weight.codes.device)
            return kernels.kernel_names(
                tiles, weight.n, weight.groups, self.out_dtype, self.bias is not None, self.act_scale is None,
                weight.codes.device,
            )  # fmt: skip
        has_bias, aligned = self.bias is not None, self._aligned()
        return [sm90_linear.kernel_name(tile, self.out_dtype, has_bias, aligned) for tile in tiles]

    def _problem(self) -> tuple[int, int, int]:
        """(rows, K, groups) as the kernel sees them: with the padding between groups."""
        weight = self.operands
        return (
            (weight.codes.shape[0] * PANEL_ROWS if weight.groups > 1 else weight.n),
            weight.k,
            weight.groups,
        )

    def _aligned(self) -> bool:
        if self.block_scaled:
            return self.operands.n // self.operands.groups * self.out_dtype.itemsize % 16 == 0
        return self._problem()[0] * self.out_dtype.itemsize % 16 == 0


@dataclass(frozen=True)
class ExpertsLayer:
    """One layer of prepared routed experts (Layout.SM90 or BLOCK_SCALED), E of them local."""

    name: str
    operands: PreparedExperts
    topk: int
    known: int  # experts that ids name
    expert_map: torch.Tensor | None = None  # int [known] -> local id or -1
    swiglu_limit: float | None = None
    out_dtype: torch.dtype = torch.bfloat16
    ranks: int = 1  # data-parallel ranks whose tokens meet here
    act_scale_13: torch.Tensor | None = None  # f32 [1] of W4A4; None: each token's own
    act_scale_2: torch.Tensor | None = None  # f32 [E]; None with act_scale_13

    @property
    def block_scaled(self) -> bool:
        return self.operands.layout is Layout.BLOCK_SCALED

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(E, H, I)"""
        experts, hidden = self.operands.w2_row_scale.shape
        return experts, hidden, self.operands.w13_row_scale.shape[1] // 2

    @property
    def shape(self) -> tuple:
        return *self.sizes, self.topk, self.known, self.out_dtype, self.act_scale_13 is None

    def __str__(self) -> str:
        experts, hidden, intermediate = self.sizes
        return f"E = {experts} of {self.known}, H = {hidden}, I = {intermediate}, top-k = {self.topk}"

    def tiles(self, max_tokens: int, batch_invariant: bool) -> dict[ExpertTiles, int]:
        """Tiles that 1 .. max_tokens tokens take, each with a number of tokens that takes it."""
        experts, hidden, intermediate = self.sizes
        most = max_tokens * self.ranks
        if self.block_scaled:
            return self._blackwell().chosen_experts(self.topk, self.known, most)
        return chosen_experts(hidden, intermediate, self.topk, experts, self.known, most, batch_invariant)

    def kernels(self, max_tokens: int, batch_invariant: bool) -> list[str]:
        """Names of the kernels behind `tiles`, those of one choice together."""
        if self.block_scaled:
            arch = arch_of(self.operands.w13_codes.device)
            policy = "dynamic" if self.act_scale_13 is None else "static"
            names = map(self._blackwell().tiles_name, self.tiles(max_tokens, batch_invariant))
            return [f"{EXPERTS}{arch} {policy} {name}" for name in names]
        return [sm90_experts.tiles_name(tiles) for tiles in self.tiles(max_tokens, batch_invariant)]

    def _blackwell(self) -> ModuleType:
        return block_scaled_kernels("experts", self.operands.w13_codes.device)


# (inputs, layer, tile, out) -> None, writes out; inputs are (x,), or for experts (x, top-k weights, top-k ids)
Multiply = Callable[
    [tuple[torch.Tensor, ...], Layer | ExpertsLayer, LinearTile | ExpertTiles, torch.Tensor], None
]


def multiply(
    inputs: tuple[torch.Tensor, ...],
    layer: Layer | ExpertsLayer,
    tile: LinearTile | ExpertTiles,
    out: torch.Tensor,
) -> None:
    """What the op computes, with one tile."""
    weight = layer.operands
    if isinstance(layer, Layer) and layer.block_scaled:
        block_scaled_kernels("linear", weight.codes.device).run(
            *inputs, weight.codes, weight.block_scales, weight.row_scale, layer.act_scale, layer.bias,
            n=weight.n, k=weight.k, groups=weight.groups, out_dtype=out.dtype, config=tile, out=out,
        )  # fmt: skip
        return
    if isinstance(layer, Layer):
        sm90_linear.run(
            *inputs, weight.codes, weight.block_scales, weight.row_scale, layer.bias,
            n=weight.n, k=weight.k, groups=weight.groups, out_dtype=out.dtype, config=tile, out=out,
        )  # fmt: skip
        return
    x, weights, ids = inputs
    _, hidden, intermediate = layer.sizes
    if layer.block_scaled:
        block_scaled_kernels("experts", weight.w13_codes.device).run(
            x, weight.w13_codes, weight.w13_block_scales, weight.w13_row_scale, weight.w2_codes,
            weight.w2_block_scales, weight.w2_row_scale, weights, ids, layer.act_scale_13, layer.act_scale_2,
            layer.expert_map, hidden=hidden, intermediate=intermediate, swiglu_limit=layer.swiglu_limit,
            out_dtype=out.dtype, config=tile, out=out,
        )  # fmt: skip
        return
    sm90_experts.run(
        x, weight.w13_codes, weight.w13_block_scales, weight.w13_row_scale, weight.w2_codes, weight.w2_block_scales,
        weight.w2_row_scale, weights, ids, layer.expert_map, hidden=hidden, intermediate=intermediate,
        swiglu_limit=layer.swiglu_limit, out_dtype=out.dtype, config=tile, out=out,
    )  # fmt: skip


def _pick(count: int, wanted: int, generator: torch.Generator) -> torch.Tensor:
    """`wanted` different indices below `count`, ascending; the first and the last among them."""
    if count <= wanted:
        return torch.arange(count)
    inner = torch.randperm(count - 2, generator=generator)[: wanted - 2] + 1
    return torch.cat([torch.tensor([0, count - 1]), inner]).sort().values


def _panels(layer: Layer) -> int:
    """Panels of 64 rows that the groups' rows fill."""
    return layer.operands.groups * -(-layer.operands.n // layer.operands.groups // PANEL_ROWS)


def _values(layer: Layer, panels: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Weights of `panels` without the global scale, float64 [P, 64, K]; `rows` [P, 64] are theirs."""
    weight = layer.operands
    if layer.block_scaled:
        codes, scales = plain_linear(weight)
        rows = rows.clamp(max=weight.n - 1)
        return dequantize(codes[rows], scales.view(torch.uint8)[rows].view(SCALE_DTYPE), dtype=torch.float64)
    plain = unpack_linear(
        weight.codes[panels], weight.block_scales[panels], PANEL_ROWS * len(panels), weight.k
    )
    return dequantize(*plain, dtype=torch.float64).view(-1, PANEL_ROWS, weight.k)


def as_multiplied(x: torch.Tensor, act_scale: torch.Tensor | None) -> torch.Tensor:
    """x [T, K] as W4A4 multiplies it, float64, with its global scale.

    Computed on the CPU: torch's own division on a GPU may differ in the last bit, and so the rounding.
    """
    plain = x.cpu()
    scale = (dynamic_act_scale(plain) if act_scale is None else act_scale.cpu()).reshape(-1, 1)
    return (dequantize(*quantize(plain, scale), dtype=torch.float64) * scale.double()).to(x.device)


def _exact(
    x: torch.Tensor, layer: Layer, panels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rows n [R] of `panels`, their products with x in float64 [T, R], what size these have by chance [R])."""
    weight = layer.operands
    panels_per_group = _panels(layer) // weight.groups
    rows_per_group = weight.n // weight.groups
    group = panels // panels_per_group
    row = (panels % panels_per_group * PANEL_ROWS).unsqueeze(1) + torch.arange(PANEL_ROWS, device=x.device)
    real = row < rows_per_group  # the rest is padding
    n = (group * rows_per_group).unsqueeze(1) + row
    values = _values(layer, panels, n)
    n = n[real]
    seen = as_multiplied(x, layer.act_scale) if layer.block_scaled else x.double()
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
    layer: Layer, m: int, tile: LinearTile, generator: torch.Generator, multiply: Multiply = multiply
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
    rows, exact, size = _exact(x[tokens], layer, _pick(_panels(layer), PANELS, generator).to(device))
    # over their size, or rows with a small global scale would not count
    off = (out[tokens][:, rows].double() - exact) / size
    norm = (exact / size).norm()
    if norm == 0:
        if bool(off.any()):
            raise SelfCheckFailed("a weight of zeros gave a result")
        return 0.0
    error = float(off.norm() / norm)
    limit = BLACKWELL_F32_LIMIT if layer.block_scaled else F32_LIMIT
    if layer.out_dtype != torch.float32:
        limit = BF16_LIMIT * float(((exact.to(layer.out_dtype).double() - exact) / size).norm() / norm)
    if not error <= limit:
        worst = int(rows[off.norm(dim=0).argmax()])
        raise SelfCheckFailed(f"relative error {error:.3g}, allowed {limit:.3g}; row {worst} is furthest off")
    return error / limit


def _expert(layer: ExpertsLayer, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Decoded float64 weights of one local expert: (w13 [2I, H], gate rows first, w2 [H, I])."""
    weight, (_, hidden, intermediate) = layer.operands, layer.sizes
    if layer.block_scaled:
        one = {key: value[expert : expert + 1] for key, value in vars(weight).items() if key != "layout"}
        plain = [t[0] for t in plain_experts(PreparedExperts(**one, layout=weight.layout))]
        w13, w2 = (dequantize(*plain[i : i + 2], dtype=torch.float64) for i in (0, 2))
        return (
            w13 * weight.w13_row_scale[expert].double().unsqueeze(1),
            w2 * weight.w2_row_scale[expert].double().unsqueeze(1),
        )
    w13 = unpack_linear(weight.w13_codes[expert], weight.w13_block_scales[expert], 2 * intermediate, hidden)
    w13 = dequantize(*(separate_gate_up(t) for t in w13), dtype=torch.float64)
    w2 = unpack_linear(weight.w2_codes[expert], weight.w2_block_scales[expert], hidden, intermediate)
    w2 = dequantize(*w2, dtype=torch.float64)
    return (
        w13 * weight.w13_row_scale[expert].double().unsqueeze(1),
        w2 * weight.w2_row_scale[expert].double().unsqueeze(1),
    )


def check_experts(
    layer: ExpertsLayer, m: int, tiles: ExpertTiles, generator: torch.Generator, multiply: Multiply = multiply
) -> float:
    """m random tokens through random experts of `layer` -> the error over its limit, at most 1.

    The limit follows from rounding to bf16 what every fused path stores: the intermediate, each expert's
    result and their sum. Under W4A4 the intermediate is rounded to NVFP4, where the last bit of a sum can take one of
    its values to the next, a third away: then half of the compared tokens have to keep the limit and all of them
    FLIPPED_LIMIT. Raises as `check_product`.
    """
    if layer.block_scaled:
        m = max(m, W4A4_TOKENS)
    _, hidden, intermediate = layer.sizes
    device = layer.operands.w13_codes.device
    on_device = torch.Generator(device).manual_seed(int(torch.randint(1 << 31, (), generator=generator)))
    x = torch.randn(m, hidden, device=device, generator=on_device)
    if layer.act_scale_13 is not None:  # what it was chosen for: nothing saturates
        x = x * (layer.act_scale_13 * STATIC_SIZE)
    x = x.to(torch.bfloat16)
    ids = (
        torch.rand(m, layer.known, device=device, generator=on_device)
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
    wanted = W4A4_TOKENS if layer.block_scaled else EXPERT_TOKENS
    tokens = candidates[_pick(len(candidates), wanted, generator).to(device)].tolist()
    exact = torch.zeros(len(tokens), hidden, device=device, dtype=torch.float64)
    rounded = exact.clone()
    for i, token in enumerate(tokens):
        for choice, expert in enumerate(local[token].tolist()):
            if expert < 0:
                continue
            w13, w2 = _expert(layer, expert)
            seen = (
                as_multiplied(x[token : token + 1], layer.act_scale_13)[0] if layer.block_scaled else x[token]
            )
            h = swiglu(*(w13 @ seen.double()).chunk(2), layer.swiglu_limit)
            by = float(weights[token, choice])
            if layer.block_scaled:
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
    if layer.block_scaled and error <= FLIPPED_LIMIT:
        of_token = (off.norm(dim=1) / exact.norm(dim=1).clamp(min=1e-30)).sort().values
        error = float(of_token[(len(of_token) - 1) // 2])
    if not error <= limit:
        worst = tokens[int(off.norm(dim=1).argmax())]
        raise SelfCheckFailed(
            f"relative error {error:.3g}, allowed {limit:.3g}; token {worst} is furthest off"
        )
    return error / limit
