"""W4A4 against float32: what layers compute from the activations they see, under every activation-scale policy.

Weights are the demo's. Inputs are what its layers see on texts, or heavy-tailed synthetic ones; scales never
come from the tokens that are measured. The float32 side is transformers' own modules on the dequantized weights.

`PYTHONPATH=demo .venv/bin/python tests/support/numerics.py` prints the tables of docs/correctness.md.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

from cutedsl_nvfp4 import ops, reference
from cutedsl_nvfp4.activation_scale import ActivationScales
from cutedsl_nvfp4.family import Layout
from cutedsl_nvfp4.format import global_scale_from_amax
from cutedsl_nvfp4.prepare import PreparedExperts, PreparedLinear, prepare_experts, prepare_linear
from cutedsl_nvfp4.settings import ActivationScale
from recipe import export, rounding, texts
from recipe.model import CONFIG, tokenizer
from tests.support.paths import ROOT

KINDS = {
    "q_a": r"attn\.wq_a$",
    "q_b": r"attn\.wq_b$",
    "kv": r"attn\.wkv$",
    "o_a": r"attn\.wo_a$",
    "o_b": r"attn\.wo_b$",
    "compressor": r"attn\.compressor\.",
    "indexer": r"attn\.indexer\.",
    "shared experts": r"shared_experts\.w[123]$",
}
EXPERT_KINDS = ("routed w13", "routed w2", "shared layer", "routed layer")
LIMIT = CONFIG["swiglu_limit"]
W13_INPUT, W2_INPUT = "w13 input", "w2 input"
TOKENS = 512  # of the warm-up, and measured
CALIBRATION_TOKENS = 2048


@dataclass(frozen=True)
class Fit:
    """How close W4A4 comes to float32: cosine of the two results, and the ratio of their lengths."""

    cosine: float
    length: float

    @classmethod
    def of(cls, got: torch.Tensor, exact: torch.Tensor) -> "Fit":
        got, exact = got.double().flatten(), exact.double().flatten()
        return cls(float(got @ exact / (got.norm() * exact.norm())), float(got.norm() / exact.norm()))


Measured = Iterator[tuple[str, str, Fit]]  # kind, layer, fit


# --- activations ---


@dataclass
class Activations:
    """Inputs of every quantized layer on some texts, bf16, by native layer name."""

    linear: dict[str, torch.Tensor]  # [M, groups * K]
    routed: dict[
        str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    ]  # x [M, H], topk weights and ids [M, T]


@cache
def demo() -> tuple[dict[str, torch.Tensor], torch.nn.Module]:
    """(checkpoint tensors, transformers' model of them in float32)."""
    tensors = export.load_checkpoint(ROOT / "demo")
    return tensors, export.model_of(tensors)


@contextmanager
def _watching_routing(model, seen: dict[str, list]):
    """Inside, `seen["layers.N.ffn.experts"]` collects (x, topk weights, topk ids) of routed experts."""
    handles = []
    for index, layer in enumerate(model.model.layers):

        def hook(_, args, name=f"layers.{index}.ffn.experts"):
            x, ids, weights = args
            seen[name].append((x.flatten(0, -2).bfloat16(), weights.float(), ids))

        handles.append(layer.mlp.experts.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def captured(*token_ids: list[int]) -> Activations:
    """What the demo's layers read on these texts."""
    _, model = demo()
    linear, routed = defaultdict(list), defaultdict(list)

    def keep(name: str, x: torch.Tensor) -> torch.Tensor:
        if ".mlp.experts." not in name:
            width = x.shape[-2] * x.shape[-1] if name.endswith("o_a_proj") else x.shape[-1]
            linear[export.native_linear_names(name)[0]].append(x.reshape(-1, width).bfloat16())
        return x

    with rounding.on_activations(model, keep), _watching_routing(model, routed):
        for ids in token_ids:
            model(torch.tensor([ids]), use_cache=False)
    return Activations(
        {name: torch.cat(parts) for name, parts in linear.items()},
        {name: tuple(map(torch.cat, zip(*parts))) for name, parts in routed.items()},
    )


@cache
def demo_activations() -> tuple[Activations, Activations]:
    """(on the shipped warm-up text, on texts to measure with)."""
    from cutedsl_nvfp4.vllm.warmup import MAX_TOKENS, TEXT

    coder = tokenizer()
    # the tales are in the calibration of the checkpoint's input_scale; these letters and the prose are not
    measured = [document.prompt + document.continuation for document in texts.tales()]
    measured += [texts.letter(key, seed, 500).prompt for seed, key in enumerate(texts.ISLANDS)]
    measured.append((ROOT / "LICENSE").read_text()[2000:3000])
    return captured(coder.encode(TEXT).ids[:MAX_TOKENS]), captured(*(coder.encode(t).ids for t in measured))


def student_t(generator: torch.Generator, tokens: int, width: int) -> torch.Tensor:
    """Independent values of Student's t with 3 degrees of freedom: rare values far out, anywhere."""
    normal = torch.randn(tokens, width, generator=generator)
    chi2 = torch.randn(3, tokens, width, generator=generator).square().sum(0)
    return normal / (chi2 / 3).sqrt()


def outlier_channels(generator: torch.Generator, tokens: int, width: int) -> torch.Tensor:
    """Gaussian, with the same 2 in 64 channels 30 times as large in every token."""
    x = torch.randn(tokens, width, generator=generator)
    x[:, 5::32] *= 30
    return x


def outlier_tokens(generator: torch.Generator, tokens: int, width: int) -> torch.Tensor:
    """Gaussian, with token lengths spread log-normally: 1 in 20 is over 27 times the median, 1 in 20 under 1/27."""
    x = torch.randn(tokens, width, generator=generator)
    return x * torch.exp(2 * torch.randn(tokens, 1, generator=generator))


SYNTHETIC = {
    "Student t": student_t,
    "outlier channels": outlier_channels,
    "outlier tokens": outlier_tokens,
}


def norm_before(name: str) -> str | None:
    """Name of the RMSNorm whose output layer `name` reads, or None: outputs of attention, o_a and SwiGLU."""
    layer = ".".join(name.split(".")[:2])
    if name.endswith("wq_b"):
        return f"{layer}.attn.q_norm"
    if re.search(r"attn\.(wq_a|wkv|compressor|indexer)", name):
        return f"{layer}.attn_norm"
    return f"{layer}.ffn_norm" if re.search(r"ffn\.(experts|shared_experts\.w[13])$", name) else None


def synthetic_activations(draw: Callable[..., torch.Tensor], seed: int, tokens: int) -> Activations:
    """Inputs of the demo's layers drawn by `draw`, through the RMSNorm where there is one; random routing."""
    like, _ = demo_activations()
    tensors, _ = demo()
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, torch.Tensor] = {}

    def input_of(name: str, width: int) -> torch.Tensor:
        norm = norm_before(name)
        source = norm or name
        if source not in drawn:
            x = draw(generator, tokens, width)
            if norm is not None:
                rms = (x.square().mean(-1, keepdim=True) + CONFIG["rms_norm_eps"]).sqrt()
                x = x / rms * tensors[f"{norm}.weight"].float()
            drawn[source] = x.bfloat16()
        return drawn[source]

    linear = {name: input_of(name, x.shape[1]) for name, x in like.linear.items()}
    routed = {}
    for name, (x, weights, _) in like.routed.items():
        scores = torch.rand(tokens, CONFIG["n_routed_experts"], generator=generator)
        chosen, ids = scores.topk(weights.shape[1], dim=-1)
        routed[name] = (input_of(name, x.shape[1]), chosen / chosen.sum(-1, keepdim=True), ids)
    return Activations(linear, routed)


# --- operands ---


@cache
def linear_operands(name: str) -> PreparedLinear:
    tensors, _ = demo()
    codes, block_scales, global_scale = (
        tensors[f"{name}.{leaf}"] for leaf in ("weight", "weight_scale", "weight_scale_2")
    )
    return prepare_linear(codes, block_scales, global_scale, [codes.shape[0]], layout=Layout.PLAIN, name=name)


def _stacked(name: str, matrices: tuple[str, ...], leaf: str) -> torch.Tensor:
    """Tensors of every expert of layer `name`, [E, len(matrices), ...]."""
    tensors, _ = demo()
    return torch.stack(
        [
            torch.stack([tensors[f"{name}.{expert}.{matrix}.{leaf}"] for matrix in matrices])
            for expert in range(CONFIG["n_routed_experts"])
        ]
    )


@cache
def expert_operands(name: str) -> PreparedExperts:
    w13, w2 = ("w1", "w3"), ("w2",)
    return prepare_experts(
        _stacked(name, w13, "weight").flatten(1, 2), _stacked(name, w13, "weight_scale").flatten(1, 2),
        _stacked(name, w13, "weight_scale_2"),
        _stacked(name, w2, "weight")[:, 0], _stacked(name, w2, "weight_scale")[:, 0],
        _stacked(name, w2, "weight_scale_2")[:, 0],
        layout=Layout.PLAIN, name=name,
    )  # fmt: skip


def _operands(prepared: PreparedExperts) -> tuple[torch.Tensor, ...]:
    return (
        prepared.w13_codes, prepared.w13_block_scales, prepared.w13_row_scale,
        prepared.w2_codes, prepared.w2_block_scales, prepared.w2_row_scale,
    )  # fmt: skip


# --- scales: exported ones, and what the policies make of them ---


def _show_experts(name: str, routed: tuple[torch.Tensor, ...], scales: ActivationScales) -> None:
    """Let `scales` observe the routed experts `name` on `routed`, as the warm-up does."""
    x, weights, ids = routed
    reference.experts(
        x, *_operands(expert_operands(name)), weights, ids, swiglu_limit=LIMIT, observe=scales.observe
    )


def exported_by_the_demo(name: str) -> dict[str, torch.Tensor]:
    """The checkpoint's input_scale of layer `name`, as vllm/linear.py and vllm/experts.py read it."""
    tensors, _ = demo()
    if not name.endswith("ffn.experts"):
        return {"x": tensors[f"{name}.input_scale"].reshape(1)}
    return {
        W13_INPUT: _stacked(name, ("w1", "w3"), "input_scale").amax().reshape(1),
        W2_INPUT: _stacked(name, ("w2",), "input_scale")[:, 0],
    }


def calibrated_on(activations: Activations) -> Callable[[str], dict[str, torch.Tensor]]:
    """name -> what an exporter that saw `activations` would write: amax / (6 * 448), without headroom."""

    def exported(name: str) -> dict[str, torch.Tensor]:
        if name in activations.linear:
            return {"x": global_scale_from_amax(activations.linear[name].abs().amax()).reshape(1)}
        experts = (1, CONFIG["n_routed_experts"])
        scales = ActivationScales(ActivationScale.CHECKPOINT, (W13_INPUT, W2_INPUT), name, experts)
        scales.start_observing(torch.device("cpu"))
        _show_experts(name, activations.routed[name], scales)
        return dict(zip(scales.inputs, map(global_scale_from_amax, scales.observed)))

    return exported


def settled(
    policy: ActivationScale,
    exported: dict[str, torch.Tensor],
    show: Callable[[ActivationScales], None],
    name: str,
) -> dict[str, torch.Tensor | None]:
    """The scales that `policy` serves with, from the exported ones and the warm-up; None: per token."""
    scales = ActivationScales.from_checkpoint(policy, exported, name)
    if scales.policy is ActivationScale.DYNAMIC:
        return dict.fromkeys(exported)
    scales.start_observing(torch.device("cpu"))
    show(scales)
    return scales.stop_observing(exported)


# --- measuring ---


def _linear(x: torch.Tensor, operands: PreparedLinear, act_scale: torch.Tensor | None) -> torch.Tensor:
    """W4A4 through the op, as a layer calls it -> [M, N] in bf16."""
    groups = x.shape[1] // operands.k
    return torch.ops.cutedsl.nvfp4_linear(
        x, operands.codes, operands.block_scales, operands.row_scale, act_scale, None,
        operands.n, operands.k, groups, True, torch.bfloat16, str(operands.layout),
    )  # fmt: skip


def _modules() -> dict[str, torch.nn.Module]:
    """transformers' module by native layer name."""
    _, model = demo()
    return {
        export.native_linear_names(name)[0]: model.get_submodule(name)
        for name in rounding.input_names(model)
        if ".mlp.experts." not in name
    }


def exact_linear(name: str, x: torch.Tensor) -> torch.Tensor:
    """transformers' float32 result of linear `name` -> [M, N]."""
    module = _modules()[name]
    groups = getattr(module, "n_groups", 1)
    return module(x.float().unflatten(1, (groups, -1)) if groups > 1 else x.float()).flatten(1)


def _settled_linear(policy, warm: Activations, exported, name: str) -> torch.Tensor | None:
    return settled(policy, exported(name), lambda scales: scales.observe(0, warm.linear[name]), name)["x"]


@torch.no_grad()
def linears(
    policy: ActivationScale, warm: Activations, measured: Activations, exported: Callable[[str], dict]
) -> Measured:
    """Every quantized linear of the demo."""
    for kind, pattern in KINDS.items():
        for name, x in measured.linear.items():
            if re.search(pattern, name):
                got = _linear(x, linear_operands(name), _settled_linear(policy, warm, exported, name))
                yield kind, name, Fit.of(got, exact_linear(name, x))


@torch.no_grad()
def shared_experts(
    policy: ActivationScale, warm: Activations, measured: Activations, exported: Callable[[str], dict]
) -> Measured:
    """The shared experts as whole layers."""
    _, model = demo()
    for index, layer in enumerate(model.model.layers):
        name = f"layers.{index}.ffn.shared_experts"

        def multiply(x: torch.Tensor, linear: str) -> torch.Tensor:
            return _linear(x, linear_operands(linear), _settled_linear(policy, warm, exported, linear))

        x = measured.linear[f"{name}.w1"]
        middle = reference.swiglu(multiply(x, f"{name}.w1"), multiply(x, f"{name}.w3"), LIMIT)
        got = multiply(middle, f"{name}.w2")
        yield "shared layer", name, Fit.of(got, layer.mlp.shared_experts(x.float()))


@torch.no_grad()
def routed_experts(
    policy: ActivationScale, warm: Activations, measured: Activations, exported: Callable[[str], dict]
) -> Measured:
    """Both grouped GEMMs of the routed experts, over all (token, expert) pairs, and the whole layer."""
    _, model = demo()
    for name, (x, weights, ids) in measured.routed.items():
        scales = settled(
            policy,
            exported(name),
            lambda scales, name=name: _show_experts(name, warm.routed[name], scales),
            name,
        )
        prepared = expert_operands(name)
        module = model.model.layers[int(name.split(".")[1])].mlp.experts
        pairs = {"routed w13": ([], []), "routed w2": ([], [])}
        for expert in range(CONFIG["n_routed_experts"]):
            rows = x[(ids == expert).any(-1)]
            gate_up = rows.float() @ module.gate_up_proj[expert].T
            middle = reference.swiglu(*gate_up.chunk(2, -1), LIMIT).bfloat16()
            exact = {"routed w13": gate_up, "routed w2": middle.float() @ module.down_proj[expert].T}
            for kind, operand, inputs, key in (
                ("routed w13", "w13", rows, W13_INPUT), ("routed w2", "w2", middle, W2_INPUT)
            ):  # fmt: skip
                codes, block_scales, row_scale = (
                    getattr(prepared, f"{operand}_{part}")[expert]
                    for part in ("codes", "block_scales", "row_scale")
                )
                one = PreparedLinear(
                    codes, block_scales, row_scale, codes.shape[0], 2 * codes.shape[1], Layout.PLAIN
                )
                scale = scales[key]
                of_expert = (
                    None if scale is None else scale if scale.numel() == 1 else scale[expert : expert + 1]
                )
                pairs[kind][0].append(_linear(inputs, one, of_expert).flatten())
                pairs[kind][1].append(exact[kind].flatten())
        for kind, (got, exact) in pairs.items():
            yield kind, name, Fit.of(torch.cat(got), torch.cat(exact))
        layer = torch.ops.cutedsl.nvfp4_experts(
            x, *_operands(prepared), weights, ids, scales[W13_INPUT], scales[W2_INPUT], None, True, LIMIT,
            torch.bfloat16, str(prepared.layout),
        )  # fmt: skip
        yield "routed layer", name, Fit.of(layer, module(x.float(), ids, weights))


def everything(*arguments) -> Measured:
    yield from linears(*arguments)
    yield from shared_experts(*arguments)
    yield from routed_experts(*arguments)


def sources() -> dict[str, Callable[[], tuple[Activations, Activations, Callable]]]:
    """Kind of activations -> (warm-up, measured, exported scales)."""

    def synthetic(draw):
        calibration = synthetic_activations(draw, 1, CALIBRATION_TOKENS)
        warm, measured = (synthetic_activations(draw, seed, TOKENS) for seed in (2, 3))
        return warm, measured, calibrated_on(calibration)

    drawn = {name: lambda draw=draw: synthetic(draw) for name, draw in SYNTHETIC.items()}
    return {"demo": lambda: (*demo_activations(), exported_by_the_demo), **drawn}


def worst(measured: Measured) -> dict[str, Fit]:
    """The worst fit of each kind."""
    found: dict[str, Fit] = {}
    for kind, _, fit in measured:
        if kind not in found or fit.cosine < found[kind].cosine:
            found[kind] = fit
    return found


assert ops  # registers torch.ops.cutedsl


# --- the tables of docs/correctness.md ---

FACTORS = tuple(2.0**exponent for exponent in (-8, -4, -2, -1, 0, 1, 4, 8, 10, 12, 14, 17))


def layers_table() -> dict[str, dict[str, Fit]]:
    """{"demo, checkpoint": {kind: worst fit}, …} for every source of activations and every policy."""
    return {
        f"{source}, {policy}": worst(everything(policy, *make()))
        for source, make in sources().items()
        for policy in ActivationScale
    }


def wrong_scale_table() -> dict[str, dict[str, Fit]]:
    """{factor on every exported input_scale: {"as exported" or "guarded": worst fit of any linear}}."""
    warm, measured = demo_activations()
    blind = Activations({name: x[:0] for name, x in warm.linear.items()}, warm.routed)
    table = {}
    for factor in FACTORS:

        def exported(name: str, factor: float = factor) -> dict[str, torch.Tensor]:
            return {key: scale * factor for key, scale in exported_by_the_demo(name).items()}

        table[f"{factor:g}"] = {
            label: min(
                (fit for _, _, fit in linears(ActivationScale.CHECKPOINT, seen, measured, exported)),
                key=lambda fit: fit.cosine,
            )
            for label, seen in (("as exported", blind), ("guarded", warm))
        }
    return table


def unquantized_table() -> dict[str, dict[str, Fit]]:
    """{"weights x activations": {precision: fit}} against the product with the weights before quantization.

    Synthetic on both sides, with Flash's hidden size as K: the demo exists in NVFP4 only.
    """
    m, n, k = TOKENS, TOKENS, 4096

    def gaussian(generator: torch.Generator, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    table: dict[str, dict[str, Fit]] = {}
    for weights, draw_weights in (("Gaussian", gaussian), ("Student t", student_t)):
        generator = torch.Generator().manual_seed(4)
        weight = draw_weights(generator, n, k)
        global_scale = global_scale_from_amax(weight.abs().amax())
        codes, block_scales = reference.quantize(weight, global_scale)
        for activations, draw in {"Gaussian": gaussian, **SYNTHETIC}.items():
            x = draw(generator, m, k).bfloat16()
            exact = x.float() @ weight.T
            static = global_scale_from_amax(x.abs().amax()).reshape(1)
            table[f"{weights} weights, {activations}"] = {
                label: Fit.of(
                    reference.linear(
                        x, codes, block_scales, global_scale.expand(n), act_scale, quantize_activations=quantized
                    ),
                    exact,
                )
                for label, act_scale, quantized in (
                    ("W4A16", None, False), ("W4A4, one scale", static, True), ("W4A4, per token", None, True)
                )
            }  # fmt: skip
    return table


def _print(table: dict[str, dict[str, Fit]], rows: tuple[str, ...], corner: str) -> None:
    """Markdown: `rows` down, the table's keys across, cosines inside."""
    print(f"| {corner} | " + " | ".join(table) + " |")
    print("|---" * (len(table) + 1) + "|")
    for row in rows:
        print(f"| {row} | " + " | ".join(f"{column[row].cosine:.4f}" for column in table.values()) + " |")
    print()


def main() -> None:
    logging.disable(logging.WARNING)
    _print(layers_table(), (*KINDS, *EXPERT_KINDS), "layer")
    _print(wrong_scale_table(), ("as exported", "guarded"), "input_scale times")
    _print(unquantized_table(), ("W4A16", "W4A4, one scale", "W4A4, per token"), "precision")


if __name__ == "__main__":
    main()
