"""The demo's weights as checkpoints store them: dtypes, FP8 blocks and MXFP4, in a folder of files."""

import json
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from cutedsl_nvfp4 import format as nvfp4
from recipe import export, names
from tests.support.paths import DEMO

Tensors = dict[str, torch.Tensor]

FP8_BLOCK, MXFP4_BLOCK = 128, 32
E8M0_BIAS = 127
IN_FP8 = (".attn.wq_a", ".attn.wq_b", ".attn.wkv", ".attn.wo_a", ".attn.wo_b", ".indexer.wq_b",
          ".shared_experts.w1", ".shared_experts.w2", ".shared_experts.w3")  # fmt: skip
NATIVE_QUANTIZATION = {
    "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "scale_fmt": "ue8m0",
    "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
}  # fmt: skip


def demo_values() -> Tensors:
    """The demo's tensors under native names, NVFP4 ones dequantized to f32."""
    return export.dequantized(export.load_checkpoint(DEMO))


def native_dtypes(values: Tensors) -> Tensors:
    """Values as a BF16 checkpoint stores them: linears in BF16, the rest as the demo does."""
    return {name: value.to(names.native_dtype(name)) for name, value in values.items()}


def _exponents(amax: torch.Tensor, largest: float) -> torch.Tensor:
    """Power of two that keeps amax / 2^e within `largest`; blocks of zeros take the largest of the tensor."""
    exponent = torch.ceil(torch.log2(amax / largest))
    return torch.where(amax > 0, exponent, exponent[amax > 0].amax())


def e8m0(exponent: torch.Tensor) -> torch.Tensor:
    return (exponent + E8M0_BIAS).to(torch.uint8).view(torch.float8_e8m0fnu)


def fp8_exponents(weight: torch.Tensor) -> torch.Tensor:
    """f32 [N, K] -> exponents f32 [ceil(N/128), ceil(K/128)] of the scales of its blocks."""
    n, k = weight.shape
    padded = F.pad(weight, (0, -k % FP8_BLOCK, 0, -n % FP8_BLOCK))
    blocks = padded.unflatten(1, (-1, FP8_BLOCK)).unflatten(0, (-1, FP8_BLOCK))
    return _exponents(blocks.abs().amax((1, 3)), 448.0)


def fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """f32 [N, K] -> e4m3 [N, K], e8m0 [ceil(N/128), ceil(K/128)]."""
    n, k = weight.shape
    exponent = fp8_exponents(weight)
    scale = exponent.exp2().repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)[:n, :k]
    return (weight / scale).to(torch.float8_e4m3fn), e8m0(exponent)


def mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """f32 [N, K] -> packed codes uint8 [N, K/2], exponents f32 [N, K/32] of the blocks' scales."""
    blocks = weight.unflatten(1, (-1, MXFP4_BLOCK))
    exponent = _exponents(blocks.abs().amax(-1), nvfp4.E2M1_MAX)
    codes = nvfp4.encode_e2m1((blocks / exponent.exp2().unsqueeze(-1)).flatten(1))
    return nvfp4.pack_codes(codes), exponent


def native(values: Tensors) -> Tensors:
    """DeepSeek's own release: FP8 attention and shared experts, MXFP4 routed experts, the rest BF16 and F32."""
    tensors = native_dtypes(values)
    for name, value in values.items():
        linear = name.removesuffix(".weight")
        if ".ffn.experts." in name:
            codes, exponent = mxfp4(value)
            tensors[name], tensors[f"{linear}.scale"] = codes.view(torch.int8), e8m0(exponent)
        elif linear.endswith(IN_FP8):
            tensors[name], tensors[f"{linear}.scale"] = fp8(value)
    return tensors


def config(quantization: dict | None) -> dict:
    """The demo's config.json with another quantization_config."""
    contents = json.loads((DEMO / "config.json").read_text())
    del contents["quantization_config"]
    return contents if quantization is None else {**contents, "quantization_config": quantization}


def write(folder: Path, tensors: Tensors, contents: dict, shards: int = 1) -> Path:
    """A checkpoint in the new `folder` with the demo's tokenizer; an index where there is more than one shard."""
    folder.mkdir(parents=True)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(DEMO / file, folder)
    (folder / "config.json").write_text(json.dumps(contents))
    ordered = sorted(tensors)
    files = ["model.safetensors"]
    if shards > 1:
        files = [f"model-{shard:05}-of-{shards:05}.safetensors" for shard in range(1, shards + 1)]
    weight_map = {}
    for shard, file in enumerate(files):
        part = ordered[shard::shards]
        contiguous = {name: tensors[name].contiguous() for name in part}
        save_file(contiguous, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
