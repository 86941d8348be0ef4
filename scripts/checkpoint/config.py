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
_PRODUCER = {"name": "convert_checkpoint", "version": "1"}
_COMPRESSED = ("compressed_sparse_attention", "heavily_compressed_attention")
_NEEDED = (
    "num_hidden_layers",
    "head_dim",
    "compress_ratios",
    "num_hash_layers",
    "qk_rope_head_dim",
    "rope_theta",
    "compress_rope_theta",
    "rope_scaling",
)


def _settle(native: dict, field: str, value: object, source: str) -> None:
    """Set `field` to the `value` that `source` gives, unless config.json says something else about it."""
    if value is not None and native.get(field) not in (None, value):
        raise CheckpointError(
            f"config.json contradicts itself: {field} is {native[field]!r}, but {source} gives {value!r}; "
            f"remove the wrong one"
        )
    if value is not None:
        native[field] = value


def _settle_ratios(native: dict) -> None:
    kinds, rates = native.pop("layer_types", None), native.pop("compress_rates", None) or {}
    if kinds is None:
        return
    present = native.get("compress_ratios")
    unknown = sorted(set(kinds) - {"sliding_attention", *_COMPRESSED})
    absent = sorted((set(kinds) & set(_COMPRESSED)) - rates.keys())
    if unknown or (absent and present is None):
        raise CheckpointError(
            "config.json: layer_types cannot be turned into compress_ratios: "
            + (f"unknown kinds {unknown}" if unknown else f"compress_rates says nothing about {absent}")
            + "; add compress_ratios, one number per layer (0, 4 or 128)"
        )
    if not absent:
        ratios = [0 if kind == "sliding_attention" else rates[kind] for kind in kinds]
        ratios += (present or [])[len(ratios) :]  # of the draft layers
        _settle(native, "compress_ratios", ratios, "layer_types and compress_rates")


def _settle_hash_layers(native: dict) -> None:
    kinds = native.pop("mlp_layer_types", None)
    if kinds is None:
        return
    count = kinds.count("hash_moe")
    if kinds != ["hash_moe"] * count + ["moe"] * (len(kinds) - count):
        raise CheckpointError(
            f"config.json: mlp_layer_types must be hash_moe layers followed by moe layers, got {kinds}; vLLM knows "
            f"a number of hash layers only"
        )
    _settle(native, "num_hash_layers", count, "mlp_layer_types")


def _settle_rope(native: dict) -> None:
    nested = native.get("rope_parameters")
    if not isinstance(nested, dict) or not nested.keys() & {"main", "compress"}:
        return
    del native["rope_parameters"]
    if not all(isinstance(nested.get(part), dict) for part in ("main", "compress")):
        raise CheckpointError(
            f"config.json: rope_parameters must hold both main and compress, got {sorted(nested)}; give rope_theta, "
            f"compress_rope_theta and rope_scaling instead"
        )
    scaling = dict(nested["compress"])
    factor = scaling.pop("attention_factor", 1.0)
    if factor != 1.0:
        raise CheckpointError(
            f"config.json: rope_parameters.compress.attention_factor is {factor}; DeepSeek-V4 does not scale its "
            f"rotary embedding, and vLLM's implementation cannot"
        )
    partial = scaling.pop("partial_rotary_factor", None)
    if native.get("partial_rotary_factor") is None:
        native["partial_rotary_factor"] = partial
    _settle(native, "rope_theta", nested["main"].get("rope_theta"), "rope_parameters.main")
    _settle(native, "compress_rope_theta", scaling.pop("rope_theta", None), "rope_parameters.compress")
    present = native.get("rope_scaling")
    shared = {key: value for key, value in (present or {}).items() if key in scaling}
    if present is None or {**scaling, **shared} != scaling:
        _settle(native, "rope_scaling", scaling, "rope_parameters.compress")


def native_config(config: dict) -> dict:
    """A config.json with DeepSeek's keys: what transformers derived from them is put back, the rest is kept.

    The rules are the server's (cutedsl_nvfp4.vllm.checkpoint_config, which needs torch; the converter calls that
    one). CheckpointError for what the server refuses too: missing, contradictory, or beyond vLLM's model.
    """
    native = dict(config)
    try:
        _settle_ratios(native)
        _settle_hash_layers(native)
        _settle_rope(native)
        partial = native.pop("partial_rotary_factor", None)
        if partial is not None and native.get("head_dim") is not None:
            dim = int(native["head_dim"] * partial)
            _settle(native, "qk_rope_head_dim", dim, "head_dim * partial_rotary_factor")
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"config.json cannot be read ({type(error).__name__}: {error}); take it from the original model"
        ) from None
    missing = [field for field in _NEEDED if native.get(field) is None]
    if native.get("rope_parameters") and "rope_scaling" in missing:
        missing.remove("rope_scaling")
    if missing:
        raise CheckpointError(
            f"config.json lacks {', '.join(missing)}, and nothing in it tells what they were; copy them from the "
            f"config.json of the original model"
        )
    layers, ratios = native["num_hidden_layers"], native["compress_ratios"]
    if len(ratios) < layers:
        raise CheckpointError(
            f"config.json: {len(ratios)} compress_ratios for {layers} layers; add the others"
        )
    return native


def _written(config: dict, quantization: dict) -> dict:
    """`config`, in DeepSeek's keys already, as the output's config.json."""
    written = {
        "topk_method": "noaux_tc",
        **config,
        "architectures": ["DeepseekV4ForCausalLM"],
        "expert_dtype": "fp4",
        "quantization_config": quantization,
    }
    scaling = config.get("rope_scaling")
    if scaling and "type" not in scaling and "rope_type" in scaling:
        written["rope_scaling"] = {"type": scaling["rope_type"], **scaling}  # DeepSeek's own key
    return written


def ignored_layers(nvfp4_kinds: set[str]) -> list[str]:
    """Patterns of the layers that are not NVFP4."""
    patterns = [f"*.{layer}" for kind in KINDS if kind not in nvfp4_kinds for layer in _LAYERS[kind]]
    return [*_ALWAYS_IGNORED, *patterns, "mtp.*"]


def modelopt_config(config: dict, nvfp4_kinds: set[str]) -> dict:
    """`config`, in DeepSeek's keys, with the quantization_config of a ModelOpt NVFP4 checkpoint."""
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
    return _written(config, quantization)


def experts_only_config(config: dict) -> dict:
    """`config`, in DeepSeek's keys, where experts are NVFP4 and other linears stay in FP8 blocks with e8m0 scales."""
    quantization = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
        "moe_quant_algo": "NVFP4",
    }
    return _written(config, quantization)


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
