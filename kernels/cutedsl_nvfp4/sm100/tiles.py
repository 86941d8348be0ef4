"""Which tile computes which problem on data-centre Blackwell: what is legal, and the choice by N, K and M.

Plain data: imports neither torch nor CuTe DSL. No figure here was measured: the choice follows the number of SMs
and the sizes alone, until a device has run bench/.

sm_103a's own instruction (k = 96, half as fast again) is not used: it would wait for memory. At 9 PFLOP/s the widest
tile loads 53 KB into an SM every 768 clocks, 69 bytes a clock, as much as L2 can be expected to deliver. It pays where
the tiles of a cluster share what they load, and for K in 96s, which 7168, 4096 and 2048 are not.
"""

import math
from dataclasses import dataclass
from functools import cache

from .. import tile_choice
from ..tile_choice import TilePair

ROWS = 128  # weight rows of one accumulator: the lanes of tensor memory
TILE_K = 256  # k of a stage: four block-scaled MMAs of k = 64, rows of 128 bytes in shared memory
GROUPS_PER_ATOM = 4  # block scales of a row that lie together in a 128x4 atom, of 64 k
ATOM_BYTES = ROWS * GROUPS_PER_ATOM  # block scales of 128 rows x 64 k
SHARED_MEMORY = 227 * 1024  # bytes one CTA may use
TENSOR_COLUMNS = 512  # of tensor memory, of 128 x 4 bytes
MAX_CLUSTER = 8  # the portable cluster size
SMS = 148  # of a B200; the grid is sized by the device's own number, only the choice by this one
CHUNK = 32  # tokens that the epilogue takes at a time


class TensorMemoryTile:
    """What the tiles of both products occupy: `panels` accumulators of 128 rows x `tokens`, and a stage's operands.

    `ctas_per_mma` CTAs share one MMA instruction: each brings its rows and its share of the tokens.
    """

    panels = 1

    @property
    def rows(self) -> int:
        """Weight rows of a panel, of all CTAs that share the instruction."""
        return ROWS * self.ctas_per_mma

    @property
    def chunk(self) -> int:
        """Tokens that the epilogue takes at a time."""
        return min(CHUNK, self.tokens)

    @property
    def scale_atoms(self) -> int:
        """128-row atoms of the tokens' block scales."""
        return -(-self.tokens // ROWS)

    @property
    def scale_columns(self) -> int:
        """Columns of tensor memory for one stage's block scales, of the rows and of the tokens."""
        return TILE_K // 64 * 4 * (self.panels + self.scale_atoms)

    @property
    def stage_bytes(self) -> int:
        """Of one CTA: codes and block scales of its rows and its tokens."""
        codes = (self.panels * ROWS + self.tokens // self.ctas_per_mma) * TILE_K // 2
        return codes + (self.panels + self.scale_atoms) * TILE_K // 64 * ATOM_BYTES

    def check_memory(self) -> None:
        """Raise ValueError for a tile without a pipeline, or for which there is too little memory."""
        if self.stages < 2:
            raise ValueError(f"{self}: a pipeline needs at least 2 stages")
        if self.shared_memory > SHARED_MEMORY:
            raise ValueError(
                f"{self}: needs {self.shared_memory} bytes of shared memory, {SHARED_MEMORY} are there"
            )


@dataclass(frozen=True)
class LinearTile(TensorMemoryTile):
    """tcgen05 tiles: 128 weight rows (256 where two CTAs share an MMA) x `tokens`; weights are the MMA's A operand."""

    tokens: int = 128
    ctas_per_mma: int = 1
    stages: int = 5
    split_k: int = 1  # CTAs of a cluster that share a tile's K

    @property
    def cluster(self) -> int:
        return self.ctas_per_mma * self.split_k

    @property
    def overlaps(self) -> bool:
        """Whether the two accumulators share columns: the second starts before the first is all stored."""
        return 2 * self.tokens + self.scale_columns > TENSOR_COLUMNS

    @property
    def accumulator_stride(self) -> int:
        """Columns between the two accumulators."""
        return TENSOR_COLUMNS - self.scale_columns - self.tokens if self.overlaps else self.tokens

    @property
    def tensor_memory(self) -> int:
        """Columns allocated, a power of two."""
        used = self.accumulator_stride + self.tokens + self.scale_columns
        return max(32, 1 << (used - 1).bit_length())

    @property
    def partial_bytes(self) -> int:
        """Partial sums that come from the cluster's CTAs."""
        return ROWS * self.tokens * 4 if self.split_k > 1 else 0

    @property
    def shared_memory(self) -> int:
        return self.stages * self.stage_bytes + self.partial_bytes + 3 * 1024

    def check(self) -> None:
        """Raise ValueError for a configuration the kernel cannot run."""
        if self.tokens not in (16, 32, 64, 128, 256):
            raise ValueError(f"{self}: tokens must be 16, 32, 64, 128 or 256")
        if self.ctas_per_mma not in (1, 2):
            raise ValueError(f"{self}: ctas_per_mma must be 1 or 2")
        if self.tokens == 256 and self.ctas_per_mma == 1:
            raise ValueError(f"{self}: 256 tokens need ctas_per_mma=2")
        if self.ctas_per_mma == 2 and (self.tokens < 64 or self.split_k > 1):
            raise ValueError(f"{self}: ctas_per_mma=2 needs at least 64 tokens and split_k=1")
        if not 1 <= self.split_k <= MAX_CLUSTER or MAX_CLUSTER % self.split_k:
            raise ValueError(f"{self}: split_k must be 1, 2, 4 or 8")
        self.check_memory()

    def takes(self, m: int) -> bool:
        """Whether the tile computes m tokens: fewer than 32 have one tile, whose scales start a column."""
        return self.tokens >= 32 or m <= self.tokens


_TILES = (
    *(LinearTile(16, 1, 9, split) for split in (1, 2, 4, 8)),
    *(LinearTile(32, 1, 8, split) for split in (1, 2, 4, 8)),
    *(LinearTile(64, 1, 6, split) for split in (1, 2, 4)),
    LinearTile(128, 1, 5),
    LinearTile(128, 1, 4, 2),
    LinearTile(128, 2, 7),
    LinearTile(256, 2, 5),
)
FEWEST_TOKENS = min(tile.tokens for tile in _TILES)
LEAST_STEPS = 2  # of K, that a CTA takes where it is split
FILL = 1500  # cycles from a tile's first load to its first MMA, and its epilogue
EXCHANGE = 800  # cycles to send partial sums and add them
LOADED = 40  # bytes a cycle that an SM gets from L2 or memory when all SMs ask


def _cycles(tile: LinearTile, n: int, k: int, m: int, groups: int) -> float:
    """A rough model of the time `tile` takes: waves of tiles, each bound by its MMAs or by its loads."""
    tiles = -(-(n // groups) // tile.rows) * groups * -(-m // tile.tokens)
    waves = -(-tiles * tile.cluster // SMS)
    steps = -(-k // (TILE_K * tile.split_k))
    operands = (ROWS + tile.tokens / tile.ctas_per_mma) * 32 / 128  # cycles to read k = 64
    multiply = 4 * max(tile.tokens / 2, operands)
    time = waves * steps * max(multiply, tile.stage_bytes / LOADED)
    return time + (FILL if tile.split_k == 1 else waves * (FILL + EXCHANGE))


def choose(n: int, k: int, m: int, groups: int = 1) -> LinearTile:
    """The tile for out [m, n] with inner dimension k."""
    # every tile's tokens are a multiple of the fewest, so the model cannot tell numbers between two multiples apart
    return _choose(n, k, -(-m // FEWEST_TOKENS) * FEWEST_TOKENS, groups)


@cache
def _choose(n: int, k: int, m: int, groups: int) -> LinearTile:
    steps = -(-k // TILE_K)
    fitting = [
        tile
        for tile in _TILES
        if tile.takes(m) and (tile.split_k == 1 or steps >= tile.split_k * LEAST_STEPS)
    ]
    return min(fitting, key=lambda tile: _cycles(tile, n, k, m, groups))


@cache
def chosen(n: int, k: int, groups: int, max_tokens: int, plain: bool = True) -> dict[LinearTile, int]:
    """Every tile `choose` takes for 1 .. max_tokens tokens, each with the fewest tokens that take it.

    Results that are not `plain`, with a bias or of ragged rows, take the same.
    """
    return tile_choice.chosen(lambda m: choose(n, k, m, groups), max_tokens)


def shipped() -> list[LinearTile]:
    """Every tile `choose` can return, for ahead-of-time compilation."""
    return list(_TILES)


@dataclass(frozen=True)
class GroupedTile(TensorMemoryTile):
    """One product of an experts layer: `panels` x 128 weight rows a CTA, times `tokens` slots of one expert."""

    tokens: int = 16
    stages: int = 5
    panels: int = 2  # accumulators of 128 rows; w13's two are gate and up
    ctas_per_mma: int = 1

    @property
    def epilogue_groups(self) -> int:
        """Groups of four warps that read accumulators; they take chunks of slots in turn."""
        return 1 if self.tokens <= CHUNK else 2

    @property
    def threads(self) -> int:
        return 128 * self.epilogue_groups + 64

    @property
    def accumulator_stages(self) -> int:
        """Tiles in tensor memory: 2 where the next tile's products can overlap the epilogue."""
        return 2 if 2 * self.panels * self.tokens + self.scale_columns <= TENSOR_COLUMNS else 1

    @property
    def output_bytes(self) -> int:
        """Two halves for each group: a chunk's slots, 128 rows in bf16 and 16 bytes against bank conflicts."""
        return self.epilogue_groups * 2 * self.chunk * (ROWS * 2 + 16)

    @property
    def shared_memory(self) -> int:
        per_slot = self.epilogue_groups * self.tokens * 8
        return self.stages * (self.stage_bytes + 16) + self.output_bytes + per_slot + 2 * 1024

    def check(self) -> None:
        """Raise ValueError for a configuration the kernel cannot run."""
        if self.ctas_per_mma not in (1, 2) or self.panels not in (1, 2):
            raise ValueError(f"{self}: panels and ctas_per_mma must be 1 or 2")
        if self.tokens % self.chunk or self.tokens % (16 * self.ctas_per_mma) or not 16 <= self.tokens <= 256:
            raise ValueError(
                f"{self}: tokens must be 16 or a multiple of {CHUNK} up to 256, 16 for each of ctas_per_mma"
            )
        columns = self.panels * self.tokens + self.scale_columns
        if columns > TENSOR_COLUMNS:
            raise ValueError(f"{self}: needs {columns} columns of tensor memory, {TENSOR_COLUMNS} are there")
        self.check_memory()


@dataclass(frozen=True)
class ExpertTiles(TilePair):
    """The tiles of an experts layer's two products; both take the same tokens, the slots of a routing tile."""

    w13: GroupedTile
    w2: GroupedTile

    def check(self) -> None:
        """Raise ValueError for a configuration the kernels cannot run."""
        self.check_tokens()
        if self.w13.panels != 2:
            raise ValueError(f"{self.w13}: w13 takes two panels, gate and up")
        self.w13.check()
        self.w2.check()


# (most tokens an expert gets on average, tiles)
_EXPERTS_RULES = (
    (12, ExpertTiles(GroupedTile(16, 5), GroupedTile(16, 8, panels=1))),
    (48, ExpertTiles(GroupedTile(64, 4), GroupedTile(64, 4))),
    (144, ExpertTiles(GroupedTile(128, 3), GroupedTile(128, 3))),
    (math.inf, ExpertTiles(GroupedTile(192, 3, ctas_per_mma=2), GroupedTile(192, 3, ctas_per_mma=2))),
)


def choose_experts(pairs: int, num_global_experts: int) -> ExpertTiles:
    """The tiles for `pairs` = M * top-k pairs over `num_global_experts` experts, local or not."""
    return next(tiles for most, tiles in _EXPERTS_RULES if pairs / num_global_experts <= most)


@cache
def chosen_experts(topk: int, num_global_experts: int, max_tokens: int) -> dict[ExpertTiles, int]:
    """Every choice of `choose_experts` for 1 .. max_tokens tokens, each with the fewest tokens that take it."""
    return tile_choice.chosen(lambda m: choose_experts(m * topk, num_global_experts), max_tokens)


def shipped_expert_tiles() -> list[ExpertTiles]:
    """Everything `choose_experts` can return."""
    return [tiles for _, tiles in _EXPERTS_RULES]
