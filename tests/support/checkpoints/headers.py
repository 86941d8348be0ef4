"""Checkpoints that are headers alone: the tensors' bytes are a hole in the file, so size costs nothing."""

import json
import math
import struct
from pathlib import Path

import torch

from recipe import export
from recipe.model import CONFIG
from tests.support.paths import DEMO

Headers = dict[str, tuple[str, tuple[int, ...]]]  # name -> (safetensors' dtype, shape)

BYTES = {"U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E8M0": 1, "BF16": 2, "F32": 4, "I32": 4}


DTYPES = {
    torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32", torch.bfloat16: "BF16", torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip


def of(tensors: dict[str, torch.Tensor]) -> Headers:
    """The headers of `tensors`."""
    return {name: (DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def demo() -> Headers:
    """The demo's: three layers, all NVFP4; its draft head is left out."""
    return of(export.load_checkpoint(DEMO))


def demo_config(**fields) -> dict:
    """The demo's config.json without a draft head, with other `fields`."""
    return {**CONFIG, **fields}


def write(folder: Path, tensors: Headers, config: dict) -> Path:
    """Write config.json and one safetensors file of the right size into the new `folder`; returns it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    header, position = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = position + BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)
    return folder


# --- draft heads, as their releases store them ---


def linear(name: str, n: int, k: int, fmt: str) -> Headers:
    """The tensors of a linear of [n, k] in `fmt`."""
    if fmt == "bf16":
        return {f"{name}.weight": ("BF16", (n, k))}
    if fmt == "fp8":
        blocks = (-(-n // 128), -(-k // 128))
        return {f"{name}.weight": ("F8_E4M3", (n, k)), f"{name}.scale": ("F8_E8M0", blocks)}
    if fmt == "mxfp4":
        return {f"{name}.weight": ("I8", (n, k // 2)), f"{name}.scale": ("F8_E8M0", (n, k // 32))}
    codes = {f"{name}.weight_scale": ("F8_E4M3", (n, k // 16))}
    if fmt == "nvfp4-packed":  # compressed-tensors'
        globals_ = {f"{name}.{leaf}": ("F32", (1,)) for leaf in ("weight_global_scale", "input_global_scale")}
        return codes | globals_ | {f"{name}.weight_packed": ("U8", (n, k // 2))}
    assert fmt == "nvfp4", fmt
    globals_ = {f"{name}.{leaf}": ("F32", ()) for leaf in ("weight_scale_2", "input_scale")}
    return codes | globals_ | {f"{name}.weight": ("U8", (n, k // 2))}


def _draft_layer(prefix: str, linears: str, experts: str, experts_count: int) -> Headers:
    """A decoder layer of the demo's dimensions without compressor and indexer, its linears in two formats."""
    found: Headers = {}
    for name, n, k in (
        ("attn.wq_a", 64, 256), ("attn.wkv", 512, 256), ("attn.wq_b", 1024, 64), ("attn.wo_a", 64, 512),
        ("attn.wo_b", 256, 64), ("ffn.shared_experts.w1", 64, 256), ("ffn.shared_experts.w3", 64, 256),
        ("ffn.shared_experts.w2", 256, 64),
    ):  # fmt: skip
        found |= linear(f"{prefix}.{name}", n, k, linears)
    for expert in range(experts_count):
        for matrix, n, k in (("w1", 64, 256), ("w3", 64, 256), ("w2", 256, 64)):
            found |= linear(f"{prefix}.ffn.experts.{expert}.{matrix}", n, k, experts)
    for norm, width in (("attn_norm", 256), ("ffn_norm", 256), ("attn.q_norm", 64), ("attn.kv_norm", 512)):
        found[f"{prefix}.{norm}.weight"] = ("BF16", (width,))
    return found | {
        f"{prefix}.attn.attn_sink": ("F32", (2,)),
        f"{prefix}.ffn.gate.weight": ("BF16", (experts_count, 256)),
        f"{prefix}.ffn.gate.bias": ("F32", (experts_count,)),
    }


def mtp(linears: str, experts: str, prefix: str = "mtp.0", experts_count: int = 4) -> Headers:
    """The previews' draft head: one layer with its two projections."""
    found = _draft_layer(prefix, linears, experts, experts_count)
    for projection in ("e_proj", "h_proj"):
        found |= linear(f"{prefix}.{projection}", 256, 256, linears)
    return found | {f"{prefix}.{norm}.weight": ("BF16", (256,)) for norm in ("enorm", "hnorm", "norm")}


def dspark(linears: str, experts: str, experts_count: int = 4) -> Headers:
    """The draft head of 0731 and 0813: three layers, a projection before them, Markov and confidence heads after."""
    found: Headers = {}
    for layer in range(3):
        found |= _draft_layer(f"mtp.{layer}", linears, experts, experts_count)
    found |= linear("mtp.0.main_proj", 256, 768, linears)
    return found | {
        "mtp.0.main_norm.weight": ("BF16", (256,)),
        "mtp.2.norm.weight": ("BF16", (256,)),
        "mtp.2.markov_head.markov_w1.weight": ("BF16", (320, 16)),
        "mtp.2.markov_head.markov_w2.weight": ("BF16", (320, 16)),
        "mtp.2.confidence_head.proj.weight": ("BF16", (1, 272)),
    }


# fields of config.json beside the demo's; num_nextn_predict_layers is 1 in both
MTP_FIELDS = {"num_nextn_predict_layers": 1, "compress_ratios": [0, 4, 128, 0]}
DSPARK_FIELDS = {
    "num_nextn_predict_layers": 1, "compress_ratios": [0, 4, 128, 0, 0, 0], "dspark_block_size": 5,
    "dspark_markov_rank": 16, "dspark_noise_token_id": 319, "dspark_target_layer_ids": [0, 1, 2],
}  # fmt: skip
