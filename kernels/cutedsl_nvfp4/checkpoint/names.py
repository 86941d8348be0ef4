"""Names of DeepSeek-V4's modules and tensors: DeepSeek's own ("native"), transformers', and the kind of each linear.

One table, from which vLLM's mappers, the converter and the demo's recipe take theirs. No tensor is permuted or split
on the way, except that transformers may stack the routed experts of a layer into two tensors (STACKED). Only
compressed-tensors' global scales change in value (compressed_tensors.py).

Imports no vLLM and no torch: the patched models import this, and so do programs for Python 3.9 alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from .headers import CheckpointError

KINDS = ("attention", "compressor", "indexer", "shared", "experts")
EXPERTS = "ffn.experts"  # the routed ones, below a layer

# --- the table, from DeepSeek's paths to transformers' ---

# linears inside a layer -> (kind, theirs), in DeepSeek's order
_LINEARS = {
    "attn.wq_a": ("attention", "self_attn.q_a_proj"),
    "attn.wkv": ("attention", "self_attn.kv_proj"),
    "attn.wq_b": ("attention", "self_attn.q_b_proj"),
    "attn.wo_a": ("attention", "self_attn.o_a_proj"),
    "attn.wo_b": ("attention", "self_attn.o_b_proj"),
    "attn.compressor.wkv": ("compressor", "self_attn.compressor.kv_proj"),
    "attn.compressor.wgate": ("compressor", "self_attn.compressor.gate_proj"),
    "attn.indexer.wq_b": ("indexer", "self_attn.compressor.indexer.q_b_proj"),
    "attn.indexer.weights_proj": ("indexer", "self_attn.compressor.indexer.scorer.weights_proj"),
    "attn.indexer.compressor.wkv": ("indexer", "self_attn.compressor.indexer.kv_proj"),
    "attn.indexer.compressor.wgate": ("indexer", "self_attn.compressor.indexer.gate_proj"),
    "ffn.shared_experts.w1": ("shared", "mlp.shared_experts.gate_proj"),
    "ffn.shared_experts.w2": ("shared", "mlp.shared_experts.down_proj"),
    "ffn.shared_experts.w3": ("shared", "mlp.shared_experts.up_proj"),
}
# matrices of a routed expert, `ffn.experts.N.w1` and `mlp.experts.N.gate_proj`; and of all of a layer's, stacked
_EXPERT = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
STACKED = {"mlp.experts.gate_up_proj": ("w1", "w3"), "mlp.experts.down_proj": ("w2",)}
# parameters inside a layer, never quantized
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
# modules inside a layer that hold these
_MODULES = {"attn": "self_attn", "attn.indexer": "self_attn.compressor.indexer", "ffn": "mlp"}
# parameters outside the layers, never quantized
TOP_LEVEL = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}
# what some exporters write instead of transformers' paths, inside a layer
_EXPORTERS = {"self_attn.compressor.indexer.weights_proj": "attn.indexer.weights_proj"}

# compressed-tensors' leaves -> ModelOpt's; the global scales are divisors there
WEIGHT_DIVISOR, INPUT_DIVISOR = "weight_global_scale", "input_global_scale"
_MODELOPT_LEAVES = {"weight_packed": "weight", WEIGHT_DIVISOR: "weight_scale_2", INPUT_DIVISOR: "input_scale"}
_LEAVES = {"scale", "weight_scale", "weight_scale_inv", *_MODELOPT_LEAVES, *_MODELOPT_LEAVES.values()}

# --- what follows from it ---

# every tensor inside a layer but the routed experts', unquantized: DeepSeek's path -> transformers'
IN_LAYER = {
    **{f"{native}.weight": f"{theirs}.weight" for native, (_, theirs) in _LINEARS.items()},
    **_PARAMETERS,
}

_NATIVE_LINEARS = {
    **{native: native for native in _LINEARS},
    **{theirs: native for native, (_, theirs) in _LINEARS.items()},
    **_EXPORTERS,
}
_NATIVE_PARAMETERS = {
    **{native: native for native in _PARAMETERS},
    **{theirs: native for native, theirs in _PARAMETERS.items()},
}
_NATIVE_TOP_LEVEL = {
    **{native: native for native in TOP_LEVEL},
    **{theirs.removeprefix("model."): native for native, theirs in TOP_LEVEL.items()},
}
_NATIVE_EXPERT = {theirs: native for native, theirs in _EXPERT.items()}


def _without_leaf(parameters: dict[str, str]) -> dict[str, str]:
    """DeepSeek's -> transformers', turned round, and of modules: wildcards name those."""
    return {
        theirs.removesuffix(".weight"): native.removesuffix(".weight")
        for native, theirs in parameters.items()
    }


_TOP_LEVEL_PATHS = {"model.layers": "layers", **_without_leaf(TOP_LEVEL)}
# vLLM's own name of the module is lm_head: only its tensor is replaced
_TOP_LEVEL_PATHS["lm_head.weight"] = f"{_TOP_LEVEL_PATHS.pop('lm_head')}.weight"
_IN_LAYER_PATHS = {**_without_leaf(_MODULES), **_without_leaf(IN_LAYER), **_EXPORTERS}


def _either(paths: Iterable[str]) -> str:
    return "|".join(re.escape(path) for path in sorted(paths, key=len, reverse=True))


_PATHS = {**_TOP_LEVEL_PATHS, **_IN_LAYER_PATHS}
_FOREIGN = re.compile(
    r"^(?P<vision>(?:vision|aligner)\..*)"  # whole: the tower has an mlp too, which is no layer's
    rf"|^(?P<top>{_either(_TOP_LEVEL_PATHS)})(?!\w)"
    rf"|(?<!\w)mlp\.experts\.(?P<expert>\d+|\*)\.(?P<matrix>{_either(_NATIVE_EXPERT)})(?!\w)"
    rf"|(?<!\w)(?P<path>{_either(_IN_LAYER_PATHS)})(?!\w)"
    rf"|(?<=\.)(?P<leaf>{_either(_MODELOPT_LEAVES)})$"
)


def _replace(match: re.Match) -> str:
    if match["vision"]:
        return match["vision"]
    if match["expert"]:
        return f"ffn.experts.{match['expert']}.{_NATIVE_EXPERT[match['matrix']]}"
    return _MODELOPT_LEAVES[match["leaf"]] if match["leaf"] else _PATHS[match["top"] or match["path"]]


# --- names as the server reads them: any text, wildcards over names included ---


def native_name(name: str) -> str:
    """A tensor's or module's name, or a wildcard over such, in transformers' or DeepSeek's style -> DeepSeek's."""
    return _FOREIGN.sub(_replace, name)


def accept_foreign_names(mapper):
    """`mapper` (vLLM's WeightsMapper for DeepSeek's names), reading foreign names as well: they come first."""
    mapper.orig_to_new_regex = {_FOREIGN: _replace, **mapper.orig_to_new_regex}
    return mapper


def transformers_paths(native: str) -> list[str]:
    """transformers' paths of the linear `native` (`attn.wq_a`, `ffn.experts.3.w1`), both below the layer."""
    if expert := re.fullmatch(r"ffn\.experts\.(\d+)\.(w[123])", native):
        return [f"mlp.experts.{expert[1]}.{_EXPERT[expert[2]]}"]
    return [theirs for theirs, ours in _NATIVE_LINEARS.items() if ours == native != theirs]


# --- names as the converter reads them: exact ones, the others refused ---


def split_layer(name: str) -> tuple[int | None, str]:
    """`[model.]layers.3.rest` -> (3, rest); (None, name) for a tensor outside the layers."""
    found = re.fullmatch(r"(?:model\.)?layers\.(\d{1,6})\.(.+)", name)
    return (int(found.group(1)), found.group(2)) if found else (None, name)


def draft_index(name: str, num_layers: int) -> int | None:
    """Which draft layer `name` belongs to, `mtp.{i}.*` or `layers.{num_layers + i}.*`; None for every other name."""
    if found := re.match(r"(?:model\.)?mtp\.(\d{1,6})\.", name):
        return int(found[1])
    layer, _ = split_layer(name)
    return layer - num_layers if layer is not None and layer >= num_layers else None


def is_mtp(name: str, num_layers: int) -> bool:
    """Whether `name` belongs to the draft layers: copied as they are, under the names they have."""
    return name.startswith(("mtp.", "model.mtp.")) or draft_index(name, num_layers) is not None


def _identify_in_layer(rest: str) -> tuple[str, str] | None:
    if rest in _NATIVE_PARAMETERS:
        return _NATIVE_PARAMETERS[rest], ""
    module, _, leaf = rest.rpartition(".")
    if leaf not in _LEAVES:
        return None
    if module in _NATIVE_LINEARS:
        return _NATIVE_LINEARS[module], leaf
    expert = re.fullmatch(rf"(?:ffn|mlp)\.experts\.(\d{{1,6}})\.(w[123]|{_either(_NATIVE_EXPERT)})", module)
    if expert:
        return f"ffn.experts.{int(expert[1])}.{_NATIVE_EXPERT.get(expert[2], expert[2])}", leaf
    return None


def identify(name: str) -> tuple[str, str]:
    """A tensor's name -> (native linear, leaf), or (native parameter, "") of what is never quantized.

    CheckpointError for a name that no DeepSeek-V4 has.
    """
    layer, rest = split_layer(name)
    if layer is None:
        plain = name.removeprefix("model.")
        if plain in _NATIVE_TOP_LEVEL:
            return _NATIVE_TOP_LEVEL[plain], ""
    elif found := _identify_in_layer(rest):
        return f"layers.{layer}.{found[0]}", found[1]
    raise CheckpointError(
        f"tensor {name[:200]!r} is not one of DeepSeek-V4's; if the model is a DeepSeek-V4, its exporter uses "
        f"names this tool does not know"
    )


# --- native names ---


def linears_of(kind: str) -> tuple[str, ...]:
    """Native paths, below a layer, of its linears of `kind`, in DeepSeek's order; routed experts are not listed."""
    return tuple(native for native, (its_kind, _) in _LINEARS.items() if its_kind == kind)


def kind_of(linear: str) -> str:
    """Kind of a native linear's name, one of KINDS."""
    rest = split_layer(linear)[1]
    return "experts" if rest.startswith("ffn.experts.") else _LINEARS[rest][0]


def natural_order(name: str) -> list:
    """Sort key under which layer 2 comes before layer 10."""
    return [
        (int(part), "") if part.isdecimal() and len(part) < 10 else (-1, part) for part in name.split(".")
    ]


def listed(names: Iterable[str], most: int) -> str:
    """`names` for a message, in natural order, and how many there are beyond `most`."""
    ordered = sorted(names, key=natural_order)
    return ", ".join(ordered[:most]) + (f" and {len(ordered) - most} more" if len(ordered) > most else "")
