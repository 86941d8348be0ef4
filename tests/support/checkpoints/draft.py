"""Draft heads for the demo's model: random ones of its shape, stored in any format."""

import math
import re

import torch

from cutedsl_nvfp4 import format as nvfp4
from cutedsl_nvfp4 import reference
from cutedsl_nvfp4.checkpoint.mtp import linears, parameters
from recipe import names
from recipe.model import CONFIG
from tests.support.checkpoints import small
from tests.support.checkpoints.small import Tensors

# vLLM fuses these by twos, and the demo is so narrow that an FP8 block would reach over both
FUSED_WITHIN_A_BLOCK = ("attn.wq_a", "attn.wkv", "ffn.shared_experts.w1", "ffn.shared_experts.w3")


def config(**fields) -> dict:
    """The demo's config.json with an MTP head declared, and other `fields`."""
    return {**CONFIG, "num_nextn_predict_layers": 1, **fields}


def stored(linear: str, weight: torch.Tensor, form: str) -> Tensors:
    """The tensors of `linear`, whose weight is f32 [N, K], in `form`: nvfp4, fp8, mxfp4 or bf16."""
    if form == "nvfp4":
        scale = nvfp4.global_scale_from_amax(weight.abs().amax())
        codes, block_scales = reference.quantize(weight, scale)
        leaves = {"weight": codes, "weight_scale": block_scales, "weight_scale_2": scale}
        leaves["input_scale"] = torch.tensor(0.02)
    elif form == "fp8":
        values, scale = small.fp8(weight)
        leaves = {"weight": values, "scale": scale}
    elif form == "mxfp4":
        codes, exponent = small.mxfp4(weight)
        leaves = {"weight": codes.view(torch.int8), "scale": small.e8m0(exponent)}
    else:
        assert form == "bf16", form
        leaves = {"weight": weight.bfloat16()}
    return {f"{linear}.{leaf}": tensor for leaf, tensor in leaves.items()}


def head(of_linears: str = "nvfp4", of_experts: str = "nvfp4", seed: int = 0) -> Tensors:
    """A random MTP head `mtp.0.*` for the demo, its linears and its routed experts stored in these formats.

    Experts 0 and 1 alternate: quantizing every one would take seconds.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    for path, (n, k) in linears(CONFIG).items():
        expert = re.fullmatch(r"ffn\.experts\.(\d+)\.(w\d)", path)
        if expert and int(expert[1]) > 1:
            like = f"mtp.0.ffn.experts.{int(expert[1]) % 2}.{expert[2]}."
            copied = {name: tensor for name, tensor in tensors.items() if name.startswith(like)}
            tensors |= {
                name.replace(like, f"mtp.0.{path}."): tensor.clone() for name, tensor in copied.items()
            }
            continue
        weight = torch.randn(n, k, generator=generator) / math.sqrt(k)
        form = of_experts if expert else of_linears
        if form == "fp8" and path in FUSED_WITHIN_A_BLOCK:
            form = "bf16"
        tensors |= stored(f"mtp.0.{path}", weight, form)
    for path, shape in parameters(CONFIG).items():
        value = torch.randn(shape, generator=generator) / 4 + ("norm" in path)
        tensors[f"mtp.0.{path}"] = value.to(names.native_dtype(path))
    return tensors


def plain(tensors: Tensors, linear: str) -> torch.Tensor:
    """f32 [N, K], the weight of `linear` as any of `stored`'s formats holds it."""
    weight, scale = tensors[f"{linear}.weight"], tensors.get(f"{linear}.scale")
    if weight.dtype == torch.bfloat16:
        return weight.float()
    if scale is None:
        return reference.dequantize(
            weight, tensors[f"{linear}.weight_scale"], tensors[f"{linear}.weight_scale_2"], torch.float32
        )
    scale = scale.float()
    if weight.dtype == torch.float8_e4m3fn:
        n, k = weight.shape
        blocks = scale.repeat_interleave(small.FP8_BLOCK, 0).repeat_interleave(small.FP8_BLOCK, 1)
        return weight.float() * blocks[:n, :k]
    values = nvfp4.decode_e2m1(nvfp4.unpack_codes(weight.view(torch.uint8)))
    return values * scale.repeat_interleave(small.MXFP4_BLOCK, 1)
