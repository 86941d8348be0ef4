"""transformers' and compressed-tensors' names of DeepSeek-V4 tensors -> DeepSeek's own, which vLLM's mappers read.

No tensor is permuted or split on the way; only compressed-tensors' global scales change in value
(compressed_tensors.py). Names already native pass unchanged. Imports no vLLM: the patched models import this.
"""

import re

_PROJECTIONS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}

# Paths below `model.layers.N.` in transformers -> paths below `layers.N.`.
IN_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn": "attn",
    "self_attn.sinks": "attn.attn_sink",
    "self_attn.q_a_proj": "attn.wq_a",
    "self_attn.q_a_norm": "attn.q_norm",
    "self_attn.q_b_proj": "attn.wq_b",
    "self_attn.kv_proj": "attn.wkv",
    "self_attn.o_a_proj": "attn.wo_a",
    "self_attn.o_b_proj": "attn.wo_b",
    "self_attn.compressor.kv_proj": "attn.compressor.wkv",
    "self_attn.compressor.gate_proj": "attn.compressor.wgate",
    "self_attn.compressor.kv_norm": "attn.compressor.norm",
    "self_attn.compressor.position_bias": "attn.compressor.ape",
    "self_attn.compressor.indexer": "attn.indexer",
    "self_attn.compressor.indexer.q_b_proj": "attn.indexer.wq_b",
    "self_attn.compressor.indexer.weights_proj": "attn.indexer.weights_proj",
    "self_attn.compressor.indexer.scorer.weights_proj": "attn.indexer.weights_proj",
    "self_attn.compressor.indexer.kv_proj": "attn.indexer.compressor.wkv",
    "self_attn.compressor.indexer.gate_proj": "attn.indexer.compressor.wgate",
    "self_attn.compressor.indexer.kv_norm": "attn.indexer.compressor.norm",
    "self_attn.compressor.indexer.position_bias": "attn.indexer.compressor.ape",
    "mlp": "ffn",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    **{f"mlp.shared_experts.{theirs}": f"ffn.shared_experts.{w}" for theirs, w in _PROJECTIONS.items()},
    **{
        f"{block}_hc.{part}": f"hc_{block}_{part}"
        for block in ("attn", "ffn")
        for part in ("fn", "base", "scale")
    },
}
TOP_LEVEL = {
    "model.layers": "layers",
    "model.norm": "norm",
    "model.embed_tokens": "embed",
    "lm_head.weight": "head.weight",
    "model.hc_head.hc_fn": "hc_head_fn",
    "model.hc_head.hc_base": "hc_head_base",
    "model.hc_head.hc_scale": "hc_head_scale",
}
# compressed-tensors' leaves -> ModelOpt's; the global scales are divisors there.
WEIGHT_DIVISOR, INPUT_DIVISOR = "weight_global_scale", "input_global_scale"
LEAVES = {"weight_packed": "weight", WEIGHT_DIVISOR: "weight_scale_2", INPUT_DIVISOR: "input_scale"}


def _either(paths) -> str:
    return "|".join(re.escape(path) for path in sorted(paths, key=len, reverse=True))


_PATHS = TOP_LEVEL | IN_LAYER
_FOREIGN = re.compile(
    rf"^(?P<top>{_either(TOP_LEVEL)})(?!\w)"
    rf"|(?<!\w)mlp\.experts\.(?P<expert>\d+|\*)\.(?P<projection>{_either(_PROJECTIONS)})(?!\w)"
    rf"|(?<!\w)(?P<path>{_either(IN_LAYER)})(?!\w)"
    rf"|(?<=\.)(?P<leaf>{_either(LEAVES)})$"
)


def _replace(match: re.Match) -> str:
    if match["expert"]:
        return f"ffn.experts.{match['expert']}.{_PROJECTIONS[match['projection']]}"
    return LEAVES[match["leaf"]] if match["leaf"] else _PATHS[match["top"] or match["path"]]


def native_name(name: str) -> str:
    """A tensor's or module's name, or a wildcard over such, in transformers' or DeepSeek's style -> DeepSeek's."""
    return _FOREIGN.sub(_replace, name)


def transformers_paths(native: str) -> list[str]:
    """transformers' paths of the module `native` (`attn.wq_a`, `ffn.experts.3.w1`), both below the layer."""
    if expert := re.fullmatch(r"ffn\.experts\.(\d+)\.(w[123])", native):
        theirs = next(name for name, w in _PROJECTIONS.items() if w == expert[2])
        return [f"mlp.experts.{expert[1]}.{theirs}"]
    return [theirs for theirs, ours in IN_LAYER.items() if ours == native]


def accept_foreign_names(mapper):
    """`mapper` (vLLM's WeightsMapper for DeepSeek's names), reading foreign names as well: they come first."""
    mapper.orig_to_new_regex = {_FOREIGN: _replace, **mapper.orig_to_new_regex}
    return mapper
