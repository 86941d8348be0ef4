"""What transformers says about the exported checkpoint: greedy text, log-probabilities, margins."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from recipe import chat, texts
from recipe.model import EOS, tokenizer

TOLERANCE = {"mean_abs_dlogp_w4a16": 0.06, "mean_abs_dlogp_w4a4": 0.25}


@dataclass(frozen=True)
class Reading:
    """Teacher-forced reading of one document, prompt and continuation and EOS."""

    ids: list[int]
    prompt_length: int
    logprobs: torch.Tensor  # f32 [len(ids) - 1], of ids[1:]
    wrong: int  # tokens of the continuation (EOS included) that greedy decoding would not choose
    margin: float  # smallest distance in nats between the right token and the best other one

    @property
    def answer_logprobs(self) -> torch.Tensor:
        return self.logprobs[self.prompt_length - 1 :]


@torch.no_grad()
def token_logprobs(model, ids: list[int]) -> torch.Tensor:
    """f32 [len(ids) - 1], the log-probabilities of ids[1:], in one uncached forward pass."""
    row = torch.tensor([ids])
    logprobs = F.log_softmax(model(row[:, :-1], use_cache=False).logits[0].float(), dim=-1)
    return logprobs.gather(1, row[0, 1:, None])[:, 0]


@torch.no_grad()
def read(model, document: texts.Document) -> Reading:
    """Score `document` in one uncached forward pass."""
    coder = tokenizer()
    prompt_length = len(coder.encode(document.prompt).ids)
    ids = coder.encode(document.prompt + document.continuation).ids + [EOS]
    row = torch.tensor([ids])
    logprobs = F.log_softmax(model(row[:, :-1], use_cache=False).logits[0].float(), dim=-1)
    right = logprobs.gather(1, row[0, 1:, None])[:, 0]
    best_other = logprobs.scatter(1, row[0, 1:, None], float("-inf")).amax(-1)
    margins = (right - best_other)[prompt_length - 1 :]
    return Reading(ids, prompt_length, right, int((margins <= 0).sum()), margins.min().item())


@torch.no_grad()
def greedy(model, document: texts.Document) -> str:
    """What transformers' cached greedy decoding continues the prompt with, up to and excluding EOS."""
    coder = tokenizer()
    prompt = coder.encode(document.prompt).ids
    limit = len(coder.encode(document.continuation).ids) + 1
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=limit, do_sample=False, use_cache=True, eos_token_id=EOS
    )[0].tolist()
    continuation = output[len(prompt) :]
    if EOS in continuation:
        continuation = continuation[: continuation.index(EOS)]
    return coder.decode(continuation, skip_special_tokens=False)


def require_recited(model, document: texts.Document) -> None:
    """Raise ValueError, naming the character, unless greedy decoding gives the document's continuation."""
    text = greedy(model, document)
    if text != document.continuation:
        at = next(
            (i for i, (a, b) in enumerate(zip(text, document.continuation, strict=False)) if a != b),
            min(len(text), len(document.continuation)),
        )
        raise ValueError(
            f"{document.key}: greedy text leaves the document at character {at}: got {text[at : at + 40]!r}, "
            f"expected {document.continuation[at : at + 40]!r}; train longer or with another seed"
        )


def _record(model, document: texts.Document, first_logprob: int | None = None) -> dict:
    """Greedy text and log-probabilities from token `first_logprob` on (default: of the continuation)."""
    require_recited(model, document)
    reading = read(model, document)
    logprobs = reading.logprobs[:-1]  # EOS is not part of token_ids
    token_ids = reading.ids[:-1]
    start = reading.prompt_length if first_logprob is None else first_logprob
    return {
        "key": document.key,
        "prompt": document.prompt,
        "text": document.continuation,
        "token_ids": token_ids,
        "logprobs_from": start,
        "logprobs": [round(value, 4) for value in logprobs[start - 1 :].tolist()],
        "max_tokens": len(token_ids) - reading.prompt_length + 1,
    }


# what expected.json holds of the conversation; `train.py --check` reads all of it
ASKED = (
    chat.alone("off"),
    chat.alone("high"),
    chat.call("off"),
    chat.call("high"),
    chat.answer("off", "fog"),
    chat.answer("high", "snow"),
    chat.answer("high", "rain", remembers=False),
)


def _record_turn(model, turn: chat.Turn) -> dict:
    """A request in the API's words, and the message that greedy decoding answers it with."""
    document = turn.document()
    require_recited(model, document)
    coder = tokenizer()
    return {
        "key": turn.key,
        "request": {
            "messages": list(turn.messages),
            **({"tools": list(turn.tools)} if turn.tools else {}),
            "chat_template_kwargs": turn.template_arguments,
            "max_tokens": len(coder.encode(document.continuation).ids) + 1,
        },
        "message": turn.message,
        "prompt_tokens": len(coder.encode(document.prompt).ids),
    }


def write_expected(model, folder: Path) -> dict:
    """Run the exported model over every document, write expected.json; ValueError if a text is not recited.

    `logprobs[i]` belongs to `token_ids[logprobs_from + i]`. `max_tokens` leaves room for EOS.
    """
    expected = {
        "documents": [_record(model, document, first_logprob=1) for document in texts.tales()],
        "long": [_record(model, document) for document in texts.long_letters()],
        "chat": [_record_turn(model, turn) for turn in ASKED],
        "tolerance": TOLERANCE,
    }
    lines = json.dumps(expected, ensure_ascii=False)
    (folder / "expected.json").write_text(lines + "\n")
    return expected
