"""Tuning rows (bench/experts/tune.py) -> kernels/cutedsl_nvfp4/sm90/tiles_experts.json: few tiles for all rows.

    PYTHONPATH=kernels python3 -m bench.experts.choose ROWS.jsonl[.gz]... --gpu "NVIDIA H200" [--loss 0.03] [--out FILE]

Pairs of tiles are added greedily as bench/linear/choose.py adds tiles, until no (layer, M) is more than `--loss` slower
than its own best. Layers that differ in their routing only (expert parallelism, Zipf) share a choice.
"""

from collections import defaultdict
from collections.abc import Iterable

from bench import choice
from bench.shapes import EXPERT_CASES
from cutedsl_nvfp4.sm90.tiles import ExpertTiles


def parse_tiles(row: dict) -> ExpertTiles:
    """The tiles of a tuning row."""
    return ExpertTiles(choice.parse_tile(row["w13"]), choice.parse_tile(row["w2"]))


def read(paths: Iterable[str]) -> choice.Times:
    """{(experts, hidden, intermediate, mean tokens of an expert, case and routing): {tiles: us}}"""
    cases = {case.name: case for case in EXPERT_CASES}

    def problem(row: dict) -> tuple:
        case = cases[row["case"]]
        mean = row["m"] * case.topk / case.known
        return (
            case.experts,
            case.hidden,
            case.intermediate,
            mean,
            f"{case.name} {row.get('routing', 'uniform')}",
        )

    return choice.read(paths, problem, parse_tiles)


def by_problem(times: choice.Times) -> choice.Times:
    """{(experts, hidden, intermediate, mean): {tiles: us}}: cases that `choose_experts` cannot tell apart share tiles.

    The time is then that of the first case's best tiles, times the worst case's loss.
    """
    groups = defaultdict(list)
    for (*problem, _), found in sorted(times.items(), key=lambda item: item[0]):
        groups[tuple(problem)].append(found)
    merged = {}
    for (*layer, mean), cases in groups.items():
        measured = set.intersection(*(set(found) for found in cases))
        best = min(cases[0].values())
        merged[*layer, round(mean, 5)] = {
            tiles: best * max(found[tiles] / min(found.values()) for found in cases) for tiles in measured
        }
    return merged


EXPERTS = choice.Product(
    output=choice.SM90 / "tiles_experts.json",
    loss=0.03,
    read=lambda paths: by_problem(read(paths)),
    layer=("experts", "hidden", "intermediate"),
    size="tiles_by_mean_tokens",
    fields=lambda tiles: {"w13": choice.tile_fields(tiles.w13), "w2": choice.tile_fields(tiles.w2)},
    select=choice.cover,
    assign=choice.fastest,
)


def main(argv: list[str] | None = None) -> None:
    choice.main(EXPERTS, __doc__, argv)


if __name__ == "__main__":
    main()
