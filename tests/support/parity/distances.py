"""Log-probabilities over HTTP against transformers' in f32: the tests that every checkpoint passes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.support.checkpoints.random import write_bf16_twin
from tests.support.parity.reference_model import prompt_logprobs, reference_model
from tests.support.processor import has_avx512_bf16, need
from tests.support.servers.vllm import Server

Prompts = list[list[int]]

LENGTHS = (10, 350, 3000)
BATCH = 64  # prompts per request
FLIP = 0.25  # nats; a flipped router moves single tokens further: each token counts up to here
NO_FURTHER = 1.10  # all-NVFP4 from its reference, over bf16 from its own


def mean_distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Mean |dlogp| in nats, every token counted up to FLIP."""
    return (found - expected).abs().clamp(max=FLIP).mean().item()


def served_logprobs(server: Server, prompts: Prompts) -> torch.Tensor:
    """f32 [sum of (length - 1)]: what the server says about every token of every prompt but the first."""
    choices = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        choices += server.complete(prompt=batch, max_tokens=1, prompt_logprobs=0)["choices"]
    found = []
    for choice, prompt in zip(choices, prompts):
        by_position = choice["prompt_logprobs"][1:]
        found += [entry[str(token)]["logprob"] for entry, token in zip(by_position, prompt[1:])]
    return torch.tensor(found)


@dataclass
class Parity:
    """One checkpoint's log-probabilities, served and from its own reference."""

    prompts: dict[int, Prompts]
    served: dict[int, torch.Tensor]
    reference: dict[int, torch.Tensor]

    def distances(self, length: int) -> torch.Tensor:
        return (self.served[length] - self.reference[length]).abs()

    def distance(self, length: int) -> float:
        """Mean |dlogp| in nats, every token counted up to FLIP."""
        return mean_distance(self.served[length], self.reference[length])

    def figures(self, length: int) -> str:
        """Mean with the limit | mean without | worst token."""
        distances = self.distances(length)
        return f"{self.distance(length):.4f} | {distances.mean():.4f} | {distances.max():.2f}"


def measure(server: Server, folder: Path, prompts: dict[int, Prompts]) -> Parity:
    """Ask `server`, which serves the checkpoint in `folder`, for every prompt, and ask its reference."""
    served = {length: served_logprobs(server, batch) for length, batch in prompts.items()}
    model = reference_model(folder)
    reference = {length: prompt_logprobs(model, batch) for length, batch in prompts.items()}
    return Parity(prompts, served, reference)


class Distances:
    """The tests of every checkpoint; `mean_bar` in nats."""

    mean_bar: float
    prompts: Callable[[], dict[int, Prompts]]

    @pytest.fixture(scope="class")
    @classmethod
    def nvfp4(cls, checkpoint, tmp_path_factory) -> Parity:
        with Server(checkpoint, tmp_path_factory.mktemp("nvfp4") / "server.log") as server:
            return measure(server, checkpoint, cls.prompts())

    @pytest.fixture(scope="class")
    @classmethod
    def bf16(cls, checkpoint, tmp_path_factory) -> Parity:
        """The same dequantized weights."""
        need(has_avx512_bf16())
        folder = tmp_path_factory.mktemp("bf16")
        twin = write_bf16_twin(checkpoint, folder / "checkpoint")
        with Server(twin, folder / "server.log") as server:
            return measure(server, twin, cls.prompts())

    @pytest.mark.parametrize("length", LENGTHS)
    def test_close_to_the_reference(self, nvfp4, length):
        print(f"| {length} | all-NVFP4 | {nvfp4.figures(length)} |")
        assert nvfp4.distance(length) <= self.mean_bar

    @pytest.mark.parametrize("length", LENGTHS)
    def test_no_further_than_bf16_weights(self, nvfp4, bf16, length):
        print(f"| {length} | bf16 | {bf16.figures(length)} |")
        assert nvfp4.distance(length) <= NO_FURTHER * bf16.distance(length)
