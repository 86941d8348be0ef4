"""The conversion as a whole: plan, disk check, workers, journal, and the JSON files that make the result valid."""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import multiprocessing
import os
import shutil
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from . import names
from . import written_config as config
from .conversion import Conversion, Options, Shard, conversion_key, plan_conversion
from .dialects import read_contents
from .disk import Use, check_disks, format_bytes
from .draft import draft_head
from .folder import (
    COMPANIONS,
    CONFIG,
    INDEX,
    PARTIAL,
    Checkpoint,
    Folder,
    find_source,
    read_checkpoint,
    sync_folder,
    write_json,
)
from .headers import CheckpointError
from .hub import Hub
from .planner.model import ratios
from .shards import Measured, ShardWriter

JOURNAL = ".conversion.jsonl"
RECORD = "conversion.json"
SPARE_BYTES = 64 * 2**20  # beside the tensors: JSON files, the file system's own
_REPLACED = (CONFIG, INDEX, "hf_quant_config.json", RECORD)


class Progress:
    """Bytes of source dealt with, over all workers; a line now and then on stderr."""

    def __init__(self, total: int, already: int, counter):
        self.total, self.already, self.counter = total, already, counter
        self.started = self.printed = time.monotonic()
        self.every = 1.0 if sys.stderr.isatty() else 30.0

    def show(self, last: bool = False) -> None:
        now = time.monotonic()
        if not last and now - self.printed < self.every:
            return
        self.printed = now
        done = self.counter.value
        rate = done / max(now - self.started, 1e-6)
        left = (self.total - self.already - done) / rate if rate else math.inf
        eta = "" if last or not math.isfinite(left) else f", {int(left // 60)} min {int(left % 60)} s left"
        line = f"{format_bytes(self.already + done)} of {format_bytes(self.total)} read, {rate / 1e6:.0f} MB/s{eta}"
        end = "\n" if last or not sys.stderr.isatty() else ""
        print(("\r\033[K" if sys.stderr.isatty() else "") + line, end=end, file=sys.stderr, flush=True)


class _Worker:
    """A worker process's share of the progress: the count of source bytes that all of them add to."""

    counter = None

    @classmethod
    def start(cls, counter, parent: int | None = None) -> None:
        cls.counter = counter
        torch.set_num_threads(1)
        if parent is not None:
            threading.Thread(target=cls._follow, args=(parent,), daemon=True).start()

    @staticmethod
    def _follow(parent: int) -> None:
        """End with `parent`: a pool's workers would wait forever for one that was killed."""
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    @classmethod
    def count(cls, nbytes: int) -> None:
        with cls.counter.get_lock():
            cls.counter.value += nbytes


def _write_shard(shard: Shard, source: Path, destination: Path, search: bool, device: str) -> dict:
    """Run in a worker: write `shard`, return its line of the journal."""
    writer = ShardWriter(source, destination, search, torch.device(device), _Worker.count)
    writer.write(shard)
    measured = {kind: asdict(sums) for kind, sums in sorted(writer.measured.items())}
    return {"file": shard.file, "nbytes": shard.nbytes, "measured": measured}


class Journal:
    """DST/.conversion.jsonl: the conversion's key, then one line for every shard that is complete on disk.

    While it is begun it is locked, so that two processes cannot convert into one folder.
    """

    def __init__(self, destination: Path, key: str):
        self.path = destination / JOURNAL
        self.key = key
        self.finished: dict[str, dict] = {}
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        parsed = [self._parse(line) for line in lines]
        # a first line that was cut off: killed before anything was converted
        self.is_new = not parsed or parsed[0] is None
        if not self.is_new and parsed[0].get("key") != key:
            raise CheckpointError(
                f"{destination} holds an unfinished conversion of another source or with other options; go on with "
                f"those, or delete the folder"
            )
        for line in filter(None, parsed[1:]):
            file = destination / line["file"]
            if file.exists() and file.stat().st_size == line["nbytes"]:
                self.finished[line["file"]] = line

    @staticmethod
    def _parse(line: bytes) -> dict | None:
        try:
            return json.loads(line)
        except ValueError:
            return None  # cut off by a kill; that shard is written again

    def begin(self) -> None:
        """Take the lock, and clear away what a killed process was in the middle of."""
        self._file = self.path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"another process is converting into {self.path.parent}; wait for it"
            ) from None
        if self.is_new:
            self._file.truncate(0)
            self._append(json.dumps({"key": self.key}))
        else:
            self._append("")  # ends a line that was cut off
        for partial in self.path.parent.glob("*" + PARTIAL):
            partial.unlink()

    def _append(self, line: str) -> None:
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def add(self, line: dict) -> None:
        """Note a shard that is whole and flushed."""
        self.finished[line["file"]] = line
        self._append(json.dumps(line))

    def close(self) -> None:
        """Give the lock up."""
        self._file.close()


@dataclass(frozen=True)
class _Plan:
    """All that is known of a conversion before a tensor is read. `native`: config.json in DeepSeek's keys."""

    checkpoint: Checkpoint
    native: dict
    conversion: Conversion
    companions: dict[str, int]  # path -> bytes of the files to copy beside the tensors
    left_behind: list[str]  # other files at the top
    key: str

    @property
    def source_files(self) -> list[str]:
        return sorted(self.checkpoint.weight_files | self.companions.keys())

    def disk_use(self, destination: Path, finished: dict[str, dict]) -> Use:
        shards = sum(shard.nbytes for shard in self.conversion.shards if shard.file not in finished)
        nbytes = shards + sum(self.companions.values()) + SPARE_BYTES
        return Use(destination, nbytes, "the conversion", "choose a DST on another disk")


def _plan(source: Folder | Hub, options: Options) -> _Plan:
    """CheckpointError for a source that is damaged or cannot be served as asked."""
    checkpoint = read_checkpoint(source)
    native = config.native_config(checkpoint.config)
    ratios(native)  # or refused
    contents = read_contents(checkpoint.tensors, checkpoint.num_layers)
    conversion = plan_conversion(contents, options)
    identities = {tensor.file: source.identity(tensor.file) for tensor in checkpoint.tensors.values()}
    others = sorted(
        file
        for file in checkpoint.files
        if not file.endswith(".safetensors") and not file.startswith(".") and file not in _REPLACED
    )
    copied = [file for file in others if any(fnmatchcase(file, pattern) for pattern in COMPANIONS)]
    companions = {file: checkpoint.files[file] for file in copied} | source.below("encoding")
    left_behind = [file for file in others if file not in copied]
    key = conversion_key(conversion, options, identities)
    return _Plan(checkpoint, native, conversion, companions, left_behind, key)


def _prepare_destination(destination: Path, key: str) -> Journal | None:
    """An empty or half-converted folder -> its journal; None if it already holds this very conversion."""
    present = {path.name for path in destination.iterdir()} if destination.exists() else set()
    if RECORD in present and CONFIG in present and JOURNAL not in present:
        if json.loads((destination / RECORD).read_text()).get("key") == key:
            return None
        raise CheckpointError(
            f"{destination} holds another finished conversion; choose another folder or delete it"
        )
    if present and JOURNAL not in present:
        raise CheckpointError(f"{destination} is not empty and holds no conversion; choose another folder")
    return Journal(destination, key)


def _copy_file(source: Path, destination: Path) -> None:
    """Copy so that `destination` is whole and flushed as soon as it exists."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.with_name(destination.name + PARTIAL)
    shutil.copyfile(source, partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.rename(destination)
    sync_folder(destination.parent)


def _run_shards(
    conversion: Conversion,
    journal: Journal,
    source: Path,
    destination: Path,
    options: Options,
    jobs: int,
    device: str,
) -> None:
    pending = [shard for shard in conversion.shards if shard.file not in journal.finished]
    total = sum(job.source_bytes for shard in conversion.shards for job in shard.jobs)
    left = sum(job.source_bytes for shard in pending for job in shard.jobs)
    # a fork of a process that holds torch's threads or CUDA may hang
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    progress = Progress(total, total - left, counter)
    work = (source, destination, options.search, device)
    if jobs == 1 or len(pending) < 2:
        threads = torch.get_num_threads()
        _Worker.start(counter)
        try:
            for shard in pending:
                journal.add(_write_shard(shard, *work))
                progress.show()
        finally:
            torch.set_num_threads(threads)
    else:
        with ProcessPoolExecutor(
            min(jobs, len(pending)), context, _Worker.start, (counter, os.getpid())
        ) as pool:
            futures = {pool.submit(_write_shard, shard, *work) for shard in pending}
            try:
                while futures:
                    finished = {future for future in futures if future.done()}
                    for future in finished:
                        journal.add(future.result())
                    futures -= finished
                    progress.show()
                    time.sleep(0.05)
            except BrokenProcessPool:
                raise CheckpointError(
                    "a worker process was killed, most likely for want of memory; run the same command with fewer "
                    "--jobs: finished shards are kept"
                ) from None
            finally:
                pool.shutdown(cancel_futures=True)
    progress.show(last=True)


def _record(conversion: Conversion, journal: Journal, options: Options, key: str) -> dict:
    """conversion.json: what was done, and the error it cost."""
    sums: dict[str, Measured] = {}
    for shard in conversion.shards:
        for kind, measured in journal.finished[shard.file]["measured"].items():
            sums.setdefault(kind, Measured()).add(Measured(**measured))
    errors = {}
    for kind in names.KINDS:
        if kind in sums:
            row = sums[kind]
            snr = 10 * math.log10(row.signal / row.noise) if row.noise > 0 else None
            errors[kind] = {
                "linears": row.linears,
                "snr_db": None if snr is None else round(snr, 2),
                "mxfp4_codes_rounded": row.lossy_codes,
            }
    return {"key": key, "options": asdict(options), "nvfp4": sorted(conversion.nvfp4), "converted": errors}


def _finish(source: Path, plan: _Plan, journal: Journal, destination: Path, record: dict) -> None:
    """Copy the other files, then write what makes the folder a checkpoint: index, and config.json last of all."""
    conversion = plan.conversion
    for file in plan.companions:
        _copy_file(source / file, destination / file)
    outputs = [
        (output, shard.file) for shard in conversion.shards for job in shard.jobs for output in job.outputs
    ]
    index = {
        "metadata": {"total_size": sum(output.nbytes for output, _ in outputs)},
        "weight_map": {output.name: file for output, file in outputs},
    }
    written = (plan.native, set(conversion.nvfp4), draft_head(plan.native, plan.checkpoint.tensors))
    if not conversion.keeps_fp8:
        write_json(destination / "hf_quant_config.json", config.hf_quant_config(*written))
    write_json(destination / RECORD, record)
    write_json(destination / INDEX, index)
    if conversion.keeps_fp8:
        final = config.experts_only_config(plan.native)
    else:
        final = config.modelopt_config(*written)
    sync_folder(destination)
    write_json(destination / CONFIG, final)
    sync_folder(destination)
    journal.path.unlink()


def convert(source: Path, destination: Path, options: Options, jobs: int = 1, device: str = "cpu") -> dict:
    """Convert the checkpoint in `source` into `destination` -> the record; resumes what was begun there.

    Raises CheckpointError, before anything is written, for a source that is damaged or cannot be served as
    asked, a destination that holds something else, or a disk that is too small.
    """
    if destination.resolve() == source.resolve():
        raise CheckpointError("DST is SRC; the converter does not overwrite its source")
    plan = _plan(Folder(source), options)
    journal = _prepare_destination(destination, plan.key)
    if journal is None:
        return json.loads((destination / RECORD).read_text())
    check_disks([plan.disk_use(destination, journal.finished)])
    destination.mkdir(parents=True, exist_ok=True)
    journal.begin()
    for note in plan.conversion.notes:
        print(f"note: {note}", file=sys.stderr)
    if plan.left_behind:
        print(f"note: not copied, no part of a checkpoint: {', '.join(plan.left_behind)}", file=sys.stderr)
    try:
        _run_shards(plan.conversion, journal, source, destination, options, jobs, device)
        record = _record(plan.conversion, journal, options, plan.key)
        _finish(source, plan, journal, destination, record)
    finally:
        journal.close()
    return record


def convert_from_hub(
    hub: Hub, destination: Path, options: Options, jobs: int = 1, device: str = "cpu"
) -> dict:
    """Download `hub` and convert it; what `convert` refuses before it writes is refused before the download."""
    plan = _plan(hub, options)
    journal = _prepare_destination(destination, plan.key)
    if journal is None:
        return json.loads((destination / RECORD).read_text())
    check_disks([hub.disk_use(plan.source_files), plan.disk_use(destination, journal.finished)])
    record = convert(hub.download(plan.source_files), destination, options, jobs, device)
    print(
        f"note: the download stays in {hub.own_cache}; to free its disk: hf cache rm model/{hub.label}",
        file=sys.stderr,
    )
    return record


def _parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="convert_checkpoint",
        description="Write an all-NVFP4 DeepSeek-V4 checkpoint; see docs/convert.md.",
    )
    parser.add_argument("source", metavar="SRC", help="folder, or id of a model on the hub")
    parser.add_argument(
        "destination", metavar="DST", type=Path, help="folder to write; begun conversions resume"
    )
    parser.add_argument("--revision", help="of the hub's repository")
    parser.add_argument(
        "--quantize",
        default=",".join(names.KINDS),
        metavar="KINDS",
        help="what becomes NVFP4 (default: %(default)s)",
    )
    parser.add_argument(
        "--search-scales",
        action="store_true",
        help="choose each block scale for least squared error, not from amax",
    )
    parser.add_argument(
        "--own-global-scales", action="store_true",
        help="one weight_scale_2 per linear even where vLLM fuses two; our image serves that, other engines do not",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="workers (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), or cuda for the arithmetic")
    parser.add_argument(
        "--shard-gb", type=float, default=4.0, help="size of output files (default: %(default)s)"
    )
    return parser.parse_args(arguments)


def _report(record: dict) -> None:
    print("NVFP4: " + ", ".join(record["nvfp4"]))
    for kind, row in record["converted"].items():
        if row["snr_db"] is not None:
            print(
                f"  {kind}: {row['linears']} linears quantized, signal to noise {row['snr_db']} dB (sampled)"
            )
        elif row["mxfp4_codes_rounded"]:
            print(
                f"  {kind}: {row['linears']} linears re-labelled from MXFP4; {row['mxfp4_codes_rounded']} values lay "
                f"below e4m3's range and were rounded"
            )
        else:
            print(f"  {kind}: {row['linears']} linears converted without loss")


def main(arguments: list[str]) -> int:
    """Exit status 0: DST is complete; 1: it is not, with the reason on stderr."""
    args = _parse_arguments(arguments)
    kinds = set(filter(None, args.quantize.split(",")))
    if unknown := kinds - set(names.KINDS):
        print(
            f"--quantize: {', '.join(sorted(unknown))} is none of {', '.join(names.KINDS)}", file=sys.stderr
        )
        return 1
    options = Options(
        kinds=tuple(kind for kind in names.KINDS if kind in kinds),
        search=args.search_scales,
        own_scales=args.own_global_scales,
        shard_bytes=int(args.shard_gb * 1e9),
    )
    try:
        if args.device != "cpu" and not torch.cuda.is_available():
            raise CheckpointError(f"--device {args.device}: torch sees no CUDA device; leave it out")
        source = find_source(args.source, args.revision)
        work = (args.destination, options, max(1, args.jobs), args.device)
        _report(convert_from_hub(source, *work) if isinstance(source, Hub) else convert(source.path, *work))
    except (CheckpointError, OSError) as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 1
    return 0
