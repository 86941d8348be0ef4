"""config.json of what the converter writes: native keys, and a quantization_config that says what is NVFP4."""

from __future__ import annotations

from .headers import CheckpointError
from .names import KINDS

# vLLM's layer names of each kind, and DeepSeek's names of the linears in it (other engines match those)
_LAYERS = {
    "attention": ("attn.fused_wqa_wkv", "attn.wq_a", "attn.wkv", "attn.wq_b", "attn.wo_a", "attn.wo_b"),
    "compressor": ("attn.compressor.*",),
    "indexer": ("attn.indexer.*",),
    "shared": ("ffn.shared_experts.*",),
    "experts": ("ffn.experts", "ffn.experts.*"),
}
_ALWAYS_IGNORED = ("head", "lm_head", "*.ffn.gate", "*.attn_norm")
_RATIO_OF = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
_HF_KEYS = ("layer_types", "mlp_layer_types", "compress_rates", "rope_parameters", "partial_rotary_factor")
_PRODUCER = {"name": "convert_checkpoint", "version": "1"}


def _rope(config: dict) -> dict:
    parameters = config["rope_parameters"]
    if not {"main", "compress"} <= parameters.keys():
        return {}
    main, compress = parameters["main"], parameters["compress"]
    scaling = {
        key: compress[key]
        for key in ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
        if key in compress
    }
    return {
        "rope_theta": main["rope_theta"],
        "compress_rope_theta": compress["rope_theta"],
        "rope_scaling": {"type": "yarn", "rope_type": "yarn", **scaling},
    }


def native_config(config: dict) -> dict:
    """A config.json with DeepSeek's keys: what transformers derived from them is put back, the rest is kept."""
    native = dict(config)
    try:
        if "compress_ratios" not in native:
            ratios = [_RATIO_OF[kind] for kind in native["layer_types"]]
            native["compress_ratios"] = ratios + [0] * native.get("num_nextn_predict_layers", 0)
        if "num_hash_layers" not in native:
            native["num_hash_layers"] = native["mlp_layer_types"].count("hash_moe")
        if "rope_scaling" not in native and "rope_parameters" in native:
            native.update(_rope(native))
        if "qk_rope_head_dim" not in native:
            native["qk_rope_head_dim"] = round(native["partial_rotary_factor"] * native["head_dim"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"config.json has neither DeepSeek's keys nor transformers' to derive them from ({type(error).__name__}: "
            f"{error}); take config.json from the original model"
        ) from None
    native.setdefault("topk_method", "noaux_tc")
    native["architectures"] = ["DeepseekV4ForCausalLM"]
    native["expert_dtype"] = "fp4"
    return {key: value for key, value in native.items() if key not in _HF_KEYS}


def ignored_layers(nvfp4_kinds: set[str]) -> list[str]:
    """Patterns of the layers that are not NVFP4."""
    patterns = [f"*.{layer}" for kind in KINDS if kind not in nvfp4_kinds for layer in _LAYERS[kind]]
    return [*_ALWAYS_IGNORED, *patterns, "mtp.*"]


def modelopt_config(config: dict, nvfp4_kinds: set[str]) -> dict:
    """`config` with the quantization_config of a ModelOpt NVFP4 checkpoint."""
    numbers = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    quantization = {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "group_size": 16,
        "ignore": ignored_layers(nvfp4_kinds),
        "config_groups": {
            "group_0": {"input_activations": numbers, "weights": numbers, "targets": ["Linear"]}
        },
        "producer": _PRODUCER,
    }
    return {**native_config(config), "quantization_config": quantization}


def experts_only_config(config: dict) -> dict:
    """`config` of a checkpoint whose experts are NVFP4 and whose other linears stay in DeepSeek's FP8 blocks."""
    source = config.get("quantization_config") or {}
    quantization = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "scale_fmt": source.get("scale_fmt", "ue8m0"),
        "weight_block_size": [128, 128],
        "moe_quant_algo": "NVFP4",
    }
    return {**native_config(config), "quantization_config": quantization}


def hf_quant_config(nvfp4_kinds: set[str]) -> dict:
    """hf_quant_config.json, for engines that read ModelOpt's own file."""
    return {
        "producer": _PRODUCER,
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": 16,
            "exclude_modules": ignored_layers(nvfp4_kinds),
        },
    }
