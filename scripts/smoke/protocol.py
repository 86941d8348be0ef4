"""Checks of the OpenAI protocol: shapes, streams, limits, refusals."""

from __future__ import annotations

import time

from smoke.client import expect_ok, parse_json
from smoke.run import Run, bad_logprobs, first_choice, first_difference, message_text
from smoke.verdicts import Red, Skipped, TimedOut


def health(run: Run) -> tuple[str, str]:
    """/health answers 200."""
    started = time.monotonic()
    status, text = run.client.send("GET", "/health")
    expect_ok(status, text, "GET /health")
    return f"{(time.monotonic() - started) * 1000:.0f} ms", ""


def models(run: Run) -> tuple[str, str]:
    """/v1/models lists the model that is tested."""
    names = [entry.get("id") for entry in run.client.json("GET", "/v1/models").get("data") or ()]
    if run.model not in names:
        raise Red(f"{run.model!r} is not among the served models {names}", "pass --model with one of these")
    return run.model, f"max_model_len {run.subject.max_model_len}"


def completion(run: Run) -> tuple[str, str]:
    """/v1/completions answers in OpenAI's shape, with consistent usage."""
    done = run.complete(run.prompt)
    usage = done.answer["usage"]
    if done.answer.get("object") != "text_completion":
        raise Red(f"object is {done.answer.get('object')!r}, expected 'text_completion'")
    if done.finish_reason not in ("stop", "length"):
        raise Red(f"finish_reason is {done.finish_reason!r}, expected 'stop' or 'length'")
    if done.prompt_tokens < 1 or usage.get("total_tokens") != done.prompt_tokens + done.completion_tokens:
        raise Red(f"usage does not add up: {usage}")
    return f"{done.completion_tokens} tokens", repr(done.text[:48])


def chat(run: Run) -> tuple[str, str]:
    """/v1/chat/completions answers, and its stream says the same."""
    path, messages = "/v1/chat/completions", [{"role": "user", "content": run.prompt}]
    body = {"model": run.model, "messages": messages, "max_tokens": 32, "temperature": 0}
    answer = run.client.json("POST", path, body)
    choice = first_choice(answer)
    message = choice.get("message") or {}
    if message.get("role") != "assistant" or choice.get("finish_reason") not in ("stop", "length"):
        raise Red(f"role {message.get('role')!r}, finish_reason {choice.get('finish_reason')!r}")
    text = message_text(message)
    if not text.strip():
        raise Red("an empty answer", "is the model given the chat template it was trained with?")
    streamed = run.stream(path, body)
    if run.demo and streamed.text != text:
        raise Red(f"streamed chat differs: {first_difference(text, streamed.text)}")
    if not streamed.text.strip():
        raise Red(f"an empty stream; not streamed the answer is {text[:40]!r}")
    return f"{answer['usage']['completion_tokens']} tokens", repr(text[:48])


def streaming(run: Run) -> tuple[str, str]:
    """A streamed completion is well formed and equals the one that is not streamed."""
    whole = run.complete(run.prompt)
    body = {"model": run.model, "prompt": run.prompt, "max_tokens": 32, "temperature": 0}
    streamed = run.stream("/v1/completions", body)
    if streamed.text != whole.text and not run.demo:
        # The prefix cache may have changed a near tie: the answer after the stream then equals it.
        whole = run.complete(run.prompt)
    if streamed.text != whole.text:
        raise Red(f"the stream differs: {first_difference(whole.text, streamed.text)}")
    if streamed.finish_reason != whole.finish_reason:
        raise Red(f"streamed finish_reason {streamed.finish_reason!r}, otherwise {whole.finish_reason!r}")
    if streamed.usage.get("completion_tokens") != whole.completion_tokens:
        raise Red(f"streamed usage {streamed.usage}, otherwise {whole.completion_tokens} completion tokens")
    if len(whole.text) >= 16 and streamed.pieces < 2:
        raise Red(f"{whole.completion_tokens} tokens came in one piece", "is a proxy buffering the stream?")
    return f"{streamed.pieces} pieces", ""


def logprobs(run: Run) -> tuple[str, str]:
    """Log-probabilities are finite, at most zero, one per token, and greedy picks the largest."""
    done = run.complete(run.prompt, logprobs=1)
    chosen = (done.choice.get("logprobs") or {}).get("token_logprobs")
    if not isinstance(chosen, list) or len(chosen) != done.completion_tokens:
        count = len(chosen) if isinstance(chosen, list) else chosen
        raise Red(f"{count} log-probabilities for {done.completion_tokens} tokens")
    bad = bad_logprobs(chosen)
    if bad:
        raise Red(bad, "NaN or infinite logits: look for a wrong or missing scale in the server's log")
    for i, top in enumerate(done.choice["logprobs"].get("top_logprobs") or ()):
        if top and max(top.values()) > chosen[i] + 1e-3:
            raise Red(f"token {i} was chosen at {chosen[i]:.3f} although another has {max(top.values()):.3f}")
    return f"mean {sum(chosen) / max(1, len(chosen)):.3f}", f"{len(chosen)} tokens"


def prompt_logprobs(run: Run) -> tuple[str, str]:
    """Where offered, the prompt's log-probabilities are finite and one per prompt token."""
    body = {"model": run.model, "prompt": run.prompt, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}
    status, text = run.client.send("POST", "/v1/completions", body)
    if status in (400, 422) and "prompt_logprobs" in text:
        raise Skipped(f"not offered: status {status}")
    expect_ok(status, text, "POST /v1/completions with prompt_logprobs")
    answer = parse_json(text, "POST /v1/completions")
    entries = first_choice(answer).get("prompt_logprobs")
    if entries is None:
        raise Skipped("not offered: the answer has no prompt_logprobs")
    if len(entries) != answer["usage"]["prompt_tokens"] or entries[0] is not None:
        raise Red(
            f"{len(entries)} entries, the first {entries[0]}, for {answer['usage']['prompt_tokens']} tokens; "
            f"expected one a token, the first null"
        )
    values = [candidate["logprob"] for entry in entries[1:] for candidate in entry.values()]
    bad = bad_logprobs(values)
    if bad:
        raise Red(bad, "NaN or infinite logits in prefill: look for a wrong scale in the server's log")
    return f"{len(entries)} tokens", ""


def stop(run: Run) -> tuple[str, str]:
    """A stop string ends the text before it."""
    full = run.complete(run.prompt, 48)
    if len(full.text) < 8:
        raise Skipped(f"the answer {full.text!r} is too short to be cut")
    word = full.text[len(full.text) // 2 :][:4]
    at = full.text.find(word)
    cut = run.complete(run.prompt, 48, stop=[word])
    if word in cut.text or cut.finish_reason != "stop":
        raise Red(f"stop={word!r} gave finish_reason {cut.finish_reason!r} and {cut.text[-40:]!r}")
    if run.demo and cut.text != full.text[:at]:
        raise Red(f"stop={word!r} should leave {full.text[:at][-40:]!r}, left {cut.text[-40:]!r}")
    return f"at {len(cut.text)}", f"stop={word!r}"


def max_tokens(run: Run) -> tuple[str, str]:
    """max_tokens bounds the answer, and finish_reason says so."""
    for limit in (1, 5):
        done = run.complete(run.prompt, limit)
        wanted = "length" if done.completion_tokens == limit else "stop"
        if done.completion_tokens > limit or done.finish_reason not in (wanted, "stop"):
            raise Red(f"max_tokens={limit}: {done.completion_tokens} tokens, finish {done.finish_reason!r}")
    return "1, 5", ""


def bad_requests(run: Run) -> tuple[str, str]:
    """Bad requests are refused with a 4xx and a message, and the server lives on."""
    good = {"model": run.model, "prompt": run.prompt, "max_tokens": 4, "temperature": 0}
    messages = [{"role": "user", "content": run.prompt}]
    completions, chats, refused = "/v1/completions", "/v1/chat/completions", (400, 422)
    cases = [
        ("unknown model", completions, {**good, "model": "no-such-model"}, (404,)),
        ("unknown model in chat", chats, {"model": "no-such-model", "messages": messages}, (404,)),
        ("malformed JSON", completions, b'{"model": "' + run.model.encode() + b'", "prompt": ', refused),
        ("negative max_tokens", completions, {**good, "max_tokens": -1}, refused),
        ("prompt of a wrong type", completions, {**good, "prompt": {"a": 1}}, refused),
        ("temperature of a wrong type", completions, {**good, "temperature": "hot"}, refused),
        ("messages of a wrong type", chats, {"model": run.model, "messages": "hello"}, refused),
    ]
    if run.subject.max_model_len:
        too_long = [5] * (run.subject.max_model_len + 1)
        cases.append(("prompt too long", completions, {**good, "prompt": too_long}, (400,)))
    for what, path, body, wanted in cases:
        try:
            status, text = run.client.send("POST", path, body)
        except TimedOut:
            raise
        except Red as error:
            raise Red(f"{what}: {error.detail}", "a bad request must not end the server") from error
        if status not in wanted:
            raise Red(f"{what}: status {status}, expected {' or '.join(map(str, wanted))}: {text[:80]!r}")
        answer = parse_json(text, what)
        error_object = answer.get("error") if isinstance(answer, dict) else None
        message = error_object.get("message") if isinstance(error_object, dict) else None
        if not isinstance(message, str) or not message.strip():
            raise Red(f"{what}: status {status} without error.message: {text[:80]!r}")
    status, text = run.client.send("GET", "/health")
    expect_ok(status, text, "after the bad requests, GET /health")
    run.complete(run.prompt, 4)
    untested = "" if run.subject.max_model_len else "too long not tried: /v1/models has no max_model_len"
    return f"{len(cases)} refused", untested
