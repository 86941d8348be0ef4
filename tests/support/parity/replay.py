"""Replay a recording of vLLM's layers in the reference: how far is every part from it, on the very same input?

Each part of the reference reads what vLLM's part read and hands on what vLLM's part returned, so nothing
accumulates and no indexer choice flips because of an earlier rounding: a figure is one part's own error.
"""

from collections.abc import Callable
from contextlib import contextmanager

import torch
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4TopKRouter

from tests.support.parity.reference_model import Tensors

Figures = dict[str, float]

RATIO = 4  # tokens per entry that the indexer chooses among
TIE = 0.005  # vLLM rounds router logits to bf16: which of two experts this close it takes is chance


def _relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """f32 [T]: |ours - theirs| / |theirs| of every token."""
    ours, theirs = ours.float().flatten(1), theirs.float().flatten(1)
    return (ours - theirs).norm(dim=1) / theirs.norm(dim=1)


def _differing_choice(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """f32 [T]: the part of vLLM's chosen entries that the reference did not choose."""
    entries = len(theirs) // RATIO

    def chosen(indices):
        mask = torch.zeros(len(indices), entries + 1, dtype=torch.bool)
        mask.scatter_(1, torch.where(indices < 0, entries, indices).long(), True)
        return mask[:, :entries]

    ours, theirs = chosen(ours), chosen(theirs)
    return (theirs & ~ours).sum(1) / theirs.sum(1).clamp(min=1)


@contextmanager
def _hooked(model, compare: Callable, streams: torch.Tensor):
    """Inside, the layers start from `streams`, and every part's output is `compare(name, output [T, …])`."""
    hooks = []

    def after(module, name: str) -> None:
        def hook(_, args, output):
            if isinstance(output, tuple):  # of attention and router: the first is compared
                return (compare(name, output[0].squeeze(0)).view_as(output[0]), *output[1:])
            return compare(name, output[0])[None]

        hooks.append(module.register_forward_hook(hook))

    layers = model.model.layers
    hooks.append(layers[0].register_forward_pre_hook(lambda _, args: (streams.float()[None], *args[1:])))
    for index, layer in enumerate(layers):
        after(layer.input_layernorm, f"{index}.attn.in")
        after(layer.self_attn, f"{index}.attn.out")
        after(layer.post_attention_layernorm, f"{index}.ffn.in")
        after(layer.mlp, f"{index}.ffn.out")
        after(layer, f"{index + 1}.streams")
        if isinstance(layer.mlp.gate, DeepseekV4TopKRouter):
            after(layer.mlp.gate, f"{index}.router")
        if layer.self_attn.layer_type == "compressed_sparse_attention":
            after(layer.self_attn.compressor.indexer, f"{index}.choice")
    after(model.model.norm, "final")
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def replay(model, recording: Tensors, decoded: int) -> Figures:
    """Mean error of every part by name, of the prompt's tokens and (`decode …`) of the last `decoded` ones.

    Tokens whose router has a tie do not count in `ffn.out`, tokens that need not choose not in `choice`.
    """
    tokens = torch.arange(len(recording["ids"]))
    prefill = tokens < len(tokens) - decoded
    figures: Figures = {}
    tied = torch.zeros_like(prefill)

    def note_ties(index: str, logits: torch.Tensor) -> None:
        router = model.model.layers[int(index)].mlp.gate
        ranked = (router.score_fn(logits) + router.e_score_correction_bias).sort(descending=True).values
        tied.copy_(ranked[:, router.top_k - 1] - ranked[:, router.top_k] < TIE)

    def compare(name: str, ours: torch.Tensor) -> torch.Tensor:
        if name.endswith("router"):
            note_ties(name.split(".")[0], ours)
            return ours
        theirs = recording[name]
        counted = torch.ones_like(prefill)
        if name.endswith("choice"):
            errors = _differing_choice(ours, theirs)
            counted = (tokens + 1) // RATIO > theirs.shape[1]
            theirs = theirs[:, : ours.shape[1]].long()
        else:
            errors = _relative_error(ours, theirs)
            theirs = theirs.float()
        if name.endswith("ffn.out"):
            counted = ~tied
            tied.fill_(False)
        figures[name] = errors[prefill & counted].mean().item()
        figures[f"decode {name}"] = errors[~prefill & counted].mean().item()
        return theirs

    with _hooked(model, compare, recording["0.streams"]):
        model(recording["ids"][None], use_cache=False)
    return figures
