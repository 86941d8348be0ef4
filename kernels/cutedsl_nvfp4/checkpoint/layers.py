"""The linear layers of a DeepSeek-V4 model by every name a quantization config may call them.

A config's lists are wildcards or regular expressions over module names in DeepSeek's or transformers' style,
or over the names of the layers vLLM fuses. They are resolved here, layer by layer, into explicit lists.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from .draft import MTP, draft_head
from .names import EXPERTS, linears_of, native_name, transformers_paths

# A fused layer of vLLM, and DeepSeek's names of its segments.
FUSED = {
    "attn.fused_wqa_wkv": ("attn.wq_a", "attn.wkv"),
    "compressor.fused_wkv_wgate": ("compressor.wkv", "compressor.wgate"),
    "shared_experts.gate_up_proj": ("shared_experts.w1", "shared_experts.w3"),
}
# vLLM's layers that bear another name than DeepSeek's linears in them
_SERVED = {**FUSED, "shared_experts.down_proj": ("shared_experts.w2",)}
INDEXER_RATIO = 4


@dataclass(frozen=True)
class Layer:
    """A linear layer, or one layer's routed experts together, which vLLM quantizes as one."""

    name: str  # DeepSeek's, e.g. layers.3.attn.wq_a
    aliases: tuple[frozenset[str], ...]  # all names of the layer; of experts, of each of those looked at

    def _agreed(self, verdicts: list[bool], what: str) -> bool:
        if len(set(verdicts)) > 1:
            raise ValueError(
                f"quantization_config {what} some of the matrices of {self.name} and not others; vLLM keeps the "
                f"routed experts of a layer in one format. Export them all alike"
            )
        return verdicts[0]

    def matches_wildcards(self, patterns: Iterable[str]) -> bool:
        """Whether one of ModelOpt's `patterns` names the layer or a module it is part of."""
        return self._agreed(
            [
                any(
                    fnmatchcase(alias, pattern) or alias.startswith(f"{pattern}.")
                    for pattern in patterns
                    for alias in aliases
                )
                for aliases in self.aliases
            ],
            "ignores",
        )

    def matches_targets(self, targets: Iterable[str]) -> bool:
        """Whether one of compressed-tensors' `targets` (a class, a name, or re:… over names) is the layer."""
        return self._agreed(
            [
                any(
                    target == "Linear"
                    or (
                        any(re.match(target[3:], alias) for alias in aliases)
                        if target.startswith("re:")
                        else target in aliases
                    )
                    for target in targets
                )
                for aliases in self.aliases
            ],
            "targets",
        )


def _fused(linear: str) -> tuple[str, list[str]] | None:
    """DeepSeek's name of a linear -> vLLM's of the fused layer it is in, and DeepSeek's of the segments."""
    for fused, segments in FUSED.items():
        for segment in segments:
            if linear.endswith(f".{segment}") or linear == segment:
                prefix = linear.removesuffix(segment)
                return prefix + fused, [prefix + other for other in segments]
    return None


def partner_of(linear: str) -> str | None:
    """The linear that vLLM runs as one matrix with `linear`; of routed experts too, which FUSED does not list."""
    if f".{EXPERTS}." in linear:
        other = {"w1": "w3", "w3": "w1"}.get(linear[-2:])
        return linear[:-2] + other if other else None
    fused = _fused(linear)
    return next(segment for segment in fused[1] if segment != linear) if fused else None


def linears_in(layer: str) -> list[str]:
    """vLLM's name of a layer, below its model -> DeepSeek's names of the linears in it; not of routed experts."""
    for served, segments in _SERVED.items():
        if layer.endswith(f".{served}"):
            return [layer.removesuffix(served) + segment for segment in segments]
    return [layer]


def _aliases(layers: tuple[str, ...], path: str) -> frozenset[str]:
    """Every name of `path` inside a layer, which is called each of `layers` (`layers.3`)."""
    paths = {path, *transformers_paths(path)}
    if fused := _fused(path):
        paths |= {fused[0], fused[0].replace("attn.", "self_attn.", 1).replace("ffn.", "mlp.", 1)}
    return frozenset(
        f"{prefix}{layer}.{path}" for layer in layers for path in paths for prefix in ("", "model.")
    )


def _routed_experts(layers: tuple[str, ...], experts: int) -> Layer:
    """The routed experts of a layer; the first and the last stand for all: coverage looks at every tensor."""
    merged = {f"{layer}.{EXPERTS}" for layer in layers} | {f"model.{layer}.mlp.experts" for layer in layers}
    matrices = (f"{EXPERTS}.{expert}.w{w}" for expert in (0, experts - 1) for w in (1, 2, 3))
    return Layer(f"{layers[0]}.{EXPERTS}", tuple(_aliases(layers, matrix) | merged for matrix in matrices))


def quantizable(config: Any) -> Iterator[Layer]:
    """Every linear layer that NVFP4 checkpoints quantize, in DeepSeek's order; `config` as vLLM has it."""
    for number in range(config.num_hidden_layers):
        ratio = config.compress_ratios[number]
        paths = linears_of("attention") + linears_of("shared")
        paths += linears_of("compressor") if ratio else ()
        paths += linears_of("indexer") if ratio == INDEXER_RATIO else ()
        layer = (f"layers.{number}",)
        for path in paths:
            yield Layer(f"{layer[0]}.{path}", (_aliases(layer, path),))
        yield _routed_experts(layer, config.n_routed_experts)


def drafted(config: Any) -> Iterator[Layer]:
    """Every linear layer of the draft head that `config` declares, by vLLM's names: layer i is no `mtp.{i}` there."""
    head = draft_head(vars(config))
    layers = [
        (f"layers.{config.num_hidden_layers + index}", f"mtp.{index}")
        for index in range(head.layers if head is not None else 0)
    ]
    for layer in layers:
        for path in (*linears_of("attention"), *linears_of("shared")):
            yield Layer(f"{layer[0]}.{path}", (_aliases(layer, path),))
        yield _routed_experts(layer, config.n_routed_experts)
        if head.kind == MTP:
            for path in ("e_proj", "h_proj"):
                yield Layer(f"{layer[0]}.{path}", (_aliases(layer, path),))
            yield Layer(f"{layer[0]}.shared_head.head", (frozenset({"head", "lm_head"}),))
    if head is not None and head.kind != MTP:
        yield Layer("main_proj", (_aliases(layers[0], "main_proj"),))
        yield Layer("context_wkv_proj", tuple(_aliases(layer, "attn.wkv") for layer in layers))


def has_foreign_names(patterns: Iterable[str]) -> bool:
    """Whether any of `patterns` uses transformers' names."""
    return any(native_name(pattern) != pattern.removeprefix("model.") for pattern in patterns)
