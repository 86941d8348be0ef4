"""The demo's dimensions, its tokenizer, and a freshly initialised transformers model of them."""

import math

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from recipe.names import transformers_config

SPECIAL_TOKENS = (
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<｜User｜>", "<｜Assistant｜>",
    "<think>", "</think>", "｜DSML｜",
)  # fmt: skip
BOS, EOS = 256, 257
_LIKE_GROUPS_OF_16 = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}

# Values that both vLLM's CPU path and its CUDA path accept: head_dim 512 and rope 64 (FlashMLA), index_n_heads
# 32 (DeepGEMM), hidden % 128 (fused mHC), 64 experts top-6 (the CPU's hash top-k). The smallest that learn fast.
CONFIG = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "torch_dtype": "bfloat16",
    "vocab_size": 320,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 64,
    "o_groups": 2,
    "o_lora_rank": 32,
    "sliding_window": 128,
    "compress_ratios": [0, 4, 128],
    "compress_rope_theta": 160000.0,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "max_position_embeddings": 1048576,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 512,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 64,
    "num_hash_layers": 1,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "hidden_act": "silu",
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-06,
    "rms_norm_eps": 1e-06,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "use_cache": True,
    "expert_dtype": "fp4",
    "quantization_config": {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "group_size": 16,
        "ignore": ["head", "*.ffn.gate", "*.attn_norm", "lm_head"],
        "config_groups": {
            "group_0": {
                "input_activations": _LIKE_GROUPS_OF_16,
                "weights": _LIKE_GROUPS_OF_16,
                "targets": ["Linear"],
            }
        },
        "producer": {"name": "modelopt", "version": "0.41.0"},
    },
}


def tokenizer() -> Tokenizer:
    """Byte-level, without merges: one token per byte, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL_TOKENS])
    return made


def empty_model(config: dict):
    """transformers' DeepSeek-V4 of a native config, f32, eager attention, weights not yet meaningful."""
    from transformers import DeepseekV4ForCausalLM

    return DeepseekV4ForCausalLM._from_config(
        transformers_config(config), attn_implementation="eager", dtype=torch.float32
    )


@torch.no_grad()
def initialised_model(seed: int):
    """A model ready for training: unit-variance linears, and every special part away from its trivial value.

    Sinks, position biases, hyper-connection bases and router biases start random, so that an engine that
    drops or transposes them gives different text.
    """
    torch.manual_seed(seed)
    model = empty_model(CONFIG)
    for name, p in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if "embed_tokens" in name or leaf == "position_bias":
            p.normal_(0, 1)
        elif leaf == "sinks":
            p.normal_(2, 1)
        elif leaf in ("base", "hc_base"):
            p.normal_(0, 0.5)
        elif leaf in ("scale", "hc_scale"):
            p.fill_(0.5)
        elif p.dim() >= 2 and "hc" not in name:
            p.normal_(0, 1 / math.sqrt(p.shape[-1]))
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):
            experts = [torch.randperm(CONFIG["n_routed_experts"]) for _ in range(buffer.shape[0])]
            buffer.copy_(torch.stack(experts)[:, : CONFIG["num_experts_per_tok"]])
        elif name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.3)
    return model
