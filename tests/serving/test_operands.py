"""vLLM with a GPU's operands, on the CPU: everything between the checkpoint and the kernels' launch is as on a GPU."""

import json
import subprocess
import sys

import pytest

from tests.support.paths import DEMO, ROOT
from tests.support.servers.vllm import environment

pytestmark = pytest.mark.serving

# (compute capability, policy of the activations' scales under W4A4), each a process of its own
SERVED = [
    pytest.param(arguments, marks=pytest.mark.xdist_group(f"operands {arguments[0]}"), id="-".join(arguments))
    for arguments in (("90",), ("100", "checkpoint"), ("121", "dynamic"))
]


@pytest.fixture(scope="module", params=SERVED)
def served(tmp_path_factory, request) -> dict:
    capability, *policy = request.param
    out = tmp_path_factory.mktemp("operands") / "served.json"
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.serve_on_cpu", capability, str(out), *policy],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    activations = f"nvfp4:{policy[0]}" if policy else "bf16"
    return {"capability": capability, "activations": activations, **json.loads(out.read_text())}


class TestServedFromPreparedOperands:
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

    def test_the_draft_head_drafts_from_prepared_operands(self, served):
        assert served["report"]["draft"] == "DeepSeekV4MTP" and served["accepted"] >= 0.9
        drafting = [
            row["name"] for row in served["report"]["layers"] if row["name"].startswith("model.layers.3.")
        ]
        assert len(drafting) == 9

    def test_activations_are_what_the_family_multiplies(self, served):
        assert served["report"]["activations"] == served["activations"]

    def test_tokens_went_through_prepared_operands(self, served):
        assert all(served["calls"][op] > served["before"][op] for op in ("linear", "experts"))
