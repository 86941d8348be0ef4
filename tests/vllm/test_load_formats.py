"""Every --load-format of the installed vLLM: through names, divisors, coverage and preparation, or refused by name."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, get_args

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor import model_loader
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader import base_loader, default_loader, runai_streamer_loader, weight_utils
from vllm.model_executor.models.utils import WeightsMapper
from vllm.transformers_utils import runai_utils

from cutedsl_nvfp4.checkpoint.names import accept_foreign_names
from cutedsl_nvfp4.family import Layout
from cutedsl_nvfp4.vllm import load_formats
from cutedsl_nvfp4.vllm.refusals import refuse_unchecked, refuse_unsupported

LAYER = "model.layers.0.attn.wq_b"
# compressed-tensors' leaves under transformers' names; 4 is a divisor
STORED = {
    "model.layers.0.self_attn.q_b_proj.weight_packed": torch.zeros(16, 8, dtype=torch.uint8),
    "model.layers.0.self_attn.q_b_proj.weight_scale": torch.ones(16, 1).to(torch.float8_e4m3fn),
    "model.layers.0.self_attn.q_b_proj.weight_global_scale": torch.tensor([4.0]),
}
OBJECTS = "s3://bucket/model"


class Prepares(QuantizeMethodBase):
    """Notes the global scale that the layer has when it is prepared."""

    def __init__(self):
        self.seen: list[float] = []

    def create_weights(self, *args, **kwargs):
        raise NotImplementedError

    def apply(self, *args, **kwargs):
        raise NotImplementedError

    def process_weights_after_loading(self, layer):
        self.seen.append(layer.weight_scale_2.item())


class DeepseekV4ForCausalLM(torch.nn.Module):
    """One NVFP4 linear where vLLM's class has it, with vLLM's mapper as far as it matters here."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.hf_to_vllm_mapper = accept_foreign_names(
            WeightsMapper(orig_to_new_prefix={"layers.": "model.layers."})
        )
        module = self
        for part in LAYER.split("."):
            module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        for leaf, tensor in (
            ("weight", torch.empty(16, 8, dtype=torch.uint8)),
            ("weight_scale", torch.empty(16, 1, dtype=torch.float8_e4m3fn)),
            ("weight_scale_2", torch.full((1,), torch.nan)),
            ("input_scale", torch.full((1,), torch.nan)),
        ):
            module.register_parameter(leaf, torch.nn.Parameter(tensor, requires_grad=False))
        self.linear, module.quant_method = module, Prepares()
        self.loaded: list[str] = []

    def load_weights(self, weights):
        parameters = dict(self.named_parameters())
        for name, tensor in self.hf_to_vllm_mapper.apply(weights):
            parameters[name].data.copy_(tensor)
            self.loaded.append(name)


@pytest.fixture
def model() -> DeepseekV4ForCausalLM:
    config = SimpleNamespace(
        n_routed_experts=1, num_hidden_layers=1, num_attention_heads=1, vocab_size=1, hidden_size=1,
        quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4"},
    )  # fmt: skip
    return DeepseekV4ForCausalLM(config)


def plain_reader(files: list[str], *args, **kwargs):
    """Stands for a package that reads safetensors by its own means."""
    for file in files:
        yield from load_file(file).items()


class Streamer:
    """Run:ai's SafetensorsStreamer 0.17.1, as far as vLLM and we use it; objects are files in `store`."""

    store = Path()
    handed_out: ClassVar[list[str]] = []

    def __enter__(self):
        return self

    def __exit__(self, *args):
        return False

    def stream_files(self, paths, device, is_distributed):
        self.files = [self.store / Path(path).name for path in paths]
        self.files_to_tensors_metadata = {}
        for position, file in enumerate(self.files):
            with safe_open(file, "pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                self.files_to_tensors_metadata[position] = [
                    SimpleNamespace(name=name, dtype=found.get_dtype(), shape=found.get_shape())
                    for name, found in slices.items()
                ]

    def get_tensors(self):
        for file in self.files:
            for name, tensor in load_file(file).items():
                self.handed_out.append(name)
                yield name, tensor


@pytest.fixture
def load(tmp_path, monkeypatch, model) -> Callable[[str, dict], None]:
    """(format, tensors, object storage?) -> `model` loaded and prepared, as a worker does it."""
    monkeypatch.setattr("vllm.distributed.get_tensor_model_parallel_world_size", lambda: 1)
    monkeypatch.setattr(
        torch.accelerator, "empty_cache", lambda: None
    )  # a worker on the CPU does this itself
    monkeypatch.setattr(
        base_loader, "gc", SimpleNamespace(collect=lambda: None)
    )  # a quarter of a second each
    for iterator in ("fastsafetensors_weights_iterator", "instanttensor_weights_iterator"):
        monkeypatch.setattr(default_loader, iterator, plain_reader)
    monkeypatch.setattr(weight_utils, "SafetensorsStreamer", Streamer)
    monkeypatch.setattr(Streamer, "store", tmp_path)
    monkeypatch.setattr(Streamer, "handed_out", [])

    def list_safetensors(path: str) -> list[str]:
        names = sorted(file.name for file in tmp_path.glob("*.safetensors"))
        return [f"{path}/{name}" for name in names]

    monkeypatch.setattr(runai_streamer_loader, "list_safetensors", list_safetensors)

    def run(load_format: str, tensors: dict, from_objects: bool = False) -> None:
        file = "consolidated.safetensors" if load_format == "mistral" else "model.safetensors"
        save_file(tensors, tmp_path / file)
        loader = model_loader.get_model_loader(LoadConfig(load_format=load_format, use_tqdm_on_load=False))
        monkeypatch.setattr(loader, "create_model", lambda **kwargs: model)
        model_config = SimpleNamespace(
            model=str(tmp_path), model_weights=OBJECTS if from_objects else "", revision=None, dtype=torch.float32,
            quantization="modelopt_fp4", is_moe=False, multimodal_config=None,
            word_embeddings_untied_by_checkpoint=False,
        )  # fmt: skip
        config = SimpleNamespace(
            device_config=SimpleNamespace(device="cpu"), load_config=loader.load_config, quant_config=None
        )
        with set_current_vllm_config(VllmConfig()):
            loader.load_model(config, model_config)

    return run


WAYS = [*((name, False) for name in load_formats.CHECKED), ("runai_streamer", True)]


@pytest.mark.parametrize("load_format, from_objects", WAYS)
def test_names_divisors_and_preparation_are_reached(load, model, load_format, from_objects):
    load(load_format, STORED, from_objects)
    assert sorted(model.loaded) == [
        f"{LAYER}.{leaf}" for leaf in ("weight", "weight_scale", "weight_scale_2")
    ]
    assert model.linear.quant_method.seen == [0.25]


@pytest.mark.parametrize("load_format, from_objects", WAYS)
@pytest.mark.parametrize("gone", STORED)
def test_coverage_is_reached_before_a_tensor_is_handed_out(load, model, load_format, from_objects, gone):
    stored = {name: tensor for name, tensor in STORED.items() if name != gone}
    with pytest.raises(ValueError, match="1 parameters would stay unwritten"):
        load(load_format, stored, from_objects)
    assert not model.loaded and not Streamer.handed_out and not model.linear.quant_method.seen


def test_headers_in_object_storage_are_checked_too(load, model):
    name = "model.layers.0.self_attn.q_b_proj.weight_scale"
    wrong = STORED | {name: torch.ones(16, 1)}
    with pytest.raises(ValueError, match=rf"{name} in {OBJECTS}/model\.safetensors has dtype F32"):
        load("runai_streamer", wrong, from_objects=True)
    assert not model.loaded and not Streamer.handed_out


def test_an_error_while_streaming_names_the_tensor(load, model, monkeypatch):
    monkeypatch.setattr(model, "load_weights", lambda weights: next(iter(weights))[1].fail())
    with pytest.raises(AttributeError) as error:
        load("runai_streamer", STORED)
    assert any("while loading model.layers.0.self_attn" in note for note in error.value.__notes__)


def test_dummy_weights_are_prepared_and_nothing_is_read(load, model, tmp_path):
    load("dummy", {})
    assert not model.loaded and len(model.linear.quant_method.seen) == 1


def test_pickles_are_refused_where_layers_are_nvfp4(load, model, tmp_path):
    torch.save(STORED, tmp_path / "pytorch_model.bin")

    def run():
        for file in tmp_path.glob("*.safetensors"):
            file.unlink()
        loader = model_loader.get_model_loader(LoadConfig(load_format="auto"))
        loader._init_ep_weight_filter = loader._init_mm_encoder_only_weight_filter = lambda *args: None
        loader.load_weights(
            model, SimpleNamespace(model=str(tmp_path), revision=None, quantization="modelopt_fp4")
        )

    with pytest.raises(ValueError, match=r"pytorch_model\.bin is not a safetensors file"):
        run()
    assert not model.loaded
    model.config.quantization_config = None  # the checkpoint of a model that is not ours to check
    run()
    assert model.loaded


# --- the table ---


def test_the_table_names_every_format_of_the_installed_vllm():
    known = [*load_formats.CHECKED, *load_formats.EMPTY, *load_formats.UNPREPARED, *load_formats.UNCOVERED]
    assert sorted(known) == sorted(model_loader._LOAD_FORMAT_TO_MODEL_LOADER)
    assert sorted(known) == sorted(get_args(model_loader.LoadFormats))
    for load_format, loader in (load_formats.CHECKED | load_formats.EMPTY).items():
        found = model_loader._LOAD_FORMAT_TO_MODEL_LOADER[load_format]
        assert found.__name__ == loader, load_format
        assert found.load_model is model_loader.BaseModelLoader.load_model, (
            f"{load_format} prepares by its own means"
        )


def test_object_storage_comes_through_the_streamer():
    """vLLM itself turns `auto` into runai_streamer for these (config/vllm.py); a new scheme may go another way."""
    assert runai_utils.SUPPORTED_SCHEMES == ["s3://", "gs://", "az://"]


def deepseek_v4(load_format: str, quantization: dict | None) -> SimpleNamespace:
    hf_config = SimpleNamespace(
        model_type="deepseek_v4", quantization_config=quantization, n_routed_experts=256
    )
    return SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=hf_config, architecture="DeepseekV4ForCausalLM", convert_type="none"
        ),
        speculative_config=None,
        load_config=LoadConfig(load_format=load_format),
    )


NVFP4 = {
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "weight-only": {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"},
    "own file": {"quantization": {"quant_algo": "NVFP4"}},
    "mixed": {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "NVFP4"}}},
    "experts only": {"quant_method": "fp8", "moe_quant_algo": "NVFP4"},
    "compressed-tensors": {
        "config_groups": {"g": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}}}
    },
}
OTHERS = [None, {}, {"quant_method": "fp8"}, {"quant_method": "modelopt", "quant_algo": "FP8"},
          {"config_groups": {"g": {"weights": {"num_bits": 4, "type": "float", "group_size": 32}}}}]  # fmt: skip


@pytest.mark.parametrize("load_format", [*model_loader._LOAD_FORMAT_TO_MODEL_LOADER, "their_own"])
def test_a_format_is_served_or_refused_by_name_for_deepseek_v4(load_format):
    for quantization in NVFP4.values():
        config = deepseek_v4(load_format, quantization)
        if load_format in load_formats.CHECKED | load_formats.EMPTY:
            refuse_unchecked(config)
            continue
        with pytest.raises(ValueError, match=f"--load-format {load_format}: .*; leave it out") as error:
            refuse_unchecked(config)
        assert ("does not know it" in str(error.value)) is (load_format == "their_own")


@pytest.mark.parametrize("load_format", [*model_loader._LOAD_FORMAT_TO_MODEL_LOADER, "their_own"])
def test_models_without_nvfp4_layers_and_other_models_are_left_alone(load_format):
    for quantization in OTHERS:
        refuse_unchecked(deepseek_v4(load_format, quantization))
    config = deepseek_v4(load_format, NVFP4["modelopt"])
    config.model_config.hf_config.model_type = "llama"
    refuse_unchecked(config)
    refuse_unchecked(SimpleNamespace(model_config=None))


@pytest.mark.parametrize("load_format", [*model_loader._LOAD_FORMAT_TO_MODEL_LOADER, "their_own"])
def test_other_models_are_refused_only_what_leaves_our_kernels_unprepared(load_format):
    config = VllmConfig()
    config.load_config.load_format = load_format
    if load_format in load_formats.CHECKED | load_formats.EMPTY | load_formats.UNCOVERED:
        refuse_unsupported(config, "K", Layout.PLAIN)
    else:
        with pytest.raises(ValueError, match=f"K does not support --load-format {load_format}: "):
            refuse_unsupported(config, "K", Layout.PLAIN)
