"""Which tile computes which problem on data-centre Blackwell: what is legal, and the choice by (N, K, M).

Plain data: imports neither torch nor CuTe DSL. No figure here was measured: the choice follows the number of SMs
and the sizes alone, until a device has run bench/.
"""

from dataclasses import dataclass
from functools import cache

from .. import tile_choice

ROWS = 128  # weight rows of a CTA: the lanes of tensor memory
STEP_K = 256  # of one pipeline stage: four block-scaled MMAs of k = 64, rows of 128 bytes in shared memory
ATOM_BYTES = 512  # block scales of 128 rows x 64 k
SHARED_MEMORY = 227 * 1024  # bytes one CTA may use
TENSOR_MEMORY = 512  # columns of 128 x 4 bytes
MAX_CLUSTER = 8  # the portable cluster size
SMS = 148  # of a B200; the grid is sized by the device's own number, only the choice by this one


@dataclass(frozen=True)
class LinearTile:
    """tcgen05 tiles: 128 weight rows (a `pair` of CTAs: 256) x `tokens`; weights are the MMA's A operand."""

    tokens: int = 128
    pair: bool = False  # two CTAs share one MMA: each brings its rows and half of the tokens
    stages: int = 5
    split_k: int = 1  # CTAs of a cluster that share a tile's K

    @property
    def rows(self) -> int:
        return ROWS * self.ctas

    @property
    def ctas(self) -> int:
        """CTAs of one MMA."""
        return 2 if self.pair else 1

    @property
    def cluster(self) -> int:
        return self.ctas * self.split_k

    @property
    def scale_atoms(self) -> int:
        """128-row atoms that a tile's tokens lie in."""
        return -(-self.tokens // 128)

    @property
    def stage_bytes(self) -> int:
        """Of one CTA: codes and block scales of its rows and its tokens."""
        codes = (ROWS + self.tokens // self.ctas) * STEP_K // 2
        return codes + (1 + self.scale_atoms) * (STEP_K // 64) * ATOM_BYTES

    @property
    def scale_columns(self) -> int:
        """Columns of tensor memory for one stage's block scales, of the rows and of the tokens."""
        return 4 * (STEP_K // 64) * (1 + self.scale_atoms)

    @property
    def overlaps(self) -> bool:
        """Whether the two accumulators share columns: the second starts before the first is all stored."""
        return 2 * self.tokens + self.scale_columns > TENSOR_MEMORY

    @property
    def accumulator_stride(self) -> int:
        """Columns between the two accumulators."""
        return TENSOR_MEMORY - self.scale_columns - self.tokens if self.overlaps else self.tokens

    @property
    def tensor_memory(self) -> int:
        """Columns allocated, a power of two."""
        used = self.accumulator_stride + self.tokens + self.scale_columns
        return max(32, 1 << (used - 1).bit_length())

    @property
    def chunk(self) -> int:
        """Tokens that a thread of the epilogue holds at a time."""
        return min(32, self.tokens)

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
        if self.tokens == 256 and not self.pair:
            raise ValueError(f"{self}: 256 tokens take a pair of CTAs")
        if self.pair and (self.tokens < 64 or self.split_k > 1):
            raise ValueError(f"{self}: a pair takes at least 64 tokens and shares no K")
        if not 1 <= self.split_k <= MAX_CLUSTER or MAX_CLUSTER % self.split_k:
            raise ValueError(f"{self}: split_k must be 1, 2, 4 or 8")
        if self.stages < 2:
            raise ValueError(f"{self}: a pipeline needs at least 2 stages")
        if self.shared_memory > SHARED_MEMORY:
            raise ValueError(
                f"{self}: needs {self.shared_memory} bytes of shared memory, {SHARED_MEMORY} are there"
            )

    def takes(self, m: int) -> bool:
        """Whether the tile computes m tokens: fewer than 32 have one tile, whose scales start a column."""
        return self.tokens >= 32 or m <= self.tokens


_TILES = (
    *(LinearTile(16, False, 9, split) for split in (1, 2, 4, 8)),
    *(LinearTile(32, False, 8, split) for split in (1, 2, 4, 8)),
    *(LinearTile(64, False, 6, split) for split in (1, 2, 4)),
    LinearTile(128, False, 5),
    LinearTile(128, False, 4, 2),
    LinearTile(128, True, 7),
    LinearTile(256, True, 5),
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
    steps = -(-k // (STEP_K * tile.split_k))
    operands = (ROWS + tile.tokens / tile.ctas) * 32 / 128  # cycles to read them from shared memory, k = 64
    multiply = 4 * max(tile.tokens / 2, operands)
    time = waves * steps * max(multiply, tile.stage_bytes / LOADED)
    return time + (FILL if tile.split_k == 1 else waves * (FILL + EXCHANGE))


def choose(n: int, k: int, m: int, groups: int = 1) -> LinearTile:
    """The tile for out [m, n] with inner dimension k."""
    # every tile's tokens are a multiple of the fewest, so the model cannot tell numbers between two multiples apart
    return _choose(n, k, -(-m // FEWEST_TOKENS) * FEWEST_TOKENS, groups)


@cache
def _choose(n: int, k: int, m: int, groups: int) -> LinearTile:
    steps = -(-k // STEP_K)
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
