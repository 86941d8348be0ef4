"""checkpoint/names.py: its one table against transformers' model and the demo's file; its readers agree."""

import pytest
import torch
from safetensors import safe_open

from cutedsl_nvfp4.checkpoint import layers, names
from cutedsl_nvfp4.checkpoint.headers import CheckpointError
from recipe.model import CONFIG, empty_model
from tests.support.paths import DEMO

SCALES = ("weight_scale", "weight_scale_2", "input_scale")


@pytest.fixture(scope="module")
def native() -> set[str]:
    """The demo's tensors without its scales: layers 0, 4 and 128, with and without hashed routing."""
    with safe_open(DEMO / "model.safetensors", "pt") as file:
        return {name for name in file.keys() if not name.endswith(SCALES)}  # not a dict  # noqa: SIM118


@pytest.fixture(scope="module")
def theirs() -> set[str]:
    """What transformers itself calls them, with the stacked experts taken apart."""
    with torch.device("meta"):
        found = set(empty_model(CONFIG).state_dict())
    for stacked in [name for name in found if ".mlp.experts." in name]:
        found.remove(stacked)
        for matrix in ("gate", "up") if "gate_up" in stacked else ("down",):
            prefix = stacked.rpartition(".")[0]
            found |= {f"{prefix}.{expert}.{matrix}_proj.weight" for expert in range(64)}
    return found


def test_transformers_names_are_the_demos(native, theirs):
    assert len(theirs) == len(native)
    assert {names.native_name(name) for name in theirs} == native


def test_server_and_converter_read_every_name_alike(native, theirs):
    for name in native | theirs:
        module, leaf = names.identify(name)
        assert names.native_name(name) == (f"{module}.{leaf}" if leaf else module)
        if leaf:
            for scale in SCALES:
                other = name.removesuffix(leaf) + scale
                assert names.native_name(other) == f"{module}.{scale}" and names.identify(other) == (
                    module,
                    scale,
                )


def test_every_linear_has_its_kind_and_its_paths(native):
    linears = {module for module, leaf in map(names.identify, native) if leaf}
    assert {names.kind_of(linear) for linear in linears} == set(names.KINDS)
    for linear in linears:
        layer, path = names.split_layer(linear)
        kind = names.kind_of(linear)
        assert kind == "experts" or path in names.linears_of(kind)
        assert names.transformers_paths(path)
        for foreign in names.transformers_paths(path):
            assert names.identify(f"model.layers.{layer}.{foreign}.weight") == (linear, "weight")


def test_partners_are_the_segments_that_vllm_fuses(native):
    """Spelled out here, not read from the table."""
    pairs = [
        ("attn.wq_a", "attn.wkv"),
        ("attn.compressor.wkv", "attn.compressor.wgate"),
        ("attn.indexer.compressor.wkv", "attn.indexer.compressor.wgate"),
        ("ffn.shared_experts.w1", "ffn.shared_experts.w3"),
        *((f"ffn.experts.{expert}.w1", f"ffn.experts.{expert}.w3") for expert in range(64)),
    ]
    partners = dict(pairs) | {second: first for first, second in pairs}
    for linear in {module for module, leaf in map(names.identify, native) if leaf}:
        layer, path = names.split_layer(linear)
        assert layers.partner_of(linear) == (f"layers.{layer}.{partners[path]}" if path in partners else None)


@pytest.mark.parametrize(
    "name", ["layers.0.self_attn.k_proj.weight", "layers.0.attn.wq_a", "model.head", "x" * 500]
)
def test_names_of_other_models_are_refused(name):
    with pytest.raises(CheckpointError, match="is not one of DeepSeek-V4's") as error:
        names.identify(name)
    assert len(str(error.value)) < 400
