"""Check of speculative decoding: drafted tokens are accepted, and the text is the one the model writes without."""

from __future__ import annotations

import time

from smoke.run import PROMPTS, Run, first_difference
from smoke.verdicts import Red, Skipped

DRAFTS = "vllm:spec_decode_num_drafts_total"
DRAFTED = "vllm:spec_decode_num_draft_tokens_total"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"
BY_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
GENERATED = "vllm:generation_tokens_total"

TOKENS = 96
MIN_ACCEPTED = 0.9  # of the demo's first drafted tokens: it knows its documents by heart
MIN_DRAFTS = 16  # before a head of which nothing is accepted is red
NEAR_TIE = 0.5  # nats, between a token and the best one of the same model without speculation


def _counters(run: Run) -> dict[str, float]:
    """Drafts, drafted and accepted tokens so far, and of accepted ones those that were drafted first."""
    series = run.metrics()
    found = {
        name: sum(value for _, value in series.get(name, ()))
        for name in (DRAFTS, DRAFTED, ACCEPTED, GENERATED)
    }
    first = [value for labels, value in series.get(BY_POSITION, ()) if labels.get("position") == "0"]
    return {**found, BY_POSITION: sum(first)}


def _risen(run: Run, before: dict[str, float], tokens: int) -> dict[str, float]:
    """How much the counters rose by a request of `tokens`; they are published a little after its answer."""
    patience = min(10.0, run.client.remaining() / 2)
    started = time.monotonic()
    while True:
        rise = {name: value - before[name] for name, value in _counters(run).items()}
        if rise[GENERATED] >= tokens:
            return rise
        if time.monotonic() - started > patience:
            raise Red(f"{GENERATED} rose by {rise[GENERATED]:.0f} for {tokens} tokens")
        time.sleep(0.1)


def _worst_gap(run: Run, prompt: list[int], generated: list[int]) -> tuple[float, int]:
    """(nats, which token): how far the worst of `generated` is below the best token, read without speculation."""
    answer = run.complete(prompt + generated, 1, prompt_logprobs=1)
    entries = answer.choice.get("prompt_logprobs")
    if not isinstance(entries, list) or len(entries) != len(prompt) + len(generated):
        raise Red("no prompt_logprobs for the text that was generated")
    worst = (0.0, 0)
    for i, token in enumerate(generated):
        candidates = {key: entry["logprob"] for key, entry in entries[len(prompt) + i].items()}
        worst = max(worst, (max(candidates.values()) - candidates[str(token)], i))
    return worst


def speculation(run: Run) -> tuple[str, str]:
    """Where the server speculates, drafted tokens are accepted and the text is the model's own."""
    before = _counters(run)
    if DRAFTS not in run.metrics():
        raise Skipped("the server does not speculate")
    head = None if run.options.no_kernels else run.kernels().get("draft")
    if run.demo:
        document = run.demo["documents"][0]
        done = run.complete(document["prompt"], document["max_tokens"])
        if done.text != document["text"]:
            raise Red(
                f"another text than without speculation: {first_difference(document['text'], done.text)}"
            )
    else:
        done = run.complete(PROMPTS[1], TOKENS, return_token_ids=True)
        gap, at = _worst_gap(run, done.choice["prompt_token_ids"], done.choice["token_ids"])
        if not gap <= NEAR_TIE:
            raise Red(f"token {at} of the text is {gap:.2f} nats below the best without speculation")
    rise = _risen(run, before, done.completion_tokens)
    drafts, drafted, accepted = rise[DRAFTS], rise[DRAFTED], rise[ACCEPTED]
    figure = f"{accepted:.0f} of {drafted:.0f} accepted"
    if accepted > drafted:
        raise Red(f"{figure}: the counters contradict each other")
    if head and not drafts:
        raise Red(f"{head} is loaded, and nothing was drafted in {done.completion_tokens} tokens")
    share = rise[BY_POSITION] / drafts if drafts else 0.0
    if head and run.demo and share < MIN_ACCEPTED:
        raise Red(f"{figure}: {share:.2f} of the first tokens, expected {MIN_ACCEPTED} of the demo's head")
    if head and drafts >= MIN_DRAFTS and not accepted:
        raise Red(f"{figure}: head and model do not belong together, or the head is read wrong")
    steps = f"{1 + accepted / drafts:.2f} tokens a step" if drafts else "no draft"
    return figure, f"{steps}, by {head or 'a speculator without a model'}"
