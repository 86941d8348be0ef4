#!/usr/bin/env python3
"""Bench rows (bench/linear.py) -> a Markdown table, and every bar with its figure; exits 1 where one is missed.

python3 bench/report.py ROWS.json... > docs/results/h200_linear.md
python3 bench/report.py ROWS.json... --bars      the bars alone (make bench-check)
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable

OURS = "cutedsl_nvfp4"
PEERS = ("quack", "humming", "cublas_bf16")


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def speedup(rows: list[dict], peer: str, keep: Callable[[int], bool]) -> float:
    """Geometric mean of the peer's time over ours."""
    return geometric_mean(r["us"][peer] / r["us"][OURS] for r in rows if peer in r["us"] and keep(r["m"]))


def over_floor(rows: list[dict], keep: Callable[[int], bool]) -> list[float]:
    return [r["us"][OURS] / r["floor_us"] for r in rows if keep(r["m"])]


def bars(rows: list[dict]) -> list[tuple[str, float, str, float, bool]]:
    """(what, figure, relation, bar, met)"""
    compared = [r for r in rows if any(p in r["us"] for p in PEERS)]
    worst_peer = [min(r["us"][p] for p in PEERS if p in r["us"]) / r["us"][OURS] for r in compared]
    decode = [r["us"][OURS] - (1.35 * r["floor_us"] + 3) for r in rows if r["m"] <= 16]
    errors = [r["error_over_rounding"][OURS] for r in rows if "error_over_rounding" in r]
    found = [
        ("rows slower than 1/0.98 of the best peer", sum(w < 0.98 for w in worst_peer), "<=", 0),
        ("over Humming, M <= 64", speedup(rows, "humming", lambda m: m <= 64), ">=", 1.3),
        ("over Humming, M > 64", speedup(rows, "humming", lambda m: m > 64), ">=", 1.15),
        ("over quack", speedup(rows, "quack", lambda m: True), ">=", 1.1),
        ("over cuBLAS bf16, M >= 512", speedup(rows, "cublas_bf16", lambda m: m >= 512), ">=", 1.0),
        ("rows above 1.35 x floor + 3 us, M <= 16", sum(d > 0 for d in decode), "<=", 0),
        ("over the floor, M >= 2048", geometric_mean(over_floor(rows, lambda m: m >= 2048)), "<=", 1.17),
        (
            "worst over the floor, M >= 2048",
            max(over_floor(rows, lambda m: m >= 2048), default=math.nan),
            "<=",
            1.25,
        ),
        ("error over rounding (nan: not recorded)", max(errors, default=math.nan), "<=", 1.05),
    ]
    return [
        (what, figure, relation, bar, figure >= bar if relation == ">=" else figure <= bar)
        for what, figure, relation, bar in found
    ]


def print_bars(rows: list[dict]) -> int:
    """Print every bar as a table -> 0 if all are met, 1 if not."""
    checks = bars(rows)
    print("| bar | figure | wanted | met |\n|---|---|---|---|")
    for what, figure, relation, bar, met in checks:
        print(f"| {what} | {figure:.3g} | {relation} {bar} | {'yes' if met else 'no'} |")
    return 0 if all(check[-1] for check in checks) else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="+")
    parser.add_argument("--bars", action="store_true")
    arguments = parser.parse_args()
    runs = []
    for path in arguments.rows:
        with open(path) as file:
            runs.append(json.load(file))
    rows = [row for run in runs for row in run["rows"]]
    if arguments.bars:
        return print_bars(rows)
    print("# NVFP4 linear, W4A16, microseconds\n")
    for run in runs:
        limits = run["ceilings"]
        print(
            f"{run['gpu']}, torch {run['torch']}, CUDA {run['cuda']}; measured ceilings "
            f"{limits['bytes_per_s'] / 1e12:.2f} TB/s, {limits['flops'] / 1e12:.0f} TFLOP/s.\n"
        )
    print("CUDA graphs, weights rotated past L2, medians of interleaved repeats.\n")
    status = print_bars(rows)
    print(f"\n| linear | N x K | M | floor | ours | {' | '.join(PEERS)} |")
    print("|---|---|---|---|---|" + "---|" * len(PEERS))
    for r in rows:
        times = " | ".join(f"{r['us'][p]:.1f}" if p in r["us"] else "-" for p in PEERS)
        groups = f" x {r['groups']} groups" if r["groups"] > 1 else ""
        print(
            f"| {r['shape']} | {r['n']} x {r['k']}{groups} | {r['m']} | {r['floor_us']:.1f} "
            f"| {r['us'][OURS]:.1f} | {times} |"
        )
    return status


if __name__ == "__main__":
    sys.exit(main())
