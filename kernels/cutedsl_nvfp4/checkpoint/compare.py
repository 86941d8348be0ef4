"""How far the weights of two checkpoints are apart, tensor by tensor, whatever each stores them as."""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import names, quantize
from .dialects import Contents, Linear, read_contents
from .disk import check_disks
from .folder import Folder, find_source, read_checkpoint
from .headers import CheckpointError, Tensor
from .hub import Hub

SHOWN = 30
BATCH = 64  # tensors a worker takes at a time
CHUNK_ROWS = 64


@dataclass(frozen=True)
class Difference:
    """One tensor of A against B's: signal to noise in dB (A is the signal; None: equal), largest error, cosine."""

    name: str
    kind: str
    formats: tuple[str, str]
    snr_db: float | None
    largest: float
    cosine: float


def _read(folder: Path, tensor: Tensor) -> torch.Tensor:
    with (folder / tensor.file).open("rb") as file:
        file.seek(tensor.offset)
        buffer = bytearray(file.read(tensor.nbytes))
    if len(buffer) != tensor.nbytes:
        raise CheckpointError(f"{tensor.file} ends early; download it again")
    if tensor.dtype not in quantize.TORCH_DTYPES:
        dtype = {"I32": torch.int32, "I64": torch.int64, "F64": torch.float64}.get(tensor.dtype)
        if dtype is None:
            raise CheckpointError(f"{tensor.file}: tensors of {tensor.dtype} cannot be compared")
    else:
        dtype = quantize.TORCH_DTYPES[tensor.dtype]
    flat = torch.frombuffer(buffer, dtype=dtype) if buffer else torch.empty(0, dtype=dtype)
    return flat.view(tensor.shape)


def _chunks(folder: Path, linear: Linear) -> Iterator[torch.Tensor]:
    """f32 values of `linear`, CHUNK_ROWS rows at a time."""
    weight = _read(folder, linear.weight)
    scale = None if linear.scale is None else _read(folder, linear.scale)
    if linear.format == "nvfp4":
        if linear.global_scale is None:
            raise CheckpointError(f"{linear.name} is NVFP4 without weight_scale_2")
        overall = _read(folder, linear.global_scale).reshape(())
        overall = 1 / overall if linear.divisors else overall
        scales = scale.view(torch.uint8)
        for first in range(0, linear.n, CHUNK_ROWS):
            rows = slice(first, first + CHUNK_ROWS)
            yield quantize.dequantize_chunk(weight[rows], scales[rows], overall)
    elif linear.format == "mxfp4":
        for first in range(0, linear.n, CHUNK_ROWS):
            rows = slice(first, first + CHUNK_ROWS)
            yield quantize.dequantize_mxfp4(weight[rows], scale[rows])
    else:
        values = [chunk for _, chunk in quantize.Rows(linear, weight, scale).chunks()]
        yield from torch.cat(values).split(CHUNK_ROWS)


def _measure(pairs: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float | None, float, float]:
    """(SNR in dB or None where all is equal, largest error, cosine) over chunks of A and B."""
    signal = other = noise = dot = largest = 0.0
    for a, b in pairs:
        a, b = a.double(), b.double()
        error = b - a
        signal += float(a.square().sum())
        other += float(b.square().sum())
        noise += float(error.square().sum())
        dot += float((a * b).sum())
        if a.numel():
            largest = max(largest, float(error.abs().max()))
    if not math.isfinite(noise):
        return -math.inf, math.inf, math.nan
    cosine = dot / math.sqrt(signal * other) if signal > 0 and other > 0 else float(signal == other)
    snr = None if noise == 0 else -math.inf if signal == 0 else 10 * math.log10(signal / noise)
    return snr, largest, cosine


def _compare_batch(folders: tuple[Path, Path], batch: list) -> list[Difference]:
    """Run in a worker: (name, kind, A's Linear or Tensor, B's) -> Differences."""
    torch.set_num_threads(1)
    found = []
    for name, kind, a, b in batch:
        if isinstance(a, Linear):
            formats = (a.format, b.format)
            pairs = zip(_chunks(folders[0], a), _chunks(folders[1], b))
        else:
            formats = (a.dtype, b.dtype)
            pairs = iter([(_read(folders[0], a), _read(folders[1], b))])
        found.append(Difference(name, kind, formats, *_measure(pairs)))
    return found


def _shape(part: Linear | Tensor) -> tuple[int, ...]:
    return (part.n, part.k) if isinstance(part, Linear) else part.shape


def _matched(a: Contents, b: Contents, only: set[str]) -> tuple[list, list[str]]:
    """(what both have, with its kind), and lines about what only one has or has in another shape."""
    work, notes = [], []
    for ours, theirs, kind_of in (
        (a.linears, b.linears, names.kind_of),
        (a.parameters, b.parameters, lambda _: "rest"),
        (a.copied, b.copied, lambda _: "mtp"),
    ):
        ours, theirs = (
            {name: part for name, part in parts.items() if not only or kind_of(name) in only}
            for parts in (ours, theirs)
        )
        for label, names_only in (("A", ours.keys() - theirs.keys()), ("B", theirs.keys() - ours.keys())):
            if names_only:
                notes.append(f"{len(names_only)} only in {label}, the first {min(names_only)}")
        for name in sorted(ours.keys() & theirs.keys(), key=names.natural_order):
            if _shape(ours[name]) != _shape(theirs[name]):
                notes.append(
                    f"{name} is {list(_shape(ours[name]))} in A and {list(_shape(theirs[name]))} in B"
                )
                continue
            work.append((name, kind_of(name), ours[name], theirs[name]))
    return work, notes


def badness(difference: Difference) -> float:
    """Sort key: the noisiest first, equal tensors last."""
    return math.inf if difference.snr_db is None else difference.snr_db


def compare(a: Path, b: Path, only: set[str], jobs: int = 1) -> tuple[list[Difference], list[str]]:
    """Two checkpoint folders -> (Differences, worst first; what could not be compared)."""
    contents = []
    for folder in (a, b):
        checkpoint = read_checkpoint(Folder(folder))
        contents.append(read_contents(checkpoint.tensors, checkpoint.num_layers))
    work, notes = _matched(*contents, only)
    batches = [work[first : first + BATCH] for first in range(0, len(work), BATCH)]
    if jobs == 1 or len(batches) < 2:
        threads = torch.get_num_threads()
        found = [difference for batch in batches for difference in _compare_batch((a, b), batch)]
        torch.set_num_threads(threads)
    else:
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            results = pool.map(_compare_batch, [(a, b)] * len(batches), batches)
            found = [difference for result in results for difference in result]
    return sorted(found, key=badness), notes


def by_kind(found: list[Difference]) -> dict[str, dict]:
    """Median and worst SNR of each kind, and how many of its tensors are equal."""
    rows = {}
    for kind in dict.fromkeys(difference.kind for difference in found):
        own = [difference for difference in found if difference.kind == kind]
        unequal = sorted(difference.snr_db for difference in own if difference.snr_db is not None)
        rows[kind] = {
            "tensors": len(own),
            "equal": len(own) - len(unequal),
            "worst_db": unequal[0] if unequal else None,
            "median_db": unequal[len(unequal) // 2] if unequal else None,
        }
    return rows


def _db(value: float | None) -> str:
    return "equal" if value is None else f"{value:.2f}"


def print_table(found: list[Difference], notes: list[str], shown: int) -> None:
    print(f"{'kind':12} {'tensors':>8} {'equal':>8} {'median dB':>10} {'worst dB':>9}")
    for kind, row in by_kind(found).items():
        print(
            f"{kind:12} {row['tensors']:8} {row['equal']:8} {_db(row['median_db']):>10} {_db(row['worst_db']):>9}"
        )
    unequal = [difference for difference in found if difference.snr_db is not None]
    if unequal:
        print(f"\n{'SNR dB':>8} {'largest':>10} {'cosine':>9}  tensor (A's format -> B's), worst first")
    for row in unequal[:shown]:
        arrow = " -> ".join(row.formats)
        print(f"{_db(row.snr_db):>8} {row.largest:10.3g} {row.cosine:9.6f}  {row.name} ({arrow})")
    if len(unequal) > shown:
        print(f"… and {len(unequal) - shown} more; --json has them all")
    for note in notes:
        print(f"not compared: {note}")


def draw(found: list[Difference], path: Path) -> None:
    """SNR of every unequal tensor over its layer, one colour per kind."""
    try:
        import matplotlib
    except ImportError:
        raise CheckpointError(
            "--png needs matplotlib, which this project does not install: .venv/bin/pip install matplotlib"
        ) from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    for kind in by_kind(found):
        points = [
            (names.split_layer(row.name)[0] or 0, row.snr_db)
            for row in found
            if row.kind == kind and row.snr_db is not None and math.isfinite(row.snr_db)
        ]
        if points:
            axes.plot(*zip(*points), ".", label=kind, markersize=5)
    axes.set(xlabel="layer", ylabel="signal to noise, dB", title="Error of every tensor (higher is better)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def _check(found: list[Difference], notes: list[str], least: float) -> int:
    """--at-least: 1, with the reason on stderr, unless everything was compared and nothing is below `least` dB."""
    below = bool(found) and badness(found[0]) < least
    if below:
        print(f"{found[0].name} is at {_db(found[0].snr_db)} dB, below {least:g}", file=sys.stderr)
    reasons = notes if found else [*notes, "no tensor is in both"]
    if reasons:
        print(f"not everything could be compared: {'; '.join(reasons)}", file=sys.stderr)
    return 1 if below or reasons else 0


def fetch(locations: list[str]) -> list[Path]:
    """Folders, and ids on the hub -> folders; what is on the hub is downloaded, if the disk has the room for it."""
    sources = [find_source(location) for location in locations]
    wanted = {
        source: sorted(read_checkpoint(source).weight_files) for source in sources if isinstance(source, Hub)
    }
    check_disks([source.disk_use(files) for source, files in wanted.items()])
    return [source.download(wanted[source]) if isinstance(source, Hub) else source.path for source in sources]


def main(arguments: list[str]) -> int:
    """Exit status 0: compared; 1: they could not be, or with --at-least not all of them, or a tensor is noisier."""
    parser = argparse.ArgumentParser(
        prog="compare_checkpoints",
        description="Signal to noise of B's weights against A's, worst tensor first.",
    )
    parser.add_argument("a", metavar="A", help="the original: a folder, or the id of a model on the hub")
    parser.add_argument("b", metavar="B", help="what is compared with it")
    parser.add_argument(
        "--only", default="", metavar="KINDS", help=f"some of {','.join((*names.KINDS, 'rest', 'mtp'))}"
    )
    parser.add_argument("--show", type=int, default=SHOWN, help="tensors in the table (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw it; needs matplotlib")
    parser.add_argument("--at-least", type=float, metavar="DB", help="fail if a tensor is below this")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="workers (default: %(default)s)"
    )
    args = parser.parse_args(arguments)
    only = set(filter(None, args.only.split(",")))
    try:
        if unknown := only - {*names.KINDS, "rest", "mtp"}:
            raise CheckpointError(f"--only: {', '.join(sorted(unknown))} is no kind of module")
        folders = fetch([args.a, args.b])
        found, notes = compare(*folders, only, max(1, args.jobs))
        print_table(found, notes, args.show)
        if args.json:
            rows = [asdict(difference) for difference in found]
            report = {"by_kind": by_kind(found), "not_compared": notes, "tensors": rows}
            args.json.write_text(json.dumps(report, indent=1) + "\n")
        if args.png:
            draw(found, args.png)
    except (CheckpointError, OSError) as error:
        print(f"compare_checkpoints: {error}", file=sys.stderr)
        return 1
    return 0 if args.at_least is None else _check(found, notes, args.at_least)
