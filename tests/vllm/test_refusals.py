"""refusals.py: every option that NVFP4 layers do not serve is refused by its own name, and no other."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from vllm.config import (
    KernelConfig,
    ModelConfig,
    ParallelConfig,
    SpeculativeConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.config.lora import LoRAConfig
from vllm.model_executor.kernels.linear import init_nvfp4_linear_kernel

from cutedsl_nvfp4.family import Layout
from cutedsl_nvfp4.vllm import plugin, refusals
from cutedsl_nvfp4.vllm.refusals import refuse_unsupported

KERNEL = "CuTeDSLNvFp4LinearKernel"


def stand_in(config_class: type, **values) -> SimpleNamespace:
    """Only these fields of a config that cannot be made here; each must be a field of the real class."""
    unknown = set(values) - {field.name for field in dataclasses.fields(config_class)}
    assert not unknown, f"{config_class.__name__} has no {unknown}"
    return SimpleNamespace(**values)


def with_lora(config):
    config.lora_config = LoRAConfig()


def with_eplb(config):
    # vLLM makes the real one on GPUs only
    config.parallel_config = stand_in(ParallelConfig, enable_eplb=True, data_parallel_size=1)


def with_sleep_mode(config):
    config.model_config = stand_in(ModelConfig, enable_sleep_mode=True)


def with_speculation(config):
    config.speculative_config = stand_in(SpeculativeConfig, method="mtp")


OPTIONS = {
    "--enable-lora": (with_lora, "merge the adapter before quantizing"),
    "--enable-eplb": (with_eplb, "leave it off"),
    "--enable-sleep-mode": (with_sleep_mode, "leave it off"),
    "--speculative-config": (with_speculation, "(method 'mtp')"),
}


@pytest.fixture
def config() -> VllmConfig:
    """A default vLLM configuration whose fields can be replaced without its validation."""
    real = VllmConfig()
    return SimpleNamespace(**{field.name: getattr(real, field.name) for field in dataclasses.fields(real)})


def test_the_default_configuration_is_served(config):
    refuse_unsupported(config, KERNEL, Layout.PLAIN)
    config.model_config = stand_in(ModelConfig, enable_sleep_mode=False)
    refuse_unsupported(config, KERNEL, Layout.PLAIN)


def test_the_reference_is_refused_under_cuda_graphs(config, monkeypatch):
    monkeypatch.setattr(refusals, "current_platform", SimpleNamespace(is_cuda=lambda: True))
    monkeypatch.setenv("CUTEDSL_NVFP4_IMPL", "reference")
    config.model_config = stand_in(ModelConfig, enable_sleep_mode=False, enforce_eager=True)
    refuse_unsupported(config, KERNEL, Layout.PLAIN)
    config.model_config.enforce_eager = False
    with pytest.raises(
        ValueError, match=r"CUDA graphs with CUTEDSL_NVFP4_IMPL=reference.*add --enforce-eager"
    ):
        refuse_unsupported(config, KERNEL, Layout.PLAIN)


@pytest.mark.parametrize("option", OPTIONS)
def test_option_is_refused_by_name(config, option):
    enable, remedy = OPTIONS[option]
    enable(config)
    with pytest.raises(ValueError) as error:
        refuse_unsupported(config, KERNEL, Layout.PLAIN)
    message = str(error.value)
    assert message.startswith(f"{KERNEL} does not support {option}") and remedy in message
    assert [other for other in OPTIONS if other in message] == [option]


def test_every_refused_option_is_in_one_message(config):
    for enable, _ in OPTIONS.values():
        enable(config)
    with pytest.raises(ValueError) as error:
        refuse_unsupported(config, KERNEL, Layout.PLAIN)
    assert [option for option in OPTIONS if option in str(error.value)] == list(OPTIONS)


def test_a_layer_is_not_built_under_a_refused_option():
    plugin.register()
    config = VllmConfig()
    with set_current_vllm_config(config):
        assert type(init_nvfp4_linear_kernel()).__name__ == KERNEL
    with_lora(config)
    with (
        set_current_vllm_config(config),
        pytest.raises(ValueError, match=f"{KERNEL} does not support --enable-lora"),
    ):
        init_nvfp4_linear_kernel()


def with_all2all(config, backend: str) -> None:
    config.parallel_config = stand_in(
        ParallelConfig,
        enable_eplb=False,
        data_parallel_size=2,
        enable_expert_parallel=True,
        all2all_backend=backend,
    )


def test_all2all_backends_of_other_formats_are_refused_unless_another_moe_backend_is_named(config):
    with_all2all(config, "allgather_reducescatter")
    refuse_unsupported(config, KERNEL, Layout.SM90)
    with_all2all(config, "deepep_low_latency")
    with pytest.raises(
        ValueError, match=r"--all2all-backend deepep_low_latency: .*use allgather_reducescatter"
    ):
        refuse_unsupported(config, KERNEL, Layout.SM90)
    config.kernel_config = stand_in(KernelConfig, moe_backend="humming")
    refuse_unsupported(config, KERNEL, Layout.SM90)


def test_float16_is_refused_where_the_kernels_multiply_bfloat16(config):
    config.model_config = stand_in(ModelConfig, enable_sleep_mode=False, dtype=torch.bfloat16)
    refuse_unsupported(config, KERNEL, Layout.SM90)
    config.model_config = stand_in(ModelConfig, enable_sleep_mode=False, dtype=torch.float16)
    refuse_unsupported(config, KERNEL, Layout.PLAIN)
    with pytest.raises(ValueError, match="--dtype float16: our GPU kernels take bfloat16"):
        refuse_unsupported(config, KERNEL, Layout.SM90)
