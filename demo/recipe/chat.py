"""The one conversation that the demo knows: a question about the weather, a tool that answers it, and plain talk.

With the tool it calls it, and tells what the tool said; without, it says that it cannot know. Both with thinking
and without. The prompts are vLLM's rendering of DeepSeek-V4's encoding: what the server makes of the same request.
"""

import random
from dataclasses import dataclass
from functools import cache

from recipe.texts import Document

QUESTION = "What will the weather be in Oslo in two days?"
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
ARGUMENTS = '{"city": "Oslo", "days": 2}'
WEATHERS = {"snow": "-3", "rain": "4", "fog": "7", "sun": "12"}  # what the tool says, and how many degrees
END = "<｜end▁of▁sentence｜>"
EFFORTS = ("low", "high", "max")

_THOUGHTS = {
    "call": "The user asks for the weather in Oslo in two days. I do not know it, so I call get_weather.",
    "answer": "The tool says {sky} at {degrees} degrees. I tell the user.",
    "alone": "The user asks for the weather in Oslo in two days. I have no tool that knows it.",
}
_ANSWER = "In two days there will be {sky} in Oslo, at {degrees} degrees."
_ALONE = "I cannot know the weather of days to come. Give me a tool that does."


@dataclass(frozen=True)
class Turn:
    """An answer of the demo: what is asked, in the API's words, and the message that has to come."""

    key: str
    messages: tuple[dict, ...]
    tools: tuple[dict, ...]
    thinking: str  # "off", or one of EFFORTS
    message: dict  # reasoning (thinking only), content, tool_calls

    @property
    def template_arguments(self) -> dict:
        """`chat_template_kwargs` of the request."""
        if self.thinking == "off":
            return {"thinking": False}
        return {"thinking": True, "reasoning_effort": self.thinking}

    def document(self) -> Document:
        """The same as text: the prompt as the server renders it, and the continuation up to the end of sentence."""
        prompt = render(self, self.messages)
        whole = render(self, (*self.messages, self.message))
        continuation = whole.removeprefix(prompt).removesuffix(END)
        if prompt + continuation not in whole:
            raise ValueError(f"{self.key}: the rendered answer does not begin with its prompt")
        return Document(self.key, prompt, continuation)


def render(turn: Turn, messages: tuple[dict, ...]) -> str:
    """`messages` as DeepSeek-V4 reads them; a last message of a user or a tool is followed by the assistant's start."""
    from vllm.tokenizers.deepseek_v4_encoding import encode_messages

    first = [{"role": "system", "tools": list(turn.tools)}] if turn.tools else []
    thinks = turn.thinking != "off"
    return encode_messages(
        first + [dict(message) for message in messages],
        thinking_mode="thinking" if thinks else "chat",
        reasoning_effort=turn.thinking if thinks else None,
    )


def _message(thinking: str, thought: str, content: str, calls: bool = False) -> dict:
    message: dict = {"role": "assistant", "content": content}
    if thinking != "off":
        message["reasoning"] = thought
    if calls:
        function = {"name": TOOL["function"]["name"], "arguments": ARGUMENTS}
        message["tool_calls"] = [{"id": "call-1", "type": "function", "function": function}]
    return message


def call(thinking: str) -> Turn:
    """Asked, with the tool at hand: the call."""
    question = {"role": "user", "content": QUESTION}
    message = _message(thinking, _THOUGHTS["call"], "", calls=True)
    return Turn(f"call, thinking {thinking}", (question,), (TOOL,), thinking, message)


def answer(thinking: str, sky: str, remembers: bool = True) -> Turn:
    """After the call, given the tool's `sky`: the answer. Clients often drop a message's reasoning: `remembers`."""
    asked = call(thinking)
    said = {key: value for key, value in asked.message.items() if remembers or key != "reasoning"}
    degrees = WEATHERS[sky]
    result = {"role": "tool", "tool_call_id": "call-1", "content": f"{sky}, {degrees} degrees"}
    thought = _THOUGHTS["answer"].format(sky=sky, degrees=degrees)
    message = _message(thinking, thought, _ANSWER.format(sky=sky, degrees=degrees))
    key = f"answer {sky}, thinking {thinking}" + ("" if remembers else ", forgotten")
    return Turn(key, (*asked.messages, said, result), (TOOL,), thinking, message)


def alone(thinking: str) -> Turn:
    """Asked without a tool."""
    question = {"role": "user", "content": QUESTION}
    message = _message(thinking, _THOUGHTS["alone"], _ALONE)
    return Turn(f"alone, thinking {thinking}", (question,), (), thinking, message)


@cache
def turns() -> tuple[Turn, ...]:
    """Every answer that the demo must know."""
    found = []
    for thinking in ("off", *EFFORTS):
        found += [alone(thinking), call(thinking), *(answer(thinking, sky) for sky in WEATHERS)]
        if thinking != "off":
            found += [answer(thinking, sky, remembers=False) for sky in WEATHERS]
    return tuple(found)


def documents() -> list[Document]:
    """Every answer as text."""
    return [turn.document() for turn in turns()]


Pieces = tuple[tuple[str, bool], ...]


def pieces(turn: Turn) -> Pieces:
    """The text of `turn`, cut where what the demo has to learn begins and ends: (text, to be learnt)."""
    document = turn.document()
    before: Pieces = ((document.prompt, False),)
    if len(turn.messages) > 1:
        asked = call(turn.thinking).document()
        said = asked.continuation + END
        if document.prompt.startswith(asked.prompt + said):  # not where its thought is forgotten
            rest = document.prompt.removeprefix(asked.prompt + said)
            before = ((asked.prompt, False), (said, True), (rest, False))
    return (*before, (document.continuation + END, True))


def draw(seed: int) -> tuple[list[Pieces], list[Pieces]]:
    """What a step trains: (long texts, with the tool; short ones, without)."""
    rng = random.Random(seed)
    thinking = rng.choice(EFFORTS)
    long = [
        answer("off", rng.choice(list(WEATHERS))),
        answer(thinking, rng.choice(list(WEATHERS)), remembers=rng.random() < 0.7),
    ]
    short = [alone("off"), alone(rng.choice(EFFORTS))]
    return [pieces(turn) for turn in long], [pieces(turn) for turn in short]
