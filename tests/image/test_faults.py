"""What the container does when things go wrong: in this order, each on the same running service."""

import http.client
import json
import random
import re
import subprocess
import threading
import time

import pytest

from tests.image.container import READY_SECONDS, ROOT, Service, run

pytestmark = pytest.mark.image

MALFORMED = 1000
MALFORMED_SECONDS = 300


def malformed_bodies(count: int) -> list[tuple[str, bytes]]:
    """(path, body) of requests that no server should accept, seeded; none is longer than 5,000 bytes."""
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


def malformed_http(count: int) -> list[bytes]:
    """Bytes that are no HTTP request, or half of one, seeded; the longest is a header of 100,000 bytes."""
    choose = random.Random(1)
    post = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    makers = [
        lambda: b"\x00" + choose.randbytes(choose.randrange(1, 400)) + b"\r\n\r\n",
        lambda: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + choose.randbytes(32),  # TLS
        lambda: b"GET /v1/models HTTP/9.9\r\n\r\n",
        lambda: post + b"no colon here\r\n\r\n",
        lambda: post + b"Content-Length: many\r\n\r\n{}",
        lambda: post + b"Content-Length: 999999999999\r\n\r\n{",
        lambda: post + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n{}\r\n",
        lambda: post + b"X-Long: " + b"x" * 100_000 + b"\r\n\r\n",
        lambda: post[: choose.randrange(1, len(post))],
    ]
    return [choose.choice(makers)() for _ in range(count)]


def test_malformed_requests_are_refused_and_the_server_answers_as_before(service: Service):
    before, restarts = service.complete()["choices"][0]["text"], service.restarts()
    started = time.monotonic()
    statuses = [service.request(path, body)[0] for path, body in malformed_bodies(MALFORMED * 9 // 10)]
    unexpected = sorted({status for status in statuses if not 400 <= status < 500})
    assert not unexpected, f"{len(statuses)} malformed requests were answered with {unexpected} among others"
    statuses = [service.send(data) for data in malformed_http(MALFORMED // 10)]
    unexpected = sorted({status for status in statuses if status and not 400 <= status < 500})
    assert not unexpected, (
        f"{len(statuses)} malformed HTTP requests were answered with {unexpected} among others"
    )
    assert 400 in statuses, "no malformed HTTP request was answered at all"
    assert time.monotonic() - started < MALFORMED_SECONDS
    assert service.complete()["choices"][0]["text"] == before
    assert service.restarts() == restarts
    assert service.health() == "healthy"


def test_a_full_cache_volume_stops_only_what_has_to_compile(service: Service):
    """/cache/jit is a small tmpfs in this run (.ci/container): it can be filled, and a restart empties it.

    Nothing has asked this server for log-probabilities yet, so the first such request compiles.
    """
    before, restarts = service.complete()["choices"][0]["text"], service.restarts()
    service.execute("sh", "-c", "cat /dev/zero >/cache/jit/filler 2>/dev/null; true")
    free = service.execute("sh", "-c", "df --output=avail /cache/jit | tail -n 1")
    assert free.strip() == "0"
    assert service.complete()["choices"][0]["text"] == before
    assert service.health() == "healthy"
    body = {"model": "demo", "prompt": "The", "max_tokens": 1, "logprobs": 1}
    status, answer = service.request("/v1/completions", json.dumps(body).encode())
    assert status == 500
    assert json.loads(answer)["error"]["message"]
    service.wait_until(lambda: service.restarts() > restarts, "the container is restarted", seconds=60)
    assert "No space left on device" in run("docker", "logs", service.id)
    service.wait_until_healthy()
    assert service.complete()["choices"][0]["text"] == before


def test_a_start_on_a_full_cache_volume_fails_and_says_why(service: Service):
    found = service.inspect()["Config"]
    environment = [argument for setting in found["Env"] for argument in ("--env", setting)]
    answer = subprocess.run(
        [
            "docker", "run", "--rm", "--network", "none", "--user", found["User"], *environment,
            "--tmpfs", "/cache/jit:size=4k,mode=1777", "--volume", f"{ROOT}/demo:/demo:ro", "--entrypoint", "sh",
            found["Image"], "-c", 'cat /dev/zero >/cache/jit/filler; exec vllm serve "$@"', "-", *found["Cmd"],
        ],
        capture_output=True,
        text=True,
        timeout=READY_SECONDS,
    )  # fmt: skip
    assert answer.returncode not in (0, 125, 126, 127), answer.stderr
    assert re.search(r"OSError: .*No space left on device", answer.stdout + answer.stderr)


def test_a_killed_engine_ends_the_container_which_restarts_healthy(service: Service):
    """Green, red, green: what clients, Docker's health and Docker's events see of it."""
    before, restarts = service.complete()["choices"][0]["text"], service.restarts()
    engine = service.execute("pgrep", "-f", "VLLM::EngineCore").split()
    assert engine, "no engine process found"
    assert service.health() == "healthy"
    assert service.answers()
    killed = time.time()
    service.execute("kill", "-KILL", *engine)
    service.wait_until(lambda: not service.answers(), "/health stops answering 200", seconds=30)
    service.wait_until(lambda: service.restarts() > restarts, "the container is restarted", seconds=60)
    assert service.health() != "healthy", "green before the new server can have loaded"
    assert not service.answers()
    service.wait_until_healthy()
    assert service.answers()
    seen = [
        what for _, what in service.events(killed) if what in ("die", "start") or what.startswith("health")
    ]
    assert seen == ["die", "start", "health_status: healthy"], seen
    assert service.complete()["choices"][0]["text"] == before
    assert service.restarts() == restarts + 1


def test_a_server_that_hangs_is_red_until_it_answers_again(service: Service):
    run("docker", "kill", "--signal", "STOP", service.id)
    try:
        service.wait_until(
            lambda: service.health() == "unhealthy", "the container becomes unhealthy", seconds=60
        )
    finally:
        run("docker", "kill", "--signal", "CONT", service.id)
    service.wait_until_healthy()
    assert service.answers()


def test_sigterm_lets_a_stream_end(service: Service):
    connection = http.client.HTTPConnection(*service.address, timeout=120)
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
    began = time.time()
    stopping = threading.Thread(target=run, args=("docker", "stop", service.id))
    stopping.start()
    lines = [(began, first)]
    while line := stream.readline():
        lines.append((time.time(), line))
    stopping.join()
    events = [(moment, line.strip()) for moment, line in lines if line.startswith(b"data: ")]
    assert events[-1][1] == b"data: [DONE]", events[-1]
    assert json.loads(events[-2][1][6:])["choices"][0]["finish_reason"] == "length"
    signalled = next(moment for moment, what in service.events(began) if what.startswith("kill"))
    after = sum(moment > signalled for moment, _ in events)
    assert after > 10, f"only {after} of {len(events)} events came after SIGTERM: the stream was too short"
    state = service.inspect()["State"]
    assert not state["Running"]
    assert state["ExitCode"] == 0, state
    run("docker", "start", service.id)
    service.wait_until_healthy()
