"""NVFP4 rounding inside a transformers model: of weights (always), of activations (W4A4)."""

from contextlib import contextmanager

import torch

from cutedsl_nvfp4 import format as nvfp4
from cutedsl_nvfp4 import reference
from recipe.names import FROM_TRANSFORMERS, QUANTIZED


def round_to_nvfp4(x: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """x [..., K] rounded to NVFP4 and back, f32; `global_scale` broadcasts against [..., 1]."""
    codes, block_scales = reference.quantize(x, global_scale)
    return reference.dequantize(codes, block_scales, global_scale)


def quantized_parameters(model) -> dict[str, torch.nn.Parameter]:
    """Every parameter that the checkpoint stores as NVFP4, by transformers name."""

    def is_quantized(name: str) -> bool:
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return True
        rest = name.split(".", 3)[-1] if name.startswith("model.layers.") else name
        return bool(QUANTIZED.search("." + FROM_TRANSFORMERS[rest]))

    return {name: p for name, p in model.named_parameters() if is_quantized(name)}


def round_weight(name: str, weight: torch.Tensor) -> torch.Tensor:
    """The weight as the checkpoint will hold it: one global scale per tensor, w1 and w3 apart."""
    if name.endswith("experts.gate_up_proj"):
        apart = weight.unflatten(1, (2, -1))  # [E, gate or up, I, H]
        scale = nvfp4.global_scale_from_amax(apart.abs().amax((-2, -1), keepdim=True))
        return round_to_nvfp4(apart, scale).flatten(1, 2)
    scale = nvfp4.global_scale_from_amax(weight.abs().amax((-2, -1), keepdim=True))
    return round_to_nvfp4(weight, scale)


@contextmanager
def rounded_weights(model):
    """Inside, quantized weights are rounded; gradients reach the originals (straight-through)."""
    parameters = quantized_parameters(model)
    originals = {name: p.detach().clone() for name, p in parameters.items()}
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(round_weight(name, p))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(originals[name])


def _quantized_modules(model):
    """(name, module) of every quantized linear that is a module of its own."""
    for name in quantized_parameters(model):
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            yield name.removesuffix(".weight"), model.get_submodule(name.removesuffix(".weight"))


def input_names(model) -> list[str]:
    """The names under which `on_activations` hands out the inputs of quantized linears."""
    experts = [
        f"model.layers.{layer}.mlp.experts.{operand}"
        for layer in range(len(model.model.layers))
        for operand in ("w13", "w2")
    ]
    return [name for name, _ in _quantized_modules(model)] + experts


@contextmanager
def on_activations(model, function):
    """Inside, every quantized linear reads `function(name, x)` instead of its input x [..., K].

    The experts of a layer share two names: `<experts>.w13` for their input, `<experts>.w2` for the
    intermediate.
    """
    undo = []

    def replace_input(name):
        def hook(_, args):
            return (function(name, args[0]), *args[1:])

        return hook

    for name, module in _quantized_modules(model):
        undo.append(module.register_forward_pre_hook(replace_input(name)).remove)
    for index, layer in enumerate(model.model.layers):
        experts = layer.mlp.experts
        prefix = f"model.layers.{index}.mlp.experts"
        undo.append(experts.register_forward_pre_hook(replace_input(f"{prefix}.w13")).remove)

        def gate_then_replace(gate_up, plain=experts._apply_gate, name=f"{prefix}.w2"):
            return function(name, plain(gate_up))

        experts._apply_gate = gate_then_replace
        undo.append(lambda experts=experts: delattr(experts, "_apply_gate"))
    try:
        yield
    finally:
        for step in undo:
            step()


def round_activations(model, scales: dict[str, float] | str, headroom: float = 1.0):
    """Context of W4A4: `scales` by linear name (checkpoint policy), or "per token", or "per tensor".

    `headroom` widens the scale of "per tensor": a served scale was measured on other texts.
    """

    def rounded(name: str, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            if scales == "per token":
                scale = reference.dynamic_act_scale(x).unsqueeze(-1)
            elif scales == "per tensor":
                scale = nvfp4.global_scale_from_amax(x.abs().amax()) * headroom
            else:
                scale = torch.tensor(scales[name])
            error = round_to_nvfp4(x, scale) - x
        return x + error

    return on_activations(model, rounded)


@contextmanager
def record_amax(model, amax: dict[str, float]):
    """Inside, `amax[name]` becomes the largest |activation| that each quantized linear has seen."""

    def watch(name: str, x: torch.Tensor) -> torch.Tensor:
        amax[name] = max(amax.get(name, 0.0), x.detach().abs().max().item())
        return x

    with on_activations(model, watch):
        yield
