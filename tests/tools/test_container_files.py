"""What Dockerfile, bake file, compose files and board say agrees with versions.env and with each other."""

import json
import re
import subprocess
import sys

import pytest
import yaml
from grafana_foundation_sdk.cog import encoder
from grafana_foundation_sdk.models import dashboard

from devtools.image import arguments as image_arguments
from devtools.image import import_patched
from devtools.image import pin as pin_images
from devtools.setup import pins
from tests.support import fake_docker
from tests.support.paths import ROOT


@pytest.mark.parametrize(
    "file, variables",
    [
        ("Dockerfile", ["VLLM_IMAGE"]),
        ("docker-bake.hcl", ["VLLM_IMAGE", "VLLM_CPU_IMAGE"]),
        ("compose.yaml", ["VLLM_IMAGE"]),
        ("compose.cpu.yaml", ["VLLM_CPU_IMAGE"]),
    ],
)
def test_base_images_are_those_of_versions_env(file: str, variables: list[str]):
    named = re.findall(r"vllm/vllm-openai[a-z-]*:[^\s\"}]+", (ROOT / file).read_text())
    pinned = pins.read_pins()
    assert sorted(set(named)) == sorted(pinned[name].partition("@")[0] for name in variables)


def test_image_arguments_are_complete_and_agree_with_the_bake_file():
    arguments = image_arguments.image_arguments()
    declared = set(re.findall(r'^variable "(\w+)"', (ROOT / "docker-bake.hcl").read_text(), re.M))
    assert set(arguments) == declared - {"IMAGE"}
    assert all(value and " " not in value for value in arguments.values())


def test_import_patched_names_the_series_modules():
    modules = import_patched.patched_modules()
    assert "vllm.model_executor.kernels.linear" in modules
    assert "vllm.models.deepseek_v4.attention" in modules


def test_import_patched_fails_without_vllm():
    command = [sys.executable, "-I", "-S", str(ROOT / "devtools/image/import_patched.py")]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 1
    assert re.search(r"^0 of \d+ patched modules import$", answer.stdout, re.M)


@pytest.fixture
def versions(tmp_path, monkeypatch):
    file = tmp_path / "versions.env"
    file.write_text("# pins\nVLLM_IMAGE=a/gpu:1\nVLLM_CPU_IMAGE=a/cpu:1@sha256:" + "0" * 64 + "\nX=1\n")
    return file


def test_pin_writes_digests_of_both_or_of_none(versions, monkeypatch, capsys):
    program = pin_images
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
    board = json.loads((ROOT / "monitoring/grafana/boards/vllm.json").read_text())
    source = (ROOT / "monitoring/grafana/provisioning/datasources/prometheus.yaml").read_text()
    uid = re.search(r"uid: (\w+)", source).group(1)
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {uid}
    assert all(panel["targets"] for panel in board["panels"])


def test_what_grafana_is_told_to_read_is_mounted():
    grafana = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["grafana"]
    mounts = dict(reversed(volume.split(":")[:2]) for volume in grafana["volumes"])
    provider = (ROOT / "monitoring/grafana/provisioning/dashboards/boards.yaml").read_text()
    folder = yaml.safe_load(provider)["providers"][0]["options"]["path"]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (ROOT / mounts[folder] / home.removeprefix(f"{folder}/")).is_file()
    assert (ROOT / mounts["/etc/grafana/provisioning"] / "datasources").is_dir()


def lost(before: object, after: object, path: str = "") -> list[str]:
    """Paths of what `before` has and `after` has not, or has otherwise."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [line for key in before for line in lost(before[key], after.get(key), f"{path}.{key}")]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [line for i in range(len(before)) for line in lost(before[i], after[i], f"{path}[{i}]")]
    return [] if before == after else [path]


def test_grafana_knows_everything_the_board_says():
    """Through the types that Grafana publishes: what they do not know is lost on the way."""
    board = json.loads((ROOT / "monitoring/grafana/boards/vllm.json").read_text())

    def read_and_written(board: dict) -> dict:
        return json.loads(encoder.JSONEncoder().encode(dashboard.Dashboard.from_json(board)))

    assert lost(board, read_and_written(board)) == []
    board["panels"][0]["titel"] = "misspelt"
    assert lost(board, read_and_written(board)) == [".panels[0].titel"]


def test_every_setting_of_compose_is_in_the_example_with_its_default():
    files = "".join((ROOT / name).read_text() for name in ("compose.yaml", "compose.cpu.yaml"))
    used = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", files)) | dict.fromkeys(
        re.findall(r"^ +(\w+): +#", files, re.M) + re.findall(r"\$\{(\w+):\+", files), ""
    )
    of_the_build = set(image_arguments.image_arguments())
    images = {"PROMETHEUS_IMAGE", "GRAFANA_IMAGE"}
    example = dict(re.findall(r"^#(\w+)=(.*)$", (ROOT / ".env.example").read_text(), re.M))
    assert example == {name: value for name, value in used.items() if name not in of_the_build | images}


def test_compose_serves_on_the_loopback_and_outlives_a_cold_start():
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    for name, service in compose["services"].items():
        assert all(
            re.match(r"127\.0\.0\.1:|\$\{BIND_ADDRESS:-127\.0\.0\.1\}:", port)
            for port in service.get("ports", [])
        )
        assert service["logging"]["options"]["max-size"], f"{name} writes a log without end"
    vllm = compose["services"]["vllm"]
    hours = int(re.fullmatch(r"(\d+)h", vllm["healthcheck"]["start_period"])[1])
    assert hours >= 940e9 * 8 / 100e6 / 3600 + 1, "940 GB at 100 Mbit/s, and an hour of compilation"
    drain = int(re.search(r"--shutdown-timeout (\d+)", vllm["command"]).group(1))
    assert int(vllm["stop_grace_period"].removesuffix("s")) > drain
    assert vllm["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    mounts = dict(volume.split(":")[:2] for volume in vllm["volumes"])
    for variable in ("HOME", "HF_HOME", "CUTE_DSL_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        assert vllm["environment"][variable].startswith(tuple(mounts.values()))
    assert set(mounts) <= set(compose["volumes"])


@pytest.fixture
def make(tmp_path):
    """make with a docker that prints what reaches it, on a machine for the default model."""
    environment = fake_docker.install(tmp_path, ["NVIDIA H200, 143771"] * 2)

    def run(*arguments: str) -> str:
        command = ["make", "--no-print-directory", *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=environment, text=True, check=True, stdout=subprocess.PIPE
        ).stdout

    return run


def test_make_up_leaves_port_and_image_to_env_unless_told(make):
    pinned = pins.read_pins()["VLLM_IMAGE"]
    assert re.search(
        rf"^PORT= IMAGE= VLLM_IMAGE={pinned} REVISION=[0-9a-f]{{40}}\S* compose up --wait", make("up"), re.M
    )
    assert re.search("^PORT=9 IMAGE=other .* compose up", make("up", "PORT=9", "IMAGE=other"), re.M)
    assert "compose -f compose.yaml -f compose.cpu.yaml up --wait" in make("up-cpu")


def test_make_build_names_and_labels_what_it_builds(make):
    assert re.search(r"IMAGE=vllm-cutedsl-nvfp4 .* REVISION=[0-9a-f]{40}.* gpu$", make("build").strip())
    assert re.search(r"IMAGE=other .* cpu$", make("build", "IMAGE=other", "TARGET=cpu").strip())
