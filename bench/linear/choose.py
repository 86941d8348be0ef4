"""Tuning rows (bench/linear/tune.py) -> kernels/cutedsl_nvfp4/sm90/tiles_linear.json: few tiles for all rows.

    PYTHONPATH=kernels python3 -m bench.linear.choose ROWS.jsonl[.gz]... --gpu "NVIDIA H200" [--loss 0.02] [--out FILE]

Between the measured numbers of tokens predict.py gives the times. Of all tiles those are left out one by one that
cost least, until `TILES` are left: fewer tiles mean fewer kernels to compile ahead of time. A layer keeps its tile for
as many more tokens as it stays within `--loss` of the fastest: the table has few entries, and they end where another
tile is faster, not at powers of two.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from math import fsum, inf

from bench import choice
from bench.linear.predict import predict
from cutedsl_nvfp4.sm90.tiles import PANEL_ROWS, LinearTile

LAYER = ("n", "k", "groups")
TILES = 78
GUESS = 1.01  # a time that was measured counts before one that is only expected
# {tokens up to which: multiples at which the tile may change}
STEPS = {64: 8, 512: 32, 2048: 64, 4096: 128, 8192: 256, 16384: 1024}


def read(paths: Iterable[str]) -> choice.Times:
    """{(n, k, groups, m): {tile: us}}"""
    return choice.read(
        paths,
        lambda row: tuple(row[name] for name in (*LAYER, "m")),
        lambda row: choice.parse_tile(row["config"]),
    )


def by_layer(times: choice.Times) -> dict[tuple[int, int, int], dict[LinearTile, dict[int, float]]]:
    """{(n, k, groups): {tile: {m: us}}}"""
    layers: dict = defaultdict(lambda: defaultdict(dict))
    for (*layer, m), found in times.items():
        for tile, us in found.items():
            layers[tuple(layer)][tile][m] = us
    return layers


def sizes(measured: Iterable[int]) -> list[int]:
    """The measured numbers of tokens, and those between where the tile may change, ascending."""
    measured = sorted(measured)
    between, low = set(measured), 0
    for most, step in STEPS.items():
        between |= set(range(low + step, most + 1, step))
        low = most
    return [m for m in sorted(between) if measured[0] <= m <= measured[-1]]


def between(times: choice.Times) -> choice.Times:
    """`times`, and what they give for other numbers of tokens: of each tile that was measured at a neighbouring one."""
    filled: choice.Times = {}
    for layer, tiles in by_layer(times).items():
        measured = sorted({m for found in tiles.values() for m in found})
        panels = -(-layer[0] // PANEL_ROWS)
        for m in sizes(measured):
            at = bisect_left(measured, m)
            guess = GUESS if measured[at] == m else 1.0
            near = {m, measured[max(at - 1, 0)], measured[min(at + (guess != 1.0), len(measured) - 1)]}
            found = {
                tile: us if m in known else guess * us
                for tile, known in tiles.items()
                if near & known.keys() and (us := predict(tile, panels, known, m))
            }
            filled[*layer, m] = found
    return filled


def fewest(times: choice.Times, most: int = TILES) -> list[LinearTile]:
    """`most` tiles: all but those whose problems lose least, by squares of shares, with the next one."""
    best = {key: min(found.values()) for key, found in times.items()}
    ranked = {
        key: sorted(((us / best[key] - 1, repr(tile), tile) for tile, us in found.items()), reverse=True)
        for key, found in times.items()
    }  # the fastest last
    left = {tile for found in times.values() for tile in found}

    def loss(key: tuple, place: int) -> float:
        return ranked[key][-place][0] if len(ranked[key]) >= place else inf

    while len(left) > most:
        cost: dict[LinearTile, list[float]] = {tile: [] for tile in left}
        for key, tiles in ranked.items():
            while tiles[-1][2] not in left:
                tiles.pop()
            while len(tiles) > 1 and tiles[-2][2] not in left:
                del tiles[-2]
            cost[tiles[-1][2]].append(loss(key, 2) ** 2 - loss(key, 1) ** 2)
        left.remove(min(left, key=lambda tile: (fsum(cost[tile]), repr(tile))))
    return sorted(left, key=repr)


def runs(times: choice.Times, tiles: list[LinearTile], loss: float) -> dict[tuple, LinearTile]:
    """{(n, k, groups, most tokens): tile}: of `tiles` the one that stays within `loss` of the fastest for longest."""
    layers: dict = defaultdict(list)
    for (*layer, m), found in sorted(times.items(), key=lambda item: item[0]):
        us = {tile: found[tile] for tile in tiles if tile in found}
        layers[tuple(layer)].append((m, {tile: us[tile] / min(us.values()) - 1 for tile in us}))
    chosen = {}
    for layer, problems in layers.items():
        at = 0
        while at < len(problems):
            kept: dict[LinearTile, list[float]] = {}
            for tile, slower in problems[at][1].items():
                if slower <= loss:
                    kept[tile] = []
                    for _, lost in problems[at:]:
                        if lost.get(tile, inf) > loss:
                            break
                        kept[tile].append(lost[tile])
            tile = max(kept, key=lambda tile: (len(kept[tile]), -fsum(kept[tile])))
            at += len(kept[tile])
            chosen[*layer, problems[at - 1][0]] = tile
    return chosen


LINEAR = choice.Product(
    output=choice.SM90 / "tiles_linear.json",
    loss=0.02,
    read=lambda paths: between(read(paths)),
    layer=LAYER,
    size="tile_by_most_tokens",
    fields=choice.tile_fields,
    select=lambda times, loss: fewest(times),
    assign=runs,
)


def main(argv: list[str] | None = None) -> None:
    choice.main(LINEAR, __doc__, argv)


if __name__ == "__main__":
    main()
