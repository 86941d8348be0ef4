"""What a check works with: the subject, its answers, and the questions every check asks."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from smoke.client import Client, expect_ok, parse_json, parse_metrics, sse_events
from smoke.verdicts import Red

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived",
    "def fibonacci(n):\n",
    "The three primary colours are",
    "Water boils at a temperature of",
    "Dear Sir or Madam,\n\nI am writing to",
    "The history of the Roman Empire begins with",
    "To make a good cup of tea, first",
)


@dataclass(frozen=True)
class Subject:
    """What is being tested, found out once before the checks."""

    model: str  # empty: `problem` says why it is not known
    problem: Red | None = None
    max_model_len: int | None = None
    expected: dict | None = None  # the demo's expected.json; None for any other model


@dataclass(frozen=True)
class Completion:
    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    answer: dict

    @property
    def choice(self) -> dict:
        return self.answer["choices"][0]


@dataclass(frozen=True)
class Stream:
    text: str
    pieces: int
    finish_reason: str | None
    usage: dict


class Run:
    """One check's view of the world: the subject, the options, and a client with the check's deadline."""

    def __init__(self, client: Client, subject: Subject, options: argparse.Namespace) -> None:
        self.client, self.subject, self.options = client, subject, options

    @property
    def model(self) -> str:
        if self.subject.problem and not self.subject.model:
            problem = self.subject.problem
            raise Red(f"model name not known: {problem.detail}", problem.remedy or "pass --model NAME")
        return self.subject.model

    @property
    def demo(self) -> dict | None:
        return self.subject.expected

    @property
    def prompt(self) -> str:
        """A prompt this model has something sensible to say to."""
        return self.demo["documents"][0]["prompt"] if self.demo else PROMPTS[0]

    def complete(self, prompt: Any, max_tokens: int = 32, **extra: Any) -> Completion:
        """Greedy completion of a text or of token ids; Red unless the answer has text and usage."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **extra}
        answer = self.client.json("POST", "/v1/completions", body)
        choice, usage = first_choice(answer), answer.get("usage")
        if not isinstance(choice.get("text"), str):
            raise Red(f"choices[0].text is {choice.get('text')!r}, expected a string")
        if not isinstance(usage, dict) or any(
            not isinstance(usage.get(key), int) for key in ("prompt_tokens", "completion_tokens")
        ):
            raise Red(f"usage is {usage!r}, expected prompt_tokens and completion_tokens")
        return Completion(
            choice["text"],
            choice.get("finish_reason"),
            usage["prompt_tokens"],
            usage["completion_tokens"],
            answer,
        )

    def events(self, path: str, body: dict) -> Iterator[dict]:
        """The events of a streamed answer; Red unless it is server-sent events without an error, up to [DONE]."""
        response = self.client.open("POST", path, {**body, "stream": True})
        if response.status != 200:
            expect_ok(response.status, response.read().decode("utf-8", "replace"), f"POST {path}")
        kind = response.headers.get_content_type()
        if kind != "text/event-stream":
            raise Red(f"a stream of type {kind}, expected text/event-stream", "is a proxy rewriting answers?")
        count, done = 0, False
        for data in sse_events(self.client.lines(response, path)):
            if done:
                raise Red(f"an event after [DONE]: {data[:80]!r}")
            if data == "[DONE]":
                done = True
                continue
            event = parse_json(data, "stream event")
            if "error" in event:
                raise Red(f"error inside the stream: {event['error']}")
            count += 1
            yield event
        if not done:
            raise Red(f"the stream ended without [DONE] after {count} events")

    def stream(self, path: str, body: dict) -> Stream:
        """Read a streamed completion or chat to its end; Red unless it is well formed."""
        text, pieces, finish_reason, usage = "", 0, None, None
        for event in self.events(path, {**body, "stream_options": {"include_usage": True}}):
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                piece = choice["text"] if "text" in choice else message_text(choice.get("delta") or {})
                text += piece
                pieces += bool(piece)
                finish_reason = choice.get("finish_reason") or finish_reason
        for present, what in ((finish_reason, "finish_reason"), (usage, "usage chunk")):
            if not present:
                raise Red(f"the stream ended without {what} after {pieces} pieces")
        return Stream(text, pieces, finish_reason, usage)

    def kernels(self) -> dict:
        status, text = self.client.send("GET", "/kernels")
        if status == 404:
            raise Red(
                "the server has no /kernels",
                "this is not our image: serve with `make demo` or compose.yaml, or pass --no-kernels "
                "to check a foreign server",
            )
        expect_ok(status, text, "GET /kernels")
        return parse_json(text, "GET /kernels")

    def metrics(self) -> dict[str, list[tuple[dict[str, str], float]]]:
        status, text = self.client.send("GET", "/metrics")
        expect_ok(status, text, "GET /metrics")
        return parse_metrics(text)


def first_choice(answer: dict) -> dict:
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Red(f"the answer has no choices[0]: {json.dumps(answer)[:160]}")
    return choices[0]


def message_text(message: dict) -> str:
    """Answer text of a chat message or delta, with the reasoning that precedes it."""
    reasoning = message.get("reasoning") or message.get("reasoning_content") or ""
    return reasoning + (message.get("content") or "")


def bad_logprobs(logprobs: Iterable[Any]) -> str:
    """What is wrong with the log-probabilities of chosen tokens; empty when nothing is."""
    for i, value in enumerate(logprobs):
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            return f"log-probability {i} is {value!r}"
        if value > 1e-5:
            return f"log-probability {i} is {value}, above zero"
        if value <= -9999:
            return f"log-probability {i} is {value}, the server's stand-in for minus infinity"
    return ""


def first_difference(expected: str, got: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(expected, got)) if a != b), min(len(expected), len(got)))
    return f"at character {at} expected {expected[at : at + 24]!r}, got {got[at : at + 24]!r}"
