"""What a checkpoint holds, what our image does with it, and what is wrong with it; from headers alone."""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from . import names, routing
from .dialects import Contents, Linear, read_contents
from .draft import DSPARK, ENCODER, PREVIEW, DraftHead, draft_head, encoder_release, release
from .folder import Checkpoint, Folder, find_source, read_checkpoint, read_json
from .headers import CheckpointError
from .hub import Hub
from .planner.model import complete, linear_shapes

OTHER = ("embeddings", "norms and rest", "mtp")
DIALECTS = {
    "nvfp4": "NVFP4",
    "mxfp4": "MXFP4",
    "fp8": "FP8 blocks",
    "bf16": "BF16",
    "f16": "F16",
    "f32": "F32",
}
LISTED = 3
QUANTIZATION = "hf_quant_config.json"  # where older ModelOpt puts config.json's quantization_config
MAX_ENCODER_BYTES = 1_000_000


@dataclass
class Row:
    """One kind of module: how many tensors or linears, their bytes, and bytes per format."""

    kind: str
    count: int = 0
    nbytes: int = 0
    formats: dict[str, int] = field(default_factory=dict)

    def add(self, format: str, nbytes: int) -> None:
        self.count += 1
        self.nbytes += nbytes
        self.formats[format] = self.formats.get(format, 0) + nbytes


@dataclass(frozen=True)
class Problem:
    """Something that keeps the checkpoint from being served well, and what to do about it."""

    what: str
    remedy: str


@dataclass(frozen=True)
class Report:
    """Everything `inspect_checkpoint` prints."""

    source: str
    rows: list[Row]
    serving: list[str]
    problems: list[Problem]
    draft: DraftHead | None
    release: str | None  # draft.PREVIEW or RELEASE, where it can be told

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.rows)


def count_bytes(contents: Contents) -> list[Row]:
    """Bytes of every kind of module, in the order of names.KINDS, then of what is never quantized."""
    rows = {kind: Row(kind) for kind in (*names.KINDS, *OTHER)}
    for linear in contents.linears.values():
        rows[linear.kind].add(DIALECTS[linear.format], linear.nbytes)
    for name, tensor in contents.parameters.items():
        kind = "embeddings" if name in ("embed.weight", "head.weight") else "norms and rest"
        rows[kind].add(tensor.dtype, tensor.nbytes)
    for tensor in contents.copied.values():
        rows["mtp"].add(tensor.dtype, tensor.nbytes)
    return [row for row in rows.values() if row.count]


def _formats_by_kind(contents: Contents) -> dict[str, set[str]]:
    formats: dict[str, set[str]] = defaultdict(set)
    for linear in contents.linears.values():
        formats[linear.kind].add(linear.format)
    return formats


def _shape_problems(config: dict, linears: dict[str, Linear]) -> list[Problem]:
    """Linears that config.json's model has and the files do not, the reverse, and those of another shape."""
    expected = {
        name.replace("*", str(expert)): (n, k)
        for name, (n, k, count) in linear_shapes(config).items()
        for expert in range(count)
    }
    found = {name: (linear.n, linear.k) for name, linear in linears.items()}
    missing, surplus = expected.keys() - found.keys(), found.keys() - expected.keys()
    other = [name for name in found.keys() & expected.keys() if found[name] != expected[name]]
    problems = []
    for names_found, what, remedy in (
        (missing, "are missing", "download or export the checkpoint again"),
        (surplus, "fit no layer of config.json", "use the config.json that belongs to these weights"),
        (
            other,
            "have another shape than config.json says",
            "use the config.json that belongs to these weights",
        ),
    ):
        if names_found:
            listed = names.listed(names_found, LISTED)
            problems.append(Problem(f"{len(names_found)} linears {what}: {listed}", remedy))
    return problems


def _config_problems(config: dict, formats: dict[str, set[str]]) -> list[Problem]:
    problems = []
    quantization = config.get("quantization_config") or {}
    method = str(quantization.get("quant_method", ""))
    nvfp4 = {kind for kind, found in formats.items() if "nvfp4" in found}
    if nvfp4 and not method:
        problems.append(
            Problem(
                "tensors are NVFP4 and config.json has no quantization_config",
                "take config.json from the export",
            )
        )
    if nvfp4 - {"experts"} and method and not method.startswith(("modelopt", "compressed-tensors")):
        problems.append(
            Problem(
                f"{', '.join(sorted(nvfp4))} are NVFP4 and quant_method is {method!r}",
                "quant_method must be modelopt, with quant_algo NVFP4",
            )
        )
    if method.startswith("modelopt"):
        foreign = sorted({fmt for found in formats.values() for fmt in found} & {"fp8", "mxfp4"})
        if foreign:
            problems.append(
                Problem(
                    f"quant_method is modelopt and some linears are {' and '.join(DIALECTS[f] for f in foreign)}",
                    "scripts/convert_checkpoint.py makes all of it NVFP4",
                )
            )
    return problems


def find_problems(checkpoint: Checkpoint, contents: Contents) -> list[Problem]:
    """What is missing, mixed or left over; the most serious first."""
    config, linears = checkpoint.config, contents.linears
    formats = _formats_by_kind(contents)
    problems = []
    try:
        problems += _shape_problems(complete(config), linears)
    except CheckpointError as error:
        what, _, remedy = str(error).rpartition("; ")
        problems.append(Problem(what, remedy))
    no_scale = [
        name for name, linear in linears.items() if linear.format == "nvfp4" and linear.global_scale is None
    ]
    if no_scale:
        problems.append(
            Problem(f"NVFP4 without weight_scale_2: {names.listed(no_scale, LISTED)}", "export it again")
        )
    for kind, found in sorted(formats.items()):
        if len(found) > 1 and "nvfp4" in found:
            others = " and ".join(sorted(DIALECTS[fmt] for fmt in found - {"nvfp4"}))
            problems.append(
                Problem(
                    f"{kind}: some linears are NVFP4, others {others}",
                    f"list the others under quantization_config.ignore, or scripts/convert_checkpoint.py --quantize "
                    f"…,{kind}",
                )
            )
    problems += _config_problems(config, formats)
    for device in routing.EXPERT_COUNTS:
        if (experts := config.get("n_routed_experts")) and (reason := routing.refusal(experts, device)):
            problems.append(Problem(reason, routing.REMEDY))
    declared, head = draft_head(config), draft_head(config, checkpoint.tensors)
    if head is not None and declared is not None and head.kind != declared.kind:
        problems.append(
            Problem(
                f"the draft head is {head.kind}, and config.json has the fields of {declared.kind}",
                "use the config.json that belongs to these weights",
            )
        )
    return problems


def describe_serving(contents: Contents) -> list[str]:
    """One line for each format: which path of our image runs it."""
    lines = []
    formats = _formats_by_kind(contents)
    kinds_of: dict[str, list[str]] = defaultdict(list)
    for kind in names.KINDS:
        for fmt in sorted(formats.get(kind, ())):
            kinds_of[fmt].append(kind)
    if "nvfp4" in kinds_of:
        lines.append(
            f"{', '.join(kinds_of['nvfp4'])}: NVFP4, through our loader; GET /kernels names each layer's kernel"
        )
    if "fp8" in kinds_of:
        lines.append(
            f"{', '.join(kinds_of['fp8'])}: FP8 blocks, through vLLM's own kernels, untouched by this project"
        )
    if "mxfp4" in kinds_of:
        lines.append(
            f"{', '.join(kinds_of['mxfp4'])}: MXFP4, through vLLM's own kernels; NVFP4 without loss after conversion"
        )
    wide = [kind for fmt in ("bf16", "f16", "f32") for kind in kinds_of.get(fmt, ())]
    if wide:
        lines.append(f"{', '.join(dict.fromkeys(wide))}: unquantized, through vLLM's own kernels")
    quantized = [linear for linear in contents.linears.values() if linear.format == "nvfp4"]
    without = sum(linear.input_scale is None for linear in quantized)
    if quantized:
        lines.append(
            "activations: every NVFP4 layer has an input_scale"
            if not without
            else f"activations: {without} of {len(quantized)} NVFP4 layers have no input_scale: dynamic under W4A4"
        )
    if any(linear.divisors for linear in quantized):
        lines.append(
            "layout: compressed-tensors; its global scales are divisors and are inverted as they are read"
        )
    return lines


def describe_draft(head: DraftHead | None, config: dict, encoder: str | None) -> list[str]:
    """The draft head in words, and the release that it and the chat `encoder` (its text, if there is one) mean."""
    lines = []
    declared = draft_head(config)
    if head is None:
        lost = f"; config.json declares {declared.kind}, and no tensor of it is here" if declared else ""
        lines.append(f"draft head: none{lost}")
    else:
        said = f"{head.kind}, {head.layers} layer{'s' * (head.layers > 1)}"
        if head.block_size:
            said += f", block size {head.block_size}"
        for what, experts in (("routed experts", True), ("other linears", False)):
            if stored := head.stored(experts):
                said += f"; {what} {' and '.join(DIALECTS[fmt] for fmt in stored)}"
        lines.append(f"draft head: {said}; not read, this image serves no speculative decoding")
    found = release(head, encoder)
    by = "its chat encoder" if encoder and encoder_release(encoder) else "its MTP head"
    if found == PREVIEW:
        lines.append(f"release: a preview, by {by}")
    elif found:
        lines.append(f"release: {found}, by {by}")
    elif head is not None and head.kind == DSPARK:
        lines.append(
            f"release: 0731/0813, or a preview with DSpark attached; there is no {ENCODER} that tells which"
        )
    return lines


def _read_encoder(source: Folder | Hub) -> str | None:
    if source.below(ENCODER.partition("/")[0]).get(ENCODER, MAX_ENCODER_BYTES) >= MAX_ENCODER_BYTES:
        return None
    with source.open(ENCODER) as file:
        return file.read().decode("utf-8", "replace")


def inspect(location: str, revision: str | None = None) -> Report:
    """Read the headers of `location`, a folder or a hub id -> Report. CheckpointError where they cannot be."""
    source = find_source(location, revision)
    checkpoint = read_checkpoint(source)
    if not checkpoint.config.get("quantization_config") and QUANTIZATION in checkpoint.files:
        quantization = {"quant_method": "modelopt", **read_json(source, QUANTIZATION, checkpoint.files)}
        checkpoint = replace(checkpoint, config={**checkpoint.config, "quantization_config": quantization})
    contents = read_contents(checkpoint.tensors, checkpoint.num_layers)
    problems = find_problems(checkpoint, contents)
    serving = describe_serving(contents)
    if any("self_attn" in name or ".mlp." in name for name in checkpoint.tensors):
        serving.append(
            "names: transformers'; the server reads them as DeepSeek's, scripts/convert_checkpoint.py writes DeepSeek's"
        )
    head, encoder = draft_head(checkpoint.config, checkpoint.tensors), _read_encoder(source)
    serving += describe_draft(head, checkpoint.config, encoder)
    return Report(source.label, count_bytes(contents), serving, problems, head, release(head, encoder))


def print_report(report: Report) -> None:
    print(f"{report.source}: {report.nbytes / 1e9:.2f} GB of tensors\n")
    print(f"  {'module':16} {'tensors':>8} {'GB':>9} {'share':>6}  formats")
    for row in report.rows:
        formats = ", ".join(
            f"{fmt} {nbytes / row.nbytes:.0%}" if len(row.formats) > 1 else fmt
            for fmt, nbytes in sorted(row.formats.items(), key=lambda item: -item[1])
        )
        share = row.nbytes / report.nbytes
        print(f"  {row.kind:16} {row.count:8} {row.nbytes / 1e9:9.3f} {share:6.1%}  {formats}")
    print("\nserved so:")
    for line in report.serving:
        print(f"  {line}")
    print("\nproblems:" if report.problems else "\nno problems found")
    for problem in report.problems:
        print(f"  {problem.what}\n    -> {problem.remedy}")


def main(arguments: list[str]) -> int:
    """Exit status 0: readable; 1: it is not, with the reason on stderr."""
    parser = argparse.ArgumentParser(
        prog="inspect_checkpoint",
        description="Formats, bytes and problems of a DeepSeek-V4 checkpoint, from its headers.",
    )
    parser.add_argument("checkpoint", help="folder, or id of a model on the hub")
    parser.add_argument("--revision", help="of the hub's repository")
    parser.add_argument(
        "--json", metavar="FILE", help="write the report for machines; - prints it instead of the table"
    )
    args = parser.parse_args(arguments)
    try:
        report = inspect(args.checkpoint, args.revision)
        if args.json != "-":
            print_report(report)
        if args.json:
            text = json.dumps({**asdict(report), "nbytes": report.nbytes}, indent=1)
            if args.json == "-":
                print(text)
            else:
                Path(args.json).write_text(text + "\n", encoding="utf-8")
    except (CheckpointError, OSError) as error:
        print(f"inspect_checkpoint: {error}", file=sys.stderr)
        return 1
    return 0
