"""The committed rows -> docs/results/plots/*.svg (make plots).

    PYTHONPATH=kernels python3 -m bench.plots [--results docs/results] [--out docs/results/plots]

h200_linear.svg and h200_experts.svg: time over floor by tokens, of this project's kernels and of the peers.
h200_serving.svg: step times of the server, the image compared with stock vLLM.

Every measured number, those in the words included, comes from the rows. The same rows give the same bytes:
numbers are rounded before they are drawn, no position depends on the width of a text, and matplotlib is pinned.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Callable

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Transform

from . import report

RESULTS = pathlib.Path(__file__).parent.parent / "docs" / "results"
STYLE = {
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],  # matplotlib's own; a browser without it takes its sans-serif
    "font.size": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "xtick.bottom": False,  # the grid marks them
    "ytick.left": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "plots",
}
WIDTH = 600 / 72  # inches: 800 CSS pixels
GREY = "#555555"
FLOOR = "Floor: the bytes at memory's measured speed or the products at the tensor cores', whichever takes longer."
# name, colour (Okabe and Ito's for the colour-blind, and grey), marker
KERNELS = {
    report.OURS: ("this project", "#0072b2", "o"),
    "quack": ("quack", "#cc79a7", "v"),
    "humming": ("Humming", "#009e73", "s"),
    "marlin": ("Marlin", "#d55e00", "^"),
    "cublas_bf16": ("cuBLAS bf16", GREY, "D"),
    "grouped_mm_bf16": ("torch bf16", GREY, "D"),
}
CASES = {  # in the order of the panels
    "flash": "Flash on one GPU",
    "flash_tp4": "Flash, tensor parallel 4",
    "pro_tp8": "Pro, tensor parallel 8",
    "pro_tp4": "Pro, tensor parallel 4",
    "pro_ep8": "Pro, expert parallel 8",
    "pro_ep8_all_local": "Pro, expert parallel 8, all choices on this GPU",
}
# bench/serving/measure.py's labels: side, configuration, GPU, round. Stock and image ran on this GPU in turn.
SIDES = {"stock": ("stock vLLM", "#e69f00"), "image": ("this image", "#0072b2")}
CONFIGURATION, CONFIGURATION_PLACE = "exp12,gpu0", "12 layers, one H200"
CONFIGURATION_TITLE = "Flash's width, NVFP4 experts, the rest bf16; both on the same H200, in turn."


class UnreadableRows(Exception):
    """A file does not hold the rows that its picture needs; the message names the file."""


# --- rows


def kernel_rows(path: pathlib.Path) -> tuple[list[dict], str]:
    """(every problem's newest row, the GPU)"""
    runs = report.read(path)
    gpus = {run["gpu"] for run in runs}
    if len(gpus) != 1:
        raise ValueError(f"rows of {len(gpus)} GPUs: {sorted(gpus)}")
    return report.newest(runs), gpus.pop()


def complete(rows: list[dict], peers: tuple[str, ...]) -> list[dict]:
    """The rows in which every peer was timed: lines drawn of these compare like with like."""
    kept = [row for row in rows if all(peer in row["us"] for peer in peers)]
    if not kept:
        raise ValueError(f"no row has all of {', '.join(peers)}")
    return kept


def sizes(rows: list[dict]) -> list[int]:
    return sorted({row["m"] for row in rows})


def curve(rows: list[dict], kernel: str) -> list[float]:
    """Geometric mean of the time over the floor at every M of the rows."""
    return [
        round(report.geometric_mean(report.over_floor(rows, size.__eq__, kernel)), 3) for size in sizes(rows)
    ]


def serving_rows(path: pathlib.Path) -> dict[tuple[str, str, int], list[dict]]:
    """(side, kind, size) -> the rows of CONFIGURATION, one a round"""
    found: dict[tuple[str, str, int], list[dict]] = {}
    for row in map(json.loads, path.read_text().splitlines()):
        side, _, configuration = row["label"].partition(",")
        if configuration.rpartition(",")[0] == CONFIGURATION:
            found.setdefault((side, row["kind"], row["size"]), []).append(row)
    for kind in ("decode", "prefill"):
        measured = {side: [size for s, k, size in found if (s, k) == (side, kind)] for side in SIDES}
        if not measured["stock"] or sorted(measured["stock"]) != sorted(measured["image"]):
            raise ValueError(f"{kind} of {CONFIGURATION} is not there for both sides: {measured}")
    return found


# --- drawing


def heading(figure: Figure, title: str, lines: list[str]) -> None:
    height = figure.get_figheight() * 72
    figure.text(0.012, 1 - 19 / height, title, fontsize=12, fontweight="bold")
    for i, line in enumerate(lines):
        figure.text(0.012, 1 - (35 + 13 * i) / height, line, color=GREY)


def apart(values: list[float], gap: float) -> list[float]:
    """The values moved up where needed, so that neighbours are `gap` times each other at least."""
    moved: dict[int, float] = {}
    last = 0.0
    for i in sorted(range(len(values)), key=values.__getitem__):
        last = moved[i] = max(values[i], last * gap)
    return [round(moved[i], 3) for i in range(len(values))]


def name_axes(axes: Axes, x: str, y: str) -> None:
    """At set distances: matplotlib's own depend on the tick labels' widths."""
    axes.set_xlabel(x, va="baseline")
    axes.set_ylabel(y, va="baseline")
    box = axes.get_position()
    width, height = (size * 72 for size in axes.figure.get_size_inches())
    axes.xaxis.set_label_coords((box.x0 + box.x1) / 2, box.y0 - 28 / height, axes.figure.transFigure)
    axes.yaxis.set_label_coords(box.x0 - 33 / width, (box.y0 + box.y1) / 2, axes.figure.transFigure)


def compared(rows: list[dict], peers: tuple[str, ...]) -> tuple[str, str]:
    """(the peers' range for a title, a sentence that names each) of the peer's time over ours, all M together."""
    ratios = {KERNELS[peer][0]: report.speedup(rows, peer, lambda m: True) for peer in peers}
    ordered = sorted(ratios, key=ratios.__getitem__, reverse=True)
    each = ", ".join(f"{name} {ratios[name]:.2f}" for name in ordered)
    return (
        f"the peers take {ratios[ordered[-1]]:.1f} to {ratios[ordered[0]]:.1f} times as long",
        f"Their time over this project's, geometric mean over all M: {each}.",
    )


def name_kernel(axes: Axes, kernel: str, x: float, y: float, transform: Transform) -> None:
    """Its marker and its name, right of (x, y)."""
    name, colour, marker = KERNELS[kernel]
    axes.plot(x, y, marker=marker, color=colour, markersize=6, clip_on=False, transform=transform)
    weight = "bold" if kernel == report.OURS else "normal"
    axes.annotate(
        name, (x, y), (8, 0), xycoords=transform, textcoords="offset points", va="center", fontweight=weight
    )


def draw_over_floor(axes: Axes, rows: list[dict], peers: tuple[str, ...], top: int) -> dict[str, float]:
    """A line a kernel and the band of ours, up to 2**top times the floor; -> where each line ends."""
    ticks, kept = sizes(rows), complete(rows, peers)
    ours = [report.over_floor(rows, size.__eq__) for size in ticks]
    band = [round(min(values), 3) for values in ours], [round(max(values), 3) for values in ours]
    axes.fill_between(ticks, *band, color=KERNELS[report.OURS][1], alpha=0.13, linewidth=0)
    axes.axhline(1, color="black", linewidth=0.8)
    ends = {}
    for kernel in (*peers, report.OURS):
        _, colour, marker = KERNELS[kernel]
        means, bold = curve(kept, kernel), kernel == report.OURS
        axes.plot(
            sizes(kept), means, marker=marker, color=colour, linewidth=2.4 if bold else 1.4,
            markersize=4.5 if bold else 3.5, zorder=3 if bold else 2,
        )  # fmt: skip
        ends[kernel] = means[-1]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.minorticks_off()
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
    axes.set_xlim(ticks[0] / 1.2, ticks[-1] * 1.2)
    axes.set_ylim(0.75, 2**top * 1.1)
    axes.set_yticks([2**i for i in range(top + 1)], [f"{2**i}×" for i in range(top + 1)])
    axes.text(ticks[0] / 1.15, 0.97, "floor", va="top", fontsize=8)
    return ends


def linear(path: pathlib.Path) -> tuple[Figure, str]:
    rows, gpu = kernel_rows(path)
    peers_take, each = compared(rows, report.PEERS)
    title = f"NVFP4 linear layers, {gpu}: {peers_take}"
    figure = Figure(figsize=(WIDTH, 400 / 72))
    heading(figure, title, [
        each,
        f"Lines: geometric means of the {len(complete(rows, report.PEERS))} problems that every kernel was "
        f"timed on. Band: this project's best to its worst of {len(rows)}.",
        FLOOR,
    ])  # fmt: skip
    axes = figure.add_axes((0.075, 0.1075, 0.765, 0.7225))
    ends = draw_over_floor(axes, rows, report.PEERS, 6)
    name_axes(axes, "M, tokens", "time over the floor")
    worst = max(rows, key=lambda row: row["us"][report.OURS] / row["floor_us"])
    axes.text(
        worst["m"] * 1.1, round(1.06 * worst["us"][report.OURS] / worst["floor_us"], 2),
        f"worst: {worst['shape']}, {worst['n']} x {worst['k']}", fontsize=8,
    )  # fmt: skip
    for kernel, height in zip(ends, apart(list(ends.values()), 1.22)):
        name_kernel(axes, kernel, sizes(rows)[-1] * 1.5, height, axes.transData)
    return figure, title


def experts(path: pathlib.Path) -> tuple[Figure, str]:
    rows, gpu = kernel_rows(path)
    peers_take, each = compared(rows, report.EXPERT_PEERS)
    title = f"NVFP4 experts, {gpu}: {peers_take}"
    figure = Figure(figsize=(WIDTH, 500 / 72))
    heading(figure, title, [
        each,
        "Lines: geometric means of uniform and Zipf routing. Band: this project's better to its worse routing.",
        FLOOR,
    ])  # fmt: skip
    cases = sorted({row["case"] for row in rows}, key=list(CASES).index)
    panels = figure.subplots((len(cases) + 1) // 2, 2, sharex=True, sharey=True, squeeze=False)
    figure.subplots_adjust(left=0.075, right=0.975, bottom=0.085, top=0.79, hspace=0.17, wspace=0.09)
    for case, axes in zip(cases, panels.flat):
        draw_over_floor(axes, [row for row in rows if row["case"] == case], report.EXPERT_PEERS, 4)
        axes.set_title(CASES[case])
        name_axes(
            axes,
            "M, tokens" if axes in panels[-1] else "",
            "time over the floor" if axes in panels[:, 0] else "",
        )
    for i, kernel in enumerate((report.OURS, *report.EXPERT_PEERS)):
        name_kernel(panels[0, 0], kernel, 0.085 + 0.17 * i, 0.844, figure.transFigure)
    return figure, title


def draw_steps(axes: Axes, found: dict, kind: str, unit: str) -> str:
    """A pair of bars a size; -> the range of stock over image, 1 where the repeats of both overlap."""
    ticks, ratios = sorted({size for _, k, size in found if k == kind}), []
    means: dict[str, list[float]] = {}
    spans: dict[str, list[tuple[float, float]]] = {}
    for place, (side, (_, colour)) in enumerate(SIDES.items()):
        rounds = [found[side, kind, size] for size in ticks]
        means[side] = [round(sum(r["step_ms"] for r in of) / len(of), 2) for of in rounds]
        repeats = [[ms for r in of for ms in r["repeats_ms"]] for of in rounds]
        spans[side] = [(round(min(all_ms), 2), round(max(all_ms), 2)) for all_ms in repeats]
        x = [i + 0.38 * (place - 0.5) for i in range(len(ticks))]
        axes.bar(x, means[side], 0.36, color=colour)
        axes.vlines(x, *zip(*spans[side]), color="black", linewidth=1)
    for i, (stock, image) in enumerate(zip(spans["stock"], spans["image"])):
        differ = image[1] < stock[0] or stock[1] < image[0]
        ratio = means["stock"][i] / means["image"][i]
        top = max(stock[1], image[1])
        axes.annotate(
            f"{ratio:.2f}×" if differ else "repeats\noverlap", (i, top), (0, 4), textcoords="offset points",
            ha="center", fontweight="bold" if differ else "normal", fontsize=9 if differ else 7.5,
            color="black" if differ else GREY,
        )  # fmt: skip
        ratios.append(ratio if differ else 1)
    axes.set_xticks(range(len(ticks)), [f"{tick:,}" for tick in ticks])
    axes.grid(visible=False, axis="x")
    name_axes(axes, unit, "ms")
    axes.set_title(f"{kind} step, {CONFIGURATION_PLACE}")
    axes.set_ylim(0, 1.12 * max(high for side in spans.values() for _, high in side))
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def serving(path: pathlib.Path) -> tuple[Figure, str]:
    found = serving_rows(path)
    figure = Figure(figsize=(WIDTH, 360 / 72))
    panels = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.075, right=0.975, bottom=0.12, top=0.71, wspace=0.2)
    decode = draw_steps(panels[0], found, "decode", "streams")
    prefill = draw_steps(panels[1], found, "prefill", "tokens of the prompt")
    title = f"Stock vLLM takes {decode} times as long to decode, {prefill} to prefill"
    heading(figure, title, [
        CONFIGURATION_TITLE,
        "Bars: medians of the repeats, averaged over rounds. Black lines: fastest to slowest repeat.",
        "Figures: stock's time over the image's.",
    ])  # fmt: skip
    for i, (name, colour) in enumerate(SIDES.values()):
        figure.text(0.075 + 0.17 * i, 0.79, "■", color=colour, fontsize=12)
        figure.text(0.097 + 0.17 * i, 0.79, name)
    return figure, title


# --- files

PLOTS = {
    "h200_linear.svg": ("h200_linear.json", linear),
    "h200_experts.svg": ("h200_experts.json", experts),
    "h200_serving.svg": ("h200_serving.jsonl", serving),
}


def write(plot: Callable, rows: pathlib.Path, out: pathlib.Path) -> None:
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever matplotlibrc this machine has
        matplotlib.rcParams.update(STYLE)
        try:
            figure, title = plot(rows)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise UnreadableRows(f"{rows}: {type(error).__name__}: {error}") from error
        figure.savefig(
            out, format="svg", metadata={"Date": None, "Creator": "bench/plots.py", "Title": title}
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "plots", help="folder of the pictures")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, (rows, plot) in PLOTS.items():
        try:
            write(plot, arguments.results / rows, arguments.out / name)
        except UnreadableRows as error:
            print(f"no {name}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
