"""Checks of what the model says: language, facts, a long prompt, many at once."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

from smoke.run import PROMPTS, Completion, Run, bad_logprobs, first_difference
from smoke.verdicts import Red, Skipped, TimedOut

FACTS = (
    ("The capital of France is", "Paris"),
    ("The chemical symbol for gold is", "Au"),
    ("One, two, three, four, five, six,", "seven"),
)
FILLER = "The river runs past the mill. A heron waits on the far bank. The miller counts {} sacks of flour. "
PASS_KEY = "71432"
LONG_PROMPT_TOKENS = 6000  # beyond 4 * index_topk of both DeepSeek-V4 sizes: the indexer has to choose

MIN_MEAN_LOGPROB = -3.0  # a model whose best guesses have 5% on average knows no language
MAX_TOKEN_SHARE = 0.5
MIN_DISTINCT_RATIO = 0.1


def garbage(completion: Completion) -> str:
    """Why a greedy completion, asked with logprobs, is no language; empty when it may be."""
    text, logprobs = completion.text, completion.choice.get("logprobs")
    if not text.strip():
        ended = completion.finish_reason == "stop" and completion.completion_tokens <= 1
        return "ended at once, without text" if ended else f"{completion.completion_tokens} tokens, no text"
    broken = text.rstrip("\ufffd").count("\ufffd")
    if broken:
        return f"broken characters: {broken} x U+FFFD in {text[:40]!r}"
    if not logprobs or not logprobs.get("tokens"):
        return "no tokens and log-probabilities to judge by"
    bad = bad_logprobs(logprobs["token_logprobs"])
    if bad:
        return bad
    window = logprobs["tokens"][-64:]
    token, count = Counter(window).most_common(1)[0]
    if len(window) >= 12 and count > MAX_TOKEN_SHARE * len(window):
        return f"token {token!r} is {count} of {len(window)} tokens"
    distinct = len(set(window))
    if len(window) >= 32 and distinct < MIN_DISTINCT_RATIO * len(window):
        return f"only {distinct} distinct tokens in {len(window)}: {text[:40]!r}"
    mean = sum(logprobs["token_logprobs"]) / len(logprobs["token_logprobs"])
    if mean < MIN_MEAN_LOGPROB:
        return f"mean log-probability {mean:.1f} of its own best guesses: noise, {text[:40]!r}"
    return ""


def no_garbage(run: Run) -> tuple[str, str]:
    """Answers are language: not empty, not repeated, not noise, no NaN."""
    prompts = [document["prompt"] for document in run.demo["documents"]] if run.demo else PROMPTS[:3]
    for prompt in prompts:
        reason = garbage(run.complete(prompt, 64, logprobs=1))
        if reason:
            raise Red(f"{prompt[:32]!r}: {reason}")
    return f"{len(prompts)} texts", ""


def facts(run: Run) -> tuple[str, str]:
    """A model other than the demo knows at least one of three plain facts."""
    if run.demo:
        raise Skipped("the demo knows only its documents: see demo_text")
    answers = [run.complete(prompt, 16).text for prompt, _ in FACTS]
    right = sum(fact in answer for answer, (_, fact) in zip(answers, FACTS))
    if not right:
        raise Red(
            f"none of {len(FACTS)} right; {FACTS[0][0]!r} -> {answers[0][:40]!r}",
            "the model talks but does not know: suspect wrong weights or scales, or a tokenizer mix-up",
        )
    return f"{right} of {len(FACTS)}", repr(answers[0][:40])


def long_prompt(run: Run) -> tuple[str, str]:
    """A prompt of thousands of tokens is read; models other than the demo must recall a pass key in it."""
    limit = run.subject.max_model_len or 4096
    wanted = min(LONG_PROMPT_TOKENS, limit * 3 // 4)
    filler = "".join(FILLER.format(n) for n in range(wanted * 8 // len(FILLER) + 1))
    calibration = filler[: max(64, wanted)]
    letters_per_token = len(calibration) / run.complete(calibration, 1).prompt_tokens
    note = f"\nThe pass key is {PASS_KEY}. Remember it, {PASS_KEY} is the pass key.\n"
    question = "\nWhat is the pass key? The pass key is"
    filler = filler[: max(0, int(wanted * letters_per_token) - len(note) - len(question))]
    third = len(filler) // 3
    prompt = filler[:third] + note + filler[third:] + question
    done = run.complete(prompt, 12, logprobs=1)
    if done.prompt_tokens < wanted // 2:
        raise Red(f"the server counts {done.prompt_tokens} prompt tokens, expected about {wanted}")
    bad = bad_logprobs(done.choice["logprobs"]["token_logprobs"])
    if bad:
        raise Red(f"after {done.prompt_tokens} tokens {bad}")
    if not run.demo and PASS_KEY not in done.text:
        raise Red(
            f"pass key {PASS_KEY} not recalled from {done.prompt_tokens} tokens: {done.text!r}",
            "suspect the compressor or the indexer: compare with a shorter prompt",
        )
    return f"{done.prompt_tokens} tokens", repr(done.text[:48])


def concurrency(run: Run) -> tuple[str, str]:
    """Requests sent at once are answered as they are one by one."""
    prompts = concurrent_prompts(run.demo, run.options.parallel)
    alone = [run.complete(prompt, 48, logprobs=1) for prompt in prompts]
    together: list[Any] = [None] * len(prompts)
    gate = threading.Barrier(len(prompts))

    def ask(i: int) -> None:
        try:
            gate.wait()
            together[i] = run.complete(prompts[i], 48, logprobs=1)
        except Exception as error:  # raised below, in the check's own thread
            together[i] = error

    threads = [threading.Thread(target=ask, args=(i,), daemon=True) for i in range(len(prompts))]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(run.client.remaining())
    seconds = time.monotonic() - started
    equal = 0
    for i, got in enumerate(together):
        if got is None:
            raise TimedOut(f"request {i} of {len(prompts)} was not answered in time")
        if isinstance(got, Red):
            raise Red(f"request {i} of {len(prompts)}: {got.detail}", got.remedy)
        if isinstance(got, Exception):
            raise got
        equal += got.text == alone[i].text
        if got.text == alone[i].text:
            continue
        if run.demo:
            raise Red(f"request {i} of {len(prompts)}: {first_difference(alone[i].text, got.text)}")
        # Other models may flip a near tie in a larger batch; an answer to someone else's prompt may not be.
        for j, other in enumerate(alone):
            if got.text == other.text and prompts[i] != prompts[j]:
                raise Red(f"request {i} was given the answer to request {j}")
        if garbage(got):
            raise Red(f"request {i} of {len(prompts)}: {garbage(got)}")
    rate = sum(got.completion_tokens for got in together) / max(seconds, 1e-3)
    return f"{equal} of {len(prompts)} equal", f"{rate:.0f} tokens/s together"


def concurrent_prompts(demo: dict | None, count: int) -> list[str]:
    """`count` prompts; for the demo, its documents cut off at different places, so that lengths differ."""
    if not demo:
        return [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    documents = demo["documents"]
    rounds = -(-count // len(documents))
    prompts = []
    for i in range(count):
        document = documents[i % len(documents)]
        already = len(document["text"]) // 2 * (i // len(documents)) // rounds
        prompts.append(document["prompt"] + document["text"][:already])
    return prompts
