"""devtools/kernels/check_blackwell.py without such a GPU, and on one that is faked as far as the launch of kernels."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bench.blackwell import measure as blackwell
from cutedsl_nvfp4 import family, settings
from cutedsl_nvfp4.family import Layout
from cutedsl_nvfp4.selfcheck import child as children
from cutedsl_nvfp4.selfcheck import products
from cutedsl_nvfp4.selfcheck.products import SelfCheckFailed
from cutedsl_nvfp4.selfcheck.synthetic import synthetic_experts, synthetic_linear
from devtools.kernels import check_blackwell
from tests.support.paths import ROOT


def test_this_machine_is_told_by_name():
    """No Blackwell GPU here: whatever there is, is named, and the exit status says it."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 10:
        pytest.skip("a Blackwell GPU")
    answer = subprocess.run(
        [sys.executable, ROOT / "devtools/kernels/check_blackwell.py"], capture_output=True, text=True
    )
    assert answer.returncode == 2
    assert "B200 (sm_100)" in answer.stderr and "DGX Spark (sm_121)" in answer.stderr and not answer.stdout


@pytest.fixture
def gpu(monkeypatch):
    """gpu(name, capability): torch says it has one."""

    def fake(name: str, capability: tuple[int, int]) -> None:
        properties = SimpleNamespace(multi_processor_count=148, total_memory=180 * 10**9)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
        monkeypatch.setattr(family, "capability_of", lambda device: 10 * capability[0] + capability[1])

    return fake


def test_another_gpu_is_told_by_name(gpu, capsys, monkeypatch, tmp_path):
    gpu("NVIDIA H200", (9, 0))
    monkeypatch.setattr(sys, "argv", ["check_blackwell", "--report", str(tmp_path / "report.md")])
    assert check_blackwell.main() == 2
    assert "NVIDIA H200 (sm_90) is not a Blackwell GPU" in capsys.readouterr().err
    assert not (tmp_path / "report.md").exists()


def test_an_image_without_its_kernels_is_told(gpu, capsys, monkeypatch, tmp_path):
    gpu("NVIDIA B200", (10, 0))
    monkeypatch.setattr(sys, "argv", ["check_blackwell"])
    monkeypatch.setenv(settings.KERNELS, str(tmp_path))
    monkeypatch.setenv(settings.FORBID_JIT, "1")
    assert check_blackwell.main() == 2
    assert "KERNEL_ARCHITECTURES=sm_100a" in capsys.readouterr().err


@pytest.fixture
def b200(gpu, monkeypatch, tmp_path):
    """run(): (exit status, report as text, its figures) on a faked B200, whose kernels take no time."""
    gpu("NVIDIA B200", (10, 0))
    cpu = torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    layer = synthetic_linear(256, 128, torch.bfloat16, False, cpu, generator, Layout.BLOCK_SCALED, 1, 0.01)
    experts = synthetic_experts(6, cpu, generator, Layout.BLOCK_SCALED)
    monkeypatch.setattr(blackwell, "linears", lambda device: iter([layer]))
    monkeypatch.setattr(blackwell, "experts", lambda device: experts)
    monkeypatch.setattr(blackwell, "TOKENS", (1, 8))
    monkeypatch.setattr(blackwell, "capture", lambda calls: [call() for call in calls])
    monkeypatch.setattr(blackwell, "microseconds", lambda graph, calls: 2.5)
    monkeypatch.setattr(blackwell, "multiply", lambda inputs, layer, tile, out: out.zero_())
    monkeypatch.setattr(blackwell, "copies", lambda size: 2)
    monkeypatch.setattr(children, "check_in_child", lambda variants, device: [0.5] * len(variants))
    monkeypatch.setattr(products, "check_product", lambda *arguments: 0.4)
    monkeypatch.setattr(products, "check_experts", lambda *arguments: 0.4)

    def run(*options: str) -> tuple[int, str, dict]:
        path = tmp_path / "report.md"
        monkeypatch.setattr(sys, "argv", ["check_blackwell", "--report", str(path), *options])
        status = check_blackwell.main()
        written = path.read_text()
        return status, written, json.loads(re.search(r"```json\n(.*)\n```", written)[1])

    return run


def test_a_right_device_gets_one_report(b200, capsys):
    status, written, figures = b200()
    assert status == 0 and figures["passed"] and written in capsys.readouterr().out
    assert "# Blackwell kernels on NVIDIA B200 (sm_100)" in written and "**passed**" in written
    assert any(name.startswith("nvfp4_linear_sm100a") for name in figures["kernels"])
    assert any(name.startswith("nvfp4_quantize_sm100a") for name in figures["kernels"])
    assert figures["products"] > 5 and len(figures["rows"]) == 4
    row = figures["rows"][0]
    assert row["us"]["ours"] == 2.5 and row["gbytes_per_s"] > 0 and "flashinfer" in row["failed"]
    assert figures["software"]["torch"] == torch.__version__


def test_a_crash_names_the_kernel_and_the_others_go_on(b200, monkeypatch):
    def child(variants: list, device: str) -> list[float]:
        bad = next((variant for variant in variants if "_64_" in variant.name), None)
        if bad:
            raise SelfCheckFailed(f"the child process ended with status -11 while running {bad}", bad)
        return [0.5] * len(variants)

    monkeypatch.setattr(children, "check_in_child", child)
    status, written, figures = b200()
    failed = [name for name, verdict in figures["kernels"].items() if "failed" in verdict]
    assert status == 1 and failed and all("_64_" in name for name in failed) and "**FAILED**" in written
    assert len(failed) == sum("_64_" in name for name in figures["kernels"])
    assert all(
        f"- {name}: the child process ended with status -11 while running {name}" in written
        for name in failed
    )
    assert not figures["rows"] and figures["failures"] == ["not run: a kernel failed"]


def test_a_wrong_product_is_in_the_report(b200, monkeypatch):
    def wrong(layer, m, *rest):
        if m > 100:
            raise SelfCheckFailed("relative error 0.3, allowed 0.002")
        return 0.4

    monkeypatch.setattr(products, "check_product", wrong)
    status, written, figures = b200()
    assert status == 1 and "relative error 0.3" in written and not figures["rows"]
    assert all("N = 256, K = 128" in failure for failure in figures["failures"])


def test_no_bench_times_nothing(b200):
    status, _, figures = b200("--no-bench")
    assert status == 0 and figures["rows"] == []
