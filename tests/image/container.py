"""The compose stack under test, through the docker command that PATH, DOCKER_HOST and DOCKER_CONFIG name."""

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request

from tests.support.paths import ROOT

COMPOSE = ("docker", "compose", "-f", str(ROOT / "compose.yaml"), "-f", str(ROOT / "compose.cpu.yaml"))
READY_SECONDS = 240


def run(*command: str, check: bool = True, timeout: float = 300) -> str:
    """Output of a command; AssertionError with all it said if it fails."""
    answer = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    said = answer.stdout + answer.stderr
    assert not check or answer.returncode == 0, f"{' '.join(command)} ended with {answer.returncode}:\n{said}"
    return answer.stdout.strip()


class Service:
    """The running `vllm` service."""

    def __init__(self, port: int):
        self.url = f"http://127.0.0.1:{port}"
        self.address = ("127.0.0.1", port)
        self.id = run(*COMPOSE, "ps", "--all", "--quiet", "vllm")

    def inspect(self) -> dict:
        return json.loads(run("docker", "inspect", self.id))[0]

    def execute(self, *command: str) -> str:
        return run("docker", "exec", self.id, *command)

    def restarts(self) -> int:
        return self.inspect()["RestartCount"]

    def health(self) -> str:
        """starting, healthy or unhealthy; what `docker ps` shows in brackets."""
        return self.inspect()["State"]["Health"]["Status"]

    def wait_until(self, condition, what: str, seconds: float = READY_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                log = run("docker", "logs", "--tail", "60", self.id, check=False)
                raise AssertionError(f"{what}: not within {seconds:.0f} s; the log ends with\n{log}")
            time.sleep(0.5)

    def wait_until_healthy(self) -> None:
        self.wait_until(lambda: self.health() == "healthy", "the container becomes healthy")

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def events(self, since: float) -> list[tuple[float, str]]:
        """(time, what happened) to this container since then: kill, die, start, health_status: healthy, …"""
        said = run(
            "docker", "events", "--since", f"{since:.6f}", "--until", f"{time.time():.6f}",
            "--filter", f"container={self.id}", "--format", "{{.TimeNano}} {{.Action}}",
        )  # fmt: skip
        lines = [line.split(" ", 1) for line in said.splitlines()]
        return [(int(moment) / 1e9, what) for moment, what in lines]

    def send(self, data: bytes, timeout: float = 20) -> int:
        """Status of the answer to bytes that need not be HTTP; 0 if the connection is closed without one."""
        with socket.create_connection(self.address, timeout=timeout) as connection:
            try:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                answer = connection.recv(64)
            except (BrokenPipeError, ConnectionResetError):
                return 0
        return int(answer.split()[1]) if answer.startswith(b"HTTP/") else 0

    def request(self, path: str, body: bytes | None = None, timeout: float = 60) -> tuple[int, bytes]:
        """(status, body) of a GET, or a POST of `body`; statuses of errors are answers too."""
        request = urllib.request.Request(
            self.url + path, data=body, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def complete(self, **parameters) -> dict:
        body = {"model": "demo", "prompt": "The", "max_tokens": 8, "temperature": 0, **parameters}
        status, answer = self.request("/v1/completions", json.dumps(body).encode())
        assert status == 200, answer
        return json.loads(answer)
