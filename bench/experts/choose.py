#!/usr/bin/env python3
"""Tuning rows (bench/experts/tune.py) -> kernels/cutedsl_nvfp4/sm90/measured_experts.py: few kernels for all rows.

    PYTHONPATH=kernels python3 -m bench.experts.choose ROWS.jsonl[.gz]... --gpu "NVIDIA H200" [--loss 0.03]

Tiles are added greedily as bench/linear/choose.py does, until no (layer, M) is more than `--loss` slower than
its own best. Layers that differ in their routing only (expert parallelism, Zipf) share a rule's table.
"""

import argparse
import gzip
import json
import pathlib
from collections import defaultdict

from bench.linear.choose import cover
from bench.shapes import EXPERT_CASES
from cutedsl_nvfp4.sm90.tiles import ExpertTiles, NarrowTile, WideTile

OUTPUT = pathlib.Path(__file__).parent.parent / "kernels" / "cutedsl_nvfp4" / "measured_experts.py"


def read(paths: list[str]) -> dict:
    """{(experts, hidden, intermediate, mean tokens of an expert, case and routing): {tiles: us}}; a later file
    replaces every row of a case, M and routing that it measured again."""
    cases = {case.name: case for case in EXPERT_CASES}
    names = {"Narrow": NarrowTile, "Wide": WideTile}  # our own repr
    times: dict[tuple, dict] = {}
    for path in paths:
        measured: dict[tuple, dict] = defaultdict(dict)
        content = pathlib.Path(path).read_bytes()
        for line in (gzip.decompress(content) if path.endswith(".gz") else content).decode().splitlines():
            row = json.loads(line)
            case = cases[row["case"]]
            mean = row["m"] * case.topk / case.known
            tiles = ExpertTiles(eval(row["w13"], names), eval(row["w2"], names))
            name = f"{case.name} {row.get('routing', 'uniform')}"
            measured[case.experts, case.hidden, case.intermediate, mean, name][tiles] = row["us"]
        times |= measured
    return times


def by_problem(times: dict) -> dict:
    """{(experts, hidden, intermediate, mean): {tiles: us}}: cases that `choose_experts` cannot tell apart share tiles.

    The time is then that of the first case's best tiles, times the worst case's loss.
    """
    groups = defaultdict(list)
    for (*problem, _), found in sorted(times.items(), key=lambda item: item[0]):
        groups[tuple(problem)].append(found)
    merged = {}
    for problem, cases in groups.items():
        measured = set.intersection(*(set(found) for found in cases))
        best = min(cases[0].values())
        merged[problem] = {
            tiles: best * max(found[tiles] / min(found.values()) for found in cases) for tiles in measured
        }
    return merged


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="+")
    parser.add_argument("--gpu", required=True)
    parser.add_argument("--loss", type=float, default=0.03)
    arguments = parser.parse_args()
    times = by_problem(read(arguments.rows))
    chosen = cover(times, arguments.loss)
    used = {key: min((t for t in chosen if t in found), key=found.get) for key, found in times.items()}
    tiles = [t for t in chosen if t in set(used.values())]
    lines = [
        f'"""Measured on one {arguments.gpu} by bench/experts/tune.py; bench/experts/choose.py wrote this.',
        "",
        "TABLE[experts, hidden, intermediate] lists (tokens an expert gets on average, index into TILES,",
        "microseconds then), ascending. Do not edit.",
        '"""',
        "",
        "from .tiles import ExpertTiles, NarrowTile, WideTile",
        "",
        "TILES = (",
        *(f"    {t!r}," for t in tiles),
        ")",
        "",
        "TABLE = {",
    ]
    layers = defaultdict(list)
    for (experts, hidden, intermediate, mean), t in sorted(used.items(), key=lambda item: item[0]):
        us = round(times[experts, hidden, intermediate, mean][t], 1)
        layers[experts, hidden, intermediate].append((round(mean, 5), tiles.index(t), us))
    for layer, rules in sorted(layers.items()):
        lines.append(f"    {layer}: (")
        lines += [f"        {rule}," for rule in rules]
        lines.append("    ),")
    lines.append("}")
    OUTPUT.write_text("\n".join(lines) + "\n")
    print(f"{len(tiles)} pairs of tiles for {len(used)} problems -> {OUTPUT}")


if __name__ == "__main__":
    main()
