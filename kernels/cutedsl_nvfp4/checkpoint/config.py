"""config.json in transformers' or an exporter's words -> in DeepSeek's, which vLLM's DeepSeek-V4 reads.

Every value comes from the file itself. What the file does not say is refused with the name of the missing
field; what was translated is logged, once. Imports no vLLM, because the patched modules import this one, and
torch only for compressed-tensors: the programs in scripts/ read configs by the same rules, with Python 3.9 alone.
"""

from __future__ import annotations

import logging
from typing import Any

from . import layers

logger = logging.getLogger(__name__)

MODEL_TYPE = "deepseek_v4"
# with text alone, and with a vision tower; vLLM's classes have the same names
ARCHITECTURES = ("DeepseekV4ForCausalLM", "DeepseekV4ForConditionalGeneration")
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
_reported: set[str] = set()


def _report(repair: str) -> None:
    if repair not in _reported:
        _reported.add(repair)
        logger.info("config.json: %s", repair)


class _Repair:
    """One config.json's fields while they are translated."""

    def __init__(self, fields: dict[str, Any]):
        self.fields = dict(fields)

    def settle(self, field: str, value: Any, source: str) -> None:
        """Set `field` to `value`, which `source` gives; refuse a file that says something else about it."""
        present = self.fields.get(field)
        if value is None:
            return
        if present is None:
            self.fields[field] = value
            _report(f"{field} = {value!r}, from {source}")
        elif present != value:
            raise ValueError(
                f"config.json contradicts itself: {field} is {present!r}, but {source} gives {value!r}; "
                f"remove the wrong one"
            )

    def compress_ratios(self) -> None:
        kinds = self.fields.pop("layer_types", None)
        rates = self.fields.pop("compress_rates", None) or {}
        if kinds is None:
            return
        unknown = sorted(set(kinds) - {"sliding_attention", *_COMPRESSED})
        absent = sorted((set(kinds) & set(_COMPRESSED)) - rates.keys())
        if unknown or (absent and self.fields.get("compress_ratios") is None):
            raise ValueError(
                "config.json: layer_types cannot be turned into compress_ratios: "
                + (f"unknown kinds {unknown}" if unknown else f"compress_rates says nothing about {absent}")
                + "; add compress_ratios, one number per layer (0, 4 or 128)"
            )
        if absent:
            return
        ratios = [0 if kind == "sliding_attention" else rates[kind] for kind in kinds]
        present = self.fields.get("compress_ratios")
        if present is not None:  # DeepSeek's list goes on with the draft layers
            ratios += present[len(ratios) :]
        self.settle("compress_ratios", ratios, "layer_types and compress_rates")

    def num_hash_layers(self) -> None:
        kinds = self.fields.pop("mlp_layer_types", None)
        if kinds is None:
            return
        count = kinds.count("hash_moe")
        if kinds != ["hash_moe"] * count + ["moe"] * (len(kinds) - count):
            raise ValueError(
                f"config.json: mlp_layer_types must be hash_moe layers followed by moe layers, got {kinds}; "
                f"vLLM knows a number of hash layers only"
            )
        self.settle("num_hash_layers", count, "mlp_layer_types")

    def rope(self) -> None:
        nested = self.fields.get("rope_parameters")
        if not isinstance(nested, dict) or not nested.keys() & {"main", "compress"}:
            return
        del self.fields["rope_parameters"]
        if not all(isinstance(nested.get(part), dict) for part in ("main", "compress")):
            raise ValueError(
                f"config.json: rope_parameters must hold both main and compress, got {sorted(nested)}; "
                f"give rope_theta, compress_rope_theta and rope_scaling instead"
            )
        scaling = dict(nested["compress"])
        factor = scaling.pop("attention_factor", 1.0)
        if factor != 1.0:
            raise ValueError(
                f"config.json: rope_parameters.compress.attention_factor is {factor}; DeepSeek-V4 does not "
                f"scale its rotary embedding, and vLLM's implementation cannot"
            )
        partial = scaling.pop("partial_rotary_factor", None)
        self.settle("rope_theta", nested["main"].get("rope_theta"), "rope_parameters.main")
        self.settle("compress_rope_theta", scaling.pop("rope_theta", None), "rope_parameters.compress")
        if self.fields.get("partial_rotary_factor") is None:
            self.fields["partial_rotary_factor"] = partial
        present = self.fields.get("rope_scaling")  # DeepSeek's has a `type` besides
        of_both = {key: value for key, value in (present or {}).items() if key in scaling}
        if present is None or {**scaling, **of_both} != scaling:
            self.settle("rope_scaling", scaling, "rope_parameters.compress")

    def qk_rope_head_dim(self) -> None:
        partial = self.fields.pop("partial_rotary_factor", None)
        if partial is not None and self.fields.get("head_dim") is not None:
            dim = int(self.fields["head_dim"] * partial)
            self.settle("qk_rope_head_dim", dim, "head_dim * partial_rotary_factor")


def native_config(fields: dict[str, Any]) -> dict[str, Any]:
    """Contents of config.json -> the same with every field vLLM's DeepSeek-V4 needs, under DeepSeek's names.

    Raises ValueError naming what the file lacks, contradicts, or says in words vLLM cannot follow.
    """
    if fields.get("architectures", [ARCHITECTURES[0]]) not in [[name] for name in ARCHITECTURES]:
        return fields  # draft models have configs of their own
    native = native_fields(fields)
    if native.get("topk_method") is None:
        # transformers has no such field: its routers always add a bias, which DeepSeek calls noaux_tc
        native["topk_method"] = "noaux_tc"
        _report("topk_method = 'noaux_tc', from the architecture, whose routers have a bias")
    return native


def native_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """`native_config` of a DeepSeek-V4, as far as the file itself tells."""
    repair = _Repair(fields)
    repair.compress_ratios()
    repair.num_hash_layers()
    repair.rope()
    repair.qk_rope_head_dim()
    missing = [
        field
        for field in _NEEDED
        if repair.fields.get(field) is None
        and not (field == "rope_scaling" and repair.fields.get("rope_parameters"))
    ]
    if missing:
        raise ValueError(
            f"config.json lacks {', '.join(missing)}, and nothing in it tells what they were; the exporter lost "
            f"them. Copy them from the config.json of the original model, the one that was quantized"
        )
    layer_count, ratios = repair.fields["num_hidden_layers"], repair.fields["compress_ratios"]
    if len(ratios) < layer_count:
        raise ValueError(
            f"config.json: {len(ratios)} compress_ratios for {layer_count} layers; add the others"
        )
    return repair.fields


def native_quantization(config: Any, quantization: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's `quantization_config` -> ModelOpt's or DeepSeek's own, with DeepSeek's names.

    `config` is vLLM's, already repaired; other models' come back unchanged. Raises ValueError for schemes
    that cannot be served.
    """
    if getattr(config, "model_type", None) != MODEL_TYPE:
        return quantization
    method = str(quantization.get("quant_method", "")).lower().replace("_", "-")
    if method == "compressed-tensors":
        from .compressed_tensors import native_scheme

        native = native_scheme(quantization, layers.quantizable(config), layers.drafted(config))
        _report(f"quantization_config: compressed-tensors, read as quant_method {native['quant_method']}")
        return native
    if method == "fp8":
        return _with_scale_format(config, quantization)
    return _with_native_ignore_list(config, quantization)


def holds_nvfp4(quantization: Any) -> bool:
    """Whether a `quantization_config`, in any exporter's words or `native_quantization`'s, makes any layer NVFP4."""
    if not isinstance(quantization, dict):
        return False
    algorithms = [str(quantization.get(key)).upper() for key in ("quant_algo", "moe_quant_algo")]
    weights = {"num_bits": 4, "type": "float", "group_size": 16}  # in compressed-tensors' groups
    return (
        any("NVFP4" in algorithm for algorithm in algorithms)
        or all(quantization.get(key) == value for key, value in weights.items())
        or any(map(holds_nvfp4, quantization.values()))
    )


def _with_scale_format(config: Any, quantization: dict[str, Any]) -> dict[str, Any]:
    """vLLM reads FP8 block scales as powers of two (ue8m0) wherever experts are FP4, and asks DeepGEMM here."""
    if quantization.get("scale_fmt") is not None or getattr(config, "expert_dtype", "fp4") != "fp4":
        return quantization
    _report(
        "quantization_config.scale_fmt = 'ue8m0', from expert_dtype fp4, whose FP8 layers have e8m0 scales"
    )
    return {**quantization, "scale_fmt": "ue8m0"}


def _with_ignore(quantization: dict[str, Any]) -> dict[str, Any]:
    """A flat ModelOpt `quantization_config` with its list under `ignore`, the only name vLLM reads there."""
    renamed = {key: value for key, value in quantization.items() if key != "exclude_modules"}
    if len(renamed) == len(quantization):
        return quantization
    excluded = quantization["exclude_modules"]
    if renamed.setdefault("ignore", excluded) != excluded:
        raise ValueError(
            "config.json contradicts itself: ignore and exclude_modules of quantization_config differ; remove one"
        )
    _report("quantization_config.ignore, from exclude_modules")
    return renamed


def _with_native_ignore_list(config: Any, quantization: dict[str, Any]) -> dict[str, Any]:
    """Replace a ModelOpt ignore list in transformers' names by the layers it names, in DeepSeek's.

    A draft layer that the list calls `mtp.{i}` alone, as DeepSeek does, is added by vLLM's name.
    """
    nested = quantization.get("quantization")
    holder, key = (
        (nested, "exclude_modules") if isinstance(nested, dict) else (_with_ignore(quantization), "ignore")
    )
    patterns = holder.get(key) or []
    drafted = [layer for layer in layers.drafted(config) if layer.matches_wildcards(patterns)]
    if layers.has_foreign_names(patterns):
        trunk = [layer for layer in layers.quantizable(config) if layer.matches_wildcards(patterns)]
        ignored = [layer.name for layer in trunk + drafted]
        _report(f"quantization_config.{key}: transformers' names, {len(ignored)} layers left unquantized")
    else:
        understood = [pattern for pattern in patterns if "mtp" not in pattern]
        added = [layer.name for layer in drafted if not layer.matches_wildcards(understood)]
        ignored = [*patterns, *added] if added else patterns
        if added:
            _report(f"quantization_config.{key}: {len(added)} layers of mtp.* by vLLM's names besides")
    translated = {**holder, key: ignored} if ignored is not patterns else holder
    return {**quantization, "quantization": translated} if isinstance(nested, dict) else translated
