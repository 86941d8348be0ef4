"""CI tells the truth: it is red if any part is, the container part above all, and says where the time went."""

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PASS, FAIL = "exit 0", "exit 7"


def executable(file: Path, body: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)


@pytest.fixture
def ci(tmp_path):
    """.ci/run on a project of stand-ins: start(what `make` does, what .ci/container does or None) -> process."""

    def start(make: str, container: str | None) -> subprocess.Popen:
        (tmp_path / ".ci").mkdir()
        shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
        executable(tmp_path / "bin/make", make)
        (tmp_path / "devtools/setup").mkdir(parents=True)
        (tmp_path / "devtools/setup/demo_server.py").write_text("")
        if container is not None:
            executable(tmp_path / ".ci/container", container)
        environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
        return subprocess.Popen(
            [tmp_path / ".ci/run"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """(exit status, all it printed)"""
    said, _ = process.communicate(timeout=600)
    return process.returncode, said


def test_green_with_every_part_in_the_table_of_times(ci):
    status, said = ended(ci(PASS, PASS))
    assert status == 0, said
    assert said.endswith("CI passed\n")
    table = said.partition("=== where the time went")[2]
    names = re.findall(r"^ *\d+ s  (\w+) +ok$", table, re.M)
    assert names == ["system", "setup", "lint", "tests", "proofs", "demo", "smoke", "down", "container"]


@pytest.mark.parametrize("container, status", [(FAIL, 7), (None, 127)])
def test_red_where_the_container_part_fails_or_is_missing(ci, container: str | None, status: int):
    ci_status, said = ended(ci(PASS, container))
    assert ci_status == 1
    assert re.search(rf"^ *\d+ s  container +FAILED \({status}\)$", said, re.M)
    assert said.endswith("CI failed: container\n")


def test_a_failure_before_it_does_not_keep_the_container_part_from_running(ci):
    status, said = ended(ci('case "$1" in lint|test|demo) exit 1 ;; esac', PASS))
    assert status == 1
    assert re.search(r"^ *\d+ s  container +ok$", said, re.M)
    assert said.endswith("CI failed: lint tests proofs demo\n")


def test_cut_off_is_not_passed(ci, tmp_path):
    """The signal comes while the container part runs: that ends only when it is let go."""
    process = ci(PASS, f"touch {tmp_path}/begun; until [ -e {tmp_path}/let_go ]; do sleep 0.05; done")
    while not (tmp_path / "begun").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    (tmp_path / "let_go").touch()
    status, said = ended(process)
    assert status == 143
    assert "CI passed" not in said
    assert "where the time went" in said


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_the_container_part_refuses_to_run_without_root_instead_of_passing():
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        container = Path(folder) / "ci/container"
        container.parent.mkdir()
        shutil.copy(ROOT / ".ci/container", container)
        answer = subprocess.run([container], user=65534, group=65534, capture_output=True, text=True)
    assert answer.returncode == 1
    assert "needs root" in answer.stderr
