"""HTTP to the server under test: one deadline a check, and every failure a Red."""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from smoke.verdicts import CannotRun, Red, TimedOut


@dataclass(frozen=True)
class Address:
    """Where the server is. `prefix` is the path before /v1, usually empty."""

    scheme: str
    host: str
    port: int
    prefix: str
    api_key: str = ""

    @classmethod
    def parse(cls, base_url: str, api_key: str) -> Address:
        url = urlsplit(base_url)
        try:
            port = url.port
        except ValueError as error:
            raise CannotRun(f"base URL {base_url!r}: {error}; use http://HOST:PORT") from error
        if url.scheme not in ("http", "https") or not url.hostname:
            raise CannotRun(f"base URL {base_url!r} is not http://HOST:PORT or https://HOST; set BASE_URL")
        prefix = re.sub(r"/v1$", "", url.path.rstrip("/"))
        return cls(url.scheme, url.hostname, port or (443 if url.scheme == "https" else 80), prefix, api_key)

    def connection(self, timeout: float) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self.scheme == "https" else http.client.HTTPConnection
        return kind(self.host, self.port, timeout=timeout)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}:{self.port}{self.prefix}"


class Client:
    """HTTP with one deadline for everything sent through it; every failure is a Red."""

    def __init__(self, address: Address, seconds: float) -> None:
        self.address = address
        self.deadline = time.monotonic() + seconds

    def remaining(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimedOut("ran out of time", "look at the server's log; raise --timeout if it is only slow")
        return left

    def open(self, method: str, path: str, body: Any = None) -> http.client.HTTPResponse:
        """Send a request; `body` is bytes as they are, or anything JSON can hold."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if self.address.api_key:
            headers["Authorization"] = f"Bearer {self.address.api_key}"
        with failures_are_red(f"{method} {path}"):
            connection = self.address.connection(self.remaining())
            connection.request(method, self.address.prefix + path, data, headers)
            return connection.getresponse()

    def send(self, method: str, path: str, body: Any = None) -> tuple[int, str]:
        """Status and text of the answer, whatever the status is."""
        with failures_are_red(f"{method} {path}"), self.open(method, path, body) as response:
            return response.status, response.read().decode("utf-8", "replace")

    def json(self, method: str, path: str, body: Any = None) -> dict:
        """The JSON object of a 200 answer; anything else is Red."""
        status, text = self.send(method, path, body)
        expect_ok(status, text, f"{method} {path}")
        answer = parse_json(text, f"{method} {path}")
        if not isinstance(answer, dict):
            raise Red(f"{method} {path}: expected a JSON object, got {text[:80]!r}")
        return answer

    def lines(self, response: http.client.HTTPResponse, path: str) -> Iterator[bytes]:
        """The lines of a streamed answer, until it ends."""
        with failures_are_red(f"POST {path}"), response:
            while True:
                self.remaining()
                line = response.readline()
                if not line:
                    return
                yield line


@contextmanager
def failures_are_red(request: str) -> Iterator[None]:
    """Turn what sockets raise into Red."""
    try:
        yield
    except socket.timeout as error:  # an alias of TimeoutError only from Python 3.10 on
        remedy = "look at the server's log; raise --timeout if it is only slow"
        raise TimedOut(f"{request}: no answer in time", remedy) from error
    except (OSError, http.client.HTTPException) as error:
        detail = f"{request}: {type(error).__name__}: {error}"
        raise Red(detail, "is the server alive? look at its log") from error


def parse_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise Red(f"{what}: not JSON: {text[:80]!r}") from error


def expect_ok(status: int, text: str, what: str) -> None:
    if status == 200:
        return
    remedy = {
        401: "set OPENAI_API_KEY to the server's key",
        403: "set OPENAI_API_KEY to the server's key",
        500: "look at the server's log; NaN log-probabilities cannot be sent as JSON and end here too",
    }.get(status, "")
    said = " ".join(text.split())[:160] or "empty body"
    raise Red(f"{what}: status {status}: {said}", remedy)


def sse_events(lines: Iterable[bytes]) -> Iterator[str]:
    """The data of each server-sent event; an event cut off by the end of the stream is dropped."""
    data: list[str] = []
    for raw in lines:
        line = raw.decode("utf-8", "replace").rstrip("\r\n")
        if not line:
            if data:
                yield "\n".join(data)
            data = []
            continue
        field, _, value = line.partition(":")
        if field == "data":
            data.append(value[1:] if value.startswith(" ") else value)


def parse_metrics(text: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Prometheus text -> series name -> [(labels, value)]."""
    series: dict[str, list[tuple[dict[str, str], float]]] = {}
    for line in text.splitlines():
        match = re.match(r"([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)", line)
        if match:
            labels = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', match[2] or ""))
            series.setdefault(match[1], []).append((labels, float(match[3])))
    return series
