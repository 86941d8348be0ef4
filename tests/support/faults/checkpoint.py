"""Checkpoints with one planted fault each: what an engine that reads NVFP4 wrong would serve."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

# The segments that vLLM fuses: an oracle, written apart from the library's own table (checkpoint/layers.py).
FUSED_SEGMENTS = (
    (r"(attn)\.(wq_a|wkv)$", r"\1.fused_wqa_wkv"),
    (r"(compressor)\.(wkv|wgate)$", r"\1.fused_wkv_wgate"),
    (r"(shared_experts|experts\.\d+)\.w[13]$", r"\1.w13"),
)


def _layers(tensors: Tensors) -> list[str]:
    suffix = ".weight_scale"
    return [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]


def global_scale_inverted(tensors: Tensors) -> None:
    for layer in _layers(tensors):
        tensors[f"{layer}.weight_scale_2"] = 1.0 / tensors[f"{layer}.weight_scale_2"]


def block_scales_doubled(tensors: Tensors) -> None:
    for layer in _layers(tensors):
        doubled = (tensors[f"{layer}.weight_scale"].float() * 2).clamp(max=448)
        tensors[f"{layer}.weight_scale"] = doubled.to(torch.float8_e4m3fn)


def nibbles_swapped(tensors: Tensors) -> None:
    for layer in _layers(tensors):
        codes = tensors[f"{layer}.weight"]
        tensors[f"{layer}.weight"] = (codes << 4) | (codes >> 4)


def compressor_zeroed(tensors: Tensors) -> None:
    for layer in _layers(tensors):
        if re.search(r"attn\.compressor\.wkv$", layer):
            tensors[f"{layer}.weight"] = torch.zeros_like(tensors[f"{layer}.weight"])


def indexer_wrong(tensors: Tensors) -> None:
    generator = torch.Generator().manual_seed(0)
    for layer in _layers(tensors):
        if ".indexer." in layer:
            codes = tensors[f"{layer}.weight"]
            tensors[f"{layer}.weight"] = torch.randint(
                0, 256, codes.shape, dtype=torch.uint8, generator=generator
            )


def largest_segment_scale_for_all(tensors: Tensors) -> None:
    """What vLLM's loader does to fused layers without the patch."""
    groups: dict[str, list[str]] = {}
    for layer in _layers(tensors):
        for pattern, fused in FUSED_SEGMENTS:
            if re.search(pattern, layer):
                groups.setdefault(re.sub(pattern, fused, layer), []).append(f"{layer}.weight_scale_2")
    for names in groups.values():
        largest = torch.stack([tensors[name] for name in names]).amax()
        for name in names:
            tensors[name] = largest.clone()


FAULTS: dict[str, Callable[[Tensors], None]] = {
    fault.__name__: fault
    for fault in (
        global_scale_inverted,
        block_scales_doubled,
        nibbles_swapped,
        compressor_zeroed,
        indexer_wrong,
        largest_segment_scale_for_all,
    )
}


def plant(checkpoint: Path, into: Path, change: Callable[[Tensors], None]) -> Path:
    """Copy `checkpoint` to `into` with `change` made to its tensors, file by file; returns `into`."""
    into.mkdir()
    for file in checkpoint.iterdir():
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            change(tensors)
            save_file(tensors, into / file.name, metadata={"format": "pt"})
        elif file.suffix == ".json":
            shutil.copy(file, into / file.name)
    return into
