"""What the container does when things go wrong: in this order, each on the same running service."""

import http.client
import json
import random
import threading
from urllib.parse import urlsplit

import pytest
from container import Service, run

pytestmark = pytest.mark.image

MALFORMED = 1000


def malformed_bodies(count: int) -> list[tuple[str, bytes]]:
    """(path, body) of requests that no server should accept, seeded."""
    choose = random.Random(0)
    completion = json.dumps({"model": "demo", "prompt": "x", "max_tokens": 1}).encode()
    makers = [
        lambda: completion[: choose.randrange(len(completion))],
        lambda: choose.randbytes(choose.randrange(1, 400)),
        lambda: json.dumps({"model": "demo", "prompt": {"deep": [[]]}, "max_tokens": 1}).encode(),
        lambda: json.dumps({"model": "demo", "prompt": "x", "max_tokens": -choose.randrange(1, 9)}).encode(),
        lambda: json.dumps({"model": "demo", "prompt": "x", "temperature": "hot"}).encode(),
        lambda: json.dumps({"model": "demo", "prompt": [2**40 + choose.randrange(9)]}).encode(),
        lambda: json.dumps({"model": f"none-{choose.random()}", "prompt": "x"}).encode(),
        lambda: b"[" * choose.randrange(1, 5000),
    ]
    paths = ("/v1/completions", "/v1/chat/completions")
    return [(choose.choice(paths), choose.choice(makers)()) for _ in range(count)]


def test_malformed_requests_are_refused_and_the_server_answers_as_before(service: Service):
    before, restarts = service.complete()["choices"][0]["text"], service.restarts()
    statuses = [service.request(path, body)[0] for path, body in malformed_bodies(MALFORMED)]
    unexpected = sorted({status for status in statuses if not 400 <= status < 500})
    assert not unexpected, f"{len(statuses)} malformed requests were answered with {unexpected} among others"
    assert service.complete()["choices"][0]["text"] == before
    assert service.restarts() == restarts


def test_a_full_cache_volume_does_not_stop_serving(service: Service):
    """/cache/jit is a small tmpfs in this run (.ci/container), so that it can be filled."""
    before = service.complete()["choices"][0]["text"]
    service.execute("sh", "-c", "cat /dev/zero >/cache/jit/filler 2>/dev/null; true")
    try:
        free = service.execute("sh", "-c", "df --output=avail /cache/jit | tail -n 1")
        assert free.strip() == "0"
        assert service.complete()["choices"][0]["text"] == before
        assert service.health() == "healthy"
    finally:
        service.execute("rm", "/cache/jit/filler")


def test_a_killed_engine_ends_the_container_which_restarts_healthy(service: Service):
    before, restarts = service.complete()["choices"][0]["text"], service.restarts()
    engine = service.execute("pgrep", "-f", "VLLM::EngineCore").split()
    assert engine, "no engine process found"
    service.execute("kill", "-KILL", *engine)
    service.wait_until(lambda: service.restarts() > restarts, "the container is restarted", seconds=60)
    assert service.health() != "healthy"
    service.wait_until_healthy()
    assert service.complete()["choices"][0]["text"] == before


def test_sigterm_lets_a_stream_end(service: Service):
    address = urlsplit(service.url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=120)
    body = {
        "model": "demo",
        "prompt": "The",
        "max_tokens": 300,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    connection.request(
        "POST", "/v1/completions", json.dumps(body), headers={"Content-Type": "application/json"}
    )
    stream = connection.getresponse()
    assert stream.status == 200
    first = stream.readline()
    assert first.startswith(b"data: {")
    stopping = threading.Thread(target=run, args=("docker", "stop", service.id))
    stopping.start()
    lines = [first, *stream.read().splitlines()]
    stopping.join()
    events = [line for line in lines if line.startswith(b"data: ")]
    assert events[-1].strip() == b"data: [DONE]", events[-1]
    assert json.loads(events[-2][6:])["choices"][0]["finish_reason"] == "length"
    state = service.inspect()["State"]
    assert not state["Running"]
    assert state["ExitCode"] == 0, state
    run("docker", "start", service.id)
    service.wait_until_healthy()
