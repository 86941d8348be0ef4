"""Step times of a running server, by its own clock -> JSON rows, appended to OUT.

    python3 -m bench.serving.measure OUT.jsonl --port 8000 --label 'ours, 4 layers' [--streams 1,8] [--prefill 2048]

Decode: one request with a prompt for each stream, so that all streams start together; the step is the change
of `vllm:inter_token_latency_seconds` (sum over count). Prefill: one prompt of random tokens, one token out;
`vllm:request_prefill_time_seconds`. Medians of `REPEATS` repeats after an unmeasured one; the server must run
with --no-enable-prefix-caching.
"""

import argparse
import json
import random
import re
import statistics
import time
import urllib.request

REPEATS = 5
DECODE_TOKENS, DECODE_PROMPT = 96, 16


class Server:
    def __init__(self, port: int):
        self.url = f"http://127.0.0.1:{port}"
        with urllib.request.urlopen(f"{self.url}/v1/models", timeout=60) as answer:
            model = json.load(answer)["data"][0]
        self.model, self.max_model_len = model["id"], model["max_model_len"]

    def complete(self, prompts: list[list[int]], tokens: int) -> None:
        body = {
            "model": self.model, "prompt": prompts, "max_tokens": tokens, "temperature": 0, "ignore_eos": True
        }  # fmt: skip
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=900) as answer:
            used = json.load(answer)["usage"]
        assert used["completion_tokens"] == len(prompts) * tokens, used

    def histogram(self, name: str) -> tuple[float, float]:
        """(sum, count) over all label sets."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            text = answer.read().decode()
        return tuple(
            sum(float(value) for value in re.findall(rf"^{name}_{part}{{.*}} (\S+)$", text, re.MULTILINE))
            for part in ("sum", "count")
        )

    def step(self, metric: str, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
        """(milliseconds by the server's histogram, milliseconds by this client's clock) of one request."""
        total, count = self.histogram(metric)
        start = time.monotonic()
        self.complete(prompts, tokens)
        elapsed = time.monotonic() - start
        total_after, count_after = self.histogram(metric)
        return (total_after - total) / (count_after - count) * 1e3, elapsed * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--label", required=True)
    parser.add_argument("--streams", default="1,8,32,64")
    parser.add_argument("--prefill", default="2048,8192,16384")
    parser.add_argument("--vocab", type=int, default=4000, help="token ids of prompts are below")
    arguments = parser.parse_args()
    server, draw = Server(arguments.port), random.Random(0)

    def prompt(length: int) -> list[int]:
        return [draw.randrange(1, arguments.vocab) for _ in range(length)]

    cases = [
        ("decode", n, "vllm:inter_token_latency_seconds", n, DECODE_PROMPT, DECODE_TOKENS)
        for n in map(int, filter(None, arguments.streams.split(",")))
    ] + [
        ("prefill", length, "vllm:request_prefill_time_seconds", 1, length, 1)
        for length in map(int, filter(None, arguments.prefill.split(",")))
    ]
    for kind, size, metric, streams, length, tokens in cases:
        times = []
        for repeat in range(REPEATS + 1):
            measured = server.step(metric, [prompt(length) for _ in range(streams)], tokens)
            if repeat:
                times.append(measured)
        row = {
            "label": arguments.label,
            "kind": kind,
            "size": size,
            "step_ms": statistics.median(server_ms for server_ms, _ in times),
            "repeats_ms": [server_ms for server_ms, _ in times],
            "client_ms": [client_ms for _, client_ms in times],
        }
        with open(arguments.out, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{arguments.label}: {kind} {size}: {row['step_ms']:.3f} ms", flush=True)


if __name__ == "__main__":
    main()
