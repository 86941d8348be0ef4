"""vLLM against transformers' DeepSeek-V4 in f32: log-probabilities over HTTP, and every part of every layer.

Log-probabilities show what a user sees, but some errors hide below their floor; the parts, compared on the same
input, show those. Each error of support/faults/reference_model.py is planted into the reference, and has to turn a
comparison red. The demo's log-probabilities are asked of the server of test_demo.py. docs/correctness.md holds the
tables that `pytest tests/serving/test_parity.py tests/serving/test_demo.py -rP` prints.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.checkpoints.random import write_random
from tests.support.faults.reference_model import PLANTED
from tests.support.parity.distances import LENGTHS, Distances, Prompts
from tests.support.parity.record_layers import DECODED
from tests.support.parity.reference_model import prompt_logprobs, reference_model
from tests.support.parity.replay import Figures, replay
from tests.support.paths import ROOT
from tests.support.servers.vllm import environment

pytestmark = pytest.mark.serving

RECORDED_LENGTH = 2600
CLEARLY = 3  # a planted error shows this many times the bar of its figure

# Left to test_planted_error_shows_in_a_layer.
HIDDEN_FROM_LOGITS = {
    "HCA removed": "moves them by less than rounding does",
    "indexer chooses wrong blocks": "moves them by less than rounding does",
    "gate bias is noise": "no router of the tight checkpoint has a bias",
    "SwiGLU clamp off": "vLLM's bf16 experts do not clamp on the CPU: no activation of the pair reaches the clamp",
}

# Bar of each kind of figure, about twice the clean one: relative error of hidden states, or part of a choice.
LAYER_BARS = {
    "attn.in": 0.006,
    "attn.out": 0.03,
    "ffn.in": 0.006,
    "ffn.out": 0.008,
    "streams": 0.004,
    "final": 0.006,
    "choice": 0.02,
}


def random_prompts() -> dict[int, Prompts]:
    generator = torch.Generator().manual_seed(5)
    return {
        length: [torch.randint(0, 256, (length,), generator=generator).tolist() for _ in range(count)]
        for length, count in zip(LENGTHS, (144, 4, 1))
    }


@pytest.mark.xdist_group("parity-random")
class TestRandomCheckpoint(Distances):
    """Every layer routes by token, so no router flips: the tight comparison."""

    mean_bar = 0.03
    prompts = staticmethod(random_prompts)

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, tmp_path_factory) -> Path:
        return write_random(tmp_path_factory.mktemp("random") / "checkpoint", hash_layers=3, gate_gain=1)

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, checkpoint):
        return reference_model(checkpoint)

    @pytest.mark.parametrize("error", [error for error in PLANTED if error not in HIDDEN_FROM_LOGITS])
    def test_planted_error_shows_in_log_probabilities(self, nvfp4, model, error):
        with PLANTED[error](model):
            wrong = prompt_logprobs(model, nvfp4.prompts[3000])
        distance = (nvfp4.served[3000] - wrong).abs().mean().item()
        print(f"| {error} | {distance:.3f} (clean {nvfp4.distance(3000):.3f}) |")
        assert distance > self.mean_bar


def bar(figure: str) -> float:
    return next(limit for kind, limit in LAYER_BARS.items() if figure.endswith(kind))


def furthest_over_its_bar(figures: Figures) -> str:
    return max(figures, key=lambda figure: figures[figure] / bar(figure))


@pytest.mark.xdist_group("parity-layers")
class TestLayers:
    """Prefill and decode of one prompt, long enough that the indexer has to choose."""

    @pytest.fixture(scope="class")
    @classmethod
    def recorded(cls, tmp_path_factory) -> tuple:
        """(reference model, vLLM's recording, clean figures)"""
        folder = tmp_path_factory.mktemp("layers")
        checkpoint = write_random(folder / "nvfp4", hash_layers=1, gate_gain=4)
        (folder / "ids.json").write_text(json.dumps(random_prompts()[3000][0][:RECORDED_LENGTH]))
        recorder = ROOT / "tests/support/parity/record_layers.py"
        command = [sys.executable, recorder, checkpoint, folder / "ids.json", folder / "rows.safetensors"]
        run = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900)
        assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
        recording = load_file(folder / "rows.safetensors")
        model = reference_model(checkpoint)
        return model, recording, replay(model, recording, DECODED)

    def test_every_part_of_every_layer_agrees(self, recorded):
        _, _, clean = recorded
        for figure, error in clean.items():
            print(f"| {figure} | {error:.4f} | {bar(figure)} |")
        assert len(clean) == 2 * (3 * 5 + 2)
        assert {figure: error for figure, error in clean.items() if not error <= bar(figure)} == {}

    @pytest.mark.parametrize("error", PLANTED)
    def test_planted_error_shows_in_a_layer(self, recorded, error):
        model, recording, clean = recorded
        with PLANTED[error](model):
            figures = replay(model, recording, DECODED)
        worst = furthest_over_its_bar(figures)
        print(f"| {error} | {worst} {figures[worst]:.3f} (clean {clean[worst]:.4f}) |")
        assert figures[worst] > CLEARLY * bar(worst)

    def test_planted_errors_leave_no_trace(self, recorded):
        model, recording, clean = recorded
        assert replay(model, recording, DECODED) == clean
