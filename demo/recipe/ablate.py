"""What each planted error does to the text and to the log-probabilities: the demo's worth as a fixture."""

from collections.abc import Callable

import torch

from cutedsl_nvfp4 import format as nvfp4
from recipe import expected, names, rounding, texts
from recipe.export import model_of, stored_input_scales

Tensors = dict[str, torch.Tensor]


def _each(tensors: Tensors, part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Tensors:
    """A copy of `tensors` with `change` applied to every tensor whose name contains `part`."""
    touched = [name for name in tensors if part in name]
    if not touched:
        raise ValueError(f"no tensor name contains {part!r}; the planted error would change nothing")
    return tensors | {name: change(tensors[name]) for name in touched}


def _scale_blocks(scales: torch.Tensor, factor: float) -> torch.Tensor:
    return (scales.float() * factor).clamp(max=nvfp4.E4M3_MAX).to(scales.dtype)


def _swap_nibbles(weight: torch.Tensor) -> torch.Tensor:
    return (weight >> 4) | (weight << 4) if weight.dtype == torch.uint8 else weight


def _one_scale_per_group(tensors: Tensors, pick: Callable[..., torch.Tensor], routed: bool) -> Tensors:
    """Give the members of each fused group one global scale, as an engine that fuses carelessly would."""
    changed = dict(tensors)
    pairs = (("wq_a", "wkv"), ("wkv", "wgate"), ("w1", "w3"))
    for name in tensors:
        for first, second in pairs:
            suffix = f".{first}.weight_scale_2"
            other = name.removesuffix(suffix) + f".{second}.weight_scale_2"
            if name.endswith(suffix) and other in tensors and (".ffn.experts." in name) == routed:
                if (first, second) == ("wkv", "wgate") and "compressor" not in name:
                    continue
                changed[name] = changed[other] = pick(tensors[name], tensors[other])
    return changed


def _swap_w1_w3(tensors: Tensors) -> Tensors:
    changed = dict(tensors)
    for name in tensors:
        if ".ffn.experts." in name and ".w1." in name:
            other = name.replace(".w1.", ".w3.")
            changed[name], changed[other] = tensors[other], tensors[name]
    return changed


def _randomise_indexer(tensors: Tensors) -> Tensors:
    generator = torch.Generator().manual_seed(1)
    changed = dict(tensors)
    for name, value in tensors.items():
        if ".indexer." in name and value.dtype == torch.uint8:
            changed[name] = torch.randint(0, 256, value.shape, dtype=torch.uint8, generator=generator)
    return changed


def _roll_experts(tensors: Tensors) -> Tensors:
    changed = dict(tensors)
    for name in tensors:
        if ".ffn.experts." in name:
            before, expert, after = names.split_expert(name)
            changed[name] = tensors[f"{before}{(expert + 1) % names.count_experts(tensors)}{after}"]
    return changed


CHECKPOINT_ERRORS: dict[str, Callable[[Tensors], Tensors]] = {
    "none": lambda t: t,
    "global scales inverted": lambda t: _each(t, "weight_scale_2", lambda s: 1 / s),
    "block scales x 2": lambda t: _each(
        t, ".weight_scale", lambda s: s if s.dim() == 0 else _scale_blocks(s, 2)
    ),
    "block scales x 1.125": lambda t: _each(
        t, ".weight_scale", lambda s: s if s.dim() == 0 else _scale_blocks(s, 1.125)
    ),
    "nibbles swapped": lambda t: _each(t, ".weight", _swap_nibbles),
    "fused linears: max of global scales": lambda t: _one_scale_per_group(t, torch.maximum, routed=False),
    "fused linears: first global scale": lambda t: _one_scale_per_group(t, lambda a, b: a, routed=False),
    "experts: w1's global scale for w3": lambda t: _one_scale_per_group(t, lambda a, b: a, routed=True),
    "experts: w1 and w3 swapped": _swap_w1_w3,
    "experts rolled by one": _roll_experts,
    "shared experts zeroed": lambda t: _each(t, "shared_experts.w2.weight_scale", torch.zeros_like),
    "ratio-4 compressor zeroed": lambda t: _each(t, "layers.1.attn.compressor.norm", torch.zeros_like),
    "ratio-128 compressor zeroed": lambda t: _each(t, "layers.2.attn.compressor.norm", torch.zeros_like),
    "indexer randomised": _randomise_indexer,
    "indexer weights_proj negated": lambda t: _each(t, "weights_proj.weight_scale_2", torch.neg),
    "ape zeroed": lambda t: _each(t, ".ape", torch.zeros_like),
    "sinks removed": lambda t: _each(t, "attn_sink", lambda s: torch.full_like(s, -1e4)),
    "hash table rolled by one": lambda t: _each(t, "tid2eid", lambda s: s.roll(1, 0)),
    "router bias dropped": lambda t: _each(t, "gate.bias", torch.zeros_like),
    "hyper-connection mix transposed": lambda t: _each(t, "_base", _transpose_mix),
}


def _transpose_mix(base: torch.Tensor) -> torch.Tensor:
    if base.numel() == 4:  # hc_head_base has no mixing matrix
        return base
    return torch.cat((base[:8], base[8:].view(4, 4).t().flatten()))


def table(tensors: Tensors) -> str:
    """Markdown rows: planted error, wrong characters and mean |dlogp| on both kinds of continuation."""
    groups = {"tales": texts.tales(), "letters": texts.long_letters()}
    truth: dict[str, torch.Tensor] = {}
    lines = [
        "| planted error | tales: wrong characters | mean abs dlogp | letters: wrong | mean abs dlogp |",
        "|---|---|---|---|---|",
    ]

    def row(label: str, model) -> str:
        cells = []
        for group, documents in groups.items():
            readings = [expected.read(model, document) for document in documents]
            logprobs = torch.cat([reading.answer_logprobs for reading in readings])
            truth.setdefault(group, logprobs)
            difference = (logprobs - truth[group]).abs().mean().item()
            cells += [f"{sum(r.wrong for r in readings)} of {len(logprobs)}", f"{difference:.3f}"]
        return f"| {label} | " + " | ".join(cells) + " |"

    for label, plant in CHECKPOINT_ERRORS.items():
        lines.append(row(label, model_of(plant(dict(tensors)))))
        print(lines[-1], flush=True)
    model = model_of(tensors)
    for label, policy in (
        ("(W4A4, input_scale)", stored_input_scales(tensors, model)),
        ("(W4A4, per token)", "per token"),
        (
            "(W4A4, input_scale / 4)",
            {name: scale / 4 for name, scale in stored_input_scales(tensors, model).items()},
        ),
    ):
        with rounding.round_activations(model, policy):
            lines.append(row(label, model))
            print(lines[-1], flush=True)
    return "\n".join(lines)
