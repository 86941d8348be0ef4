"""What a right server answers in chat, and what one makes of it that lacks a parser or a part."""

import copy
import json

QUESTION = "What will the weather be in Oslo in two days?"
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
CALL = {"name": "get_weather", "arguments": '{"city": "Oslo", "days": 2}'}
THOUGHT = "I think, so I am asked to."

FAULTS = {  # fault -> the checks that must turn red
    "no_reasoning_parser": {"reasoning", "tools", "json_schema"},
    "thinking_never_off": {"reasoning", "tools", "messages"},
    "no_tool_parser": {"tools", "messages"},
    "tool_markup": {"tools", "messages"},
    "wrong_arguments": {"tools", "messages"},
    "two_calls": {"tools"},
    "streamed_arguments_cut": {"tools"},
    "tool_result_unread": {"tools"},
    "no_schema": {"json_schema"},
    "key_of_no_schema": {"json_schema"},
    "messages_without_tools": {"messages"},
}
# another model is asked with thinking off where tools are concerned, and need not think at all in the other checks
FAULTS_OF_ANOTHER_MODEL = {
    **FAULTS,
    "no_reasoning_parser": {"reasoning", "json_schema"},
    "thinking_never_off": {"reasoning", "messages"},
    "wrong_arguments": {"tools"},
}


def conversations() -> list[dict]:
    """The part `chat` of expected.json, for the fake demo."""
    question = {"role": "user", "content": QUESTION}
    called = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "type": "function", "function": CALL}],
    }
    turns = []
    for thinking in ("off", "high"):
        arguments = {"thinking": thinking != "off"}
        reasoning = {} if thinking == "off" else {"reasoning": THOUGHT}

        def turn(key: str, messages: list, message: dict, tools: bool = True, arguments=arguments) -> None:
            request = {"messages": messages, "chat_template_kwargs": arguments, "max_tokens": 300}
            turns.append(
                {"key": key, "request": request | ({"tools": [TOOL]} if tools else {}), "message": message}
            )

        turn(
            f"alone, thinking {thinking}", [question], {"content": "I cannot know.", **reasoning}, tools=False
        )
        turn(f"call, thinking {thinking}", [question], {**called, **reasoning})
        for sky in ("snow", "rain", "fog"):
            result = {"role": "tool", "tool_call_id": "1", "content": f"{sky}, 1 degree"}
            for forgotten in ("", ", forgotten"):
                said = called if forgotten else {**called, **reasoning}
                message = {"content": f"There will be {sky}.", **reasoning}
                turn(f"answer {sky}, thinking {thinking}{forgotten}", [question, said, result], message)
    return turns


def by_schema(request: dict) -> dict:
    """The content that follows the request's schema, if it has one."""
    if "response_format" not in request:
        return {}
    schema = request["response_format"]["json_schema"]["schema"]
    return {"content": '"Oslo"' if "enum" in schema else '{"city": "Oslo", "certain": true}'}


def right_message(request: dict, known: list[dict]) -> dict:
    """The message that a right server gives."""
    arguments = request.get("chat_template_kwargs") or {}
    thinks = arguments.get("thinking", True)
    for turn in known:
        asked = turn["request"]
        same = all(asked.get(key) == request.get(key) for key in ("messages", "tools"))
        if same and asked["chat_template_kwargs"]["thinking"] == thinks:
            return copy.deepcopy(turn["message"]) | by_schema(request)
    message = {"role": "assistant", "content": "9.9 is the larger one."} | (
        {"reasoning": THOUGHT} if thinks else {}
    )
    last = request["messages"][-1]
    if last["role"] == "tool":
        message["content"] = f"There will be {last['content'].split(',')[0]}."
    elif request.get("tools"):
        message |= {"content": "", "tool_calls": [{"id": "1", "type": "function", "function": dict(CALL)}]}
    return message | by_schema(request)


def message_of(request: dict, fault: str, known: list[dict]) -> dict | None:
    """The message of a server with `fault`; None: it answers 400, as vLLM does without a tool parser."""
    message = right_message(request, known)
    calls = message.get("tool_calls")
    if fault == "no_tool_parser" and request.get("tools"):
        return None
    if fault == "no_reasoning_parser" and "reasoning" in message:
        message["content"] = f"{message.pop('reasoning')}</think>{message['content']}"
    if fault == "thinking_never_off":
        message["reasoning"] = THOUGHT
    if calls and fault == "tool_markup":
        del message["tool_calls"]
        message["content"] = '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="get_weather">'
    if calls and fault == "wrong_arguments":
        calls[0]["function"] = {**CALL, "arguments": '{"city": "Oslo", "days": 3}'}
    if calls and fault == "two_calls":
        calls.append(calls[0])
    if fault == "tool_result_unread" and request["messages"][-1]["role"] == "tool":
        message["content"] = "I do not know."
    if "response_format" in request and fault in ("no_schema", "key_of_no_schema"):
        message["content"] = {"no_schema": "Oslo.", "key_of_no_schema": '{"city": "Oslo"}'}[fault]
    return message


def deltas_of(message: dict, fault: str) -> list[dict]:
    """The message as the deltas of a stream."""
    deltas: list[dict] = [{"role": "assistant", "content": ""}]
    for key in ("reasoning", "content"):
        text = message.get(key) or ""
        deltas += [{key: text[at : at + 7]} for at in range(0, len(text), 7)]
    for index, call in enumerate(message.get("tool_calls") or ()):
        name, written = call["function"]["name"], call["function"]["arguments"]
        deltas.append({"tool_calls": [{"index": index, "function": {"name": name, "arguments": ""}}]})
        pieces = [written[at : at + 5] for at in range(0, len(written), 5)]
        for piece in pieces[:-1] if fault == "streamed_arguments_cut" else pieces:
            deltas.append({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})
    return deltas


def finish_of(message: dict) -> str:
    return "tool_calls" if message.get("tool_calls") else "stop"


def blocks_of(message: dict, fault: str) -> list[dict]:
    """The message as Anthropic's content blocks."""
    blocks = []
    if message.get("reasoning"):
        blocks.append({"type": "thinking", "thinking": message["reasoning"]})
    if message.get("content"):
        blocks.append({"type": "text", "text": message["content"]})
    if fault != "messages_without_tools":
        for call in message.get("tool_calls") or ():
            function = call["function"]
            blocks.append(
                {"type": "tool_use", "name": function["name"], "input": json.loads(function["arguments"])}
            )
    return blocks


def as_chat(request: dict) -> dict:
    """A request of Anthropic's API as one of OpenAI's."""
    tools = [TOOL] if request.get("tools") else None
    arguments = {"thinking": request.get("thinking", {}).get("type") != "disabled"}
    return {"messages": request["messages"], "chat_template_kwargs": arguments} | (
        {"tools": tools} if tools else {}
    )
