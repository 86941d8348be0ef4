"""`make pin` against a registry: Debian's, in a container of the stand-in base."""

import shutil
import subprocess
import sys

import pytest

from devtools.setup import pins
from tests.image.container import ROOT, run

pytestmark = pytest.mark.image

PROGRAMS = ROOT / ".cache/container-ci/programs"  # .ci/container unpacks them there
REGISTRY = "127.0.0.1:5000"


@pytest.fixture
def pushed(tmp_path):
    """Digest of the small image that the registry has as vllm/gpu:v1 and vllm/cpu:v1."""
    settings = PROGRAMS / "registry.yml"
    settings.write_text("version: 0.1\nstorage: {filesystem: {rootdirectory: /tmp}}\nhttp: {addr: ':5000'}\n")
    registry = run(
        "docker", "run", "--detach", "--rm", "--publish", f"{REGISTRY}:5000", "--volume", f"{PROGRAMS}:/programs:ro",
        "--entrypoint", "/programs/usr/bin/docker-registry", "standin:cpu", "serve", "/programs/registry.yml",
    )  # fmt: skip
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY Dockerfile /\n")
    for name in ("gpu", "cpu"):
        tag = f"{REGISTRY}/vllm/{name}:v1"
        run(
            "docker",
            "buildx",
            "build",
            "--quiet",
            "--provenance=false",
            "--load",
            "--tag",
            tag,
            str(tmp_path),
        )
        run("docker", "push", tag)
    yield run("docker", "image", "inspect", tag, "--format", "{{.Id}}")
    run("docker", "rm", "--force", registry)


def test_pin_writes_what_the_registry_says(pushed: str, tmp_path):
    for name in ("devtools/image/pin.py", "devtools/setup/pins.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        shutil.copy(ROOT / name, tmp_path / name)
    table = tmp_path / "versions.env"
    before = f"# pins\nVLLM_IMAGE={REGISTRY}/vllm/gpu:v1\nVLLM_CPU_IMAGE={REGISTRY}/vllm/cpu:v1\n"
    table.write_text(before)

    def pin(*arguments: str) -> int:
        return subprocess.run([sys.executable, tmp_path / "devtools/image/pin.py", *arguments]).returncode

    assert pin("--check") == 1
    assert table.read_text() == before
    assert pin() == 0
    assert pins.read_pins(table) == {
        "VLLM_IMAGE": f"{REGISTRY}/vllm/gpu:v1@{pushed}",
        "VLLM_CPU_IMAGE": f"{REGISTRY}/vllm/cpu:v1@{pushed}",
    }
    assert pin("--check") == 0
    table.write_text(table.read_text().replace("cpu:v1", "cpu:none"))
    assert pin() == 1, "a tag that the registry does not have"
