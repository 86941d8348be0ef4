"""Weight coverage: what a checkpoint lacks, and what it has too much of, is listed by name."""

import re

import pytest
import torch
from safetensors.torch import save_file

from cutedsl_nvfp4.checkpoint.files import read_checkpoint
from cutedsl_nvfp4.vllm.coverage import check_coverage

EXPERTS = 3


class NativeMapper:
    """The renames of vLLM's DeepSeek-V4 mapper that matter here."""

    def apply_list(self, names: list[str]) -> list[str]:
        renamed = []
        for name in names:
            if "mtp." in name:
                continue
            name = re.sub(r"^(layers|norm)\.", r"model.\1.", name)
            name = name.replace(".shared_experts.w2", ".shared_experts.down_proj")
            renamed.append(re.sub(r"\.scale$", ".weight_scale_inv", name))
        return renamed


LINEAR = ("weight", "weight_scale", "weight_scale_2", "input_scale")


def parameters() -> set[str]:
    layer = "model.layers.0"
    linears = ["attn.fused_wqa_wkv", "attn.compressor.fused_wkv_wgate", "attn.wq_b", "ffn.shared_experts.gate_up_proj",
               "ffn.shared_experts.down_proj"]  # fmt: skip
    names = {f"{layer}.{linear}.{leaf}" for linear in linears for leaf in LINEAR}
    names |= {
        f"{layer}.ffn.experts.routed_experts.{merged}_{leaf}" for merged in ("w13", "w2") for leaf in LINEAR
    }
    return names | {"model.norm.weight", f"{layer}.attn.fp8.weight_scale_inv"}


def tensors() -> set[str]:
    layer = "layers.0"
    linears = ["attn.wq_a", "attn.wkv", "attn.compressor.wkv", "attn.compressor.wgate", "attn.wq_b"]
    linears += [f"ffn.shared_experts.w{i}" for i in (1, 2, 3)]
    linears += [f"ffn.experts.{expert}.w{i}" for expert in range(EXPERTS) for i in (1, 2, 3)]
    names = {f"{layer}.{linear}.{leaf}" for linear in linears for leaf in LINEAR}
    return names | {"norm.weight", f"{layer}.attn.fp8.scale"}


def check(names: set[str], elsewhere=lambda name: False) -> None:
    check_coverage(names, parameters(), NativeMapper(), EXPERTS, elsewhere)


def test_a_complete_checkpoint_passes():
    check(tensors())


@pytest.mark.parametrize("gone", sorted(name for name in tensors() if not name.endswith("input_scale")))
def test_every_missing_tensor_is_named(gone):
    with pytest.raises(ValueError, match="1 parameters would stay unwritten") as error:
        check(tensors() - {gone})
    leaf = (
        gone.rsplit(".", 1)[-1].replace("scale", "weight_scale_inv")
        if gone.endswith(".scale")
        else gone.rsplit(".", 1)[-1]
    )
    assert leaf in str(error.value)
    if ".experts." in gone:
        assert gone.split(".experts.")[1].rsplit(".", 1)[0] in str(error.value)
    elif "wkv" in gone or "wgate" in gone or "wq_a" in gone or "w1" in gone or "w3" in gone:
        assert gone.split("layers.0.")[1].split(".", 1)[1].rsplit(".", 1)[0] in str(error.value)


def test_input_scales_and_draft_layers_are_not_needed():
    check({name for name in tensors() if not name.endswith("input_scale")} | {"mtp.0.attn.wq_a.weight"})


@pytest.mark.parametrize(
    "extra",
    [
        "layers.0.attn.wq_c.weight",
        "layers.0.ffn.experts.3.w1.weight",
        "layers.0.ffn.experts.0.w1.bias",
        "layers.7.norm.weight",
    ],
)
def test_tensors_without_a_place_are_named(extra):
    with pytest.raises(ValueError, match="1 tensors of the checkpoint have no place") as error:
        check(tensors() | {extra})
    assert extra in str(error.value)


def test_long_lists_are_cut():
    with pytest.raises(ValueError, match=r"and \d+ more"):
        check({"norm.weight"})


def test_layers_of_other_pipeline_ranks_are_left_alone():
    check(tensors() | {"layers.7.attn.wq_b.weight"}, lambda name: name.startswith("model.layers.7."))


def test_names_come_from_headers(tmp_path):
    save_file(
        {"a": torch.zeros(2), "b.c": torch.zeros(3)}, tmp_path / "1.safetensors", metadata={"format": "pt"}
    )
    save_file({"d": torch.zeros(1)}, tmp_path / "2.safetensors")
    assert set(read_checkpoint(tmp_path.glob("*.safetensors"))) == {"a", "b.c", "d"}
