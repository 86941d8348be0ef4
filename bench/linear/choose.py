"""Tuning rows (bench/linear/tune.py) -> kernels/cutedsl_nvfp4/sm90/tiles_linear.json: few tiles for all rows.

    PYTHONPATH=kernels python3 -m bench.linear.choose ROWS.jsonl[.gz]... --gpu "NVIDIA H200" [--loss 0.01] [--out FILE]

Between the measured numbers of tokens predict.py gives the times. Tiles are added greedily, the one that saves most
time first, until no (shape, M) is more than `--loss` slower than its own best. Fewer tiles mean fewer kernels to
compile ahead of time. A layer keeps its tile for as many more tokens as that is true of it: the table has few entries,
and they end where another tile is faster, not at powers of two.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable

from bench import choice
from bench.linear.predict import predict
from cutedsl_nvfp4.sm90.tiles import PANEL_ROWS, LinearTile

LAYER = ("n", "k", "groups")
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
    """`times` and, between two measured numbers of tokens, what they give for the tiles that either has."""
    filled: choice.Times = {}
    for layer, tiles in by_layer(times).items():
        measured = sorted({m for found in tiles.values() for m in found})
        panels = -(-layer[0] // PANEL_ROWS)
        for m in sizes(measured):
            if (*layer, m) in times:
                filled[*layer, m] = times[*layer, m]
                continue
            at = bisect_left(measured, m)
            near = [
                tile for tile, found in tiles.items() if measured[at - 1] in found or measured[at] in found
            ]
            filled[*layer, m] = {tile: predict(tile, panels, tiles[tile], m) for tile in near}
    return filled


def runs(times: choice.Times, tiles: list[LinearTile], loss: float) -> dict[tuple, LinearTile]:
    """{(n, k, groups, most tokens): tile}: of `tiles` the one that stays within `loss` of the best for longest."""
    layers: dict = defaultdict(list)
    for (*layer, m), found in sorted(times.items(), key=lambda item: item[0]):
        best = min(found.values())
        slower = {tile: found[tile] / best - 1 for tile in tiles if tile in found}
        layers[tuple(layer)].append((m, slower))
    chosen = {}
    for layer, problems in layers.items():
        at = 0
        while at < len(problems):
            kept = {tile: [] for tile, slower in problems[at][1].items() if slower <= loss}
            for tile, lost in kept.items():
                for _, slower in problems[at:]:
                    if slower.get(tile, loss + 1) > loss:
                        break
                    lost.append(slower[tile])
            tile = max(kept, key=lambda tile: (len(kept[tile]), -sum(kept[tile])))
            at += len(kept[tile])
            chosen[*layer, problems[at - 1][0]] = tile
    return chosen


LINEAR = choice.Product(
    output=choice.SM90 / "tiles_linear.json",
    loss=0.01,
    read=lambda paths: between(read(paths)),
    layer=LAYER,
    size="tile_by_most_tokens",
    fields=choice.tile_fields,
    assign=runs,
)


def main(argv: list[str] | None = None) -> None:
    choice.main(LINEAR, __doc__, argv)


if __name__ == "__main__":
    main()
