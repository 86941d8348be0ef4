"""Start `vllm serve` on a free port of 127.0.0.1 for a test, and stop it by its own pid."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from tests.support.paths import ROOT

LIMIT = 900  # seconds; reached only by what hangs
LANES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
LANE = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))

# arguments of `Server.smoke_test`
TEXT_CHECKS = ("--only", "demo_text", "--only", "garbage")
LOGPROB_CHECKS = ("--only", "demo_logprobs")
OURS_CHECKS = ("--only", "kernels", "--require-ours")


class ServerDied(RuntimeError):
    """The server exited before it was healthy; `log` is everything it said."""

    def __init__(self, returncode: int, log: str):
        super().__init__(f"vllm serve exited with {returncode} before it was healthy:\n{log[-4000:]}")
        self.log = log


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _cores() -> dict[str, str]:
    """Where this test process's servers compute: vLLM's own choice, or a core of their own beside others."""
    if LANES == 1:
        return {}
    cores = sorted(os.sched_getaffinity(0))
    return {"VLLM_CPU_OMP_THREADS_BIND": str(cores[LANE % len(cores)])}


def environment() -> dict[str, str]:
    """The environment in which a test starts vLLM: our plugin, a small cache, no network."""
    return {
        **os.environ,
        "VLLM_PLUGINS": "cutedsl_nvfp4",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        **_cores(),
    }


class Server:
    """`vllm serve model`, healthy on entering; its whole process group is gone on leaving."""

    def __init__(
        self, model: Path, log: Path, env: dict[str, str] | None = None, arguments: tuple[str, ...] = ()
    ):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = log
        self.command = [
            str(Path(sys.executable).parent / "vllm"), "serve", str(model), "--served-model-name", "demo",
            "--host", "127.0.0.1", "--port", str(self.port), "--max-model-len", "8192", *arguments,
        ]  # fmt: skip
        self.env = {**environment(), **(env or {})}
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> "Server":
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, env=self.env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerDied(self.process.returncode, self.log())
            if self._healthy():
                return self
            time.sleep(0.5)
        self.__exit__()
        raise TimeoutError(f"vllm serve was not healthy within {LIMIT} s:\n{self.log()[-4000:]}")

    def __exit__(self, *exception: object) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _healthy(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.url}/health", timeout=2).status == 200
        except (urllib.error.URLError, OSError):
            return False

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def get(self, path: str) -> dict:
        return json.load(urllib.request.urlopen(f"{self.url}{path}", timeout=LIMIT))

    def complete(self, **request: object) -> dict:
        """POST /v1/completions -> the parsed response."""
        body = json.dumps({"model": "demo", "temperature": 0, **request}).encode()
        headers = {"Content-Type": "application/json"}
        post = urllib.request.Request(f"{self.url}/v1/completions", body, headers)
        return json.load(urllib.request.urlopen(post, timeout=LIMIT))

    def stream(self, **request: object) -> str:
        """POST /v1/completions, streamed -> the pieces' text together."""
        body = json.dumps({"model": "demo", "temperature": 0, "stream": True, **request}).encode()
        post = urllib.request.Request(
            f"{self.url}/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(post, timeout=LIMIT) as answer:
            events = [line.removeprefix(b"data: ") for line in answer if line.startswith(b"data: ")]
        assert events.pop().strip() == b"[DONE]"
        return "".join(choice["text"] for event in events for choice in json.loads(event)["choices"])

    def counter(self, name: str) -> float:
        """The sum of a metric's series; 0 where there is none."""
        text = urllib.request.urlopen(f"{self.url}/metrics", timeout=LIMIT).read().decode()
        series = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
        return sum(map(float, series))

    def smoke_test(self, *arguments: str) -> dict:
        """Run scripts/smoke_test.py against this server -> its JSON report, with its exit status as `status`."""
        command = [str(ROOT / "scripts/smoke_test.py"), "--base-url", self.url, "--json", "-", *arguments]
        run = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=LIMIT)
        return {**json.loads(run.stdout), "status": run.returncode}


def red(report: dict) -> list[str]:
    """Names of the checks that failed in a report of `Server.smoke_test`."""
    return [check["name"] for check in report["checks"] if check["verdict"] == "red"]
