"""config.json of what the converter writes: native keys, and a quantization_config that says what is NVFP4."""

from __future__ import annotations

from .config import native_fields
from .draft import DraftHead
from .headers import CheckpointError
from .names import KINDS, linears_of

# vLLM's layer names of each kind, and DeepSeek's names of the linears in it (other engines match those)
_LAYERS = {
    "attention": ("attn.fused_wqa_wkv", *linears_of("attention")),
    "compressor": ("attn.compressor.*",),
    "indexer": ("attn.indexer.*",),
    "shared": ("ffn.shared_experts.*",),
    "experts": ("ffn.experts", "ffn.experts.*"),
}
_ALWAYS_IGNORED = ("head", "lm_head", "*.ffn.gate", "*.attn_norm")
_PRODUCER = {"name": "convert_checkpoint", "version": "1"}


def native_config(config: dict) -> dict:
    """A config.json with DeepSeek's keys: what transformers derived from them is put back, the rest is kept.

    The rules are the server's. CheckpointError for what it refuses: missing, contradictory, or beyond vLLM's model.
    """
    try:
        return native_fields(config)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"config.json cannot be read ({type(error).__name__}: {error}); take it from the original model"
        ) from None


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


def ignored_layers(nvfp4_kinds: set[str], num_layers: int, draft: DraftHead | None) -> list[str]:
    """Patterns of the layers that are not NVFP4, of a model of `num_layers` layers and its draft head."""
    patterns = [f"*.{layer}" for kind in KINDS if kind not in nvfp4_kinds for layer in _LAYERS[kind]]
    return [*_ALWAYS_IGNORED, *patterns, *(draft.unquantized(num_layers) if draft is not None else ())]


def modelopt_config(config: dict, nvfp4_kinds: set[str], draft: DraftHead | None = None) -> dict:
    """`config`, in DeepSeek's keys, with the quantization_config of a ModelOpt NVFP4 checkpoint with head `draft`."""
    numbers = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    quantization = {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "group_size": 16,
        "ignore": ignored_layers(nvfp4_kinds, config["num_hidden_layers"], draft),
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


def hf_quant_config(config: dict, nvfp4_kinds: set[str], draft: DraftHead | None = None) -> dict:
    """hf_quant_config.json, for engines that read ModelOpt's own file; arguments as for `modelopt_config`."""
    return {
        "producer": _PRODUCER,
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": 16,
            "exclude_modules": ignored_layers(nvfp4_kinds, config["num_hidden_layers"], draft),
        },
    }
