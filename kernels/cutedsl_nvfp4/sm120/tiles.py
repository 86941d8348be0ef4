"""Tiles of the sm_120a and sm_121a kernels: what is legal, and which linear or experts layer takes which.

Plain data: imports neither torch nor CuTe DSL. No such chip has run these kernels yet: the choice follows from
bytes, shared memory and the number of SMs, not from measurements.
"""

import math
from dataclasses import dataclass
from functools import cache

from .. import tile_choice
from ..tile_choice import TilePair

BLOCK_K = 64  # k of one MMA: four groups of 16, one scale word
BAND = 32  # rows whose scale words one load brings to a warp; a scale tile is four bands
SCALE_TILE_ROWS = 128
SHARED_MEMORY = 99 * 1024  # bytes one CTA may use
ALIGNMENT = 2 * 1024  # bytes spent on aligning the stages


@dataclass(frozen=True)
class LinearTile:
    """`tokens` x `rows` of the result; MMAs are 16 tokens x 8 weight rows x 64 k.

    Its warps split the tokens, the weight rows and, with `k_warps`, the k blocks of every stage.
    """

    tokens: int = 128
    rows: int = 128
    token_warps: int = 2
    row_warps: int = 4
    k_warps: int = 1
    k_blocks: int = 2  # blocks of 64 k a stage: rows of 64 or 128 bytes in shared memory
    stages: int = 5
    panels: int = 1  # 2: half of the rows are w1's (gate), half w3's (up), each in scale tiles of its own

    def takes(self, m: int) -> bool:
        """Whether the tile computes m tokens: all do."""
        return True

    @property
    def panel_rows(self) -> int:
        return self.rows // self.panels

    @property
    def warps(self) -> int:
        """Warps that multiply; one more loads."""
        return self.token_warps * self.row_warps * self.k_warps

    @property
    def moves_registers(self) -> bool:
        """Whether warps hold more sums than an even share of the registers allows.

        Then a whole warpgroup loads, of which three warps idle: registers move between warpgroups only.
        """
        return self.warp_tokens * self.warp_rows > 2048

    @property
    def threads(self) -> int:
        return 32 * (self.warps + (4 if self.moves_registers else 1))

    @property
    def warp_tokens(self) -> int:
        return self.tokens // self.token_warps

    @property
    def warp_rows(self) -> int:
        return self.rows // self.row_warps

    @property
    def warp_blocks(self) -> int:
        """k blocks a warp takes from a stage."""
        return self.k_blocks // self.k_warps

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's codes in a stage."""
        return self.k_blocks * BLOCK_K // 2

    @property
    def scale_atoms(self) -> int:
        """Scale tiles of the tokens."""
        return 1

    @property
    def token_scale_rows(self) -> int:
        """Rows of a scale tile's 32 that a stage holds for the tokens."""
        return min(self.tokens, BAND)

    @property
    def token_scale_bytes(self) -> int:
        return self.k_blocks * self.token_scale_rows * 16

    @property
    def row_scale_tiles(self) -> int:
        return self.panels * -(-self.panel_rows // SCALE_TILE_ROWS)

    @property
    def row_scale_bytes(self) -> int:
        return self.row_scale_tiles * self.k_blocks * 512

    @property
    def stage_bytes(self) -> int:
        codes = (self.tokens + self.rows) * self.row_bytes
        return codes + self.token_scale_bytes + self.row_scale_bytes

    @property
    def partial_bytes(self) -> int:
        """Where warps leave sums of their k blocks for the first of the k warps."""
        return (self.k_warps - 1) * self.tokens * self.rows * 4

    @property
    def shared_memory(self) -> int:
        return self.stages * (self.stage_bytes + 16) + self.partial_bytes + ALIGNMENT

    def check(self) -> None:
        """Raise ValueError for a tile the kernels cannot run."""
        if self.tokens not in (16, 32, 64, 128) or self.rows not in (32, 64, 128, 256):
            raise ValueError(f"{self}: tokens must be 16, 32, 64 or 128, and rows 32, 64, 128 or 256")
        if self.k_blocks not in (2, 4) or self.k_blocks % self.k_warps:
            raise ValueError(f"{self}: k_blocks must be 2 or 4 and a multiple of k_warps")
        if self.tokens % self.token_warps or self.warp_tokens not in (16, 32, 64):
            raise ValueError(f"{self}: a warp takes 16, 32 or 64 tokens")
        if self.warp_tokens == 16 and self.tokens != 16:
            raise ValueError(f"{self}: a warp takes whole bands of {BAND} tokens, or 16 of a tile of 16")
        if self.rows % self.row_warps or self.warp_rows not in (32, 64):
            raise ValueError(f"{self}: a warp takes 32 or 64 weight rows")
        if self.panels not in (1, 2) or (self.panels == 2 and self.warp_rows != 2 * BAND):
            raise ValueError(f"{self}: panels must be 1, or 2 of which a warp takes {BAND} rows each")
        if self.warps not in (2, 4, 8):
            raise ValueError(f"{self}: {self.warps} warps multiply; 2, 4 or 8 can")
        if self.stages < 2:
            raise ValueError(f"{self}: a pipeline needs at least 2 stages")
        if self.shared_memory > SHARED_MEMORY:
            raise ValueError(
                f"{self}: needs {self.shared_memory} bytes of shared memory, {SHARED_MEMORY} are there"
            )


_FEW = (  # tiles of 16 tokens by weight rows: the fewer rows, the more CTAs
    LinearTile(16, 32, 1, 1, 2, 4, 10),
    LinearTile(16, 64, 1, 2, 2, 4, 7),
    LinearTile(16, 128, 1, 4, 1, 4, 4),
)
_SOME = (LinearTile(32, 64, 1, 2, 2, 4, 5), LinearTile(32, 128, 1, 4, 2, 4, 3))
_MANY = (
    LinearTile(64, 128, 2, 4, 1, 2, 6),
    LinearTile(128, 128, 2, 4, 1, 2, 5),
    LinearTile(128, 256, 2, 4, 1, 2, 3),
)
CTAS_WANTED = 96  # with 64 KB in flight each, more bytes than memory's latency takes on either chip


def choose(n: int, k: int, m: int, groups: int = 1, plain: bool = True) -> LinearTile:
    """The tile for out [m, n] with inner dimension k: the largest of its kind that leaves enough CTAs.

    `plain` results have no bias and rows of whole 16-byte pieces, as all of DeepSeek-V4's; the others take one of
    two tiles.
    """
    if not plain:
        return general()[m > 16]
    if m <= 16:
        tiles = _FEW
    elif m <= 32:
        tiles = _SOME
    else:
        tiles = _MANY[:1] if m <= 64 else _MANY[1:]
    for tile in reversed(tiles):
        if groups * -(-n // groups // tile.rows) * -(-m // tile.tokens) >= CTAS_WANTED:
            return tile
    return tiles[0]


@cache
def chosen(n: int, k: int, groups: int, max_tokens: int, plain: bool = True) -> dict[LinearTile, int]:
    """Every tile `choose` takes for 1 .. max_tokens tokens, each with the fewest tokens that take it."""
    return tile_choice.chosen(lambda m: choose(n, k, m, groups, plain), max_tokens)


def general() -> list[LinearTile]:
    """Every tile for results with a bias or ragged rows."""
    return [_FEW[1], _MANY[1]]


def shipped() -> list[LinearTile]:
    """Every tile `choose` can return, for ahead-of-time compilation."""
    return [*_FEW, *_SOME, *_MANY]


@dataclass(frozen=True)
class ExpertTiles(TilePair):
    """The tiles of an experts layer's two products; both take the same tokens, the slots of a routing tile."""

    w13: LinearTile
    w2: LinearTile

    def check(self) -> None:
        """Raise ValueError for tiles the kernels cannot run."""
        self.check_tokens()
        if self.w13.panels != 2 or self.w2.panels != 1:
            raise ValueError(f"{self}: w13 takes two panels, gate and up, and w2 one")
        self.w13.check()
        self.w2.check()


# (most tokens an expert gets on average, tiles)
_EXPERT_RULES = (
    (12, ExpertTiles(LinearTile(16, 64, 1, 1, 2, 4, 6, 2), _FEW[1])),
    (48, ExpertTiles(LinearTile(64, 256, 2, 4, 1, 2, 4, 2), _MANY[0])),
    (math.inf, ExpertTiles(LinearTile(128, 256, 2, 4, 1, 2, 3, 2), _MANY[2])),
)


def choose_experts(pairs: int, num_global_experts: int) -> ExpertTiles:
    """The tiles for `pairs` = M * top-k pairs over `num_global_experts` experts, local or not."""
    return next(tiles for most, tiles in _EXPERT_RULES if pairs / num_global_experts <= most)


@cache
def chosen_experts(topk: int, num_global_experts: int, max_tokens: int) -> dict[ExpertTiles, int]:
    """Every choice of `choose_experts` for 1 .. max_tokens tokens, each with the fewest tokens that take it."""
    return tile_choice.chosen(lambda m: choose_experts(m * topk, num_global_experts), max_tokens)


def shipped_expert_tiles() -> list[ExpertTiles]:
    """Everything `choose_experts` can return."""
    return [tiles for _, tiles in _EXPERT_RULES]
