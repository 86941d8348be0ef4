"""The tiles that bench/experts/tune.py measures; bench/experts/choose.py keeps the winners."""

from cutedsl_nvfp4.sm90.tiles import LinearTile, NarrowTile, WideTile


def by_tokens(mean: float) -> list[list[LinearTile]]:
    """Tiles for experts that get `mean` tokens, by tokens of a tile: w13 and w2 take one each of a list."""
    lists = [
        [NarrowTile(8, 2, 2, 4, split) for split in (1, 2, 4)]
        + [NarrowTile(8, 2, 2, 3), NarrowTile(8, 1, 2, 6)],
        [NarrowTile(16, 2, 2, 3), NarrowTile(16, 1, 2, 5)],
        [NarrowTile(24, 2, 1, 4), NarrowTile(24, 1, 1, 6)],
        [
            NarrowTile(32, 1, 1, 6),
            WideTile(2, 32, 2, 4, ctas_per_sm=2, persistent=True),
            WideTile(4, 32, 1, 5, ctas_per_sm=2, persistent=True),
            WideTile(4, 32, 2, 6, persistent=True),
        ],
        [
            WideTile(2, 64, 2, 3, ctas_per_sm=2, persistent=True),
            WideTile(4, 64, 1, 8, persistent=True),
            WideTile(4, 64, 2, 5, persistent=True),
        ],
        [WideTile(2, 96, 1, 5, ctas_per_sm=2, persistent=True), WideTile(4, 96, 1, 8, persistent=True)],
        [WideTile(4, 128, 1, 7, persistent=True)],
    ]
    least = {8: 0, 16: 1, 24: 6, 32: 6, 64: 6, 96: 12, 128: 24}
    most = {8: 8, 16: 20, 24: 30, 32: 60, 64: 150}
    return [
        configs for configs in lists if least[configs[0].tokens] <= mean <= most.get(configs[0].tokens, mean)
    ]
