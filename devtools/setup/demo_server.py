#!/usr/bin/env python3
"""Start, stop or look at the demo: demo/ served on 127.0.0.1 by .venv's patched vLLM.

    devtools/setup/demo_server.py start      start it, wait until it is ready, print one completion and the kernels
    devtools/setup/demo_server.py stop       stop it and everything it started
    devtools/setup/demo_server.py status     exit 0 if it runs and answers

The port is $PORT or 8000. State and log are in .demo/.
Exit status: 0 done, 1 not (the reason and the remedy are printed).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from devtools.setup import machine
from devtools.setup.pins import PROJECT_ROOT

MODEL_NAME = "demo"
CONTEXT_TOKENS = 8192
QUESTION = "What will the weather be in Oslo in two days?"  # demo/recipe/chat.py
STOP_SECONDS = 30
KILL_SECONDS = 5  # for the kernel to end what SIGKILL was sent to

# what the server sees on top of the caller's environment
SERVER_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default takes nine tenths of the machine
    "VLLM_PLUGINS": "cutedsl_nvfp4",  # vLLM adds a plugin's HTTP routes (/kernels) only if it is named
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",  # the model is a folder; nothing is fetched
}


class DemoFailed(Exception):
    """The demo cannot be started or stopped; the message names the reason and the remedy."""


def server_command(root: Path, host: str, port: int, drafted: int = 0) -> list[str]:
    vllm, model = root / ".venv" / "bin" / "vllm", root / "demo"
    if not vllm.exists():
        raise DemoFailed(f"{vllm} does not exist; run devtools/setup/setup_env.py (`make demo` does)")
    for name in ("config.json", "expected.json"):
        if not (model / name).is_file():
            raise DemoFailed(f"{model / name} is missing; get it from git, or make it with `make train-demo`")
    speculation = {"method": "mtp", "num_speculative_tokens": drafted}
    return [
        str(vllm), "serve", str(model),
        "--served-model-name", MODEL_NAME,
        "--host", host,
        "--port", str(port),
        "--max-model-len", str(CONTEXT_TOKENS),
        *(("--speculative-config", json.dumps(speculation)) if drafted else ()),
    ]  # fmt: skip


def process_times() -> dict[int, tuple[int, int]]:
    """pid -> (session id, start time in clock ticks) of every process that is not a zombie."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if fields[0] != "Z":
            found[int(stat.parent.name)] = (int(fields[3]), int(fields[19]))
    return found


def fetch(url: str, body: dict | None = None, timeout: float = 120) -> dict | str:
    """GET, or POST of `body` -> the decoded JSON answer, or the text if it is none."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        text = answer.read().decode("utf-8")
    return json.loads(text) if text.startswith(("{", "[")) else text


class DemoServer:
    """One background server with its state file and log under `folder`."""

    def __init__(self, folder: Path, stop_seconds: float = STOP_SECONDS):
        self.folder = folder
        self.stop_seconds = stop_seconds  # from SIGTERM to SIGKILL
        self.log = folder / "server.log"
        self.state_file = folder / "server.json"

    def state(self) -> dict | None:
        return json.loads(self.state_file.read_text(encoding="utf-8")) if self.state_file.is_file() else None

    def is_running(self, state: dict | None) -> bool:
        """Whether the recorded process lives; another one that got its number later does not count."""
        return state is not None and process_times().get(state["pid"], (0, 0))[1] == state["started"]

    def members(self, state: dict) -> list[int]:
        """The server's processes that live: its session, unless that number is someone else's by now."""
        processes = process_times()
        if state["pid"] in processes and processes[state["pid"]][1] != state["started"]:
            return []
        return [
            pid
            for pid, (session, start) in processes.items()
            if session == state["pid"] and start >= state["started"]
        ]

    def launch(self, command: list[str], url: str, environment: dict[str, str]) -> dict:
        self.folder.mkdir(exist_ok=True)
        with self.log.open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.process = process
        state = {
            "pid": process.pid,
            "started": process_times()[process.pid][1],
            "url": url,
            "command": command,
        }
        self.state_file.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        return state

    def last_lines(self, count: int) -> list[str]:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line for line in lines if line.strip()][-count:]

    def wait_until_ready(self, url: str, seconds: float) -> float:
        """Seconds until /health answered; DemoFailed with the log's end if it dies or time runs out."""
        started = shown = time.monotonic()
        terminal = sys.stdout.isatty()
        while True:
            elapsed = time.monotonic() - started
            code = self.process.poll()
            if code is not None:
                tail = "\n".join(self.last_lines(40))
                raise DemoFailed(
                    f"{tail}\nthe server ended with status {code} after {elapsed:.0f} s; its log: {self.log}"
                )
            if elapsed > seconds:
                tail = "\n".join(self.last_lines(10))
                raise DemoFailed(
                    f"{tail}\nthe server was not ready after {seconds:.0f} s; its log: {self.log}"
                )
            try:
                fetch(f"{url}/health", timeout=5)
                print("\r\033[K" if terminal else "", end="")
                return elapsed
            except OSError:  # not listening yet
                pass
            if time.monotonic() - shown >= (0.5 if terminal else 10):
                shown = time.monotonic()
                width = shutil.get_terminal_size().columns if terminal else 160
                last = (self.last_lines(1) or [""])[0][: width - 12]
                text = f"  {elapsed:4.0f} s  {last}"
                print(f"\r\033[K{text}" if terminal else text, end="" if terminal else "\n", flush=True)
            time.sleep(0.5)

    def stop(self) -> str:
        """Stop every process of the server -> what happened; DemoFailed if one survives."""
        state = self.state()
        if state is None:
            return "no demo server is running"
        members = self.members(state)
        if not members:
            self.state_file.unlink()
            return f"the demo server (pid {state['pid']}) had already ended; its log: {self.log}"
        forced = ""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if number == signal.SIGKILL:
                pids = ", ".join(map(str, members))
                forced = f"; pids {pids} were killed, {self.stop_seconds:.0f} s after SIGTERM"
            # the leader first: it ends its own workers in order
            for pid in [state["pid"]] if number == signal.SIGTERM and state["pid"] in members else members:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue
            deadline = time.monotonic() + (self.stop_seconds if number == signal.SIGTERM else KILL_SECONDS)
            while (members := self.members(state)) and time.monotonic() < deadline:
                time.sleep(0.1)
            if not members:
                self.state_file.unlink()
                return f"stopped the demo server (pid {state['pid']}){forced}"
        raise DemoFailed(f"processes {members} survive SIGKILL; they wait in the kernel, look at dmesg")


def first_completion(url: str, expected_file: Path) -> None:
    """Ask for the first document's continuation and print it; DemoFailed if it is not the expected text."""
    document = json.loads(expected_file.read_text(encoding="utf-8"))["documents"][0]
    request = {
        "model": MODEL_NAME,
        "prompt": document["prompt"],
        "max_tokens": document["max_tokens"],
        "temperature": 0,
    }
    started = time.monotonic()
    try:
        answer = fetch(f"{url}/v1/completions", request, timeout=300)
    except urllib.error.HTTPError as error:
        text = error.read().decode("utf-8", errors="replace")
        raise DemoFailed(f"{url}/v1/completions answers {error.code}: {text}; see .demo/server.log") from None
    except OSError as error:
        raise DemoFailed(f"{url}/v1/completions gives no answer: {error}; see .demo/server.log") from None
    seconds, text = time.monotonic() - started, answer["choices"][0]["text"]
    tokens = answer["usage"]["completion_tokens"]
    print(f"\nprompt      {document['prompt']!r}\ncompletion  {text!r}")
    print(f"            {tokens} tokens in {seconds:.1f} s")
    if text != document["text"]:
        raise DemoFailed(
            f"the reference continues with {document['text']!r}. The server computes something else: "
            f"`make smoke-test` says what differs"
        )


def print_kernels(url: str) -> None:
    try:
        report = fetch(f"{url}/kernels")
    except urllib.error.HTTPError as error:
        raise DemoFailed(
            f"{url}/kernels answers {error.code}: the plugin or the patches are not active in this vLLM. "
            f"Run devtools/setup/setup_env.py, and look for 'cutedsl' in .demo/server.log"
        ) from None
    print(
        f"\nkernels     vLLM {report['vllm_version']} on {report['device']}, "
        f"activations {report['activations']}"
    )
    for kernel, layers in sorted(report["summary"].items()):
        print(f"            {layers:4} quantized layers  {kernel}")


def print_next_steps(url: str, log: Path) -> None:
    port = url.rpartition(":")[2]
    suffix = "" if port == "8000" else f" BASE_URL={url}"
    body = json.dumps(
        {"model": MODEL_NAME, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    )
    print(f"\nready at {url} (log: {log})\n")
    print(f"  make smoke-test{suffix}")
    print(f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'")
    print(f"  curl {url}/kernels")
    print("  make down")
    print(
        "\nThe demo is a toy: it knows its texts and this one question, and writes nonsense after anything else."
    )


def start(server: DemoServer, args: argparse.Namespace) -> None:
    url = f"http://{args.host}:{args.port}"
    state = server.state()
    if server.is_running(state):
        print(
            f"the demo server is already running (pid {state['pid']}) at {state['url']}; `make down` stops it"
        )
        return
    command = server_command(PROJECT_ROOT, args.host, args.port, args.speculate)
    if not machine.report(machine.serve_findings(args.host, args.port)):
        raise DemoFailed("something is missing (above); nothing was started")
    server.launch(command, url, {**os.environ, **SERVER_ENVIRONMENT})
    print(f"starting vLLM at {url} (log: {server.log})", flush=True)
    try:
        seconds = server.wait_until_ready(url, args.timeout)
    except (DemoFailed, KeyboardInterrupt):
        print(server.stop(), file=sys.stderr)
        raise
    print(f"ready after {seconds:.0f} s")
    first_completion(url, PROJECT_ROOT / "demo" / "expected.json")
    print_kernels(url)
    print_next_steps(url, server.log)


def stop(server: DemoServer) -> None:
    state = server.state()
    print(server.stop())
    if state is None:
        return
    host, _, port = state["url"].rpartition("://")[2].rpartition(":")
    if machine.port_in_use(host, int(port)):
        raise DemoFailed(
            f"{host}:{port} is still in use, by {machine.port_owner(int(port)) or 'another user'}"
        )


def status(server: DemoServer) -> None:
    state = server.state()
    if not server.is_running(state):
        raise DemoFailed("the demo server is not running; `make demo` starts it")
    try:
        fetch(f"{state['url']}/health", timeout=10)
    except OSError as error:
        raise DemoFailed(
            f"pid {state['pid']} runs but {state['url']}/health fails: {error}; see {server.log}"
        ) from None
    print(f"the demo server runs (pid {state['pid']}) at {state['url']}")


def main(argv: list[str] | None = None, stop_seconds: float = STOP_SECONDS) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("start", "stop", "status"))
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument(
        "--port", type=int, default=int(os.environ.get("PORT") or 8000), help="default: $PORT or 8000"
    )
    parser.add_argument(
        "--speculate",
        type=int,
        default=0,
        metavar="N",
        help="tokens that the demo's draft head drafts; default: none",
    )
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="to wait until ready")
    args = parser.parse_args(argv)
    if args.speculate < 0:
        parser.error(f"--speculate {args.speculate}: a number of tokens, 0 for none")
    server = DemoServer(PROJECT_ROOT / ".demo", stop_seconds)
    try:
        if args.action == "start":
            start(server, args)
        elif args.action == "stop":
            stop(server)
        else:
            status(server)
    except DemoFailed as error:
        print(f"demo_server: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo_server: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
