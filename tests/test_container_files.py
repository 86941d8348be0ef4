"""What Dockerfile, bake file, compose files and board say agrees with versions.env and with each other."""

import json
import re
import subprocess
import sys

import pytest
from script_loader import PROJECT_ROOT, load_script

import pins


@pytest.mark.parametrize(
    "file, variables",
    [
        ("Dockerfile", ["VLLM_IMAGE"]),
        ("docker-bake.hcl", ["VLLM_IMAGE", "VLLM_CPU_IMAGE"]),
        ("compose.yaml", ["VLLM_IMAGE"]),
        ("compose.cpu.yaml", ["VLLM_CPU_IMAGE"]),
        (".env.example", ["VLLM_IMAGE", "VLLM_CPU_IMAGE"]),
    ],
)
def test_base_images_are_those_of_versions_env(file: str, variables: list[str]):
    named = re.findall(r"vllm/vllm-openai[a-z-]*:[^\s\"}]+", (PROJECT_ROOT / file).read_text())
    pinned = pins.read_pins()
    assert sorted(set(named)) == sorted(pinned[name].partition("@")[0] for name in variables)


def test_image_arguments_are_complete_and_agree_with_the_bake_file():
    arguments = load_script("image_arguments").image_arguments()
    declared = set(re.findall(r'^variable "(\w+)"', (PROJECT_ROOT / "docker-bake.hcl").read_text(), re.M))
    assert set(arguments) == declared - {"IMAGE"}
    assert all(value and " " not in value for value in arguments.values())


def test_import_patched_names_the_series_modules():
    modules = load_script("import_patched").patched_modules()
    assert "vllm.model_executor.kernels.linear" in modules
    assert "vllm.models.deepseek_v4.attention" in modules


def test_import_patched_fails_without_vllm():
    command = [sys.executable, "-I", "-S", str(PROJECT_ROOT / "scripts/import_patched")]
    program = f"import runpy, sys; sys.path.insert(0, {str(PROJECT_ROOT / 'scripts')!r}); " + (
        f"runpy.run_path({command[-1]!r}, run_name='__main__')"
    )
    answer = subprocess.run([*command[:3], "-c", program], capture_output=True, text=True)
    assert answer.returncode == 1
    assert re.search(r"^0 of \d+ patched modules import$", answer.stdout, re.M)


@pytest.fixture
def versions(tmp_path, monkeypatch):
    file = tmp_path / "versions.env"
    file.write_text("# pins\nVLLM_IMAGE=a/gpu:1\nVLLM_CPU_IMAGE=a/cpu:1@sha256:" + "0" * 64 + "\nX=1\n")
    return file


def test_pin_writes_digests_of_both_or_of_none(versions, monkeypatch, capsys):
    program = load_script("pin_images")
    monkeypatch.setattr(program, "VERSIONS_FILE", versions)
    monkeypatch.setattr(program, "read_pins", lambda: pins.read_pins(versions))
    monkeypatch.setattr(sys, "argv", ["pin_images"])
    digests = {"a/gpu:1": "sha256:" + "1" * 64}

    def digest_of(tag: str) -> str:
        if tag not in digests:
            raise program.PinFailed(f"{tag}: out of reach")
        return digests[tag]

    monkeypatch.setattr(program, "digest_of", digest_of)
    before = versions.read_text()
    assert program.main() == 1
    assert "a/cpu:1: out of reach" in capsys.readouterr().err
    assert versions.read_text() == before
    digests["a/cpu:1"] = "sha256:" + "2" * 64
    assert program.main() == 0
    pinned = pins.read_pins(versions)
    assert pinned["VLLM_IMAGE"] == f"a/gpu:1@{digests['a/gpu:1']}"
    assert pinned["VLLM_CPU_IMAGE"] == f"a/cpu:1@{digests['a/cpu:1']}"


def test_every_panel_of_the_board_asks_the_provisioned_prometheus():
    board = json.loads((PROJECT_ROOT / "monitoring/grafana/boards/vllm.json").read_text())
    source = (PROJECT_ROOT / "monitoring/grafana/provisioning/datasources/prometheus.yaml").read_text()
    uid = re.search(r"uid: (\w+)", source).group(1)
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {uid}
    assert all(panel["targets"] for panel in board["panels"])
