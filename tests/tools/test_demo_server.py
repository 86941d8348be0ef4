"""demo_server against small servers made here: starting, dying, hanging, stopping, leaving others alone."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from devtools.setup import demo_server

LIMIT = 600  # seconds; reached only by what hangs
EXPECTED = {"documents": [{"prompt": "Once", "text": " upon a time", "max_tokens": 4}]}

# argv: port, behaviour
FAKE_SERVER = """
import json, signal, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
port, behaviour = int(sys.argv[1]), sys.argv[2]
print("loading weights", flush=True)
if behaviour == "dies":
    print("ValueError: no such kernel", flush=True)
    sys.exit(3)
if behaviour == "hangs":
    signal.pause()
if behaviour == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if behaviour == "orphan":
    code = "import signal; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); signal.pause()"
    subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE).stdout.readline()
class Handler(BaseHTTPRequestHandler):
    def reply(self, answer):
        body = json.dumps(answer).encode()
        self.send_response(200 if answer else 404)
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        kernels = {"vllm_version": "1", "device": "cpu", "activations": "none", "summary": {"cutedsl": 7}}
        if behaviour == "no-plugin":
            kernels = None
        self.reply({"/health": {"ok": 1}, "/kernels": kernels}[self.path])
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = " into the void" if behaviour == "wrong" else " upon a time"
        if behaviour == "fails":
            self.send_response(500)
            self.end_headers()
            self.wfile.write(b"out of cache")
            return
        assert request["prompt"] == "Once" and request["temperature"] == 0
        self.reply({"choices": [{"text": text}], "usage": {"completion_tokens": 4}})
    def log_message(self, *_):
        pass
HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """demo(action, behaviour) runs the program in a project folder of its own -> exit status."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/expected.json").write_text(json.dumps(EXPECTED))
    monkeypatch.setattr(demo_server, "PROJECT_ROOT", tmp_path)
    monkeypatch.setattr(demo_server, "KILL_SECONDS", LIMIT)
    monkeypatch.setattr(demo_server.machine, "available_memory", lambda: 100 * demo_server.machine.GB)

    def run(action, behaviour="well", timeout=LIMIT, stop_seconds=LIMIT):
        command = [sys.executable, "-c", FAKE_SERVER, str(port), behaviour]
        monkeypatch.setattr(demo_server, "server_command", lambda *_: command)
        return demo_server.main([action, "--port", str(port), "--timeout", str(timeout)], stop_seconds)

    run.server = demo_server.DemoServer(tmp_path / ".demo", stop_seconds=1)
    run.port = port
    yield run
    run.server.stop()


def test_start_status_stop(demo, capsys):
    assert demo("status") == 1
    assert demo("start") == 0
    output = capsys.readouterr().out
    assert "' upon a time'" in output
    assert "7 quantized layers  cutedsl" in output
    assert f"make smoke-test BASE_URL=http://127.0.0.1:{demo.port}" in output
    assert "make down" in output
    state = demo.server.state()
    assert os.getsid(state["pid"]) == state["pid"] != os.getsid(0)
    assert demo("status") == 0
    assert demo("stop") == 0
    assert not demo.server.is_running(state)
    assert not demo_server.machine.port_in_use("127.0.0.1", demo.port)
    assert demo("status") == 1


def test_second_start_says_that_it_runs(demo, capsys):
    assert demo("start") == 0
    pid = demo.server.state()["pid"]
    capsys.readouterr()
    assert demo("start") == 0
    assert f"already running (pid {pid})" in capsys.readouterr().out
    assert demo.server.state()["pid"] == pid


def test_second_stop_has_nothing_to_do(demo, capsys):
    assert demo("stop") == 0
    assert "no demo server is running" in capsys.readouterr().out


def test_server_that_dies_shows_the_end_of_its_log(demo, capsys):
    assert demo("start", "dies") == 1
    error = capsys.readouterr().err
    assert "ValueError: no such kernel" in error
    assert "ended with status 3" in error
    assert demo.server.state() is None


def test_server_that_hangs_is_stopped(demo, capsys, monkeypatch):
    """Its time is up as soon as it has said something."""
    launch = demo_server.DemoServer.launch

    def launch_and_listen(server, *arguments):
        state = launch(server, *arguments)
        while not server.last_lines(1) and server.process.poll() is None:
            time.sleep(0.05)
        return state

    monkeypatch.setattr(demo_server.DemoServer, "launch", launch_and_listen)
    assert demo("start", "hangs", timeout=0) == 1
    error = capsys.readouterr().err
    assert "loading weights" in error
    assert "not ready after 0 s" in error
    assert demo.server.state() is None


def test_wrong_text_is_an_error(demo, capsys):
    assert demo("start", "wrong") == 1
    output = capsys.readouterr()
    assert "' into the void'" in output.out
    assert "the reference continues with ' upon a time'" in output.err


def test_server_that_fails_to_complete_is_an_error(demo, capsys):
    assert demo("start", "fails") == 1
    assert "/v1/completions answers 500: out of cache" in capsys.readouterr().err


def test_server_without_our_plugin_is_an_error(demo, capsys):
    assert demo("start", "no-plugin") == 1
    assert "/kernels answers 404: the plugin or the patches are not active" in capsys.readouterr().err


def test_port_in_use_starts_nothing(demo, capsys):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", demo.port))
        listener.listen()
        assert demo("start") == 1
    assert f"127.0.0.1:{demo.port} is in use by pid {os.getpid()}" in capsys.readouterr().err
    assert demo.server.state() is None


def test_server_that_ignores_sigterm_is_killed_and_said_so(demo, capsys):
    assert demo("start", "stubborn") == 0
    assert demo("stop", stop_seconds=1) == 0
    assert "were killed, 1 s after SIGTERM" in capsys.readouterr().out
    assert not demo_server.machine.port_in_use("127.0.0.1", demo.port)


def test_workers_that_outlive_the_server_are_stopped(demo):
    assert demo("start", "orphan") == 0
    state = demo.server.state()
    workers = [pid for pid in demo.server.members(state) if pid != state["pid"]]
    assert len(workers) == 1
    os.kill(state["pid"], signal.SIGKILL)
    while demo.server.is_running(state):
        time.sleep(0.05)
    assert demo("stop", stop_seconds=1) == 0
    assert workers[0] not in demo_server.process_times()


def test_someone_elses_process_with_our_pid_is_left_alone(demo, capsys):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        demo.server.folder.mkdir()
        started = demo_server.process_times()[other.pid][1]
        state = {"pid": other.pid, "started": started - 1, "url": "http://127.0.0.1:1", "command": []}
        demo.server.state_file.write_text(json.dumps(state))
        assert demo("stop") == 0
        assert "had already ended" in capsys.readouterr().out
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize(
    ("present", "reason"),
    [
        ([], "devtools/setup/setup_env.py"),
        ([".venv/bin/vllm"], "config.json is missing; get it from git, or make it with `make train-demo`"),
        ([".venv/bin/vllm", "demo/config.json"], "expected.json is missing"),
    ],
)
def test_what_is_not_there_yet_is_named(tmp_path, present, reason):
    for name in present:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(demo_server.DemoFailed, match=reason):
        demo_server.server_command(tmp_path, "127.0.0.1", 8000)


@pytest.mark.parametrize(
    ("drafted", "speculation"), [(0, []), (2, [{"method": "mtp", "num_speculative_tokens": 2}])]
)
def test_the_draft_head_is_asked_for_by_its_number_of_tokens(tmp_path, drafted, speculation):
    for name in (".venv/bin/vllm", "demo/config.json", "demo/expected.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    command = demo_server.server_command(tmp_path, "127.0.0.1", 8000, drafted)
    found = [json.loads(command[at + 1]) for at, word in enumerate(command) if word == "--speculative-config"]
    assert found == speculation
