"""Tuning rows (bench/linear/tune.py) -> kernels/cutedsl_nvfp4/sm90/tiles_linear.json: few tiles for all rows.

    PYTHONPATH=kernels python3 -m bench.linear.choose ROWS.jsonl[.gz]... --gpu "NVIDIA H200" [--loss 0.01] [--out FILE]

Tiles are added greedily, the one that saves most time first, until no (shape, M) is more than `--loss` slower than
its own best. Fewer tiles mean fewer kernels to compile ahead of time.
"""

from collections.abc import Iterable

from bench import choice

LAYER = ("n", "k", "groups")


def read(paths: Iterable[str]) -> choice.Times:
    """{(n, k, groups, m): {tile: us}}"""
    return choice.read(
        paths,
        lambda row: tuple(row[name] for name in (*LAYER, "m")),
        lambda row: choice.parse_tile(row["config"]),
    )


LINEAR = choice.Product(
    output=choice.SM90 / "tiles_linear.json",
    loss=0.01,
    read=read,
    layer=LAYER,
    size="tile_by_most_tokens",
    fields=choice.tile_fields,
)


def main(argv: list[str] | None = None) -> None:
    choice.main(LINEAR, __doc__, argv)


if __name__ == "__main__":
    main()
