"""The reference of the parity tests: transformers' DeepSeek-V4 in f32 on weights that vLLM's own emulation decoded.

No line of ours is between the checkpoint's bytes and these log-probabilities. What vLLM rounds by design (the fp8
KV cache, the fp8 indexer) is rounded here too.
"""

import json
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype

from recipe import names
from recipe.model import empty_model

Tensors = dict[str, torch.Tensor]

ROPE_DIM = 64
KV_BLOCK = 64  # values of a cached KV row that share a scale
INDEX_BLOCK = 128  # the same for the indexer's queries and keys
SCALES = (".weight_scale", ".weight_scale_2", ".input_scale")


def load_tensors(folder: Path) -> Tensors:
    """All tensors of the checkpoint in `folder`."""
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def decoded(tensors: Tensors) -> Tensors:
    """One f32 (or unquantized) tensor per weight, decoded by vLLM's NVFP4 emulation."""
    plain = {}
    for name, value in tensors.items():
        if name.endswith(SCALES):
            continue
        if value.dtype == torch.uint8:
            scales, global_scale = tensors[f"{name}_scale"], tensors[f"{name}_scale_2"]
            value = dequantize_to_dtype(value, scales, global_scale, torch.float32, swizzle=False)
        plain[name] = value
    return plain


def round_to_fp8(x: torch.Tensor, block: int) -> torch.Tensor:
    """x [..., D] rounded to e4m3 with one power-of-two scale per `block` values, and back."""
    blocks = x.unflatten(-1, (-1, block))
    largest = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-4)
    scale = torch.exp2(torch.ceil(torch.log2(largest / 448)))
    return ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2)


def _round_cached_kv(kv: torch.Tensor) -> torch.Tensor:
    """kv [B, 1, S, 512] as vLLM's fp8_ds_mla cache holds it: 448 values in e4m3, the rotated 64 in bf16."""
    rotated = kv[..., -ROPE_DIM:].bfloat16().float()
    return torch.cat((round_to_fp8(kv[..., :-ROPE_DIM], KV_BLOCK), rotated), dim=-1)


def _attend_to_fp8_cache(module, query, key, value, *args, **kwargs):
    """transformers' eager attention on rounded keys; the values are the same tensor."""
    cached = _round_cached_kv(key)
    return modeling.eager_attention_forward(module, query, cached, cached, *args, **kwargs)


def _round_to_bf16(_, args, output):
    return output.bfloat16().float()


def _round_indexer_operands(_, operands):
    queries, keys, hidden = operands
    return round_to_fp8(queries, INDEX_BLOCK), round_to_fp8(keys, INDEX_BLOCK), hidden


def reference_model(folder: Path):
    """The checkpoint in `folder` (NVFP4 or bf16) as transformers' f32 model with vLLM's fp8 caches emulated."""
    config = json.loads((folder / "config.json").read_text())
    model = empty_model(config)
    weights = decoded(load_tensors(folder))
    model.load_state_dict(names.to_transformers(weights, config["n_routed_experts"]))
    ALL_ATTENTION_FUNCTIONS.register("eager_fp8_cache", _attend_to_fp8_cache)
    ALL_MASK_ATTENTION_FUNCTIONS.register("eager_fp8_cache", eager_mask)
    model.config._attn_implementation = "eager_fp8_cache"
    for module in model.modules():
        if isinstance(module, modeling.DeepseekV4IndexerScorer):
            module.register_forward_pre_hook(_round_indexer_operands)
    for layer in model.model.layers:  # the cache is written from bf16
        layer.self_attn.kv_proj.register_forward_hook(_round_to_bf16)
        layer.self_attn.kv_norm.register_forward_hook(_round_to_bf16)
    return model.eval()


@torch.no_grad()
def prompt_logprobs(model, prompts: Iterable[list[int]]) -> torch.Tensor:
    """f32 [sum of (length - 1)]: log-probability of every token of every prompt but the first."""
    found = []
    for prompt in prompts:
        row = torch.tensor([prompt])
        logprobs = F.log_softmax(model(row[:, :-1], use_cache=False).logits[0].float(), dim=-1)
        found.append(logprobs.gather(1, row[0, 1:, None])[:, 0])
    return torch.cat(found)


@contextmanager
def replaced(owner, attribute: str, value):
    """Inside, `owner.attribute` is `value`."""
    before = getattr(owner, attribute)
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        setattr(owner, attribute, before)
