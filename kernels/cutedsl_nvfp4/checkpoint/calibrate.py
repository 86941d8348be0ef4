"""Measure what reaches each NVFP4 layer on texts, and write it into the checkpoint as `input_scale`."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from .dialects import Linear, read_contents
from .folder import INDEX, PARTIAL, Checkpoint, Folder, read_checkpoint, sync_folder, write_json
from .headers import CheckpointError
from .names import kind_of

SCALES_FILE = "input-scales.safetensors"
LISTED = 5

# How the engine has to run for its layers to be observed (kernels/cutedsl_nvfp4/vllm/calibration.py).
ENVIRONMENT = {
    "CUTEDSL_NVFP4_ACTIVATIONS": "nvfp4",
    "CUTEDSL_NVFP4_ACTIVATION_SCALE": "warmup",
    "CUTEDSL_NVFP4_IMPL": "reference",
    "VLLM_PLUGINS": "cutedsl_nvfp4",
    "VLLM_NO_USAGE_STATS": "1",
}


def linears_to_calibrate(checkpoint: Checkpoint) -> dict[str, Linear]:
    """The NVFP4 linears whose `input_scale` is absent, or this tool's.

    Raises CheckpointError for a dialect that the scales could not be written in, and where there are none.
    """
    contents = read_contents(checkpoint.tensors, checkpoint.num_layers)
    nvfp4 = {name: linear for name, linear in contents.linears.items() if linear.format == "nvfp4"}
    if any(linear.divisors or f"{name}.weight" not in checkpoint.tensors for name, linear in nvfp4.items()):
        raise CheckpointError(
            "the checkpoint has transformers' or compressed-tensors' names; convert it first "
            "(scripts/convert_checkpoint.py)"
        )
    found = {
        name: linear
        for name, linear in nvfp4.items()
        if linear.input_scale is None or linear.input_scale.file == SCALES_FILE
    }
    if not found:
        raise CheckpointError(
            "every NVFP4 linear has an input_scale from the export; nothing to calibrate"
            if nvfp4
            else "the checkpoint has no NVFP4 linear; convert it first (scripts/convert_checkpoint.py)"
        )
    return found


def settle(measured: dict[str, float], margin: float) -> dict[str, float]:
    """Scales by linear as measured, 0.0 where nothing came -> as written: `margin` above what the texts showed.

    The experts of a layer share one scale for each matrix, the largest: some see few tokens or none, and a
    scale up to 1,024 times too large costs NVFP4 nothing, because block scales are relative. Raises
    CheckpointError where a scale stays 0.
    """

    def family(name: str) -> str:
        return re.sub(r"(?<=\.experts\.)\d+", "*", name)

    largest: dict[str, float] = {}
    for name, scale in measured.items():
        largest[family(name)] = max(largest.get(family(name), 0.0), scale)
    if dead := sorted(name for name in measured if not largest[family(name)]):
        raise CheckpointError(
            f"the texts gave {len(dead)} linears nothing but zeros, the first {', '.join(dead[:LISTED])}; "
            f"use more or longer texts"
        )
    return {name: margin * largest[family(name)] for name in measured}


def write_scales(checkpoint: Checkpoint, scales: dict[str, float]) -> None:
    """Add `scales` to the checkpoint: a file of their own, then the index, each appearing whole."""
    import torch
    from safetensors.torch import save_file

    assert isinstance(checkpoint.source, Folder)
    folder = checkpoint.source.path
    tensors = {
        f"{name}.input_scale": torch.tensor(scale, dtype=torch.float32) for name, scale in scales.items()
    }
    partial = folder / (SCALES_FILE + PARTIAL)
    save_file(tensors, partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.rename(folder / SCALES_FILE)
    weight_map = {name: tensor.file for name, tensor in checkpoint.tensors.items()}
    total = sum(tensor.nbytes for name, tensor in checkpoint.tensors.items() if name not in tensors)
    index = {
        "metadata": {"total_size": total + 4 * len(tensors)},
        "weight_map": weight_map | dict.fromkeys(tensors, SCALES_FILE),
    }
    sync_folder(folder)
    write_json(folder / INDEX, index)
    sync_folder(folder)


def measure(folder: Path, texts: list[str], length: int, tokens: int, engine: dict) -> dict[str, float]:
    """Serve `folder` in this process on `texts`, in requests of `length` tokens -> scale by linear."""
    os.environ.update(ENVIRONMENT)
    from vllm import LLM, SamplingParams

    from ..vllm.calibration import START_METHOD, STOP_METHOD

    llm = LLM(
        model=str(folder), enforce_eager=True, enable_prefix_caching=False, max_model_len=length + 1, **engine
    )
    pieces = []
    for text in texts:
        ids = llm.get_tokenizer().encode(text)
        pieces += [ids[i : i + length] for i in range(0, len(ids), length)]
    while sum(map(len, pieces)) > tokens and len(pieces) > 1:
        pieces.pop()
    print(f"calibrating on {sum(map(len, pieces))} tokens in {len(pieces)} requests", file=sys.stderr)
    llm.collective_rpc(START_METHOD)
    llm.generate(
        [{"prompt_token_ids": piece} for piece in pieces], SamplingParams(max_tokens=1, temperature=0)
    )
    measured: dict[str, float] = {}
    for rank in llm.collective_rpc(STOP_METHOD):
        for name, scale in rank.items():
            measured[name] = max(measured.get(name, 0.0), scale)
    return measured


def calibrate(folder: Path, texts: list[str], length: int, tokens: int, margin: float, engine: dict) -> None:
    """Measure and write; nothing of the checkpoint changes before the scales of every linear are known."""
    checkpoint = read_checkpoint(Folder(folder))
    wanted = linears_to_calibrate(checkpoint)
    measured = measure(folder, texts, length, tokens, engine)
    if missing := sorted(wanted.keys() - measured.keys()):
        raise CheckpointError(
            f"{len(missing)} NVFP4 linears were served without being observed, the first "
            f"{', '.join(missing[:LISTED])}; their scales are unknown and nothing was written"
        )
    measured = {name: measured[name] for name in wanted}
    write_scales(checkpoint, settle(measured, margin))
    print(f"{len(measured)} input_scale written to {folder / SCALES_FILE}")
    experts = [scale for name, scale in measured.items() if kind_of(name) == "experts"]
    if experts:
        print(f"{sum(map(bool, experts))} of {len(experts)} matrices of routed experts saw a token")


def _parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="calibrate_checkpoint",
        description="Measure NVFP4 activation scales on texts and write them as input_scale; see docs/convert.md.",
    )
    parser.add_argument(
        "folder", metavar="DIR", help="all-NVFP4 checkpoint, as scripts/convert_checkpoint.py writes it"
    )
    parser.add_argument("texts", nargs="+", type=Path, metavar="TEXT", help="UTF-8 files of ordinary text")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a request (default: %(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=131072, help="stop after so many tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=2.0,
        help="headroom for other texts; costs nothing (default: %(default)s)",
    )
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = _parse_arguments(arguments)
    try:
        if not os.path.isdir(options.folder):
            raise CheckpointError(
                f"{options.folder} is no folder; scales are written into a local checkpoint"
            )
        if options.length < 1 or options.tokens < 1:
            raise CheckpointError("--length and --tokens must be at least 1")
        if not 1 <= options.margin <= 1024:
            raise CheckpointError(f"--margin is {options.margin}, expected 1 to 1024")
        texts = [_read_text(path) for path in options.texts]
        engine = {"tensor_parallel_size": options.tensor_parallel_size}
        calibrate(Path(options.folder), texts, options.length, options.tokens, options.margin, engine)
    except CheckpointError as error:
        print(f"calibrate_checkpoint: {error}", file=sys.stderr)
        return 1
    return 0


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: {error}; give UTF-8 text files") from None
    if not text.strip():
        raise CheckpointError(f"{path} is empty")
    return text
