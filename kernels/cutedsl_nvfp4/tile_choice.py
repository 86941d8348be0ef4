"""What the tile choices of all architectures share: what a choice can return, and the pair of an experts layer.

Plain data: imports neither torch nor CuTe DSL.
"""

from collections.abc import Callable
from typing import TypeVar

Tile = TypeVar("Tile")


def chosen(choose: Callable[[int], Tile], max_tokens: int) -> dict[Tile, int]:
    """Every tile that `choose(m)` returns for m = 1 .. max_tokens, each with the fewest tokens that take it.

    Every m is asked: a choice by cost or by measurement may change anywhere. The fewest tokens fill a tile least.
    """
    found: dict[Tile, int] = {}
    for m in range(1, max_tokens + 1):
        found.setdefault(choose(m), m)
    return found


class TilePair:
    """The tiles of an experts layer's two products, whatever the GPU: `w13` and `w2`."""

    @property
    def tokens(self) -> int:
        return self.w13.tokens

    def check_tokens(self) -> None:
        """Raise ValueError unless both take the same tokens."""
        if self.w13.tokens != self.w2.tokens:
            raise ValueError(f"{self}: w13 and w2 must take the same tokens")

    def most_tiles(self, pairs: int, experts: int) -> int:
        """Tiles the worst routing of `pairs` (token, choice) pairs over `experts` local experts needs."""
        return (pairs + min(experts, pairs) * (self.tokens - 1)) // self.tokens
