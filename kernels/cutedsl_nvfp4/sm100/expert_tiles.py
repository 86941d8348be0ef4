"""Which tile computes which experts on Blackwell's data-centre chips: what is legal, and the choice by tokens.

Plain data: imports neither torch nor CuTe DSL. Nothing here was measured: no such chip has run the kernels.

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
TILE_K = 256  # k of a stage: 128 bytes of codes, one swizzle row
GROUPS_PER_ATOM = 4  # block scales of a row that lie together in a 128x4 atom, of 64 k
SHARED_MEMORY = 227 * 1024  # bytes one CTA may use
TENSOR_COLUMNS = 512
CHUNK = 32  # slots the epilogue stages through shared memory at a time


@dataclass(frozen=True)
class GroupedTile:
    """One product of an experts layer: `panels` x 128 weight rows a CTA, times `tokens` slots of one expert."""

    tokens: int = 16
    stages: int = 5
    panels: int = 2  # accumulators of 128 rows; w13's two are gate and up
    ctas: int = 1  # that share one MMA instruction of 256 rows, each loading half of the tokens

    @property
    def rows(self) -> int:
        """Weight rows of a panel, of all CTAs that share the instruction."""
        return ROWS * self.ctas

    @property
    def chunk(self) -> int:
        return min(CHUNK, self.tokens)

    @property
    def epilogue_groups(self) -> int:
        """Groups of four warps that read accumulators; they take chunks of slots in turn."""
        return 1 if self.tokens <= CHUNK else 2

    @property
    def threads(self) -> int:
        return 128 * self.epilogue_groups + 64

    @property
    def scale_atoms(self) -> int:
        """128-row atoms of the tokens' block scales."""
        return -(-self.tokens // ROWS)

    @property
    def scale_columns(self) -> int:
        """Tensor memory columns of a stage's block scales."""
        return TILE_K // 64 * 4 * (self.panels + self.scale_atoms)

    @property
    def accumulator_stages(self) -> int:
        """Tiles in tensor memory: 2 where the next tile's products can overlap the epilogue."""
        return 2 if 2 * self.panels * self.tokens + self.scale_columns <= TENSOR_COLUMNS else 1

    @property
    def stage_bytes(self) -> int:
        codes = (self.panels * ROWS + self.tokens // self.ctas) * TILE_K // 2
        return codes + (self.panels + self.scale_atoms) * ROWS * TILE_K // 16

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
        if self.ctas not in (1, 2) or self.panels not in (1, 2):
            raise ValueError(f"{self}: panels and ctas must be 1 or 2")
        if self.tokens % self.chunk or self.tokens % (16 * self.ctas) or not 16 <= self.tokens <= 256:
            raise ValueError(
                f"{self}: tokens must be 16 or a multiple of {CHUNK} up to 256, 16 for each of ctas"
            )
        columns = self.panels * self.tokens + self.scale_columns
        if columns > TENSOR_COLUMNS:
            raise ValueError(f"{self}: needs {columns} columns of tensor memory, {TENSOR_COLUMNS} are there")
        if self.stages < 2:
            raise ValueError(f"{self}: a pipeline needs at least 2 stages")
        if self.shared_memory > SHARED_MEMORY:
            raise ValueError(
                f"{self}: needs {self.shared_memory} bytes of shared memory, {SHARED_MEMORY} are there"
            )


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
_RULES = (
    (12, ExpertTiles(GroupedTile(16, 5), GroupedTile(16, 8, panels=1))),
    (48, ExpertTiles(GroupedTile(64, 4), GroupedTile(64, 4))),
    (144, ExpertTiles(GroupedTile(128, 3), GroupedTile(128, 3))),
    (math.inf, ExpertTiles(GroupedTile(192, 3, ctas=2), GroupedTile(192, 3, ctas=2))),
)


def choose_experts(pairs: int, known: int) -> ExpertTiles:
    """The tiles for `pairs` = M * top-k pairs over `known` experts, local or not."""
    return next(tiles for most, tiles in _RULES if pairs / known <= most)


@cache
def chosen_experts(topk: int, known: int, max_tokens: int) -> dict[ExpertTiles, int]:
    """Every choice of `choose_experts` for 1 .. max_tokens tokens, each with the fewest tokens that take it."""
    return tile_choice.chosen(lambda m: choose_experts(m * topk, known), max_tokens)


def shipped_expert_tiles() -> list[ExpertTiles]:
    """Everything `choose_experts` can return."""
    return [tiles for _, tiles in _RULES]
