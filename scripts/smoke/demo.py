"""Checks of the demo model against demo/expected.json, written by an independent implementation."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from smoke.kernels import quantizes_activations
from smoke.run import Run, bad_logprobs, first_difference
from smoke.verdicts import CannotRun, Red, Skipped


def load_expected(path: Path) -> dict:
    """Read and check expected.json."""
    remedy = "write it again with devtools/demo/train.py, or pass another --expected FILE"
    try:
        expected = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CannotRun(f"{path}: {error}; {remedy}") from error
    try:
        if not expected["documents"]:
            raise ValueError("`documents` is empty")
        for key in ("mean_abs_dlogp_w4a16", "mean_abs_dlogp_w4a4"):
            if not expected["tolerance"][key] > 0:
                raise ValueError(
                    f"tolerance.{key} is {expected['tolerance'][key]}, expected a positive number"
                )
        for document in expected["documents"] + expected.get("long", []):
            count = len(document["token_ids"]) - document.get("logprobs_from", 1)
            if count < 1 or len(document["logprobs"]) != count:
                raise ValueError(
                    f"{document['key']}: {len(document['logprobs'])} log-probabilities, expected {count}"
                )
            if not document["prompt"] or not document["text"] or document["max_tokens"] < 1:
                raise ValueError(f"{document['key']}: empty prompt or text, or max_tokens below 1")
            if not all(map(math.isfinite, document["logprobs"])):
                raise ValueError(f"{document['key']}: a log-probability is not finite")
    except KeyError as error:
        raise CannotRun(f"{path}: lacks {error}; {remedy}") from error
    except (TypeError, ValueError) as error:
        raise CannotRun(f"{path}: {error}; {remedy}") from error
    return expected


def demo_text(run: Run) -> tuple[str, str]:
    """The demo recites every document exactly."""
    if not run.demo:
        raise Skipped("not the demo model")
    wrong, letters, first = 0, 0, ""
    documents = run.demo["documents"] + run.demo.get("long", [])
    with ThreadPoolExecutor(run.options.parallel) as pool:  # together: the wait is for the longest alone
        texts = pool.map(
            lambda document: run.complete(document["prompt"], document["max_tokens"]).text, documents
        )
        answers = list(zip(documents, texts))
    for document, got in answers:
        expected = document["text"]
        letters += max(len(expected), len(got))
        wrong += sum(a != b for a, b in zip(expected, got)) + abs(len(expected) - len(got))
        if got != expected and not first:
            first = f"{document['key']}: {first_difference(expected, got)}"
    figure = f"{wrong} of {letters} wrong"
    if first and quantizes_activations(run) and not run.demo.get("exact_w4a4", True):
        raise Skipped(f"{figure}; expected.json does not ask for exact text under W4A4; {first}")
    if first:
        raise Red(f"{figure}; {first}")
    return figure, f"{len(run.demo['documents'])} documents, {len(run.demo.get('long', []))} long"


def demo_logprobs(run: Run) -> tuple[str, str]:
    """The demo's log-probabilities match the independent reference within tolerance."""
    if not run.demo:
        raise Skipped("not the demo model")
    key = "mean_abs_dlogp_w4a4" if quantizes_activations(run) else "mean_abs_dlogp_w4a16"
    tolerance = run.demo["tolerance"][key]
    means = []
    for document in run.demo["documents"] + run.demo.get("long", []):
        ids, start = document["token_ids"], document.get("logprobs_from", 1)
        served = served_logprobs(run, ids, start, document["key"])
        distance = sum(abs(a - b) for a, b in zip(served, document["logprobs"])) / len(served)
        means.append((distance, document["key"]))
        if not distance <= tolerance:
            raise Red(f"{document['key']}: mean |dlogp| {distance:.4f} > {tolerance} ({key})")
    worst, where = max(means)
    return f"worst {worst:.4f}", f"mean |dlogp| in {where}; tolerance {tolerance} ({key})"


def served_logprobs(run: Run, token_ids: list[int], start: int, key: str) -> list[float]:
    """The server's log-probability of each token from index `start` on; Red unless all are numbers."""
    entries = run.complete(token_ids, 1, prompt_logprobs=1).choice.get("prompt_logprobs")
    if not isinstance(entries, list) or len(entries) != len(token_ids):
        count = len(entries) if isinstance(entries, list) else entries
        raise Red(f"{key}: {count} prompt_logprobs for {len(token_ids)} tokens")
    values = []
    for i in range(start, len(token_ids)):
        entry = (entries[i] or {}).get(str(token_ids[i]))
        if entry is None:
            raise Red(f"{key}: prompt_logprobs[{i}] does not hold token {token_ids[i]}")
        values.append(entry["logprob"])
    bad = bad_logprobs(values)
    if bad:
        raise Red(f"{key}: from token {start} on, {bad}")
    return values
