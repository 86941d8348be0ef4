"""Which tile computes which problem: what is legal, stated once, and the measured choice by (N, K, M).

Plain data: imports neither torch nor CuTe DSL, so tests, bench and ahead-of-time compilation share it.
"""

import json
import math
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

from .. import tile_choice
from ..tile_choice import TilePair

PANEL_ROWS = 64  # weight rows a packed panel holds (sm90/layout.py)
BLOCK_K = 64
BLOCK_CODE_BYTES = PANEL_ROWS * BLOCK_K // 2
BLOCK_SCALE_BYTES = PANEL_ROWS * BLOCK_K // 16
SM90_SHARED_MEMORY = 227 * 1024  # bytes one CTA may use
MAX_CLUSTER = 8  # the portable cluster size
PANEL_CLOCKS = 2.2  # of a k block's wgmmas, for each panel and token: 4096 multiply-adds a clock, at 90%
LEAST_BLOCK_CLOCKS = (
    520  # of a k block: weights are decoded for any number of tokens; measured with tails of 64
)
BULK_BUFFERS = 3  # pieces of a panel's results: one written, one read by TMA, one between


@dataclass(frozen=True)
class NarrowTile:
    """mma.sync tiles for few tokens: one panel of weight rows x `tokens`, K split over warps and a cluster."""

    tokens: int = 8
    k_warps: int = 2  # groups of four warps, each taking its own k blocks of a stage
    blocks: int = 2  # k blocks of 64 a warp takes from a stage
    stages: int = 4
    split_k: int = 1  # CTAs of a cluster that share a tile's K
    signal: bool = False  # partial sums count themselves in where they arrive: no barrier of the cluster

    @property
    def rows(self) -> int:
        return PANEL_ROWS

    @property
    def stage_blocks(self) -> int:
        return self.k_warps * self.blocks

    @property
    def stage_weight_bytes(self) -> int:
        return self.stage_blocks * (BLOCK_CODE_BYTES + BLOCK_SCALE_BYTES)

    @property
    def stage_bytes(self) -> int:
        return self.stage_weight_bytes + self.stage_blocks * self.tokens * BLOCK_K * 2

    @property
    def token_step(self) -> int:
        """Tokens by which the boxes of TMA loads differ in height: what the swizzle repeats by."""
        return 8

    @property
    def box_steps(self) -> int:
        """Steps of the highest box of a TMA load."""
        return self.tokens // self.token_step

    @property
    def partial_bytes(self) -> int:
        return self.k_warps * PANEL_ROWS * self.tokens * 4

    @property
    def shared_memory(self) -> int:
        return self.stages * (self.stage_bytes + 16) + self.partial_bytes + 3 * 1024

    @property
    def threads(self) -> int:
        return 128 * self.k_warps + 32

    @property
    def streams(self) -> bool:
        """Whether a warp has its rows' whole sums: experts' kernels then run one CTA through many tiles."""
        return self.k_warps == 1 and self.split_k == 1

    @property
    def ctas_per_sm(self) -> int:
        """As many as shared memory holds."""
        return min(6, SM90_SHARED_MEMORY // (self.shared_memory + 1024))

    def takes(self, m: int) -> bool:
        """Whether the tile computes m tokens: all do."""
        return True

    def fits_groups(self, panels_per_group: int, groups: int) -> bool:
        """One panel lies in one group."""
        return True

    def check(self) -> None:
        """Raise ValueError for a tile the kernel cannot run."""
        if self.tokens not in (8, 16, 24, 32):
            raise ValueError(f"{self}: tokens must be 8, 16, 24 or 32")
        if self.k_warps not in (1, 2, 4) or self.blocks not in (1, 2):
            raise ValueError(f"{self}: k_warps must be 1, 2 or 4 and blocks 1 or 2")
        _check_shared(self)


@dataclass(frozen=True)
class WideTile:
    """wgmma tiles: `panels` x 64 weight rows by `tokens`, one warpgroup a panel."""

    panels: int = 2
    tokens: int = 128
    blocks: int = 1  # k blocks of 64 a stage
    stages: int = 6
    split_k: int = 1
    ctas_per_sm: int = 1
    persistent: bool = False
    multicast: int = 1  # CTAs of a cluster that share the tokens and differ in rows
    lag: int = 0  # stages a warpgroup starts a tile behind the one before it: one stores, another multiplies
    bulk: bool = False  # two-byte results leave shared memory by TMA
    signal: bool = False  # as NarrowTile's
    tail: int = 0  # tokens of the parts into which tiles of the last, incomplete wave are cut; 0: not cut

    @property
    def rows(self) -> int:
        return PANEL_ROWS * self.panels

    @property
    def token_step(self) -> int:
        """Tokens by which the boxes of TMA loads differ in height: a quarter of a tile where swizzle and tail fit."""
        most, part = self.tokens // self.multicast, (self.tail or self.tokens) // self.multicast
        quarter = most // 4
        return quarter if quarter % 8 == 0 and part % quarter == 0 else math.gcd(part, most // 2)

    @property
    def box_steps(self) -> int:
        """Steps of the highest box of a TMA load."""
        return self.tokens // self.multicast // self.token_step

    @property
    def part_percent(self) -> int:
        """A part's time in percent of a tile's: below LEAST_BLOCK_CLOCKS fewer tokens save none."""
        tile, part = (
            max(PANEL_CLOCKS * self.panels * n, LEAST_BLOCK_CLOCKS) for n in (self.tokens, self.tail)
        )
        return round(100 * part / tile)

    @property
    def stage_weight_bytes(self) -> int:
        return self.blocks * self.panels * (BLOCK_CODE_BYTES + BLOCK_SCALE_BYTES)

    @property
    def stage_bytes(self) -> int:
        return self.stage_weight_bytes + self.blocks * self.tokens * BLOCK_K * 2

    @property
    def output_tokens(self) -> int:
        """Tokens staged through shared memory at a time, for two-byte results; half as many of four bytes."""
        return min(32, self.tokens)

    @property
    def output_bytes(self) -> int:
        if self.split_k > 1:
            slices = -(-self.tokens // 8 // self.split_k)
            return self.split_k * slices * self.panels * 128 * 16
        if self.bulk:
            return BULK_BUFFERS * self.panels * self.output_tokens * PANEL_ROWS * 2
        return 2 * self.panels * self.output_tokens * (PANEL_ROWS + 8) * 2

    @property
    def shared_memory(self) -> int:
        return self.stages * (self.stage_bytes + 16) + self.output_bytes + 3 * 1024

    @property
    def threads(self) -> int:
        """One warpgroup a panel and a producer: a warp, or a warpgroup where registers have to be moved."""
        return 128 * self.panels + (32 if self.panels == 1 else 128)

    @property
    def consumer_registers(self) -> int:
        """Registers a consumer thread gets when the producer warpgroup gives up its share."""
        if self.panels == 3:
            return 160
        return {1: 240, 2: 104}[self.ctas_per_sm]  # multiples of 8 within 512 per lane of a scheduler

    def takes(self, m: int) -> bool:
        """Whether the tile computes m tokens: all do."""
        return True

    def fits_groups(self, panels_per_group: int, groups: int) -> bool:
        """Whether CTAs that share tokens stay within one group of a block-diagonal weight."""
        return groups == 1 or panels_per_group % (self.panels * self.multicast) == 0

    def check(self) -> None:
        """Raise ValueError for a tile the kernel cannot run."""
        if self.panels not in (1, 2, 3, 4) or self.blocks not in (1, 2, 4):
            raise ValueError(f"{self}: panels must be 1 to 4, and blocks 1, 2 or 4")
        if self.tokens % 16 or not 16 <= self.tokens <= 256 or self.tokens % self.output_tokens:
            raise ValueError(f"{self}: tokens must be 16 or a multiple of 32 up to 256")
        if self.split_k > 1 and (self.persistent or self.multicast > 1):
            raise ValueError(f"{self}: split_k shares neither a cluster nor a persistent grid")
        if self.ctas_per_sm not in (1, 2):
            raise ValueError(f"{self}: ctas_per_sm must be 1 or 2")
        if self.panels == 3 and (self.ctas_per_sm > 1 or self.tokens > 192):
            raise ValueError(f"{self}: three panels take a whole SM and at most 192 tokens")
        if self.bulk and (self.split_k > 1 or self.tokens % 32):
            raise ValueError(f"{self}: TMA stores whole sums, 32 tokens at a time")
        if self.lag and (not self.persistent or not 0 < self.lag * (self.panels - 1) < self.stages):
            raise ValueError(f"{self}: only warpgroups of a persistent tile lag, by less than its stages")
        if self.multicast not in (1, 2) or self.tokens % (8 * self.multicast):
            raise ValueError(f"{self}: multicast must be 1 or 2")
        if self.tail:
            if not self.persistent:
                raise ValueError(f"{self}: only persistent tiles have a tail")
            if self.tail % 32 or not 0 < self.tail < self.tokens or self.tokens % self.tail:
                raise ValueError(f"{self}: a tail is a multiple of 32 that divides the tile's tokens")
        _check_shared(self)


LinearTile = NarrowTile | WideTile


# what the experts' kernels know: {field: its values}
_NARROW_EXPERTS = {"signal": (False,)}
_WIDE_EXPERTS = {
    "panels": (1, 2, 4),
    "tokens": tuple(range(32, 257, 32)),
    "split_k": (1,),
    "multicast": (1,),
    "lag": (0,),
    "bulk": (False,),
    "signal": (False,),
    "tail": (0,),
}


def check_for_experts(tile: LinearTile) -> None:
    """Raise ValueError for a tile the experts' kernels cannot run."""
    tile.check()
    for field, allowed in (_WIDE_EXPERTS if isinstance(tile, WideTile) else _NARROW_EXPERTS).items():
        if (value := getattr(tile, field)) not in allowed:
            raise ValueError(
                f"{tile}: {field} of an experts' tile must be {' or '.join(map(str, allowed))}, got {value}"
            )


def _check_shared(tile: LinearTile) -> None:
    if tile.signal and tile.split_k == 1:
        raise ValueError(f"{tile}: only shares of split_k signal")
    if not 1 <= tile.split_k <= MAX_CLUSTER or MAX_CLUSTER % tile.split_k:
        raise ValueError(f"{tile}: split_k must be 1, 2, 4 or 8")
    if tile.stages < 2:
        raise ValueError(f"{tile}: a pipeline needs at least 2 stages")
    ctas = tile.ctas_per_sm if isinstance(tile, WideTile) else 1
    per_cta = SM90_SHARED_MEMORY // ctas - 1024 * (ctas > 1)
    if tile.shared_memory > per_cta:
        raise ValueError(f"{tile}: needs {tile.shared_memory} bytes of shared memory, {per_cta} are there")


def choose(n: int, k: int, m: int, groups: int, batch_invariant: bool, plain: bool = True) -> LinearTile:
    """The tile for out [m, n] with inner dimension k.

    Measured problems take what was fastest; others the rule of the nearest measured one (by ratio of n and
    of k). With `batch_invariant` the split of K depends on n and k alone and only the tokens of a tile on
    m: a row's sums are then the same whatever the batch. `plain` results have no bias and rows of whole
    16-byte pieces, as all of DeepSeek-V4's; the others take one of four tiles, invariant too.
    """
    if not plain:
        return _general(n, k, m)
    if batch_invariant:
        return _invariant(n, k, m)
    return _measured(n, k, groups, m)


@cache
def chosen(
    n: int, k: int, groups: int, max_tokens: int, batch_invariant: bool, plain: bool = True
) -> dict[LinearTile, int]:
    """Every tile `choose` takes for 1 .. max_tokens tokens, each with the fewest tokens that take it."""
    return tile_choice.chosen(lambda m: choose(n, k, m, groups, batch_invariant, plain), max_tokens)


def _measured(n: int, k: int, groups: int, m: int) -> LinearTile:
    rules = _rules(n, k, groups)
    return next((tile for most, tile in rules if m <= most), rules[-1][1])


@cache
def _rules(n: int, k: int, groups: int) -> tuple[tuple[int, LinearTile], ...]:
    """(most tokens, tile) of the nearest measured problem, ascending, as a weight [n, k] can take them."""
    panels_per_group = -(-n // PANEL_ROWS) // groups

    def distance(problem: tuple[int, int, int]) -> tuple[float, bool]:
        ratio = abs(math.log(problem[0] / n)) + abs(math.log(problem[1] / k))
        return ratio, (problem[2] > 1) != (groups > 1)

    def fitting(tile: LinearTile) -> LinearTile:
        return tile if tile.fits_groups(panels_per_group, groups) else ungrouped(tile)

    _, layers = _measured_tiles()
    return tuple((most, fitting(tile)) for most, tile in layers[min(layers, key=distance)])


def _read(file: str) -> dict:
    """A file of measured tiles, as bench/choice.py writes it."""
    return json.loads(Path(__file__).with_name(file).read_text())


def _tile(fields: dict) -> LinearTile:
    """The tile of its class and the fields that differ from the class's default."""
    kind = {"narrow": NarrowTile, "wide": WideTile}[fields["class"]]
    return kind(**{name: value for name, value in fields.items() if name != "class"})


@cache
def _measured_tiles() -> tuple[list[LinearTile], dict[tuple[int, int, int], list[tuple[int, LinearTile]]]]:
    """(every tile, {(n, k, groups): [(most tokens, tile), ...], ascending}) of tiles_linear.json."""
    table = _read("tiles_linear.json")
    tiles = [_tile(fields) for fields in table["tiles"]]
    return tiles, {
        (layer["n"], layer["k"], layer["groups"]): [
            (int(most), tiles[index]) for most, index in layer["tile_by_most_tokens"].items()
        ]
        for layer in table["layers"]
    }


def ungrouped(tile: WideTile) -> WideTile:
    """The nearest tile of one panel, which fits groups of any number of panels."""
    even = tile.tokens // tile.output_tokens % 2 == 0  # without TMA stores only these can be persistent
    return replace(
        tile,
        panels=1,
        multicast=1,
        stages=min(tile.stages, 4),
        ctas_per_sm=1,
        persistent=tile.persistent and even,
        lag=0,
        bulk=False,
        tail=0,
    )


def _invariant(n: int, k: int, m: int) -> WideTile:
    panels = -(-n // PANEL_ROWS)
    split = 1
    while split < MAX_CLUSTER and panels * split < 96 and k // split > 1024:
        split *= 2
    tokens, stages = (16, 4) if m <= 16 else (64, 4) if m <= 512 else (128, 3)
    return WideTile(1, tokens, 2, stages, split)


def _general(n: int, k: int, m: int) -> WideTile:
    split = 4 if -(-n // PANEL_ROWS) < 48 and k > 2048 else 1
    return WideTile(1, 16, 2, 4, split) if m <= 16 else WideTile(1, 128, 2, 3, split)


def general() -> list[WideTile]:
    """Every tile for results with a bias or ragged rows."""
    return [_general(n, 4096, m) for n in (64, 8192) for m in (1, 64)]


def shipped() -> list[LinearTile]:
    """Every tile `choose` can return, for ahead-of-time compilation."""
    measured, _ = _measured_tiles()
    invariant = [_invariant(64 * 8, 512 << i, m) for i in range(8) for m in (1, 64, 1024)]
    alone = [ungrouped(c) for c in measured if isinstance(c, WideTile) and c.panels * c.multicast > 1]
    return list(dict.fromkeys([*measured, *invariant, *general(), *alone]))


@dataclass(frozen=True)
class ExpertTiles(TilePair):
    """The tiles of an experts layer's two products; both take the same tokens, the slots of a routing tile."""

    w13: LinearTile
    w2: LinearTile

    @cached_property
    def step(self) -> int:
        """An expert's tiles have whole steps of slots, but for the last: what its widths differ by."""
        widths = expert_widths(self.w13) if isinstance(self.w13, WideTile) else ()
        return widths[1] - widths[0] if len(widths) > 1 else self.w13.tokens

    def check(self) -> None:
        """Raise ValueError for a tile the kernels cannot run."""
        self.check_tokens()
        for tile in (self.w13, self.w2):
            check_for_experts(tile)
        if self.w13.split_k == MAX_CLUSTER:
            raise ValueError(f"{self.w13}: with split_k = 8 a gate row and its up row lie in different CTAs")


def expert_widths(tile: WideTile) -> tuple[int, ...]:
    """The numbers of tokens that an experts kernel multiplies: a tile with fewer slots takes the next of them.

    More than four, or more than one where two CTAs share an SM, take more registers than there are.
    """
    step = 32 if tile.tokens <= 128 else 64
    widths = tuple(range(step, tile.tokens + 1, step))
    return widths[-4:] if tile.ctas_per_sm == 1 else widths[-1:]


# (most tokens an expert gets on average, tiles) whose sums do not depend on the batch
_INVARIANT_EXPERTS = (
    (28, WideTile(2, 32, 2, 4, ctas_per_sm=2, persistent=True)),
    (56, WideTile(4, 64, 1, 8, persistent=True)),
    (math.inf, WideTile(4, 128, 1, 7, persistent=True)),
)


def choose_experts(
    hidden: int,
    intermediate: int,
    pairs: int,
    num_local_experts: int,
    num_global_experts: int,
    batch_invariant: bool,
) -> ExpertTiles:
    """The tiles for `pairs` = M * top-k pairs over `num_global_experts`, of which `num_local_experts` are here.

    Measured layers take what was fastest for the nearest number of tokens an expert gets on average (by
    ratio), others the rule of the nearest measured layer. With `batch_invariant` only the tokens of a tile
    depend on `pairs`, never the order of a sum.
    """
    mean = pairs / num_global_experts
    if batch_invariant:
        tile = next(tile for most, tile in _INVARIANT_EXPERTS if mean <= most)
        return ExpertTiles(tile, tile)
    return _measured_experts(num_local_experts, hidden, intermediate, mean)


@cache
def chosen_experts(
    hidden: int,
    intermediate: int,
    topk: int,
    num_local_experts: int,
    num_global_experts: int,
    max_tokens: int,
    batch_invariant: bool,
) -> dict[ExpertTiles, int]:
    """Every choice of `choose_experts` for 1 .. max_tokens tokens, each with the fewest tokens that take it."""

    def choose_for(m: int) -> ExpertTiles:
        return choose_experts(
            hidden, intermediate, m * topk, num_local_experts, num_global_experts, batch_invariant
        )

    return tile_choice.chosen(choose_for, max_tokens)


def _measured_experts(experts: int, hidden: int, intermediate: int, mean: float) -> ExpertTiles:
    rules = _experts_rules(experts, hidden, intermediate)
    return min(rules, key=lambda rule: abs(math.log(rule[0] / mean)))[1]


@cache
def _experts_rules(experts: int, hidden: int, intermediate: int) -> tuple[tuple[float, ExpertTiles], ...]:
    """(tokens an expert gets on average, tiles) of the nearest measured layer, ascending."""

    def distance(layer: tuple[int, int, int]) -> float:
        return sum(abs(math.log(a / b)) for a, b in zip(layer, (experts, hidden, intermediate), strict=True))

    _, layers = _measured_expert_tiles()
    return tuple(layers[min(layers, key=distance)])


@cache
def _measured_expert_tiles() -> tuple[
    list[ExpertTiles], dict[tuple[int, int, int], list[tuple[float, ExpertTiles]]]
]:
    """(every pair, {(experts, hidden, intermediate): [(tokens an expert gets on average, pair), ...], ascending})
    of tiles_experts.json."""
    table = _read("tiles_experts.json")
    tiles = [ExpertTiles(_tile(pair["w13"]), _tile(pair["w2"])) for pair in table["tiles"]]
    return tiles, {
        (layer["experts"], layer["hidden"], layer["intermediate"]): [
            (float(mean), tiles[index]) for mean, index in layer["tiles_by_mean_tokens"].items()
        ]
        for layer in table["layers"]
    }


def shipped_expert_tiles() -> list[ExpertTiles]:
    """Everything `choose_experts` can return."""
    measured, _ = _measured_expert_tiles()
    return [*measured, *(ExpertTiles(tile, tile) for _, tile in _INVARIANT_EXPERTS)]


def shipped_experts() -> list[tuple[LinearTile, bool]]:
    """Every (tile, whether it is w13's) `choose_experts` can return, for ahead-of-time compilation."""
    pairs = (pair for t in shipped_expert_tiles() for pair in ((t.w13, True), (t.w2, False)))
    return list(dict.fromkeys(pairs))
