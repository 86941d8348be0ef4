"""DeepSeek's own tensor and config names <-> transformers'. No tensor is permuted on the way."""

import re

import torch

from cutedsl_nvfp4.checkpoint.names import IN_LAYER, TOP_LEVEL

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
