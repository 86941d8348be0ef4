"""Small DeepSeek-V4 checkpoints in every dialect the converter reads, made from the demo's weights."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from cutedsl_nvfp4.format import encode_e2m1, pack_codes
from recipe import export, names
from tests.support.paths import DEMO

FP8_LINEARS = (
    "attn.wq_a",
    "attn.wkv",
    "attn.wq_b",
    "attn.wo_a",
    "attn.wo_b",
    "attn.indexer.wq_b",
    "shared_experts",
)


def demo_values() -> dict[str, torch.Tensor]:
    """The demo's tensors under native names, NVFP4 ones dequantized to f32."""
    return export.dequantized(export.load_checkpoint(DEMO))


def native_dtypes(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Values as a BF16 checkpoint stores them: linears in BF16, the rest as the demo does."""
    return {name: value.to(names.native_dtype(name)) for name, value in values.items()}


def fp8_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """f32 [N, K] -> (e4m3 [N, K], e8m0 bytes [N/128, K/128]), with power-of-two scales."""
    n, k = weight.shape
    rows, columns = -(-n // 128), -(-k // 128)
    padded = torch.zeros(rows * 128, columns * 128)
    padded[:n, :k] = weight
    amax = padded.view(rows, 128, columns, 128).abs().amax((1, 3)).clamp(min=2.0**-60)
    exponent = torch.ceil(torch.log2(amax / 448))
    scale = (2.0**exponent).repeat_interleave(128, 0).repeat_interleave(128, 1)[:n, :k]
    return (weight / scale).to(torch.float8_e4m3fn), (exponent + 127).to(torch.uint8).view(
        torch.float8_e8m0fnu
    )


def mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """f32 [N, K] -> (codes int8 [N, K/2], e8m0 bytes [N, K/32])."""
    blocks = weight.unflatten(-1, (-1, 32))
    exponent = torch.floor(torch.log2(blocks.abs().amax(-1).clamp(min=2.0**-60))) - 2
    codes = encode_e2m1(blocks / (2.0**exponent).unsqueeze(-1)).flatten(-2)
    return pack_codes(codes).view(torch.int8), (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


def native(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """DeepSeek's own release: FP8 blocks, MXFP4 experts, the rest BF16 and F32."""
    tensors = {}
    for name, value in native_dtypes(values).items():
        linear = name.removesuffix(".weight")
        if ".ffn.experts." in name:
            tensors[name], tensors[f"{linear}.scale"] = mxfp4(values[name])
        elif name.endswith(".weight") and any(part in linear for part in FP8_LINEARS):
            tensors[name], tensors[f"{linear}.scale"] = fp8_blocks(values[name])
        else:
            tensors[name] = value
    return tensors


def config(quantization: dict | None) -> dict:
    """The demo's config.json with another quantization_config."""
    contents = json.loads((DEMO / "config.json").read_text())
    del contents["quantization_config"]
    return contents if quantization is None else {**contents, "quantization_config": quantization}


NATIVE_QUANTIZATION = {
    "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}  # fmt: skip


def write(folder: Path, tensors: dict[str, torch.Tensor], contents: dict, shards: int = 1) -> Path:
    """A checkpoint folder with the demo's tokenizer; an index where there is more than one shard."""
    folder.mkdir(parents=True)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(DEMO / file, folder)
    (folder / "config.json").write_text(json.dumps(contents))
    ordered = sorted(tensors)
    if shards == 1:
        save_file({name: tensors[name].contiguous() for name in ordered}, folder / "model.safetensors")
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = ordered[shard::shards]
        save_file({name: tensors[name].contiguous() for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder
