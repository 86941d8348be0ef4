"""vllm/selfcheck.py: which layers are checked, what is noted, and that every rank stops if one fails."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from cutedsl_nvfp4 import family, support
from cutedsl_nvfp4.family import Layout
from cutedsl_nvfp4.prepare import prepare_linear
from cutedsl_nvfp4.selfcheck import report
from cutedsl_nvfp4.selfcheck.products import SelfCheckFailed
from cutedsl_nvfp4.support import Support
from cutedsl_nvfp4.vllm import selfcheck as vllm_selfcheck
from cutedsl_nvfp4.vllm.linear import CuTeDSLNvFp4LinearKernel
from tests.support.faults.kernel import PLANTED, emulated


class Model(torch.nn.Module):
    """Two layers as process_weights_after_loading leaves them: one for the compressor, in float32."""

    def __init__(self, random_weight, layout: Layout):
        super().__init__()
        self.norm = torch.nn.LayerNorm(4)
        self.wq_a = self._layer(random_weight, layout)
        self.fused_wkv_wgate = self._layer(random_weight, layout)
        self.fused_wkv_wgate.nvfp4_out_dtype = torch.float32

    def _layer(self, random_weight, layout: Layout) -> torch.nn.Module:
        prepared = prepare_linear(*random_weight(64, 128), torch.tensor([0.5]), [64], layout=layout)
        kernel = CuTeDSLNvFp4LinearKernel.__new__(CuTeDSLNvFp4LinearKernel)
        kernel.support = Support(layout, "a test's")
        layer = torch.nn.Module()
        layer.quant_method = SimpleNamespace(kernel=kernel)
        for name, tensor in (("weight", prepared.codes), ("weight_scale", prepared.block_scales),
                             ("row_scale", prepared.row_scale)):  # fmt: skip
            layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        layer.nvfp4_n, layer.nvfp4_k, layer.nvfp4_groups = prepared.n, prepared.k, prepared.groups
        return layer


@pytest.fixture
def worker(random_weight):
    scheduler = SimpleNamespace(max_num_batched_tokens=64)
    model = Model(random_weight, Layout.SM90)
    return SimpleNamespace(
        get_model=lambda: model,
        device=torch.device("cpu"),
        vllm_config=SimpleNamespace(scheduler_config=scheduler),
    )


def check_with(multiply):
    """The self-check without a child, whose stage two multiplies by `multiply`."""
    return partial(report.check, multiply=multiply, check_in_child=lambda found, *_: [0.5] * len(found))


CHECK = check_with(emulated)


def never(*_):
    pytest.fail("checked")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """As on a GPU that is not there."""
    monkeypatch.setattr(type(vllm_selfcheck.current_platform), "get_device_name", lambda *_: "a test GPU")
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)


def test_every_layer_is_checked_and_the_verdict_noted(worker):
    vllm_selfcheck.check_kernels(worker, CHECK)
    noted = worker.get_model().nvfp4_self_check
    assert noted["verdict"] == "passed" and noted["layers"] == 2
    assert {(layer.name, layer.out_dtype) for layer in vllm_selfcheck._layers(worker.get_model())} == {
        ("wq_a", torch.bfloat16), ("fused_wkv_wgate", torch.float32),
    }  # fmt: skip


def test_failure_stops_the_start_and_says_what_to_do(worker):
    with pytest.raises(SelfCheckFailed) as failed:
        vllm_selfcheck.check_kernels(worker, check_with(PLANTED["doubled_scale"]))
    for words in (
        "a test GPU",
        "wq_a (N = 64, K = 128",
        "relative error",
        "--linear-backend NAME",
        "--moe-backend NAME",
    ):
        assert words in str(failed.value)
    assert not hasattr(worker.get_model(), "nvfp4_self_check")


def test_failure_of_another_rank_stops_this_one(worker, monkeypatch):
    group = SimpleNamespace(world_size=2, cpu_group=None)

    def all_gather_object(failures, mine, group):
        failures[:] = [mine, "wq_a: relative error 2"]

    monkeypatch.setattr(vllm_selfcheck, "model_parallel_is_initialized", lambda: True)
    monkeypatch.setattr(vllm_selfcheck, "get_world_group", lambda: group)
    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    with pytest.raises(SelfCheckFailed, match=r"rank 1: wq_a: relative error 2"):
        vllm_selfcheck.check_kernels(worker, CHECK)


def test_reference_has_nothing_to_check(random_weight, worker):
    model = Model(random_weight, Layout.PLAIN)
    worker.get_model = lambda: model
    vllm_selfcheck.check_kernels(worker, never)
    assert model.nvfp4_self_check["verdict"].startswith("nothing to check")


def test_switching_it_off_is_noted(worker, monkeypatch):
    monkeypatch.setenv("CUTEDSL_NVFP4_SELF_CHECK", "off")
    vllm_selfcheck.check_kernels(worker, never)
    assert worker.get_model().nvfp4_self_check == {"verdict": "off"}


@pytest.mark.parametrize("capability", [90, 100, 103, 120, 121])
def test_layers_of_every_gpu_are_checked(random_weight, worker, monkeypatch, capability):
    """In the layout that the GPU's kernels read, which is never the reference's."""
    found = support.linear("cuda", capability)
    model = Model(random_weight, found.layout)
    worker.get_model = lambda: model
    monkeypatch.setattr(family, "capability_of", lambda device: capability)
    vllm_selfcheck.check_kernels(worker, CHECK)
    assert model.nvfp4_self_check["verdict"] == "passed" and model.nvfp4_self_check["layers"] == 2
