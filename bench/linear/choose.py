#!/usr/bin/env python3
"""Turn tuning rows (bench/linear/tune.py) into kernels/cutedsl_nvfp4/sm90/measured.py: few configurations for all rows.

    PYTHONPATH=kernels python3 -m bench.linear.choose ROWS.jsonl[.gz]... --gpu "NVIDIA H200" [--loss 0.01]

Configurations are added greedily, the one that saves most time first, until no (shape, M) is more than
`--loss` slower than its own best. Fewer configurations mean fewer kernels to compile ahead of time.
"""

import argparse
import gzip
import json
import pathlib
from collections import defaultdict
from dataclasses import fields

from cutedsl_nvfp4.sm90.tiles import LinearTile, NarrowTile, WideTile

OUTPUT = pathlib.Path(__file__).parent.parent / "kernels" / "cutedsl_nvfp4" / "measured.py"


def read(paths: list[str]) -> dict:
    """{(n, k, groups, m): {config: us}}; a later file replaces every row of a problem that it measured again."""
    times: dict[tuple, dict] = {}
    for path in paths:
        found: dict[tuple, dict] = defaultdict(dict)
        content = pathlib.Path(path).read_bytes()
        text = gzip.decompress(content) if path.endswith(".gz") else content
        for line in text.decode().splitlines():
            row = json.loads(line)
            config = eval(row["config"], {"Narrow": NarrowTile, "Wide": WideTile})  # our own repr
            found[row["n"], row["k"], row["groups"], row["m"]][config] = row["us"]
        times |= found
    return times


def cover(times: dict, loss: float) -> list:
    """The greedy choice of configurations."""
    chosen: list = []
    best = {key: min(found.values()) for key, found in times.items()}
    current = {key: 10 * best[key] for key in times}
    configs = {config for found in times.values() for config in found}
    while any(current[key] > (1 + loss) * best[key] for key in times):

        def gain(config):
            return sum(
                max(0.0, current[key] - max(found[config], (1 + loss) * best[key])) / best[key]
                for key, found in times.items()
                if config in found
            )

        pick = max(configs - set(chosen), key=lambda c: (gain(c), repr(c)))
        chosen.append(pick)
        for key, found in times.items():
            current[key] = min(current[key], found.get(pick, float("inf")))
    return chosen


def code(config: LinearTile) -> str:
    """The expression that makes `config`, without what is its class's default."""
    changed = {
        f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default
    }
    arguments = ", ".join(f"{name}={value!r}" for name, value in changed.items())
    return f"{type(config).__name__}({arguments})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="+")
    parser.add_argument("--gpu", required=True)
    parser.add_argument("--loss", type=float, default=0.01)
    arguments = parser.parse_args()
    times = read(arguments.rows)
    chosen = cover(times, arguments.loss)
    used = {}
    for key, found in times.items():
        used[key] = min((c for c in chosen if c in found), key=found.get)
    configs = [c for c in chosen if c in set(used.values())]
    lines = [
        f'"""Measured on {arguments.gpu} by bench/linear/tune.py; bench/linear/choose.py wrote this, do not edit.',
        "",
        "TABLE[n, k, groups] lists (most tokens, index into CONFIGS, microseconds then), ascending.",
        '"""',
        "",
        "from .tiles import NarrowTile, WideTile",
        "",
        "CONFIGS = (",
        *(f"    {code(config)}," for config in configs),
        ")",
        "",
        "TABLE = {",
    ]
    problems = defaultdict(list)
    for (n, k, groups, m), config in sorted(used.items()):
        problems[n, k, groups].append((m, configs.index(config), round(times[n, k, groups, m][config], 2)))
    for problem, rules in sorted(problems.items()):
        lines.append(f"    {problem}: (")
        lines += [f"        {rule}," for rule in rules]
        lines.append("    ),")
    lines.append("}")
    OUTPUT.write_text("\n".join(lines) + "\n")
    print(f"{len(configs)} configurations for {len(used)} problems -> {OUTPUT}")


if __name__ == "__main__":
    main()
