"""The self-check of Blackwell's operands on a Hopper GPU: whole layers in W4A4, multiplied by the reference."""

from dataclasses import replace

import pytest
import torch

from cutedsl_nvfp4 import family
from cutedsl_nvfp4.family import Layout
from cutedsl_nvfp4.prepare import prepare_experts, prepare_linear
from cutedsl_nvfp4.selfcheck.products import ExpertsLayer, LinearLayer, SelfCheckFailed
from cutedsl_nvfp4.selfcheck.report import Report, check_layers
from tests.support.faults.kernel import PLANTED, emulated

pytestmark = pytest.mark.gpu_sm90


@pytest.fixture(autouse=True, params=[100, 120])
def capability(monkeypatch, request):
    monkeypatch.setattr(family, "capability_of", lambda device: request.param)


def random(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    *batch, n, k = shape
    generator = torch.Generator("cuda").manual_seed(seed)
    codes = torch.randint(0, 256, (*batch, n, k // 2), dtype=torch.uint8, device="cuda", generator=generator)
    scales = torch.randint(
        0x20, 0x50, (*batch, n, k // 16), dtype=torch.uint8, device="cuda", generator=generator
    )
    return codes, scales.view(torch.float8_e4m3fn)


def linear(
    n: int, k: int, groups: int = 1, out_dtype: torch.dtype = torch.bfloat16, static=False
) -> LinearLayer:
    operands = prepare_linear(
        *random(n, k), torch.tensor([0.5, 0.002], device="cuda"), [n // 4, n - n // 4],
        layout=Layout.BLOCK_SCALED, groups=groups,
    )  # fmt: skip
    act_scale = torch.tensor([0.001], device="cuda") if static else None
    return LinearLayer("linear", operands, out_dtype, act_scale=act_scale)


def experts(static: bool) -> ExpertsLayer:
    """The experts of Flash, an eighth of them local."""
    operands = prepare_experts(
        *random(32, 4096, 4096), torch.full((32, 2), 0.002, device="cuda"), *random(32, 4096, 2048, seed=1),
        torch.full((32,), 0.5, device="cuda"), layout=Layout.BLOCK_SCALED,
    )  # fmt: skip
    expert_map = torch.full((256,), -1, dtype=torch.int32, device="cuda")
    expert_map[64:96] = torch.arange(32, device="cuda", dtype=torch.int32)
    layer = ExpertsLayer("experts", operands, 6, 256, expert_map, 10.0)
    if not static:
        return layer
    scales = torch.tensor([0.001], device="cuda"), torch.full((32,), 0.02, device="cuda")
    return replace(layer, act_scale_13=scales[0], act_scale_2=scales[1])


LAYERS = {
    "q": lambda: linear(2048, 7168),
    "static": lambda: linear(2048, 7168, static=True),
    "float32": lambda: linear(1024, 4096, 1, torch.float32),
    "wo_a": lambda: linear(8192, 4096, 8),
    "ragged": lambda: linear(80, 144, 2),
    "experts": lambda: experts(False),
    "static experts": lambda: experts(True),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_right_products_pass(kind):
    report = Report()
    check_layers([LAYERS[kind]()], 1024, False, report, emulated)
    assert report.products > 1 and 0 < report.worst_error <= 1


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("fault", PLANTED)
def test_planted_fault_is_caught(kind, fault):
    with pytest.raises(SelfCheckFailed, match=kind.split()[-1] if "experts" in kind else "linear"):
        check_layers([LAYERS[kind]()], 512, False, Report(), PLANTED[fault])
