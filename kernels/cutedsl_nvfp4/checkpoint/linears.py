"""Names of DeepSeek-V4's tensors: DeepSeek's own ("native"), transformers' ("HF"), and the kind of each linear.

A native name is [layers.N.]module.leaf; HF names map onto it one to one, except that HF may stack the routed
experts of a layer into two tensors (`stacked_experts`).
"""

from __future__ import annotations

import re

from .headers import CheckpointError

KINDS = ("attention", "compressor", "indexer", "shared", "experts")

# native linear inside a layer -> (kind, HF module)
_LINEARS = {
    "attn.wq_a": ("attention", "self_attn.q_a_proj"),
    "attn.wq_b": ("attention", "self_attn.q_b_proj"),
    "attn.wkv": ("attention", "self_attn.kv_proj"),
    "attn.wo_a": ("attention", "self_attn.o_a_proj"),
    "attn.wo_b": ("attention", "self_attn.o_b_proj"),
    "attn.compressor.wkv": ("compressor", "self_attn.compressor.kv_proj"),
    "attn.compressor.wgate": ("compressor", "self_attn.compressor.gate_proj"),
    "attn.indexer.wq_b": ("indexer", "self_attn.compressor.indexer.q_b_proj"),
    "attn.indexer.weights_proj": ("indexer", "self_attn.compressor.indexer.weights_proj"),
    "attn.indexer.compressor.wkv": ("indexer", "self_attn.compressor.indexer.kv_proj"),
    "attn.indexer.compressor.wgate": ("indexer", "self_attn.compressor.indexer.gate_proj"),
    "ffn.shared_experts.w1": ("shared", "mlp.shared_experts.gate_proj"),
    "ffn.shared_experts.w2": ("shared", "mlp.shared_experts.down_proj"),
    "ffn.shared_experts.w3": ("shared", "mlp.shared_experts.up_proj"),
}
# native parameter inside a layer, never quantized -> HF parameter
_PARAMETERS = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn.attn_sink": "self_attn.sinks",
    "attn.q_norm.weight": "self_attn.q_a_norm.weight",
    "attn.kv_norm.weight": "self_attn.kv_norm.weight",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.compressor.norm.weight": "self_attn.compressor.kv_norm.weight",
    "attn.indexer.compressor.ape": "self_attn.compressor.indexer.position_bias",
    "attn.indexer.compressor.norm.weight": "self_attn.compressor.indexer.kv_norm.weight",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    **{f"hc_{b}_{p}": f"{b}_hc.{p}" for b in ("attn", "ffn") for p in ("fn", "base", "scale")},
}
_TOP_LEVEL = {
    "embed.weight": "embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "norm.weight",
    "hc_head_fn": "hc_head.hc_fn",
    "hc_head_base": "hc_head.hc_base",
    "hc_head_scale": "hc_head.hc_scale",
}
_HF_LINEARS = {theirs: native for native, (_, theirs) in _LINEARS.items()}
_HF_PARAMETERS = {theirs: native for native, theirs in _PARAMETERS.items()}
_HF_TOP_LEVEL = {theirs: native for native, theirs in _TOP_LEVEL.items()}
_EXPERT_MATRICES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
STACKED = {"mlp.experts.gate_up_proj": ("w1", "w3"), "mlp.experts.down_proj": ("w2",)}

LEAVES = frozenset(
    ("weight", "scale", "weight_scale", "weight_scale_inv", "weight_scale_2", "input_scale",
     "weight_packed", "weight_global_scale", "input_global_scale")
)  # fmt: skip

# linears that vLLM runs as one matrix; so are w1 and w3 of each routed expert
_FUSED = {
    "attn.wq_a": "attn.wkv",
    "attn.compressor.wkv": "attn.compressor.wgate",
    "attn.indexer.compressor.wkv": "attn.indexer.compressor.wgate",
    "ffn.shared_experts.w1": "ffn.shared_experts.w3",
}
_PARTNERS = {**_FUSED, **{second: first for first, second in _FUSED.items()}}


def split_layer(name: str) -> tuple[int | None, str]:
    """`[model.]layers.3.rest` -> (3, rest); (None, name) for a tensor outside the layers."""
    found = re.fullmatch(r"(?:model\.)?layers\.(\d{1,6})\.(.+)", name)
    return (int(found.group(1)), found.group(2)) if found else (None, name)


def is_mtp(name: str, num_layers: int) -> bool:
    """Whether `name` belongs to the draft layers: copied as they are, under the names they have."""
    layer, _ = split_layer(name)
    return name.startswith(("mtp.", "model.mtp.")) or (layer is not None and layer >= num_layers)


def _native_in_layer(rest: str) -> tuple[str, str] | None:
    """(native module or parameter, leaf) of a name inside a layer; leaf is "" for a parameter, None if unknown."""
    if rest in _PARAMETERS:
        return rest, ""
    if rest in _HF_PARAMETERS:
        return _HF_PARAMETERS[rest], ""
    module, _, leaf = rest.rpartition(".")
    if leaf not in LEAVES:
        return None
    module = module.replace("indexer.scorer.", "indexer.")
    if module in _LINEARS:
        return module, leaf
    if module in _HF_LINEARS:
        return _HF_LINEARS[module], leaf
    expert = re.fullmatch(r"(?:ffn|mlp)\.experts\.(\d{1,6})\.(w[123]|gate_proj|up_proj|down_proj)", module)
    if expert:
        matrix = _EXPERT_MATRICES.get(expert.group(2), expert.group(2))
        return f"ffn.experts.{int(expert.group(1))}.{matrix}", leaf
    return None


def native_name(name: str) -> tuple[str, str]:
    """Any known name -> (native module, leaf); leaf "" for a parameter that is never quantized."""
    layer, rest = split_layer(name)
    if layer is None:
        plain = name[len("model.") :] if name.startswith("model.") else name
        if plain in _TOP_LEVEL:
            return plain, ""
        if plain in _HF_TOP_LEVEL:
            return _HF_TOP_LEVEL[plain], ""
    else:
        found = _native_in_layer(rest)
        if found:
            return f"layers.{layer}.{found[0]}", found[1]
    raise CheckpointError(
        f"tensor {name[:200]!r} is not one of DeepSeek-V4's; if the model is a DeepSeek-V4, its exporter uses "
        f"names this tool does not know"
    )


def kind_of(linear: str) -> str:
    """Kind of a native linear's name, one of KINDS."""
    rest = split_layer(linear)[1]
    return "experts" if rest.startswith("ffn.experts.") else _LINEARS[rest][0]


def partner_of(linear: str) -> str | None:
    """The linear that vLLM fuses with `linear`, or None."""
    layer, rest = split_layer(linear)
    if rest.startswith("ffn.experts."):
        other = {"w1": "w3", "w3": "w1"}.get(rest[-2:])
        return linear[:-2] + other if other else None
    return f"layers.{layer}.{_PARTNERS[rest]}" if rest in _PARTNERS else None


def natural_order(name: str) -> list:
    """Sort key under which layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
