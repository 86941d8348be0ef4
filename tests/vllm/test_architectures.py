"""Every architecture of the DeepSeek-V4 family in the installed vLLM: checked like the first, or refused by name."""

from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
from vllm.config.multimodal import MultiModalConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import ModelRegistry
from vllm.models.deepseek_v4.common.vl_model import DeepseekV4ForConditionalGeneration

from cutedsl_nvfp4.checkpoint.config import ARCHITECTURES, native_config
from cutedsl_nvfp4.vllm import architectures
from cutedsl_nvfp4.vllm.coverage import check_weight_coverage, native_weights
from cutedsl_nvfp4.vllm.refusals import refuse_unchecked
from tests.support.checkpoints import dialects, headers
from tests.support.one_rank import one_rank
from tests.support.paths import DEMO

REGISTERED = {
    name: model for name, model in ModelRegistry.models.items() if "deepseek_v4" in model.module_name
}


def test_every_architecture_of_the_family_has_its_line():
    assert sorted(REGISTERED) == sorted({*ARCHITECTURES, *architectures.REFUSED})
    for name in ARCHITECTURES:  # the hooks look at the classes
        assert REGISTERED[name].class_name == name


def configured(
    architecture: str, model_type: str = "deepseek_v4", draft: str | None = None
) -> SimpleNamespace:
    quantization = {"quant_method": "fp8", "moe_quant_algo": "NVFP4"}
    hf_config = SimpleNamespace(model_type=model_type, quantization_config=quantization, n_routed_experts=256)
    model = SimpleNamespace(hf_config=hf_config, architecture=architecture, convert_type="none")
    drafted = SimpleNamespace(architecture=draft or architecture)
    return SimpleNamespace(
        model_config=model, load_config=LoadConfig(),
        speculative_config=SimpleNamespace(method="mtp", draft_model_config=drafted) if draft else None,
    )  # fmt: skip


@pytest.mark.parametrize("architecture", [*REGISTERED, "TransformersMoEForCausalLM"])
def test_nvfp4_layers_are_served_by_checked_classes_alone(architecture):
    model_type = "deepseek_v41" if "V41" in architecture else "deepseek_v4"
    config = configured(architecture, model_type)
    if architecture in ARCHITECTURES:
        refuse_unchecked(config)
        return
    with pytest.raises(ValueError, match=f"not served with architecture {architecture}: "):
        refuse_unchecked(config)
    config.model_config.hf_config.quantization_config = {"quant_method": "fp8"}
    refuse_unchecked(config)


@pytest.mark.parametrize("draft", [name for name in REGISTERED if name not in ARCHITECTURES])
def test_draft_classes_are_refused_beside_nvfp4_layers(draft):
    with pytest.raises(ValueError, match=rf"--speculative-config \(method 'mtp', architecture {draft}\): "):
        refuse_unchecked(configured("DeepseekV4ForCausalLM", draft=draft))
    # ngram has the served model's configuration for its own
    refuse_unchecked(configured("DeepseekV4ForCausalLM", draft="DeepseekV4ForCausalLM"))


def test_a_model_made_into_another_is_refused():
    config = configured("DeepseekV4ForCausalLM")
    config.model_config.convert_type = "embed"
    with pytest.raises(ValueError, match=r"--convert embed: .*serve --runner generate"):
        refuse_unchecked(config)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_config_is_repaired_for_every_checked_architecture(architecture):
    contents = dialects.transformers_names(*dialects.demo())[1] | {"architectures": [architecture]}
    assert native_config(contents)["compress_ratios"] == [0, 4, 128]
    others = contents | {"architectures": ["DSparkDraftModel"]}
    assert native_config(others) is others


# --- the vision class, built on the CPU: vLLM itself serves it on GPUs alone ---

VISION = {"vision_n_layers": 2, "vision_dim": 64, "vision_n_heads": 4, "vision_inter_dim": 128}


@pytest.fixture(scope="module", autouse=True)
def _single_rank(tmp_path_factory) -> Iterator[None]:
    with one_rank(tmp_path_factory.mktemp("dist")):
        yield


def vision_model(images: int):
    """vLLM's vision class around the demo, without memory; 0 `images` leave the tower out."""
    config: VllmConfig = EngineArgs(
        model=str(DEMO), max_model_len=4096, max_num_batched_tokens=4096
    ).create_engine_config()
    vars(config.model_config.hf_config).update(VISION)
    config.model_config.multimodal_config = MultiModalConfig(limit_per_prompt={"image": images})
    with set_current_vllm_config(config), mock.patch("torch.cuda.Event"), torch.device("meta"):
        return DeepseekV4ForConditionalGeneration(vllm_config=config)


def tower() -> headers.Headers:
    """The tensors of VISION's tower and aligner, and the learned delimiters, by the checkpoint's names."""
    found: headers.Headers = {
        "vision.patch_embed.proj.weight": ("BF16", (64, 588)), "vision.patch_embed.proj.bias": ("BF16", (64,)),
        "vision.norm.weight": ("BF16", (64,)), "aligner.w1.weight": ("BF16", (256, 576)),
        "aligner.w1.bias": ("BF16", (256,)), "aligner.w2.weight": ("BF16", (256, 256)),
        "aligner.w2.bias": ("BF16", (256,)),
    }  # fmt: skip
    for block in (f"vision.blocks.{number}" for number in range(2)):
        found |= {
            f"{block}.norm1.weight": ("BF16", (64,)), f"{block}.norm2.weight": ("BF16", (64,)),
            f"{block}.attn.wqkv.weight": ("BF16", (192, 64)), f"{block}.attn.wqkv.bias": ("BF16", (192,)),
            f"{block}.attn.wo.weight": ("BF16", (64, 64)), f"{block}.attn.wo.bias": ("BF16", (64,)),
            f"{block}.mlp.w1.weight": ("BF16", (256, 64)), f"{block}.mlp.w2.weight": ("BF16", (64, 128)),
        }  # fmt: skip
    return found | {f"image_{part}": ("F32", (256,)) for part in ("start", "end", "newline", "pad")}


@pytest.mark.parametrize("images", [1, 0])
def test_coverage_holds_for_the_vision_class(images, tmp_path):
    model = vision_model(images)
    stored = headers.demo() | tower()
    folder = headers.write(tmp_path / "whole", stored, {})
    check_weight_coverage(model, [folder / "model.safetensors"])

    del stored["layers.1.ffn.experts.63.w3.weight_scale_2"]
    stored["vision.blocks.0.attn.q_norm.weight"] = ("BF16", (64,))
    folder = headers.write(tmp_path / "damaged", stored, {})
    with pytest.raises(
        ValueError, match=r"1 parameters would stay unwritten.*w13_weight_scale_2 \[63\.w3\]"
    ) as error:
        check_weight_coverage(model, [folder / "model.safetensors"])
    no_place = "1 tensors of the checkpoint have no place in the model: vision.blocks.0.attn.q_norm.weight"
    assert (no_place in str(error.value)) is bool(images)


def test_divisors_are_inverted_and_names_translated_for_the_vision_class():
    model = vision_model(images=1)
    theirs = "model.layers.0.self_attn.q_a_proj.weight_global_scale"
    weights = dict(model.hf_to_vllm_mapper.apply(native_weights(model, [(theirs, torch.tensor([4.0]))])))
    assert {name: value.item() for name, value in weights.items()} == {
        "language_model.model.layers.0.attn.wq_a.weight_scale_2": 0.25
    }
