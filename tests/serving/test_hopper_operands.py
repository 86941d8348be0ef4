"""vLLM with Hopper's operands, on the CPU: everything between the checkpoint and the kernels' launch is as on a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import DEMO
from tests.support.servers.vllm import environment

pytestmark = pytest.mark.serving


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("hopper") / "served.json"
    script = Path(__file__).parent / "hopper_on_cpu.py"
    run = subprocess.run(
        [sys.executable, str(script), str(out)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.xdist_group("hopper-operands")
class TestServedFromPackedOperands:
    def test_texts_are_the_demos(self, served):
        documents = json.loads((DEMO / "expected.json").read_text())["documents"]
        for text, document in zip(served["texts"], documents, strict=True):
            assert len(text) > 60 and document["text"].startswith(text)

    def test_every_layer_is_ours_and_was_checked(self, served):
        report = served["report"]
        assert {row["implementation"] for row in report["layers"]} == {"CuTe DSL sm_90a"}
        assert all(row["ours"] for row in report["layers"])
        check = report["self_check"]
        assert check["verdict"] == "passed" and check["layers"] == len(report["layers"])
        assert served["before"]["linear"] > 0 and served["before"]["experts"] > 0

    def test_tokens_went_through_packed_operands(self, served):
        assert all(served["calls"][op] > served["before"][op] for op in ("linear", "experts"))
