"""Speculation over HTTP: the tests that hold servers which draft to one of the same checkpoint which does not."""

import json
from collections.abc import Iterator

import pytest
import torch

from recipe import texts
from tests.support.faults.checkpoint import plant
from tests.support.paths import DEMO
from tests.support.processor import has_block_fp8
from tests.support.servers.vllm import OURS_CHECKS, Server, red

DRAFTED = "vllm:spec_decode_num_draft_tokens_total"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"
CACHED = "vllm:prefix_cache_hits_total"
LETTERS = {"FIR": 4200, "MARBLE": 5000, "SANDSTONE": 6000}  # tokens of the prompt
TOKENS = 160  # of each answer
CUT = 400  # tokens of a tale that are given, so that its prompt fills a block of the cache
SMOKE = ("--only", "speculation", *OURS_CHECKS)


def asked() -> list[str]:
    """Three short prompts, and three of up to 6,000 tokens: several chunks, and the indexer must choose."""
    letters = [texts.letter(key, 7, length).prompt for key, length in LETTERS.items()]
    return [tale.prompt for tale in texts.tales()] + letters


def token_ids(server: Server, prompts: list[str]) -> list[list[int]]:
    """What `server` continues `prompts` with, greedily; all of them at once."""
    choices = server.complete(prompt=prompts, max_tokens=TOKENS, return_token_ids=True)["choices"]
    return [choice["token_ids"] for choice in choices]


def speculating(method: str, tokens: int, **options) -> tuple[str, str]:
    """Arguments of `vllm serve`."""
    return "--speculative-config", json.dumps({"method": method, "num_speculative_tokens": tokens, **options})


class Acceptance:
    """What was drafted and accepted since this was made."""

    def __init__(self, server: Server):
        self.server, self.before = server, self._counters()

    def _counters(self) -> tuple[float, float]:
        return self.server.counter(DRAFTED), self.server.counter(ACCEPTED)

    def share(self) -> float:
        drafted, accepted = (now - before for now, before in zip(self._counters(), self.before, strict=True))
        assert drafted > 0, "nothing was drafted"
        return accepted / drafted


def damage_head(tensors: dict[str, torch.Tensor]) -> None:
    """Other numbers in the way into the head: it drafts from noise."""
    generator = torch.Generator().manual_seed(0)
    for projection in ("e_proj", "h_proj"):
        codes = tensors[f"mtp.0.{projection}.weight"]
        codes.copy_(torch.randint(0, 256, codes.shape, dtype=torch.uint8, generator=generator))


class Speculation:
    """For a class whose fixture `demo` serves the demo without speculation."""

    @pytest.fixture(scope="class")
    @classmethod
    def plain(cls, demo) -> list[list[int]]:
        """The token ids without speculation."""
        return token_ids(demo, asked())

    @pytest.fixture(scope="class")
    @classmethod
    def drafting(cls, tmp_path_factory) -> Iterator[Server]:
        log = tmp_path_factory.mktemp("drafting") / "server.log"
        with Server(DEMO, log, arguments=speculating("mtp", 1)) as server:
            yield server

    def test_a_draft_head_changes_no_token(self, drafting, plain):
        """One by one, then together; the long prompts' beginnings come from the cache then."""
        assert [token_ids(drafting, [prompt])[0] for prompt in asked()] == plain
        cached = drafting.counter(CACHED)
        assert token_ids(drafting, asked()) == plain
        if has_block_fp8():  # where vLLM caches prefixes
            assert drafting.counter(CACHED) - cached > sum(LETTERS.values()) - 3 * 1024

    def test_a_draft_head_changes_no_streamed_text(self, drafting, demo):
        for prompt in (asked()[0], asked()[3]):
            text = demo.complete(prompt=prompt, max_tokens=TOKENS)["choices"][0]["text"]
            assert drafting.stream(prompt=prompt, max_tokens=TOKENS) == text

    def test_drafts_of_the_tales_are_accepted(self, drafting):
        """Also where a prompt's beginning comes from the cache, which must hold what the head saw of it."""
        for given in (0, CUT, CUT):
            acceptance = Acceptance(drafting)
            token_ids(drafting, [tale.prompt + tale.continuation[:given] for tale in texts.tales()])
            assert acceptance.share() >= 0.9, given

    def test_a_drafting_server_passes_the_smoke_test(self, drafting):
        report = drafting.smoke_test(*SMOKE)
        assert report["status"] == 0, red(report)
        assert drafting.get("/kernels")["draft"] == "DeepSeekV4MTP"

    def test_a_damaged_head_changes_no_token_and_is_not_believed(self, plain, tmp_path):
        """Two tokens a step, the second from the first; prompts in chunks of 1,024."""
        checkpoint = plant(DEMO, tmp_path / "checkpoint", damage_head)
        arguments = (*speculating("mtp", 2), "--max-num-batched-tokens", "1024")
        with Server(checkpoint, tmp_path / "server.log", arguments=arguments) as server:
            acceptance = Acceptance(server)
            assert token_ids(server, asked()) == plain
            assert acceptance.share() < 0.3
            report = server.smoke_test(*SMOKE)
        assert red(report) == ["speculation"]

    def test_ngram_changes_no_token(self, plain, tmp_path):
        arguments = speculating("ngram", 3, prompt_lookup_min=2, prompt_lookup_max=4)
        with Server(DEMO, tmp_path / "server.log", arguments=arguments) as server:
            acceptance = Acceptance(server)
            assert token_ids(server, asked()) == plain
            assert acceptance.share() > 0
            report = server.smoke_test(*SMOKE)
        assert report["status"] == 0, red(report)
