"""DeepSeek's own tensor and config names <-> transformers'. No tensor is permuted on the way."""

import re

import torch

TOP_LEVEL = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}
IN_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn.attn_sink": "self_attn.sinks",
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.q_norm.weight": "self_attn.q_a_norm.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wkv.weight": "self_attn.kv_proj.weight",
    "attn.kv_norm.weight": "self_attn.kv_norm.weight",
    "attn.wo_a.weight": "self_attn.o_a_proj.weight",
    "attn.wo_b.weight": "self_attn.o_b_proj.weight",
    "attn.compressor.wkv.weight": "self_attn.compressor.kv_proj.weight",
    "attn.compressor.wgate.weight": "self_attn.compressor.gate_proj.weight",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.compressor.norm.weight": "self_attn.compressor.kv_norm.weight",
    "attn.indexer.wq_b.weight": "self_attn.compressor.indexer.q_b_proj.weight",
    "attn.indexer.weights_proj.weight": "self_attn.compressor.indexer.scorer.weights_proj.weight",
    "attn.indexer.compressor.wkv.weight": "self_attn.compressor.indexer.kv_proj.weight",
    "attn.indexer.compressor.wgate.weight": "self_attn.compressor.indexer.gate_proj.weight",
    "attn.indexer.compressor.ape": "self_attn.compressor.indexer.position_bias",
    "attn.indexer.compressor.norm.weight": "self_attn.compressor.indexer.kv_norm.weight",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
    **{
        f"hc_{block}_{part}": f"{block}_hc.{part}"
        for block in ("attn", "ffn")
        for part in ("fn", "base", "scale")
    },
}
FROM_TRANSFORMERS = {theirs: native for native, theirs in (TOP_LEVEL | IN_LAYER).items()}

QUANTIZED = re.compile(r"\.(wq_a|wq_b|wkv|wgate|wo_a|wo_b|weights_proj|w1|w2|w3)\.weight$")
_KEPT_IN_F32 = re.compile(r"(hc_|attn_sink$|\.ape$|gate\.bias$)")
_LAYER_TYPES = {
    0: "sliding_attention",
    4: "compressed_sparse_attention",
    128: "heavily_compressed_attention",
}


def native_dtype(name: str) -> torch.dtype:
    """dtype in which the checkpoint stores the unquantized tensor `name`."""
    if name.endswith("tid2eid"):
        return torch.int32
    return torch.float32 if _KEPT_IN_F32.search(name) else torch.bfloat16


def to_native(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers state dict -> tensors under DeepSeek's names, one per expert and projection."""
    tensors = {}
    for name, value in state.items():
        value = value.detach()
        if name in FROM_TRANSFORMERS:
            tensors[FROM_TRANSFORMERS[name]] = value
            continue
        layer, rest = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name).groups()
        prefix = f"layers.{layer}."
        if rest == "mlp.experts.gate_up_proj":
            for expert, gate_up in enumerate(value):
                gate, up = gate_up.chunk(2)
                tensors[f"{prefix}ffn.experts.{expert}.w1.weight"] = gate
                tensors[f"{prefix}ffn.experts.{expert}.w3.weight"] = up
        elif rest == "mlp.experts.down_proj":
            for expert, down in enumerate(value):
                tensors[f"{prefix}ffn.experts.{expert}.w2.weight"] = down
        else:
            tensors[prefix + FROM_TRANSFORMERS[rest]] = value
    return {name: value.contiguous().clone() for name, value in tensors.items()}


def to_transformers(tensors: dict[str, torch.Tensor], n_experts: int) -> dict[str, torch.Tensor]:
    """The inverse of `to_native`, with floating tensors in f32; quantized tensors must come dequantized."""
    state = {}
    layers = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("layers.")})
    for layer in layers:
        experts = f"layers.{layer}.ffn.experts."
        gate_up = [
            torch.cat((tensors[f"{experts}{e}.w1.weight"], tensors[f"{experts}{e}.w3.weight"]))
            for e in range(n_experts)
        ]
        down = [tensors[f"{experts}{e}.w2.weight"] for e in range(n_experts)]
        state[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.stack(gate_up).float()
        state[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.stack(down).float()
    for name, value in tensors.items():
        if ".ffn.experts." in name:
            continue
        value = value.float() if value.is_floating_point() else value.long()
        if name in TOP_LEVEL:
            state[TOP_LEVEL[name]] = value
        else:
            _, layer, rest = name.split(".", 2)
            state[f"model.layers.{layer}.{IN_LAYER[rest]}"] = value
    return state


def transformers_config(native: dict):
    """Native config.json contents -> DeepseekV4Config, with every derived key written out."""
    from transformers import DeepseekV4Config

    replaced = {
        "architectures", "torch_dtype", "quantization_config", "expert_dtype", "topk_method", "model_type",
        "compress_ratios", "num_hash_layers", "qk_rope_head_dim", "rope_scaling", "rope_theta",
    }  # fmt: skip
    layers = native["num_hidden_layers"]
    hash_layers = min(layers, native["num_hash_layers"])
    partial = native["qk_rope_head_dim"] / native["head_dim"]
    scaling = native["rope_scaling"]
    compress_rope = {
        "rope_type": "yarn",
        "rope_theta": native["compress_rope_theta"],
        "partial_rotary_factor": partial,
        "factor": float(scaling["factor"]),
        "original_max_position_embeddings": scaling["original_max_position_embeddings"],
        "beta_fast": float(scaling["beta_fast"]),
        "beta_slow": float(scaling["beta_slow"]),
        "attention_factor": 1.0,
    }
    main_rope = {
        "rope_type": "default",
        "rope_theta": native["rope_theta"],
        "partial_rotary_factor": partial,
    }
    return DeepseekV4Config(
        **{key: value for key, value in native.items() if key not in replaced},
        layer_types=[_LAYER_TYPES[ratio] for ratio in native["compress_ratios"][:layers]],
        mlp_layer_types=["hash_moe"] * hash_layers + ["moe"] * (layers - hash_layers),
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
        partial_rotary_factor=partial,
        rope_theta=native["rope_theta"],
        rope_parameters={"main": main_rope, "compress": compress_rope},
    )


def split_expert(name: str) -> tuple[str, int, str]:
    """`layers.0.ffn.experts.12.w1.weight` -> (`layers.0.ffn.experts.`, 12, `.w1.weight`)."""
    before, expert, after = re.fullmatch(r"(.*\.experts\.)(\d+)(\..*)", name).groups()
    return before, int(expert), after


def count_experts(tensors: dict[str, torch.Tensor]) -> int:
    """How many routed experts a layer of these native tensors has."""
    return 1 + max(split_expert(name)[1] for name in tensors if ".ffn.experts." in name)
