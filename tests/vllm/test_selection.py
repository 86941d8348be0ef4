"""Which kernel vLLM selects for an NVFP4 layer, what it says where ours has none, and what ours refuses."""

import argparse
import enum
import logging
from typing import get_args

import pytest
import torch
import vllm
from vllm.config import KernelConfig, VllmConfig, set_current_vllm_config
from vllm.config.kernel import LinearBackend, MoEBackend
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.kernels import linear as vllm_linear
from vllm.model_executor.kernels.linear.nvfp4.emulation import EmulationNvFp4LinearKernel
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)
from vllm.model_executor.layers.fused_moe.oracle import nvfp4 as oracle
from vllm.model_executor.layers.quantization.utils.quant_utils import kNvfp4Dynamic, kNvfp4Static
from vllm.platforms.interface import PlatformEnum
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.worker.worker_base import WorkerBase

from cutedsl_nvfp4 import settings, support
from cutedsl_nvfp4.family import Layout
from cutedsl_nvfp4.vllm import plugin
from cutedsl_nvfp4.vllm.backend import current_support
from cutedsl_nvfp4.vllm.experts import CuTeDSLNvFp4Experts
from cutedsl_nvfp4.vllm.linear import CuTeDSLNvFp4LinearKernel


@pytest.fixture(scope="module", autouse=True)
def registered():
    plugin.register()


@pytest.fixture
def no_kernel_here(monkeypatch):
    """This machine as an H200 would look to a build that has no Hopper kernel; -> the reason it gives."""
    monkeypatch.setattr(support, "families", lambda: ())
    monkeypatch.setattr(support, "family_of", lambda capability: None)
    linear, experts = support.linear, support.experts
    monkeypatch.setattr(support, "linear", lambda device_type, capability: linear("cuda", 90))
    monkeypatch.setattr(support, "experts", lambda device_type, capability: experts("cuda", 90))
    return support.linear("cuda", 90).reason


def select_linear(backend: str = "auto", use_a16: bool = False):
    with set_current_vllm_config(VllmConfig(kernel_config=KernelConfig(linear_backend=backend))):
        return vllm_linear.init_nvfp4_linear_kernel(use_a16=use_a16)


def select_experts(backend: str = "auto", activation_key=kNvfp4Dynamic, **changes):
    config = FusedMoEConfig(
        **{
            "num_experts": 64, "experts_per_token": 6, "hidden_dim": 128, "intermediate_size": 32,
            "num_local_experts": 64, "num_logical_experts": 64, "activation": MoEActivation.SILU,
            "device": "cpu", "routing_method": RoutingMethodType.DeepSeekV3, "in_dtype": torch.bfloat16,
            "moe_parallel_config": FusedMoEParallelConfig.make_no_parallel(), "moe_backend": backend,
            "swiglu_limit": 10.0,
        } | changes
    )  # fmt: skip
    return oracle.select_nvfp4_moe_backend(config, kNvfp4Static, activation_key)


# --- order and names ---


@pytest.mark.parametrize("platform", [PlatformEnum.CUDA, PlatformEnum.CPU])
def test_ours_is_first_and_upstreams_follow(platform):
    kernels = vllm_linear._POSSIBLE_NVFP4_KERNELS[platform]
    assert kernels[0] is CuTeDSLNvFp4LinearKernel
    assert kernels.count(CuTeDSLNvFp4LinearKernel) == 1
    assert EmulationNvFp4LinearKernel in kernels


@pytest.mark.parametrize("capability", [90, 100, 120])
def test_ours_stays_first_where_vllm_reorders_the_list(capability):
    kernels = vllm_linear.prioritize_humming(
        list(vllm_linear._POSSIBLE_NVFP4_KERNELS[PlatformEnum.CUDA]), capability
    )
    assert kernels[0] is CuTeDSLNvFp4LinearKernel
    backends = oracle.prioritize_humming(oracle.AUTO_NVFP4_BACKENDS, capability)
    assert backends[0] is oracle.NvFp4MoeBackend.CUTEDSL


def test_moe_order_names_our_class_first():
    assert oracle.AUTO_NVFP4_BACKENDS[0] is oracle.NvFp4MoeBackend.CUTEDSL
    assert oracle.AUTO_NVFP4_BACKENDS.count(oracle.NvFp4MoeBackend.CUTEDSL) == 1
    assert oracle.backend_to_kernel_cls(oracle.NvFp4MoeBackend.CUTEDSL) == [CuTeDSLNvFp4Experts]
    assert oracle.map_nvfp4_backend("cutedsl") is oracle.NvFp4MoeBackend.CUTEDSL


def test_registering_again_changes_nothing():
    def lists():
        return {
            "possible": {
                platform: list(kernels) for platform, kernels in vllm_linear._POSSIBLE_NVFP4_KERNELS.items()
            },
            "preferred": list(vllm_linear._PREFERRED_NVFP4_KERNELS),
            "by name": {
                name: set(kernels) for name, kernels in vllm_linear._LINEAR_BACKEND_KERNEL_MAP.items()
            },
            "report": WorkerBase.cutedsl_nvfp4_report,
        }

    before = lists()
    plugin.register()
    plugin.register()
    assert lists() == before


def test_backend_name_belongs_to_our_kernel_alone():
    assert vllm_linear._LINEAR_BACKEND_KERNEL_MAP["cutedsl"] == {CuTeDSLNvFp4LinearKernel}
    assert "cutedsl" in get_args(LinearBackend) and "cutedsl" in get_args(MoEBackend)


def test_command_line_takes_the_backend_names():
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(exit_on_error=False))
    parsed = parser.parse_args(["--linear-backend", "cutedsl", "--moe-backend", "cutedsl"])
    assert (parsed.linear_backend, parsed.moe_backend) == ("cutedsl", "cutedsl")
    config = KernelConfig(linear_backend="cutedsl", moe_backend="cutedsl")
    assert (config.linear_backend, config.moe_backend) == ("cutedsl", "cutedsl")
    for option in ("--linear-backend", "--moe-backend"):
        with pytest.raises((argparse.ArgumentError, SystemExit)):
            parser.parse_args([option, "cutedsi"])


# --- selection on this machine ---


@pytest.mark.parametrize("backend", ["auto", "cutedsl"])
@pytest.mark.parametrize("use_a16", [False, True])
def test_linear_selection_is_ours(backend, use_a16):
    assert type(select_linear(backend, use_a16)) is CuTeDSLNvFp4LinearKernel


def test_another_linear_backend_can_be_asked_for():
    assert type(select_linear("emulation")) is EmulationNvFp4LinearKernel


@pytest.mark.parametrize("backend", ["auto", "cutedsl"])
@pytest.mark.parametrize("activation_key", [kNvfp4Dynamic, None])
def test_experts_selection_is_ours(backend, activation_key):
    selected = select_experts(backend, activation_key)
    assert selected == (oracle.NvFp4MoeBackend.CUTEDSL, CuTeDSLNvFp4Experts)


@pytest.mark.parametrize("activation", [MoEActivation.GELU, MoEActivation.SWIGLUOAI])
def test_experts_of_another_activation_are_not_ours(activation):
    with pytest.raises(ValueError, match=r"'CUTEDSL' does not support .* activation"):
        select_experts("cutedsl", activation=activation)


# --- where this build has no kernel ---


@pytest.mark.parametrize("capability", [90, 100, 120])
def test_missing_gpu_kernel_is_a_reason(monkeypatch, capability):
    monkeypatch.setattr(support, "families", lambda: ())
    monkeypatch.setattr(support, "family_of", lambda capability: None)
    supported, reason = CuTeDSLNvFp4LinearKernel.is_supported(capability)
    assert supported is False
    assert f"sm_{capability}" in reason and "no NVFP4 linear kernel" in reason
    assert "GPU kernels built: none" in reason and "CUTEDSL_NVFP4_IMPL=reference" in reason


def test_built_gpu_kernels_are_supported_and_listed():
    assert CuTeDSLNvFp4LinearKernel.is_supported(90) == (True, None)
    assert support.linear("cuda", 90).implementation == "CuTe DSL sm_90a"
    supported, reason = CuTeDSLNvFp4LinearKernel.is_supported(89)
    assert not supported and "GPU kernels built: sm_90a, sm_100a, sm_103a, sm_120a, sm_121a" in reason


# --- as on a Hopper GPU ---


@pytest.fixture
def hopper(monkeypatch):
    """What this machine's platform says becomes an H200's."""
    linear = support.linear
    monkeypatch.setattr(support, "linear", lambda device_type, capability: linear("cuda", 90))


@pytest.mark.parametrize("use_a16", [False, True])
def test_hopper_linear_kernel_is_selected(hopper, use_a16):
    kernel = select_linear(use_a16=use_a16)
    assert type(kernel) is CuTeDSLNvFp4LinearKernel and kernel.support.layout is Layout.SM90
    assert not kernel.quantize_activations and not kernel.batch_invariant


def test_hopper_needs_compiled_kernels_or_the_compiler(monkeypatch, tmp_path):
    find_spec = support.importlib.util.find_spec
    monkeypatch.setattr(
        support.importlib.util, "find_spec", lambda name: None if name == "cutlass" else find_spec(name)
    )
    monkeypatch.delenv("CUTEDSL_NVFP4_KERNELS", raising=False)
    found = support.linear("cuda", 90)
    assert not found and "nvidia-cutlass-dsl" in found.reason and "CUTEDSL_NVFP4_KERNELS" in found.reason
    monkeypatch.setenv("CUTEDSL_NVFP4_KERNELS", str(tmp_path))
    assert support.linear("cuda", 90)


def test_hopper_refuses_w4a4_by_name(hopper, monkeypatch):
    monkeypatch.setenv("CUTEDSL_NVFP4_ACTIVATIONS", "nvfp4")
    with pytest.raises(ValueError, match="CUTEDSL_NVFP4_ACTIVATIONS=nvfp4: Hopper has no FP4 tensor cores"):
        select_linear()


@pytest.mark.parametrize("backend", ["auto", "cutedsl"])
def test_batch_invariance_is_ours_on_hopper(hopper, monkeypatch, backend):
    monkeypatch.setattr(vllm_linear.envs, "VLLM_BATCH_INVARIANT", True)
    kernel = select_linear(backend)
    assert type(kernel) is CuTeDSLNvFp4LinearKernel and kernel.batch_invariant


def test_batch_invariance_is_upstreams_elsewhere_and_where_it_is_asked_for(hopper, monkeypatch):
    monkeypatch.setattr(vllm_linear.envs, "VLLM_BATCH_INVARIANT", True)
    assert type(select_linear("emulation")) is EmulationNvFp4LinearKernel
    monkeypatch.undo()  # a CPU again
    monkeypatch.setattr(vllm_linear.envs, "VLLM_BATCH_INVARIANT", True)
    assert not CuTeDSLNvFp4LinearKernel.supports_batch_invariance()
    assert type(select_linear()) is EmulationNvFp4LinearKernel


# --- as on a Blackwell GPU ---


@pytest.fixture(params=[100, 103, 120, 121])
def blackwell(monkeypatch, request) -> int:
    """What this machine's platform says becomes a Blackwell GPU's; -> its capability."""
    linear, experts = support.linear, support.experts
    monkeypatch.setattr(support, "linear", lambda device_type, capability: linear("cuda", request.param))
    monkeypatch.setattr(support, "experts", lambda device_type, capability: experts("cuda", request.param))
    return request.param


def test_kernels_never_run_serve_where_they_are_asked_for_by_name(blackwell):
    kernel = select_linear("cutedsl")
    assert type(kernel) is CuTeDSLNvFp4LinearKernel and kernel.quantize_activations
    assert kernel.support.layout is Layout.BLOCK_SCALED and not kernel.support.proven
    assert kernel.support.implementation == f"CuTe DSL sm_{blackwell}a"


def test_kernels_never_run_leave_the_layers_to_upstreams(blackwell):
    assert type(select_linear()) is EmulationNvFp4LinearKernel
    with pytest.raises(NotImplementedError):  # the CPU has no experts of upstream's
        select_experts()
    with set_current_vllm_config(VllmConfig(kernel_config=KernelConfig(moe_backend="cutedsl"))):
        assert select_experts("cutedsl")[1] is CuTeDSLNvFp4Experts
    supported, reason = CuTeDSLNvFp4LinearKernel.is_supported(blackwell)
    assert not supported and f"CuTe DSL sm_{blackwell}a" in reason
    assert "never run" in reason and "--linear-backend cutedsl serves with them" in reason
    found = current_support(support.experts)
    assert not found and "--moe-backend cutedsl serves with them" in found.reason


def test_one_kind_asked_for_is_not_the_other(blackwell):
    with set_current_vllm_config(VllmConfig(kernel_config=KernelConfig(moe_backend="cutedsl"))):
        assert current_support(support.experts) and not current_support(support.linear)
    per_quantization = KernelConfig(linear_backend_per_quant={"nvfp4_w4a4": "cutedsl"})
    with set_current_vllm_config(VllmConfig(kernel_config=per_quantization)):
        assert current_support(support.linear) and not current_support(support.experts)


def test_blackwell_refuses_w4a16_by_name(blackwell, monkeypatch):
    monkeypatch.setenv("CUTEDSL_NVFP4_ACTIVATIONS", "bf16")
    with pytest.raises(ValueError, match="CUTEDSL_NVFP4_ACTIVATIONS=bf16: the Blackwell kernels run W4A4"):
        select_linear("cutedsl")


def test_batch_invariance_is_upstreams_on_blackwell(blackwell, monkeypatch):
    monkeypatch.setattr(vllm_linear.envs, "VLLM_BATCH_INVARIANT", True)
    assert type(select_linear("cutedsl")) is EmulationNvFp4LinearKernel


@pytest.mark.parametrize("operation", [support.linear, support.experts])
def test_reference_is_supported_on_any_device(monkeypatch, operation):
    assert operation("cpu", None).layout is Layout.PLAIN
    assert not operation("xpu", None) and "xpu" in operation("xpu", None).reason
    monkeypatch.setenv("CUTEDSL_NVFP4_IMPL", "reference")
    for device, capability in (("cuda", 90), ("cuda", 75), ("xpu", None)):
        assert operation(device, capability).layout is Layout.PLAIN
        assert "CUTEDSL_NVFP4_IMPL=reference" in operation(device, capability).implementation


@pytest.mark.parametrize("use_a16", [False, True])
def test_upstreams_linear_kernel_serves_where_ours_has_none(no_kernel_here, use_a16):
    if use_a16:  # the CPU has no other weight-only kernel
        with pytest.raises(ValueError, match="MarlinNvFp4LinearKernel is not supported"):
            select_linear(use_a16=True)
    else:
        assert type(select_linear()) is EmulationNvFp4LinearKernel


def test_our_linear_kernel_asked_for_by_name_is_not_replaced_silently(no_kernel_here):
    with pytest.raises(ValueError) as error:
        select_linear("cutedsl")
    assert f"CuTeDSLNvFp4LinearKernel: {no_kernel_here}" in str(error.value)


def test_our_experts_asked_for_by_name_are_not_replaced_silently(no_kernel_here):
    with pytest.raises(ValueError) as error:
        select_experts("cutedsl")
    assert no_kernel_here.replace("linear", "experts") in str(error.value)


# --- refusing to register ---


@pytest.mark.parametrize("version", ["0.31.0", "0.32.1", "0.33.0+cpu", "0.32.0rc1"])
def test_wrong_vllm_version(monkeypatch, version):
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(RuntimeError) as error:
        plugin.register()
    message = str(error.value)
    assert f"built for vLLM 0.32.0, found {version}" in message and "uninstall cutedsl-nvfp4" in message


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.32.0+cu130"])
def test_right_vllm_version(monkeypatch, version):
    monkeypatch.setattr(vllm, "__version__", version)
    plugin.check_vllm()


def test_unpatched_vllm(monkeypatch):
    members = [name for name in oracle.NvFp4MoeBackend.__members__ if name != "CUTEDSL"]
    assert len(members) == len(oracle.NvFp4MoeBackend) - 1
    monkeypatch.setattr(oracle, "NvFp4MoeBackend", enum.Enum("NvFp4MoeBackend", members))
    with pytest.raises(RuntimeError) as error:
        plugin.register()
    message = str(error.value)
    assert vllm.__path__[0] in message and "is not patched; run devtools/patches/apply.py" in message


# --- settings ---


@pytest.mark.parametrize(
    "variable, read, choices",
    [
        ("CUTEDSL_NVFP4_IMPL", settings.implementation, "auto, reference"),
        ("CUTEDSL_NVFP4_ACTIVATIONS", settings.activations, "auto, bf16, nvfp4"),
        ("CUTEDSL_NVFP4_ACTIVATION_SCALE", settings.activation_scale, "checkpoint, warmup, dynamic"),
        ("CUTEDSL_NVFP4_SELF_CHECK", settings.self_check, "on, off"),
    ],
)
def test_settings(monkeypatch, variable, read, choices):
    assert read() == choices.split(", ")[0]
    for choice in choices.split(", "):
        monkeypatch.setenv(variable, choice)
        assert read() == choice
    for bad in ("", "AUTO", "fp8", " auto"):
        monkeypatch.setenv(variable, bad)
        with pytest.raises(ValueError, match=f"{variable}={bad!r} is not one of: {choices}$"):
            read()


@pytest.mark.parametrize("variable", ["CUTEDSL_NVFP4_IMPL", "CUTEDSL_NVFP4_ACTIVATIONS"])
def test_bad_settings_stop_the_linear_kernel(monkeypatch, variable):
    monkeypatch.setenv(variable, "fp8")
    with pytest.raises(ValueError, match=f"{variable}='fp8' is not one of"):
        select_linear()


@pytest.mark.parametrize("value, quantizes", [("auto", False), ("bf16", False), ("nvfp4", True)])
def test_activations_setting_reaches_the_kernel(monkeypatch, value, quantizes):
    monkeypatch.setenv("CUTEDSL_NVFP4_ACTIVATIONS", value)
    assert select_linear().quantize_activations is quantizes


# --- log ---


def test_our_log_goes_where_vllms_goes():
    """vLLM's configuration covers the logger "vllm" alone; an INFO line of ours would otherwise be lost."""
    seen = []
    handler = logging.Handler(logging.INFO)
    handler.emit = seen.append
    root = logging.getLogger("vllm")
    level, propagate = root.level, root.propagate
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    root.propagate = False
    try:
        for module in ("cutedsl_nvfp4.activation_scale", "cutedsl_nvfp4.vllm.endpoint"):
            logging.getLogger(module).info("from %s", module)
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        root.propagate = propagate
    assert [record.name for record in seen] == [
        "cutedsl_nvfp4.activation_scale",
        "cutedsl_nvfp4.vllm.endpoint",
    ]
