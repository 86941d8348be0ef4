"""vLLM with Blackwell's operands, on the CPU: everything between checkpoint and launch is as on a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import DEMO
from tests.support.servers.vllm import environment

pytestmark = pytest.mark.serving


@pytest.fixture(scope="module", params=["100-checkpoint", "121-dynamic"])
def served(tmp_path_factory, request) -> dict:
    capability, policy = request.param.split("-")
    out = tmp_path_factory.mktemp("blackwell") / "served.json"
    script = Path(__file__).parent / "blackwell_on_cpu.py"
    run = subprocess.run(
        [sys.executable, str(script), capability, policy, str(out)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return {"capability": capability, "policy": policy, **json.loads(out.read_text())}


@pytest.mark.xdist_group("blackwell-operands")
class TestServedFromBlockScaledOperands:
    def test_texts_are_the_demos(self, served):
        documents = json.loads((DEMO / "expected.json").read_text())["documents"]
        for text, document in zip(served["texts"], documents, strict=True):
            assert len(text) > 60 and document["text"].startswith(text)

    def test_every_layer_is_ours_and_was_checked(self, served):
        report = served["report"]
        expected = f"CuTe DSL sm_{served['capability']}a"
        assert {row["implementation"] for row in report["layers"]} == {expected}
        assert all(row["ours"] and row["reason"] is None for row in report["layers"])
        check = report["self_check"]
        assert check["verdict"] == "passed" and check["layers"] == len(report["layers"])
        assert served["before"]["linear"] > 0 and served["before"]["experts"] > 0

    def test_activations_are_quantized(self, served):
        assert served["report"]["activations"] == f"nvfp4:{served['policy']}"

    def test_tokens_went_through_block_scaled_operands(self, served):
        assert all(served["calls"][op] > served["before"][op] for op in ("linear", "experts"))
