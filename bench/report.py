"""Bench rows -> a Markdown table a run, and every bar with its figure; exits 1 where one is missed.

python3 -m bench.report ROWS.json...           rows of bench/linear/measure.py, or of bench/experts/measure.py
python3 -m bench.report ROWS.json... --bars    the bars alone, of both (make bench-check)

A file holds one run or {"runs": [...]}, oldest first. The bars take a problem's row of the newest run that has
it, with that run's peers and ceilings: times of two runs are never compared.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterable

OURS = "cutedsl_nvfp4"
PEERS = ("quack", "humming", "marlin", "cublas_bf16")
EXPERT_PEERS = ("humming", "marlin", "grouped_mm_bf16")


def save(result: dict, path: str) -> None:
    """Write a run as JSON; a reader, or a run that is cut off, finds the file whole."""
    part = f"{path}.part"
    with open(part, "w") as file:
        json.dump(result, file)
    os.replace(part, path)


def read(path: str | os.PathLike) -> list[dict]:
    """The runs of a file, oldest first."""
    with open(path) as file:
        content = json.load(file)
    return content.get("runs", [content])


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def speedup(rows: list[dict], peer: str, keep: Callable[[int], bool]) -> float:
    """Geometric mean of the peer's time over ours."""
    return geometric_mean(r["us"][peer] / r["us"][OURS] for r in rows if peer in r["us"] and keep(r["m"]))


def over_floor(rows: list[dict], keep: Callable[[int], bool], kernel: str = OURS) -> list[float]:
    return [r["us"][kernel] / r["floor_us"] for r in rows if keep(r["m"])]


def beaten(rows: list[dict], peers: tuple[str, ...]) -> int:
    """Rows in which the best peer is faster by more than noise."""
    compared = [r for r in rows if any(p in r["us"] for p in peers)]
    return sum(min(r["us"][p] for p in peers if p in r["us"]) < 0.98 * r["us"][OURS] for r in compared)


def newest(runs: list[dict]) -> list[dict]:
    """The last run's row of every problem."""
    keys = ("n", "k", "groups", "case", "routing", "m")
    return list({tuple(row.get(key) for key in keys): row for run in runs for row in run["rows"]}.values())


def linear_bars(rows: list[dict]) -> list[tuple[str, float, str, float]]:
    """(what, figure, relation, bar)"""
    decode = [r["us"][OURS] - (1.35 * r["floor_us"] + 3) for r in rows if r["m"] <= 16]
    errors = [r["error_over_rounding"][OURS] for r in rows if "error_over_rounding" in r]
    return [
        ("rows slower than 1/0.98 of the best peer", beaten(rows, PEERS), "<=", 0),
        ("over Humming, M <= 64", speedup(rows, "humming", lambda m: m <= 64), ">=", 1.3),
        ("over Humming, M > 64", speedup(rows, "humming", lambda m: m > 64), ">=", 1.15),
        ("over quack", speedup(rows, "quack", lambda m: True), ">=", 1.1),
        ("over Marlin", speedup(rows, "marlin", lambda m: True), ">=", 2.0),
        ("over cuBLAS bf16, M >= 512", speedup(rows, "cublas_bf16", lambda m: m >= 512), ">=", 1.0),
        ("rows above 1.35 x floor + 3 us, M <= 16", sum(d > 0 for d in decode), "<=", 0),
        ("over the floor, M >= 2048", geometric_mean(over_floor(rows, lambda m: m >= 2048)), "<=", 1.17),
        (
            "worst over the floor, M >= 2048",
            max(over_floor(rows, lambda m: m >= 2048), default=math.nan),
            "<=",
            1.25,
        ),
        (
            f"error over rounding, recorded in {len(errors)} of {len(rows)} rows",
            max(errors, default=math.nan),
            "<=",
            1.05,
        ),
    ]


def expert_bars(rows: list[dict]) -> list[tuple[str, float, str, float]]:
    """(what, figure, relation, bar)"""

    def worst(low: int, high: int, keep: Callable[[str], bool] = lambda case: True) -> float:
        kept = [r for r in rows if keep(r["case"])]
        return max(over_floor(kept, lambda m: low <= m <= high), default=math.nan)

    decode, prefill = lambda m: 16 <= m <= 64, lambda m: m >= 1024
    return [
        ("rows slower than 1/0.98 of the best peer", beaten(rows, EXPERT_PEERS), "<=", 0),
        ("over Humming", speedup(rows, "humming", lambda m: True), ">=", 1.15),
        ("over Marlin, M 16 to 64", speedup(rows, "marlin", decode), ">=", 1.3),
        ("over Marlin, M >= 1024", speedup(rows, "marlin", prefill), ">=", 2.2),
        ("worst over the floor, M 16 to 64", worst(16, 64), "<=", 1.45),
        ("worst over the floor, M = 1024", worst(1024, 1024), "<=", 1.5),
        ("worst over the floor, M = 4096", worst(4096, 4096, lambda c: c != "pro_tp8"), "<=", 1.5),
        ("worst over the floor, M = 4096, pro_tp8", worst(4096, 4096, lambda c: c == "pro_tp8"), "<=", 1.6),
        ("worst over the floor, M = 16384", worst(16384, 16384), "<=", 1.35),
        (
            "error over rounding what must be stored",
            max((r["error_over_rounding"][OURS] for r in rows), default=math.nan),
            "<=",
            1.1,
        ),
    ]


def print_bars(checks: list[tuple[str, float, str, float]]) -> bool:
    """Print bars as a table -> whether all are met; a figure nobody measured (nan) meets none."""
    print("| bar | figure | wanted | met |\n|---|---|---|---|")
    all_met = True
    for what, figure, relation, bar in checks:
        met = figure >= bar if relation == ">=" else figure <= bar
        all_met = all_met and met
        print(f"| {what} | {figure:.3g} | {relation} {bar} | {'yes' if met else 'no'} |")
    return all_met


def linear_table(rows: list[dict]) -> None:
    print(f"\n| linear | N x K | M | floor | ours | {' | '.join(PEERS)} |")
    print("|---|---|---|---|---|" + "---|" * len(PEERS))
    for r in rows:
        times = " | ".join(f"{r['us'][p]:.1f}" if p in r["us"] else "-" for p in PEERS)
        groups = f" x {r['groups']} groups" if r["groups"] > 1 else ""
        print(
            f"| {r['shape']} | {r['n']} x {r['k']}{groups} | {r['m']} | {r['floor_us']:.1f} "
            f"| {r['us'][OURS]:.1f} | {times} |"
        )


def expert_table(rows: list[dict]) -> None:
    print(f"\n| layer | M | routing | experts touched | floor | ours | {' | '.join(EXPERT_PEERS)} |")
    print("|---|---|---|---|---|---|" + "---|" * len(EXPERT_PEERS))
    for r in rows:
        times = " | ".join(f"{r['us'][p]:.1f}" if p in r["us"] else "-" for p in EXPERT_PEERS)
        print(
            f"| {r['case']} | {r['m']} | {r['routing']} | {r['touched']:.0f} | {r['floor_us']:.1f} "
            f"| {r['us'][OURS]:.1f} | {times} |"
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="+")
    parser.add_argument("--bars", action="store_true")
    arguments = parser.parse_args()
    every = [run for path in arguments.rows for run in read(path)]
    all_met = True
    for title, is_kind, bars, table in (
        ("linear", lambda row: "shape" in row, linear_bars, linear_table),
        ("experts", lambda row: "case" in row, expert_bars, expert_table),
    ):
        runs = [run for run in every if any(map(is_kind, run["rows"]))]
        if not runs:
            continue
        print(f"# NVFP4 {title}, W4A16, microseconds\n")
        if not arguments.bars:
            print("CUDA graphs, weights from memory, medians of interleaved repeats.\n")
        all_met = print_bars(bars(newest(runs))) and all_met
        for run in runs if not arguments.bars else []:
            limits = run["ceilings"]
            if "run" in run:
                print(f"\n## Run {run['run']}, {run['date']}, tiles {run['tiles']}")
            print(
                f"\n{run['gpu']}, torch {run['torch']}, CUDA {run['cuda']}; measured ceilings "
                f"{limits['bytes_per_s'] / 1e12:.2f} TB/s, {limits['flops'] / 1e12:.0f} TFLOP/s."
            )
            table(run["rows"])
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main())
