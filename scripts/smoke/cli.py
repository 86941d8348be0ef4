"""The command: find out what is served, run the checks in order, report."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from smoke import chat, demo, kernels, language, protocol, speculation
from smoke.client import Address, Client
from smoke.run import Run, Subject
from smoke.verdicts import CannotRun, Red, Skipped, TimedOut

DEMO_MODEL = "demo"
DEFAULT_EXPECTED = Path(__file__).resolve().parents[2] / "demo" / "expected.json"
TIMEOUTS_BEFORE_GIVING_UP = 2


@dataclass(frozen=True)
class Check:
    """A function that returns (figure, detail), or raises Red or Skipped."""

    name: str
    run: Callable[[Run], tuple[str, str]]
    remedy: str  # where the Red brings none of its own
    patience: float = 1.0  # multiplies --timeout

    @property
    def summary(self) -> str:
        return (self.run.__doc__ or "").splitlines()[0]


DIRECTLY = "look at the server's log; if a proxy stands in between, ask the server directly"
NUMBERS = (
    "suspect scales (missing, inverted, doubled) or swapped nibbles; hold the demo model to its reference"
)
REFERENCE = "the checkpoint, its scales or a kernel differ from the reference"

CHECKS = (
    Check("health", protocol.health, "look at the server's log; --wait SECONDS while it starts", 0.25),
    Check("models", protocol.models, "look at the server's log", 0.25),
    Check("completion", protocol.completion, DIRECTLY),
    Check("chat", protocol.chat, DIRECTLY),
    Check("streaming", protocol.streaming, DIRECTLY),
    Check("logprobs", protocol.logprobs, NUMBERS),
    Check("prompt_logprobs", protocol.prompt_logprobs, NUMBERS),
    Check("stop", protocol.stop, DIRECTLY),
    Check("max_tokens", protocol.max_tokens, DIRECTLY),
    Check("concurrency", language.concurrency, "suspect a workspace shared between streams or requests", 3),
    Check("long_prompt", language.long_prompt, NUMBERS, 3),
    Check("garbage", language.no_garbage, NUMBERS, 2),
    Check("facts", language.facts, NUMBERS),
    Check("reasoning", chat.reasoning, DIRECTLY, 2),
    Check("tools", chat.tools, chat.TOOL_PARSER, 3),
    Check("json_schema", chat.json_schema, DIRECTLY, 2),
    Check("messages", chat.messages, DIRECTLY, 2),
    Check("metrics", kernels.metrics, "was the server started with --disable-log-stats?"),
    Check("kernels", kernels.kernels, "the report or the metric is wrong: look at the server's start-up log"),
    Check(
        "speculation",
        speculation.speculation,
        "the draft head, or how its drafts are verified: see the log",
        5,
    ),
    Check("demo_text", demo.demo_text, REFERENCE, 5),
    Check("demo_logprobs", demo.demo_logprobs, REFERENCE, 5),
    Check("bad_requests", protocol.bad_requests, DIRECTLY, 2),  # last: it may end the server
)


@dataclass(frozen=True)
class Result:
    """One row of the report."""

    name: str
    verdict: str  # green, red or skipped
    figure: str = ""
    detail: str = ""
    remedy: str = ""
    seconds: float = 0.0
    timed_out: bool = False


def run_check(check: Check, address: Address, subject: Subject, options: argparse.Namespace) -> Result:
    """Run one check in a thread of its own, so that no server can hold it beyond its deadline."""
    limit = options.timeout * check.patience
    started = time.monotonic()
    outcome: list[dict] = []

    def work() -> None:
        try:
            figure, detail = check.run(Run(Client(address, limit), subject, options))
            outcome.append({"verdict": "green", "figure": figure, "detail": detail})
        except Skipped as reason:
            outcome.append({"verdict": "skipped", "detail": str(reason)})
        except Red as error:
            late = isinstance(error, TimedOut)
            outcome.append(
                {
                    "verdict": "red",
                    "detail": error.detail,
                    "remedy": error.remedy or check.remedy,
                    "timed_out": late,
                }
            )
        except Exception as error:  # an answer of a shape no check foresaw is a finding, not a crash
            at = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(at.filename).name}:{at.lineno}"
            detail = f"unforeseen answer: {type(error).__name__}: {error} ({where})"
            outcome.append({"verdict": "red", "detail": detail, "remedy": "compare it with OpenAI's API"})

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(limit + 1)
    hangs = {
        "verdict": "red",
        "detail": f"not finished after {limit:.0f} s",
        "remedy": "the server hangs: look at its log",
        "timed_out": True,
    }
    return Result(check.name, seconds=time.monotonic() - started, **(outcome[0] if outcome else hangs))


def run_checks(
    checks: Sequence[Check],
    address: Address,
    subject: Subject,
    options: argparse.Namespace,
    report: Callable[[Result], None],
) -> list[Result]:
    """Run the checks in order; after two that ran out of time the rest are red without being tried."""
    results: list[Result] = []
    for check in checks:
        late = [result.name for result in results if result.timed_out]
        if len(late) >= TIMEOUTS_BEFORE_GIVING_UP:
            result = Result(check.name, "red", detail=f"not run: {' and '.join(late)} ran out of time")
        else:
            result = run_check(check, address, subject, options)
        results.append(result)
        report(result)
    return results


def print_row(result: Result, out: TextIO, coloured: bool) -> None:
    colour = {"green": "\033[32m", "red": "\033[31m", "skipped": "\033[33m"}[result.verdict]
    verdict = f"{result.verdict:8}"
    if coloured:
        verdict = f"{colour}{verdict}\033[0m"
    row = f"{result.name:16} {verdict} {result.seconds:6.1f} s  {result.figure:20} {result.detail}"
    print(row.rstrip(), file=out)
    if result.remedy:
        print(f"{'':36}-> {result.remedy}", file=out)
    out.flush()


def wait_until_healthy(address: Address, seconds: float) -> None:
    """Poll /health with visible progress; CannotRun when it is not 200 in time."""
    deadline = time.monotonic() + seconds
    shown = -10.0
    while True:
        left = deadline - time.monotonic()
        try:
            status, _ = Client(address, min(5.0, max(left, 0.1))).send("GET", "/health")
            if status == 200:
                return
            state = f"/health: status {status}"
        except Red as error:
            state = error.detail
        left = deadline - time.monotonic()
        if left <= 0:
            raise CannotRun(f"{address} not healthy after {seconds:.0f} s: {state}; look at the server's log")
        if time.monotonic() - shown >= 10:
            shown = time.monotonic()
            print(f"waiting for {address}, {left:.0f} s left: {state}", file=sys.stderr)
        time.sleep(min(1.0, left))


def require_reachable(address: Address) -> None:
    """CannotRun unless something listens at the address."""
    try:
        socket.create_connection((address.host, address.port), timeout=10).close()
    except OSError as error:
        raise CannotRun(
            f"no server at {address}: {error}. Start one (`make demo`, or compose.yaml), set BASE_URL or "
            f"--base-url, or use --wait SECONDS while it starts"
        ) from error


def discover(address: Address, options: argparse.Namespace) -> Subject:
    """Find the model's name and length, and whether it is the demo."""
    try:
        data = Client(address, options.timeout * 0.25).json("GET", "/v1/models").get("data")
        cards = [card for card in data if isinstance(card, dict)] if isinstance(data, list) else []
        problem = None if cards else Red("/v1/models lists none")
    except Red as error:
        cards, problem = [], error
    if options.model:
        card = next((card for card in cards if card.get("id") == options.model), {})
    else:
        card = cards[0] if cards else {}
    name = options.model or card.get("id") or ""
    if not name and not problem:
        problem = Red(f"the first model of /v1/models has no id: {card}")
    expected = None
    if options.expected or name == DEMO_MODEL:
        expected = demo.load_expected(Path(options.expected or DEFAULT_EXPECTED))
    return Subject(name, problem, card.get("max_model_len"), expected)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="smoke_test",
        description="Check an OpenAI-compatible server, and which kernels serve its NVFP4 layers.",
        epilog="Exit status: 0 green, 1 red, 2 could not run. What each check proves: docs/smoke-test.md",
    )
    option = parser.add_argument
    url = os.environ.get("BASE_URL") or "http://127.0.0.1:8000"
    option("--base-url", default=url, metavar="URL", help="the server (BASE_URL, else %(default)s)")
    option("--model", metavar="NAME", help="served name to test (default: the first of /v1/models)")
    option(
        "--expected",
        metavar="FILE",
        help=f"hold the model to this expected.json (default for a model named {DEMO_MODEL!r}: the demo's)",
    )
    option("--only", action="append", metavar="NAME", help="run this check alone; repeatable")
    option("--list", action="store_true", help="name the checks and stop")
    option("--json", metavar="FILE", help="write the results as JSON ('-': to stdout, table to stderr)")
    option("--wait", type=float, default=0, metavar="SECONDS", help="wait for /health first")
    option("--timeout", type=float, default=120, metavar="SECONDS", help="base time of a check (%(default)s)")
    option("--parallel", type=int, default=8, metavar="N", help="requests at once (%(default)s)")
    option("--require-ours", action="store_true", help="any layer not served by our kernel is red")
    option("--no-kernels", action="store_true", help="a foreign server: do not ask which kernels serve")
    options = parser.parse_args(argv)
    names = [check.name for check in CHECKS]
    for name in options.only or ():
        if name not in names:
            parser.error(f"--only {name}: no such check; there are {', '.join(names)}")
    if options.timeout <= 0 or options.wait < 0 or options.parallel < 2:
        parser.error("--timeout must be above 0, --wait at least 0, --parallel at least 2")
    if options.no_kernels and options.require_ours:
        parser.error("--require-ours needs the report that --no-kernels leaves out; drop one of them")
    return options


def smoke_test(options: argparse.Namespace) -> int:
    """Test the server and report; 0 green, 1 red. Raises CannotRun."""
    out = sys.stderr if options.json == "-" else sys.stdout
    coloured = out.isatty() and "NO_COLOR" not in os.environ
    address = Address.parse(options.base_url, os.environ.get("OPENAI_API_KEY", ""))
    if options.wait:
        wait_until_healthy(address, options.wait)
    require_reachable(address)
    subject = discover(address, options)
    print(f"{address}  model {subject.model or '?'}{'  (demo)' if subject.expected else ''}", file=out)
    checks = [check for check in CHECKS if not options.only or check.name in options.only]
    results = run_checks(checks, address, subject, options, lambda row: print_row(row, out, coloured))
    red = [result.name for result in results if result.verdict == "red"]
    counts = ", ".join(
        f"{sum(result.verdict == verdict for result in results)} {verdict}"
        for verdict in ("green", "red", "skipped")
    )
    print(f"{'red' if red else 'green'}: {counts}{': ' if red else ''}{', '.join(red)}", file=out)
    if options.json:
        record = {
            "base_url": str(address),
            "model": subject.model,
            "demo": subject.expected is not None,
            "verdict": "red" if red else "green",
            "checks": [asdict(result) for result in results],
        }
        write_json(record, options.json)
    return 1 if red else 0


def write_json(record: dict, where: str) -> None:
    text = json.dumps(record, indent=1) + "\n"
    if where == "-":
        sys.stdout.write(text)
        return
    try:
        Path(where).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CannotRun(f"--json {where}: {error}; name a file that can be written") from error


def main(argv: Sequence[str]) -> int:
    options = parse_arguments(argv)
    if options.list:
        for check in CHECKS:
            print(f"{check.name:16} {check.summary}")
        return 0
    try:
        return smoke_test(options)
    except CannotRun as error:
        print(f"smoke_test: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("smoke_test: interrupted", file=sys.stderr)
    return 2
