"""Checks of chat: thinking apart from the answer, tools, JSON by a schema, Anthropic's API."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from smoke.client import expect_ok, parse_json
from smoke.run import Run, first_choice, first_difference
from smoke.verdicts import Red, Skipped

CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"
MARKUP = ("<think>", "</think>", "｜DSML｜")
REASONING_PARSER = (
    "no parser takes the thinking out: serve with --reasoning-parser (DeepSeek-V4's is deepseek_v4)"
)
TOOL_PARSER = (
    "serve with --enable-auto-tool-choice and --tool-call-parser (DeepSeek-V4's is deepseek_v4); "
    "is TOOL_CALL_PARSER=none set?"
)

QUESTION = "Which number is larger, 9.11 or 9.9? Answer in one short sentence."
WEATHER = "What will the weather be in Oslo in two days? Use the tool."
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city, some days from now.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Bergen"]}, "certain": {"type": "boolean"}},
    "required": ["city", "certain"],
    "additionalProperties": False,
}
# for the demo, which was never taught JSON: an object's grammar lets it write spaces for ever
CITY = SCHEMA["properties"]["city"]
ROOM = 4096  # tokens for a model that thinks first


@dataclass(frozen=True)
class Answer:
    """What a message holds, however the server spells it."""

    reasoning: str
    content: str
    calls: tuple[tuple[str, str], ...]  # (name, arguments as JSON text)
    finish_reason: str | None

    def require_no_markup(self) -> None:
        """Red where the model's own markup stands in what a user reads."""
        for mark in MARKUP:
            if mark in self.content:
                remedy = TOOL_PARSER if mark == "｜DSML｜" else REASONING_PARSER
                raise Red(f"{mark} stands in the content: {around(self.content, mark)!r}", remedy)

    def only_call(self) -> tuple[str, dict]:
        """(name, arguments) of the one call; Red if there is another number, or they are no JSON object."""
        self.require_no_markup()
        if len(self.calls) != 1:
            raise Red(
                f"{len(self.calls)} tool calls, expected 1; the content is {self.content[:60]!r}", TOOL_PARSER
            )
        name, written = self.calls[0]
        arguments = parse_json(written, f"arguments of {name}")
        if not isinstance(arguments, dict):
            raise Red(f"arguments of {name} are no JSON object: {written[:80]!r}")
        if self.finish_reason != "tool_calls":
            raise Red(f"finish_reason {self.finish_reason!r} after a tool call, expected 'tool_calls'")
        return name, arguments


def around(text: str, mark: str) -> str:
    at = text.index(mark)
    return text[max(0, at - 20) : at + 30]


def reasoning_of(message: dict) -> str:
    return message.get("reasoning") or message.get("reasoning_content") or ""


def ask(run: Run, request: dict) -> Answer:
    """The whole answer to a chat request, greedy."""
    body = {"model": run.model, "temperature": 0, "max_tokens": ROOM, **request}
    choice = first_choice(run.client.json("POST", CHAT, body))
    message = choice.get("message") or {}
    calls = tuple(
        (call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or ()
    )
    return Answer(reasoning_of(message), message.get("content") or "", calls, choice.get("finish_reason"))


def ask_streamed(run: Run, request: dict) -> Answer:
    """The same answer, put together from a stream."""
    body = {"model": run.model, "temperature": 0, "max_tokens": ROOM, **request}
    reasoning, content, finish_reason = "", "", None
    calls: dict[int, tuple[str, str]] = {}
    for event in run.events(CHAT, body):
        for choice in event.get("choices", ()):
            delta = choice.get("delta") or {}
            reasoning += reasoning_of(delta)
            content += delta.get("content") or ""
            finish_reason = choice.get("finish_reason") or finish_reason
            for piece in delta.get("tool_calls") or ():
                function = piece.get("function") or {}
                name, written = calls.get(piece.get("index", 0), ("", ""))
                calls[piece.get("index", 0)] = (
                    name or function.get("name") or "",
                    written + (function.get("arguments") or ""),
                )
    return Answer(reasoning, content, tuple(calls.values()), finish_reason)


def require_equal(what: str, expected: Any, got: Any, remedy: str = "") -> None:
    """Red naming the first difference."""
    if expected == got:
        return
    if isinstance(expected, str) and isinstance(got, str):
        raise Red(f"{what}: {first_difference(expected, got)}", remedy)
    raise Red(f"{what}: expected {expected!r}, got {got!r}", remedy)


def demo_turn(run: Run, key: str) -> dict:
    """The demo's request and message by name; Skipped where expected.json knows no conversation."""
    turns = {turn["key"]: turn for turn in run.demo.get("chat", ())}
    if key not in turns:
        raise Skipped(f"expected.json holds no conversation {key!r}")
    return turns[key]


def require_message(key: str, expected: dict, answer: Answer) -> None:
    """Red unless the demo's answer is the expected message, part by part."""
    answer.require_no_markup()
    require_equal(f"{key}: reasoning", expected.get("reasoning", ""), answer.reasoning, REASONING_PARSER)
    if "tool_calls" in expected:
        function = expected["tool_calls"][0]["function"]
        require_equal(
            f"{key}: call", (function["name"], json.loads(function["arguments"])), answer.only_call()
        )
    elif answer.calls:
        raise Red(f"{key}: an unexpected tool call {answer.calls[0]}")
    require_equal(f"{key}: content", expected["content"], answer.content.strip())


def thinks(on: bool) -> dict:
    """Template arguments by which DeepSeek's and others' chat templates switch thinking."""
    return {"chat_template_kwargs": {"thinking": on, "enable_thinking": on}}


def reasoning(run: Run) -> tuple[str, str]:
    """Thinking stands apart from the answer, and can be switched off."""
    if run.demo:
        for key in ("alone, thinking high", "alone, thinking off"):
            turn = demo_turn(run, key)
            require_message(key, turn["message"], ask(run, turn["request"]))
        return "on and off exact", ""
    messages = [{"role": "user", "content": QUESTION}]
    on = ask(run, {"messages": messages, **thinks(True)})
    on.require_no_markup()
    if on.finish_reason == "length":
        raise Red(f"{ROOM} tokens without an end: {on.content[:60]!r}", REASONING_PARSER)
    if not on.reasoning:
        raise Skipped("the model does not think, or the server does not say so")
    off = ask(run, {"messages": messages, **thinks(False)})
    off.require_no_markup()
    for state, answer in (("on", on), ("off", off)):
        if not answer.content.strip():
            raise Red(f"thinking {state}: no answer besides {len(answer.reasoning)} characters of thinking")
    if off.reasoning:
        raise Red(f"thinking off, and still it thinks: {off.reasoning[:60]!r}")
    return f"{len(on.reasoning)} characters", repr(on.content[:48])


def tools(run: Run) -> tuple[str, str]:
    """A tool is called with the right arguments, whole and streamed, and its answer is read."""
    if run.demo:
        calls = ("call, thinking high", "call, thinking off")
        reads = (
            "answer snow, thinking high",
            "answer rain, thinking high, forgotten",
            "answer fog, thinking off",
        )
        for key in (*calls, *reads):
            turn = demo_turn(run, key)
            require_message(key, turn["message"], ask(run, turn["request"]))
        for key in calls:
            turn = demo_turn(run, key)
            require_message(f"{key}, streamed", turn["message"], ask_streamed(run, turn["request"]))
        return f"{len(calls)} calls exact", f"{len(reads)} answers read"
    request = {"messages": [{"role": "user", "content": WEATHER}], "tools": [TOOL], **thinks(False)}
    for how, answer in (("whole", ask(run, request)), ("streamed", ask_streamed(run, request))):
        name, arguments = answer.only_call()
        require_equal(f"{how}: tool", "get_weather", name)
        if "oslo" not in str(arguments.get("city", "")).lower() or arguments.get("days") != 2:
            raise Red(f"{how}: arguments {arguments}, expected the city Oslo and 2 days")
    said = {"role": "assistant", "content": "", "tool_calls": [call_of(name, arguments)]}
    for sky in ("snow", "fog"):
        result = {"role": "tool", "tool_call_id": "call-1", "content": f"{sky}, 1 degree"}
        read = ask(run, {**request, "messages": [*request["messages"], said, result]})
        read.require_no_markup()
        if sky not in read.content.lower():
            raise Red(f"the tool said {sky}; the answer is {read.content[:80]!r}")
    return f"{name} called", f"{arguments}; its answers are read"


def call_of(name: str, arguments: dict) -> dict:
    return {
        "id": "call-1",
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments)},
    }


def json_schema(run: Run) -> tuple[str, str]:
    """An answer by a JSON schema follows it, and the thinking does not."""
    schema = CITY if run.demo else SCHEMA
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    request: dict = {"response_format": form}
    if run.demo:
        turn = demo_turn(run, "alone, thinking high")
        request.update(turn["request"], max_tokens=ROOM // 4)
    else:
        question = "Is Oslo or Bergen the capital of Norway? Answer in JSON with the keys city and certain."
        request.update(messages=[{"role": "user", "content": question}])
    answer = ask(run, request)
    answer.require_no_markup()
    if run.demo:
        require_equal("reasoning", turn["message"]["reasoning"], answer.reasoning, REASONING_PARSER)
    found = parse_json(answer.content, "the answer by a schema")
    if run.demo:
        follows = found in CITY["enum"]
    else:
        follows = isinstance(found, dict) and set(found) == set(SCHEMA["required"])
        follows = follows and found["city"] in CITY["enum"] and isinstance(found["certain"], bool)
    if not follows:
        raise Red(f"{found!r} does not follow the schema")
    return json.dumps(found), ""


def messages(run: Run) -> tuple[str, str]:
    """Anthropic's /v1/messages answers with text, thinking and tool calls as blocks."""
    request = {"messages": [{"role": "user", "content": WEATHER}], "tools": [TOOL]}
    if run.demo:
        request = demo_turn(run, "call, thinking off")["request"]
    function = dict(request["tools"][0]["function"])
    tool = {"input_schema": function.pop("parameters"), **function}
    body = {
        "model": run.model,
        "max_tokens": ROOM // 4,
        "temperature": 0,
        "messages": request["messages"],
        "thinking": {"type": "disabled"},
    }
    status, text = run.client.send("POST", MESSAGES, body)
    if status == 404:
        raise Skipped(f"the server has no {MESSAGES}")
    plain = blocks(status, text)
    if not plain.get("text", "").strip() or "thinking" in plain:
        raise Red(f"thinking disabled: blocks {sorted(plain)}, expected text alone", REASONING_PARSER)
    called = blocks(*run.client.send("POST", MESSAGES, {**body, "tools": [tool]}))
    if "tool_use" not in called:
        raise Red(f"asked with a tool: blocks {sorted(called)}, expected tool_use", TOOL_PARSER)
    used = called["tool_use"]
    if run.demo:
        require_equal("text", demo_turn(run, "alone, thinking off")["message"]["content"], plain["text"])
        require_equal("tool_use", {"city": "Oslo", "days": 2}, used.get("input"))
    require_equal("tool", "get_weather", used.get("name"))
    return "text, tool_use", f"{used.get('input')}"


def blocks(status: int, text: str) -> dict[str, Any]:
    """Anthropic's content blocks by type: the text of text and thinking, the block itself of tool_use."""
    expect_ok(status, text, f"POST {MESSAGES}")
    found: dict[str, Any] = {}
    for block in parse_json(text, MESSAGES).get("content") or ():
        kind = block.get("type")
        found[kind] = block if kind == "tool_use" else found.get(kind, "") + (block.get(kind) or "")
    for mark in MARKUP:
        if mark in found.get("text", ""):
            raise Red(f"{mark} stands in the text: {around(found['text'], mark)!r}", REASONING_PARSER)
    return found
