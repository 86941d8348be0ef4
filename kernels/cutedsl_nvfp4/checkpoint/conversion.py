"""What a conversion will write, decided from headers alone: an action for every tensor, and the output's shards."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from . import names
from .dialects import GROUP_SIZE, Contents, Linear
from .headers import BITS_OF, CheckpointError, Tensor, bytes_of
from .layers import partner_of

COPY, WIDEN, QUANTIZE, RELABEL = "copy", "widen", "quantize", "relabel"


@dataclass(frozen=True)
class Options:
    """What the user chose. `own_scales`: every linear its own weight_scale_2, even inside a fused pair."""

    kinds: tuple[str, ...] = names.KINDS
    search: bool = False
    own_scales: bool = False
    shard_bytes: int = 4 * 10**9


@dataclass(frozen=True)
class Output:
    """A tensor to be written; `offset` counts from the start of its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return bytes_of(self.dtype, self.shape)


@dataclass(frozen=True)
class Job:
    """One tensor to copy, or linears that are converted together; `action` is what happens to the linears."""

    action: str
    outputs: tuple[Output, ...]
    linears: tuple[Linear, ...] = ()
    copied: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)

    @property
    def source_bytes(self) -> int:
        return self.copied.nbytes if self.copied else sum(linear.nbytes for linear in self.linears)


@dataclass(frozen=True)
class Shard:
    """One output file: its header (with the length before it) and the jobs that fill the rest."""

    file: str
    header: bytes
    jobs: tuple[Job, ...]
    nbytes: int


@dataclass(frozen=True)
class Conversion:
    """Everything that will be written but the JSON files. `nvfp4`: the kinds that are NVFP4 in the output."""

    shards: tuple[Shard, ...]
    nvfp4: frozenset[str]
    keeps_fp8: bool
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)


def _nvfp4_outputs(linear: Linear, with_input_scale: bool) -> list[Output]:
    n, k = linear.n, linear.k
    outputs = [
        Output(f"{linear.name}.weight", "U8", (n, k // 2)),
        Output(f"{linear.name}.weight_scale", "F8_E4M3", (n, k // GROUP_SIZE)),
        Output(f"{linear.name}.weight_scale_2", "F32", ()),
    ]
    return outputs + ([Output(f"{linear.name}.input_scale", "F32", ())] if with_input_scale else [])


def _action(linear: Linear, options: Options, keeps_fp8: bool) -> str:
    if linear.format == "nvfp4":
        if linear.global_scale is None:
            raise CheckpointError(f"{linear.name} is NVFP4 without weight_scale_2; the export is incomplete")
        return COPY
    if linear.kind in options.kinds:
        if linear.k % GROUP_SIZE:
            raise CheckpointError(
                f"{linear.name} has K = {linear.k}, not a multiple of {GROUP_SIZE}; "
                f"leave {linear.kind} out of --quantize"
            )
        return RELABEL if linear.format == "mxfp4" else QUANTIZE
    if linear.format == "mxfp4":
        raise CheckpointError(
            f"{linear.name} is MXFP4 and {linear.kind} is not in --quantize; MXFP4 beside NVFP4 cannot be served. "
            f"Add {linear.kind}: MXFP4 becomes NVFP4 without loss"
        )
    return WIDEN if linear.format == "fp8" and not keeps_fp8 else COPY


def _outputs(linear: Linear, action: str) -> list[Output]:
    if action in (QUANTIZE, RELABEL):
        return _nvfp4_outputs(linear, False)
    if action == WIDEN:
        return [Output(f"{linear.name}.weight", "BF16", (linear.n, linear.k))]
    if linear.format == "nvfp4":
        return _nvfp4_outputs(linear, linear.input_scale is not None)
    outputs = [Output(f"{linear.name}.weight", linear.weight.dtype, linear.weight.shape)]
    if linear.scale is not None:
        outputs.append(Output(f"{linear.name}.scale", linear.scale.dtype, linear.scale.shape))
    return outputs


def _jobs(contents: Contents, options: Options, keeps_fp8: bool) -> list[Job]:
    jobs = [
        Job(COPY, (Output(name, tensor.dtype, tensor.shape),), copied=tensor)
        for name, tensor in (*contents.parameters.items(), *contents.copied.items())
    ]
    done: set[str] = set()
    for name, linear in contents.linears.items():
        if name in done:
            continue
        action = _action(linear, options, keeps_fp8)
        linears = [linear]
        partner = contents.linears.get(partner_of(name) or "")
        if (
            partner is not None
            and not options.own_scales
            and action in (QUANTIZE, RELABEL)
            and _action(partner, options, keeps_fp8) == action
        ):
            linears.append(partner)
        done.update(member.name for member in linears)
        outputs = tuple(output for member in linears for output in _outputs(member, action))
        jobs.append(Job(action, outputs, tuple(linears)))
    written = [output.name for job in jobs for output in job.outputs]
    assert len(written) == len(set(written)), "a tensor would be written twice"
    return sorted(jobs, key=lambda job: names.natural_order(job.outputs[0].name))


def _shard(file: str, jobs: list[Job]) -> Shard:
    """Lay the tensors out as the safetensors library does: widest dtype first, then by name."""
    outputs = sorted(
        (output for job in jobs for output in job.outputs), key=lambda o: (-BITS_OF[o.dtype], o.name)
    )
    header: dict = {"__metadata__": {"format": "pt"}}
    begins, position = {}, 0
    for output in outputs:
        begins[output.name] = position
        offsets = [position, position + output.nbytes]
        header[output.name] = {"dtype": output.dtype, "shape": list(output.shape), "data_offsets": offsets}
        position += output.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    placed = tuple(
        Job(
            job.action,
            tuple(Output(o.name, o.dtype, o.shape, start + begins[o.name]) for o in job.outputs),
            job.linears,
            job.copied,
        )
        for job in jobs
    )
    return Shard(file, len(text).to_bytes(8, "little") + text, placed, start + position)


def plan_conversion(contents: Contents, options: Options) -> Conversion:
    """Decide what becomes of every tensor. CheckpointError where the choice cannot be served."""
    if not contents.linears:
        raise CheckpointError("the checkpoint has no linear of DeepSeek-V4; nothing to convert")
    unknown = set(options.kinds) - set(names.KINDS)
    if unknown or not options.kinds:
        raise CheckpointError(
            f"--quantize takes some of {', '.join(names.KINDS)}; got {', '.join(sorted(unknown)) or 'none'}"
        )
    others = [linear for linear in contents.linears.values() if linear.kind != "experts"]
    keeps_fp8 = (
        set(options.kinds) == {"experts"}
        and any(linear.format == "fp8" for linear in others)
        and not any(linear.format == "nvfp4" for linear in others)
    )
    inexact = [
        linear
        for linear in others
        if keeps_fp8 and linear.format == "fp8" and linear.scale.dtype != "F8_E8M0"
    ]
    if inexact:
        raise CheckpointError(
            f"{inexact[0].name} is FP8 with {inexact[0].scale.dtype} block scales, and {len(inexact) - 1} more "
            f"linears are like it; beside NVFP4 experts vLLM reads FP8 only with e8m0 scales, which are powers of "
            f"two. Leave --quantize out: all of it becomes NVFP4"
        )
    jobs = _jobs(contents, options, keeps_fp8)
    nvfp4, plain = set(), {}
    for job in jobs:
        for linear in job.linears:
            if job.action in (QUANTIZE, RELABEL) or linear.format == "nvfp4":
                nvfp4.add(linear.kind)
            else:
                plain.setdefault(linear.kind, linear.name)
    notes = []
    if mixed := sorted(nvfp4 & plain.keys()):
        raise CheckpointError(
            f"{', '.join(mixed)}: some linears would be NVFP4 and others not (the first: {plain[mixed[0]]}); "
            f"add {' and '.join(mixed)} to --quantize"
        )
    widened = sorted({linear.kind for job in jobs if job.action == WIDEN for linear in job.linears})
    if widened:
        notes.append(
            f"{', '.join(widened)}: FP8 is written as BF16 (exact where its scales are powers of two), because FP8 "
            f"beside NVFP4 layers of ModelOpt's format cannot be served"
        )
    batches: list[list[Job]] = [[]]
    filled = 0
    for job in jobs:
        if batches[-1] and filled + job.nbytes > options.shard_bytes:
            batches.append([])
            filled = 0
        batches[-1].append(job)
        filled += job.nbytes
    total = len(batches)
    shards = tuple(
        _shard(f"model-{position:05}-of-{total:05}.safetensors", batch)
        for position, batch in enumerate(batches, 1)
    )
    return Conversion(shards, frozenset(nvfp4), keeps_fp8, tuple(notes))


def conversion_key(
    conversion: Conversion, options: Options, source_files: dict[str, tuple[int, int | str]]
) -> str:
    """Hash of all that decides the output: options, actions, and the identity of every source file."""
    digest = hashlib.sha256(json.dumps(asdict(options), sort_keys=True).encode())
    digest.update(json.dumps(sorted(source_files.items())).encode())
    for shard in conversion.shards:
        digest.update(shard.file.encode() + shard.header)
        for job in shard.jobs:
            parts = (
                [job.copied]
                if job.copied
                else [p for m in job.linears for p in (m.weight, m.scale, m.global_scale)]
            )
            places = [(part.file, part.offset, part.nbytes) for part in parts if part is not None]
            digest.update(json.dumps([job.action, places]).encode())
    return digest.hexdigest()
