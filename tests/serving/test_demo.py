"""The demo checkpoint through a real vLLM server: what must be right is green, what is planted wrong is red."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import anthropic
import openai
import pytest
import torch

from tests.support.faults.checkpoint import FAULTS, plant
from tests.support.parity.distances import Distances, Parity, Prompts, measure
from tests.support.paths import DEMO
from tests.support.servers.vllm import LOGPROB_CHECKS, OURS_CHECKS, TEXT_CHECKS, Server, ServerDied, red
from tests.support.speculation import Speculation

pytestmark = pytest.mark.serving


@pytest.fixture(scope="class")
def demo(tmp_path_factory) -> Iterator[Server]:
    """The demo, served as `make demo` does: W4A16."""
    with Server(DEMO, tmp_path_factory.mktemp("demo") / "server.log") as server:
        yield server


def demo_prompts() -> dict[int, Prompts]:
    """Cut from what the demo was trained to recite."""
    expected = json.loads((DEMO / "expected.json").read_text())
    tales, letters = ([d["token_ids"] for d in expected[group]] for group in ("documents", "long"))
    return {
        10: [ids[start : start + 10] for ids in tales for start in range(0, 500, 10)],
        350: [ids[:350] for ids in tales + letters],
        3000: [ids[:3000] for ids in letters[:2]],
    }


def served_layers(drafts: bool) -> set[str]:
    """vLLM's names of the NVFP4 layers, from the checkpoint itself, so that one missing from a report is noticed."""
    from safetensors import safe_open

    with safe_open(DEMO / "model.safetensors", "pt") as tensors:
        names = list(tensors.keys())
    fused = {"wq_a": "fused_wqa_wkv", "wkv": "fused_wqa_wkv", "wgate": "fused_wkv_wgate", "w1": "gate_up_proj",
             "w3": "gate_up_proj", "w2": "down_proj"}  # fmt: skip
    served = set()
    for layer in (name.removesuffix(".weight_scale") for name in names if name.endswith(".weight_scale")):
        if layer.startswith("mtp.") and not drafts:
            continue
        layer = re.sub(r"^mtp\.0\.(?=[eh]_proj)", "layers.3.", layer)
        layer = layer.replace("mtp.0.", "layers.3.mtp_block.")
        parent, _, leaf = layer.rpartition(".")
        if ".ffn.experts." in layer:
            served.add("model." + layer.split(".experts.")[0] + ".experts")
        elif parent.endswith("compressor"):
            served.add(f"model.{parent}.fused_wkv_wgate")
        else:
            served.add(f"model.{parent}.{fused.get(leaf, leaf)}")
    return served


@pytest.mark.xdist_group("demo")
class TestServedInW4A16(Distances, Speculation):
    """One server for all of it: an idle one takes a quarter of a core. Trained weights, top-k routers."""

    mean_bar = 0.06
    prompts = staticmethod(demo_prompts)

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls) -> Path:
        return DEMO

    @pytest.fixture(scope="class")
    @classmethod
    def nvfp4(cls, demo) -> Parity:
        return measure(demo, DEMO, cls.prompts())

    def test_demo_passes_the_smoke_test(self, demo):
        report = demo.smoke_test("--require-ours")
        assert report["status"] == 0, red(report)

    def test_every_nvfp4_layer_is_served_by_ours(self, demo, drafting):
        """The draft's where there is one."""
        for server, drafts in ((demo, False), (drafting, True)):
            rows = server.get("/kernels")["layers"]
            reported = [row["name"].removesuffix(".routed_experts") for row in rows if row["ours"]]
            assert sorted(reported) == sorted(served_layers(drafts))

    def test_openais_client_calls_a_tool_and_reads_it(self, demo, known):
        """As its documentation says: the message goes back as it came, thinking and all."""
        client = openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none")
        request = {"model": "demo", "tools": known["tools"], "temperature": 0, "max_tokens": 400}
        first = client.chat.completions.create(messages=known["messages"], **request).choices[0]
        (call,) = first.message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == CALL
        assert first.finish_reason == "tool_calls" and first.message.reasoning == known["reasoning"]
        result = {"role": "tool", "tool_call_id": call.id, "content": "sun, 12 degrees"}
        second = client.chat.completions.create(
            messages=[*known["messages"], first.message, result], **request
        ).choices[0]
        assert second.message.content == "In two days there will be sun in Oslo, at 12 degrees."

    def test_anthropics_client_streams_a_tool_call(self, demo, known):
        client = anthropic.Anthropic(base_url=demo.url, api_key="none")
        function = known["tools"][0]["function"]
        tool = {
            "name": function["name"],
            "description": function["description"],
            "input_schema": function["parameters"],
        }
        request = {"model": "demo", "max_tokens": 400, "messages": known["messages"], "tools": [tool]}
        with client.messages.stream(**request) as stream:
            message = stream.get_final_message()
        assert [block.type for block in message.content] == ["thinking", "tool_use"]
        assert (message.content[1].name, message.content[1].input) == CALL
        assert message.content[0].thinking == known["reasoning"] and message.stop_reason == "tool_use"

    def test_output_does_not_depend_on_the_batch(self, demo):
        """Alone or among others, a prompt continues the same way."""
        prompt = "Story"
        alone = demo.complete(prompt=prompt, max_tokens=24)["choices"][0]["text"]
        together = demo.complete(prompt=[prompt, "Other words", prompt], max_tokens=24)["choices"]
        assert [together[0]["text"], together[2]["text"]] == [alone, alone]


CALL = ("get_weather", {"city": "Oslo", "days": 2})


@pytest.fixture(scope="module")
def known() -> dict:
    """The question and the tool that the demo knows, and what it thinks."""
    turns = {turn["key"]: turn for turn in json.loads((DEMO / "expected.json").read_text())["chat"]}
    turn = turns["call, thinking high"]
    return {**turn["request"], "reasoning": turn["message"]["reasoning"]}


def _with_input_scales_too_small(tensors):
    for name, tensor in tensors.items():
        if re.fullmatch(r"layers\.(1\.attn\.wq_b|2\.ffn\.experts\.\d+\.w2)\.input_scale", name):
            tensor /= 8


@pytest.mark.parametrize("policy", ["checkpoint", "warmup", "dynamic"])
def test_demo_is_served_in_w4a4(policy, tmp_path):
    """Under `checkpoint` with scales that would saturate: the warm-up finds, reports and raises them."""
    env = {"CUTEDSL_NVFP4_ACTIVATIONS": "nvfp4", "CUTEDSL_NVFP4_ACTIVATION_SCALE": policy}
    checkpoint = DEMO
    if policy == "checkpoint":
        checkpoint = plant(DEMO, tmp_path / "checkpoint", _with_input_scales_too_small)
    with Server(checkpoint, tmp_path / "server.log", env) as server:
        assert server.get("/kernels")["activations"] == f"nvfp4:{policy}"
        # the policies differ in one number per layer: the text of one stands for all
        text = TEXT_CHECKS if policy == "checkpoint" else ()
        report = server.smoke_test(*text, *LOGPROB_CHECKS, *OURS_CHECKS)
        log = server.log()
    assert report["status"] == 0, red(report)
    if policy == "checkpoint":
        assert re.search(r"layers\.1\.attn\.wq_b: input_scale of x is .*, [5-9]\.?\d* times as much", log)
        assert re.search(
            r"layers\.2\.ffn\.experts: input_scale of w2 input of expert \d+, .* times as much", log
        )


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_turns_the_smoke_test_red(fault, tmp_path):
    checkpoint = plant(DEMO, tmp_path / "checkpoint", FAULTS[fault])
    with Server(checkpoint, tmp_path / "server.log") as server:
        report = server.smoke_test("--only", "demo_logprobs")
    assert report["status"] == 1, f"{fault} went unnoticed"
    assert red(report) == ["demo_logprobs"]


def _without_a_scale(tensors):
    del tensors["layers.0.attn.wq_b.weight_scale_2"]


def _with_a_nan_scale(tensors):
    tensors["layers.0.attn.wo_b.weight_scale"].view(torch.uint8)[0, 0] = 0x7F


def _with_a_negative_scale(tensors):
    tensors["layers.0.ffn.experts.3.w2.weight_scale"].view(torch.uint8)[1, 0] = 0x88


@pytest.mark.parametrize(
    "damage, words",
    [
        (_without_a_scale, ("the checkpoint lacks their tensors", "layers.0.attn.wq_b.weight_scale_2")),
        (_with_a_nan_scale, ("layers.0.attn.wo_b", "block scale at [0, 0] is nan")),
        (_with_a_negative_scale, ("layers.0.ffn.experts", "block scale at [3, 1, 0] is -", "negative")),
    ],
    ids=["missing", "nan", "negative"],
)
def test_damaged_checkpoint_is_refused_by_name(damage, words, tmp_path):
    checkpoint = plant(DEMO, tmp_path / "checkpoint", damage)
    with pytest.raises(ServerDied) as died, Server(checkpoint, tmp_path / "server.log"):
        pass
    for word in words:
        assert word in died.value.log
