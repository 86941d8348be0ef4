"""The self-check in front of the real kernels: right ones pass, planted faults, crashes and hangs are named."""

import sys

import pytest
import torch

from cutedsl_nvfp4.family import Layout
from cutedsl_nvfp4.prepare import prepare_experts, prepare_linear
from cutedsl_nvfp4.selfcheck import child as children
from cutedsl_nvfp4.selfcheck.products import ExpertsLayer, LinearLayer, SelfCheckFailed, Variant, multiply
from cutedsl_nvfp4.selfcheck.report import Report, check, check_layers
from cutedsl_nvfp4.sm90.linear import shipped
from tests.support.faults.kernel import planted
from tests.support.paths import ROOT

pytestmark = pytest.mark.gpu_sm90

PLANTED = planted(multiply)
KERNEL = Variant("sm90", "sm_90a", "linear", next(iter(shipped("sm_90a"))))


def layer(
    n: int, k: int, groups: int = 1, out_dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> LinearLayer:
    generator = torch.Generator("cuda").manual_seed(seed)
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda", generator=generator)
    scales = torch.randint(0x20, 0x50, (n, k // 16), dtype=torch.uint8, device="cuda", generator=generator)
    operands = prepare_linear(
        codes, scales.view(torch.float8_e4m3fn), torch.tensor([0.5, 0.002], device="cuda"), [n // 4, n - n // 4],
        layout=Layout.SM90, groups=groups,
    )  # fmt: skip
    return LinearLayer(f"layer{seed}", operands, out_dtype)


def experts_layer() -> ExpertsLayer:
    """The experts of Flash, a quarter of them local."""
    generator = torch.Generator("cuda").manual_seed(0)

    def random(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.randint(0, 256, (64, n, k // 2), dtype=torch.uint8, device="cuda", generator=generator)
        scales = torch.randint(
            0x20, 0x50, (64, n, k // 16), dtype=torch.uint8, device="cuda", generator=generator
        )
        return codes, scales.view(torch.float8_e4m3fn)

    operands = prepare_experts(
        *random(4096, 4096), torch.full((64, 2), 0.002, device="cuda"), *random(4096, 2048),
        torch.full((64,), 0.5, device="cuda"), layout=Layout.SM90,
    )  # fmt: skip
    expert_map = torch.full((256,), -1, dtype=torch.int32, device="cuda")
    expert_map[64:128] = torch.arange(64, device="cuda", dtype=torch.int32)
    return ExpertsLayer("experts", operands, 6, 256, expert_map, 10.0)


def child(tmp_path, body: str) -> tuple[str, ...]:
    script = tmp_path / "child.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch\n"
        "from cutedsl_nvfp4.selfcheck import child, products\n"
        "from tests.support.faults.kernel import planted\n" + body
    )
    return (sys.executable, str(script))


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_all_stages_pass_and_leave_nothing_allocated(batch_invariant):
    layers = [
        layer(2048, 7168), layer(2048, 7168, seed=1), layer(1024, 4096, 1, torch.float32, 2),
        layer(8192, 4096, 8, seed=3), layer(80, 128, 2, seed=4), experts_layer(),
    ]  # fmt: skip
    torch.ones(2, 2, device="cuda", dtype=torch.float64) @ torch.ones(
        2, 2, device="cuda", dtype=torch.float64
    )
    torch.cuda.synchronize()  # cuBLAS keeps a workspace from its first product on, whoever asks for it
    before = torch.cuda.memory_allocated()
    report = check(layers, torch.device("cuda:0"), 2048, batch_invariant).as_dict()
    assert torch.cuda.memory_allocated() == before
    assert report["verdict"] == "passed" and report["layers"] == 6 and report["kernels"] > 3
    print(report)


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_caught_in_both_stages(tmp_path, fault):
    for wrong, name in (
        (layer(200, 144), "layer0 (N = 200, K = 144"),
        (experts_layer(), "experts (E = 64 of 256"),
    ):
        with pytest.raises(SelfCheckFailed) as failed:
            check_layers([wrong], 64, False, Report(), PLANTED[fault])
        assert name in str(failed.value)
    command = child(tmp_path, f"child.serve(planted(products.multiply)[{fault!r}])")
    with pytest.raises(SelfCheckFailed, match=f"while running {KERNEL}.*SelfCheckFailed"):
        children.check_in_child([KERNEL], "cuda:0", command=command)


ILLEGAL_ADDRESS = """
def multiply(inputs, layer, tile, out):
    source = 'extern "C" __global__ void stray(float *p) { p[1ull << 40] = 1; }'
    kernel = torch.cuda._compile_kernel(source, "stray")
    kernel(grid=(1, 1, 1), block=(1, 1, 1), args=[torch.zeros(1, device="cuda")])
child.serve(multiply)
"""
HANG = """
def multiply(inputs, layer, tile, out):
    torch.cuda._sleep(1 << 50)
child.serve(multiply)
"""


@pytest.mark.parametrize(
    "body, seconds, words",
    [
        (ILLEGAL_ADDRESS, 600.0, "Error: CUDA error: an illegal memory access"),
        (HANG, 3.0, "no answer from the child process for 3 s"),
    ],
    ids=["illegal address", "hang"],
)
def test_crash_and_hang_cost_the_child_only(tmp_path, monkeypatch, body, seconds, words):
    monkeypatch.setattr(children, "RUN_SECONDS", seconds)
    with pytest.raises(SelfCheckFailed, match=f"running {KERNEL}") as failed:
        children.check_in_child([KERNEL], "cuda:0", command=child(tmp_path, body))
    assert words in str(failed.value)
    assert float(torch.ones(4, device="cuda").sum()) == 4
