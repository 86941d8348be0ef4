"""What an MTP head holds: its tensors by DeepSeek's paths below a draft layer, checked from headers alone.

A draft layer is a sliding-window layer of the model, routed by its gate, and a way into it and out of it:

    e_proj(enorm(embedding)) + h_proj(hnorm(streams))    streams: the model's hyper-connections, [T, hc_mult, H]
    hc_head_*, norm                                      streams -> what the model's own head turns into logits

Imports no vLLM and no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .draft import DraftHead
from .headers import CheckpointError
from .names import EXPERTS, draft_index, listed, native_name

# vLLM gives the draft the model's own embedding and head
SHARED = ("emb.tok_emb.weight", "head.weight")
LISTED = 5  # names shown in an error

_SCALES = ("scale", "weight_scale", "weight_scale_inv")
# format of a linear -> leaves of which it needs one each, besides the weight
_NEEDED = {"nvfp4": (("weight_scale",), ("weight_scale_2",)), "fp8": (_SCALES,), "mxfp4": (_SCALES,)}
_PACKED = ("U8", "I8")


def draft_path(name: str, num_layers: int) -> tuple[int, str] | None:
    """(draft layer, DeepSeek's path below it) of a tensor or module of the draft layers; None for every other."""
    index = draft_index(name, num_layers)
    if index is None:
        return None
    return index, re.sub(r"^(?:model\.)?(?:mtp|layers)\.\d+\.", "", native_name(name))


def linears(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """{path of each linear of a draft layer: (N, K)} for config.json in DeepSeek's words."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
    lora, groups = config["o_groups"] * config["o_lora_rank"], config["o_groups"]
    of_experts = {"w1": (config["moe_intermediate_size"], hidden)}
    of_experts |= {"w2": of_experts["w1"][::-1], "w3": of_experts["w1"]}
    return {
        "e_proj": (hidden, hidden),
        "h_proj": (hidden, hidden),
        "attn.wq_a": (config["q_lora_rank"], hidden),
        "attn.wkv": (config["head_dim"], hidden),
        "attn.wq_b": (heads, config["q_lora_rank"]),
        "attn.wo_a": (lora, heads // groups),
        "attn.wo_b": (hidden, lora),
        **{f"ffn.shared_experts.{matrix}": shape for matrix, shape in of_experts.items()},
        **{
            f"{EXPERTS}.{expert}.{matrix}": shape
            for expert in range(config["n_routed_experts"])
            for matrix, shape in of_experts.items()
        },
    }


def parameters(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """{path of each unquantized tensor of a draft layer: shape} for config.json in DeepSeek's words."""
    hidden, streams = config["hidden_size"], config["hc_mult"]
    mixes = (2 + streams) * streams
    return {
        **{f"{norm}.weight": (hidden,) for norm in ("enorm", "hnorm", "norm", "attn_norm", "ffn_norm")},
        "attn.q_norm.weight": (config["q_lora_rank"],),
        "attn.kv_norm.weight": (config["head_dim"],),
        "attn.attn_sink": (config["num_attention_heads"],),
        "ffn.gate.weight": (config["n_routed_experts"], hidden),
        "ffn.gate.bias": (config["n_routed_experts"],),
        **{f"hc_{block}_fn": (mixes, streams * hidden) for block in ("attn", "ffn")},
        **{f"hc_{block}_base": (mixes,) for block in ("attn", "ffn")},
        **{f"hc_{block}_scale": (3,) for block in ("attn", "ffn")},
        "hc_head_fn": (streams, streams * hidden),
        "hc_head_base": (streams,),
        "hc_head_scale": (1,),
    }


def check_mtp(config: Mapping[str, Any], tensors: Mapping[str, Any], head: DraftHead) -> None:
    """Raise CheckpointError unless `tensors` (headers by name: dtype, shape) hold all of an MTP `head` of this model.

    Names what is missing, what has another shape than `config` (config.json in DeepSeek's words) gives, and block
    scales of FP8 that are no e8m0, which vLLM's FP8 layers have beside FP4 experts.
    """
    stored: dict[tuple[int, str], tuple[str, Any]] = {}  # (draft layer, path): name, tensor
    for name, tensor in tensors.items():
        if found := draft_path(name, config["num_hidden_layers"]):
            stored[found] = name, tensor
    missing: list[str] = []
    misfits: list[str] = []

    def check(layer: int, path: str, shape: tuple[int, ...]) -> None:
        name, tensor = stored.get((layer, path), (None, None))
        if tensor is None:
            missing.append(f"mtp.{layer}.{path}")
            return
        if tensor.dtype in _PACKED:
            shape = (*shape[:-1], shape[-1] // 2)
        if tuple(tensor.shape) != shape:
            misfits.append(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")

    for layer in range(head.layers):
        for path, shape in parameters(config).items():
            check(layer, path, shape)
        for path, shape in linears(config).items():
            check(layer, f"{path}.weight", shape)
            of = EXPERTS if path.startswith(f"{EXPERTS}.") else path
            for form in head.formats.get(f"{layer}.{of}", ()):
                for leaves in _NEEDED.get(form, ()):
                    scales = [
                        stored[layer, f"{path}.{leaf}"]
                        for leaf in leaves
                        if (layer, f"{path}.{leaf}") in stored
                    ]
                    if not scales:
                        missing.append(f"mtp.{layer}.{path}.{leaves[0]}")
                    misfits += [
                        f"{name} has dtype {tensor.dtype}, expected F8_E8M0"
                        for name, tensor in scales
                        if form == "fp8" and not name.endswith(".weight_scale") and tensor.dtype != "F8_E8M0"
                    ]
    if missing:
        raise CheckpointError(
            f"the checkpoint's MTP head lacks {len(missing)} tensors: {listed(missing, LISTED)}; the export is "
            f"incomplete. Download it again, or leave --speculative-config out"
        )
    if misfits:
        raise CheckpointError(
            f"the checkpoint's MTP head is not this model's (hidden_size {config['hidden_size']}), {len(misfits)} "
            f"tensors do not fit: {listed(misfits, LISTED)}. Use the head that was trained with the model, or leave "
            f"--speculative-config out"
        )
