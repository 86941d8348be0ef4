"""Bench rows -> a Markdown table a run, and every bar with its figure; exits 1 where one is missed.

    python3 -m bench.report ROWS.json...           rows of bench.linear.measure or of bench.experts.measure, or both
    python3 -m bench.report ROWS.json... --bars    the bars alone
    python3 -m bench.report ROWS.json... --bars --expected docs/results/expected_misses.json    (make bench-check)
    python3 -m bench.report ROWS.json[.gz]... --drawn    rows of bench.linear.measure --draw, by range of M

It prints tables, nothing else. docs/results/h200_linear.md and h200_experts.md are written by hand: copy tables into
them, and never send this output to those files.

A file holds one run or {"runs": [...]}, oldest first. The bars take a problem's row of the newest run that has
it, with that run's peers and ceilings: times of two runs are never compared.

With --expected it exits 1 only where a miss is not in that file, or is worse than there by more than 2%. A bar on every
problem is missed by problems, each with its own figure; a bar on a mean is missed by "all". Misses of the file that
are none any more are named.
"""

import argparse
import gzip
import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

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
    """The runs of a file, oldest first; compressed where its name ends in .gz."""
    with gzip.open(path, "rt") if str(path).endswith(".gz") else open(path) as file:
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


def newest(runs: list[dict]) -> list[dict]:
    """The last run's row of every problem."""
    keys = ("n", "k", "groups", "case", "routing", "m")
    return list({tuple(row.get(key) for key in keys): row for run in runs for row in run["rows"]}.values())


ALL = "all"  # the problem of a mean
WORSE = 1.02  # a figure this much worse than the recorded one is another miss


@dataclass(frozen=True)
class Bar:
    """What is wanted of `figure`, and of the problems it comes from."""

    what: str
    figure: float
    relation: str
    wanted: float
    figures: dict[str, float]  # {problem: its own figure}
    limit: float  # of a problem's figure

    def holds(self, figure: float, limit: float) -> bool:
        """A figure nobody measured (nan) meets no bar."""
        return figure >= limit if self.relation == ">=" else figure <= limit

    @property
    def misses(self) -> dict[str, float]:
        """{problem: its figure}"""
        return {p: figure for p, figure in self.figures.items() if not self.holds(figure, self.limit)}

    def is_worse(self, figure: float, recorded: float) -> bool:
        return not self.holds(figure, recorded / WORSE if self.relation == ">=" else recorded * WORSE)


def mean_bar(what: str, figure: float, relation: str, wanted: float) -> Bar:
    return Bar(what, figure, relation, wanted, {ALL: figure}, wanted)


def worst_bar(what: str, figures: dict[str, float], most: float) -> Bar:
    figures = figures or {ALL: math.nan}
    return Bar(what, max(figures.values()), "<=", most, figures, most)


def count_bar(what: str, figures: dict[str, float], limit: float) -> Bar:
    return Bar(what, sum(figure > limit for figure in figures.values()), "<=", 0, figures, limit)


def problem(row: dict) -> str:
    """Its name, as recorded misses have it."""
    return (
        f"{row['shape']} M={row['m']}" if "shape" in row else f"{row['case']} M={row['m']} {row['routing']}"
    )


def over_best_peer(rows: list[dict], peers: tuple[str, ...]) -> dict[str, float]:
    """{problem: our time over the fastest peer's}"""
    best = {problem(r): [r["us"][p] for p in peers if p in r["us"]] for r in rows}
    return {problem(r): r["us"][OURS] / min(best[problem(r)]) for r in rows if best[problem(r)]}


def problems_over_floor(rows: list[dict], keep: Callable[[int], bool]) -> dict[str, float]:
    return {problem(r): r["us"][OURS] / r["floor_us"] for r in rows if keep(r["m"])}


def errors_over_rounding(rows: list[dict]) -> dict[str, float]:
    return {problem(r): r["error_over_rounding"][OURS] for r in rows if "error_over_rounding" in r}


def linear_bars(rows: list[dict]) -> list[Bar]:
    over_allowed = {problem(r): r["us"][OURS] / (1.35 * r["floor_us"] + 3) for r in rows if r["m"] <= 16}
    errors = errors_over_rounding(rows)

    def large(m: int) -> bool:
        return m >= 2048

    return [
        count_bar("rows slower than 1/0.98 of the best peer", over_best_peer(rows, PEERS), 1 / 0.98),
        mean_bar("over Humming, M <= 64", speedup(rows, "humming", lambda m: m <= 64), ">=", 1.3),
        mean_bar("over Humming, M > 64", speedup(rows, "humming", lambda m: m > 64), ">=", 1.15),
        mean_bar("over quack", speedup(rows, "quack", lambda m: True), ">=", 1.1),
        mean_bar("over Marlin", speedup(rows, "marlin", lambda m: True), ">=", 2.0),
        mean_bar("over cuBLAS bf16, M >= 512", speedup(rows, "cublas_bf16", lambda m: m >= 512), ">=", 1.0),
        count_bar("rows above 1.35 x floor + 3 us, M <= 16", over_allowed, 1.0),
        mean_bar("over the floor, M >= 2048", geometric_mean(over_floor(rows, large)), "<=", 1.17),
        worst_bar("worst over the floor, M >= 2048", problems_over_floor(rows, large), 1.25),
        worst_bar(f"error over rounding, recorded in {len(errors)} of {len(rows)} rows", errors, 1.05),
    ]


def expert_bars(rows: list[dict]) -> list[Bar]:
    def worst(
        what: str, low: int, high: int, most: float, keep: Callable[[str], bool] = lambda case: True
    ) -> Bar:
        kept = [r for r in rows if keep(r["case"])]
        return worst_bar(
            f"worst over the floor, {what}", problems_over_floor(kept, lambda m: low <= m <= high), most
        )

    decode, prefill = lambda m: 16 <= m <= 64, lambda m: m >= 1024
    return [
        count_bar("rows slower than 1/0.98 of the best peer", over_best_peer(rows, EXPERT_PEERS), 1 / 0.98),
        mean_bar("over Humming", speedup(rows, "humming", lambda m: True), ">=", 1.15),
        mean_bar("over Marlin, M 16 to 64", speedup(rows, "marlin", decode), ">=", 1.3),
        mean_bar("over Marlin, M >= 1024", speedup(rows, "marlin", prefill), ">=", 2.2),
        worst("M 16 to 64", 16, 64, 1.45),
        worst("M = 1024", 1024, 1024, 1.5),
        worst("M = 4096", 4096, 4096, 1.5, lambda case: case != "pro_tp8"),
        worst("M = 4096, pro_tp8", 4096, 4096, 1.6, lambda case: case == "pro_tp8"),
        worst("M = 16384", 16384, 16384, 1.35),
        worst_bar("error over rounding what must be stored", errors_over_rounding(rows), 1.1),
    ]


def print_bars(bars: list[Bar]) -> None:
    print("| bar | figure | wanted | met |\n|---|---|---|---|")
    for bar in bars:
        met = "no" if bar.misses else "yes"
        print(f"| {bar.what} | {bar.figure:.3g} | {bar.relation} {bar.wanted} | {met} |")


def surprises(bars: list[Bar], recorded: list[dict]) -> tuple[list[str], list[str]]:
    """(what is worse than recorded, recorded misses that are none any more), in words."""
    expected = {(entry["bar"], entry["problem"]): entry["figure"] for entry in recorded}
    measured = {(bar.what, p): (bar, figure) for bar in bars for p, figure in bar.figures.items()}
    worse, gone = [], []
    for (what, name), (bar, figure) in measured.items():
        said = f"{what}: {name} has {figure:.3g}"
        if name not in bar.misses:
            if (what, name) in expected:
                gone.append(f"{said}, recorded {expected[what, name]}")
        elif (what, name) not in expected:
            worse.append(f"{said}, and no miss is recorded")
        elif bar.is_worse(figure, expected[what, name]):
            worse.append(f"{said}, recorded {expected[what, name]}")
    worse += [
        f"{what}: {name} is recorded, and not measured" for what, name in expected.keys() - measured.keys()
    ]
    return worse, gone


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


def steps_down(rows: list[dict]) -> list[tuple[dict, dict]]:
    """Neighbours in M of one shape, in one run's rows, where fewer tokens take longer by more than 3% and 0.3 us."""
    ordered = sorted(rows, key=lambda row: (row["shape"], row["m"]))
    return [
        (fewer, more)
        for fewer, more in pairwise(ordered)
        if fewer["shape"] == more["shape"] and fewer["us"][OURS] > 1.03 * more["us"][OURS] + 0.3
    ]


def drawn_table(runs: list[dict], peer: str = "cublas_bf16") -> None:
    """By range of M: how far from the floor and from the peer, and the rows that are behind it."""
    rows = [row for run in runs for row in run["rows"]]
    print(
        "| M | rows | ours / floor | with cuBLAS | cuBLAS / ours | over 1.02 | over 1.05 | worst | worst error |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for low, high in ((1, 32), (33, 512), (513, 16384), (1, 16384)):
        kept = [row for row in rows if low <= row["m"] <= high]
        ratios = sorted(row["us"][OURS] / row["us"][peer] for row in kept if peer in row["us"])
        print(
            f"| {low} to {high} | {len(kept)} | {geometric_mean(over_floor(kept, lambda m: True)):.2f} "
            f"| {len(ratios)} | {1 / geometric_mean(ratios):.2f} "
            f"| {sum(r > 1.02 for r in ratios)} | {sum(r > 1.05 for r in ratios)} | {ratios[-1]:.2f} "
            f"| {max(errors_over_rounding(kept).values()):.3f} |"
        )
    down = [pair for run in runs for pair in steps_down(run["rows"])]
    print(f"\nsteps down in M: {len(down)}")
    for fewer, more in down:
        print(f"  {problem(fewer)} {fewer['us'][OURS]:.2f}, M={more['m']} {more['us'][OURS]:.2f}")
    print("\n| linear | N x K | M | floor | ours | cuBLAS | ours / cuBLAS | SM MHz: ours, cuBLAS |")
    print("|---|---|---|---|---|---|---|---|")
    behind = [row for row in rows if peer in row["us"] and row["us"][OURS] > 1.02 * row["us"][peer]]
    for row in sorted(behind, key=lambda row: -row["us"][OURS] / row["us"][peer]):
        ours, theirs = row["us"][OURS], row["us"][peer]
        clocks = ", ".join(str(row.get("sm_mhz", {}).get(name, "-")) for name in (OURS, peer))
        print(
            f"| {row['shape']} | {row['n']} x {row['k']} | {row['m']} | {row['floor_us']:.1f} | {ours:.1f} "
            f"| {theirs:.1f} | {ours / theirs:.2f} | {clocks} |"
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="+")
    parser.add_argument("--bars", action="store_true")
    parser.add_argument("--drawn", action="store_true", help="the rows are of bench.linear.measure --draw")
    parser.add_argument("--expected", metavar="FILE", help="recorded misses")
    arguments = parser.parse_args(argv)
    every = [run for path in arguments.rows for run in read(path)]
    if arguments.drawn:
        drawn_table(every)
        return 0
    recorded: dict[str, list[dict]] = {}
    if arguments.expected:
        with open(arguments.expected) as file:
            recorded = json.load(file)
    missed, worse, gone = [], [], []
    for title, is_kind, bars_of, table in (
        ("linear", lambda row: "shape" in row, linear_bars, linear_table),
        ("experts", lambda row: "case" in row, expert_bars, expert_table),
    ):
        runs = [run for run in every if any(map(is_kind, run["rows"]))]
        if not runs:
            continue
        print(f"# NVFP4 {title}, W4A16, microseconds\n")
        if not arguments.bars:
            print("CUDA graphs, weights from memory, medians of interleaved repeats.\n")
        bars = bars_of(newest(runs))
        print_bars(bars)
        missed += [bar for bar in bars if bar.misses]
        for found, said in zip((worse, gone), surprises(bars, recorded.get(title, []))):
            found += [f"{title}, {line}" for line in said]
        for run in runs if not arguments.bars else []:
            limits = run["ceilings"]
            if "run" in run:
                print(f"\n## Run {run['run']}, {run['date']}, tiles {run['tiles']}")
            print(
                f"\n{run['gpu']}, torch {run['torch']}, CUDA {run['cuda']}; measured ceilings "
                f"{limits['bytes_per_s'] / 1e12:.2f} TB/s, {limits['flops'] / 1e12:.0f} TFLOP/s."
            )
            table(run["rows"])
    if not arguments.expected:
        return 1 if missed else 0
    print()
    for line in gone:
        print(f"met now, take it out of {arguments.expected}: {line}")
    for line in worse:
        print(f"worse than {arguments.expected}: {line}")
    if not worse:
        print(f"every miss is recorded in {arguments.expected}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
