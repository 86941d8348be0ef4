"""What proves an image's layers and labels, and what says which revision it is built from."""

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from devtools.image import arguments as image_arguments
from devtools.image import check_labels, check_layers
from tests.support.paths import ROOT

SITE = "usr/local/lib/python3.12/dist-packages"
OURS = {
    "opt/cutedsl_nvfp4/patches/series": b"one.patch\n",
    f"{SITE}/vllm/.cutedsl_nvfp4_patches.json": b"{}",
    f"{SITE}/cutedsl_nvfp4/__init__.py": b"",
    f"{SITE}/cutedsl_nvfp4-0.1.0.dist-info/RECORD": b"",
}


def write_layout(folder: Path, layers: list[dict[str, bytes]], config: dict) -> Path:
    """An OCI layout of one image, each layer a dict of path to contents."""
    blobs = folder / "blobs/sha256"
    blobs.mkdir(parents=True)

    def blob(content: bytes) -> dict:
        name = hashlib.sha256(content).hexdigest()
        (blobs / name).write_bytes(content)
        return {"digest": f"sha256:{name}", "size": len(content)}

    def tar(files: dict[str, bytes]) -> bytes:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as archive:
            for path, content in files.items():
                member = tarfile.TarInfo(path)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return stream.getvalue()

    manifest = {"config": blob(json.dumps(config).encode()), "layers": [blob(tar(layer)) for layer in layers]}
    index = {"manifests": [blob(json.dumps(manifest).encode())]}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


BASE = {"etc/pip.conf": b"index-url = https://mirror.internal.example/simple"}
VALUES = {"https://mirror.internal.example/simple": "pip's global.index-url"}


def test_check_layers_passes_this_project_and_looks_past_the_base(tmp_path):
    program = check_layers
    layout = program.Layout(write_layout(tmp_path, [BASE, OURS, {}], {"config": {"Env": ["PATH=/bin"]}}))
    assert list(program.findings(layout, 1, VALUES)) == []
    assert len(list(program.findings(layout, 0, VALUES))) == 2


@pytest.mark.parametrize(
    "path, content, said",
    [
        ("root/.netrc", b"", "outside the project's own places"),
        ("etc/apt/apt.conf.d/proxy", b"", "outside the project's own places"),
        ("cache/jit/kernel.so", b"", "outside the project's own places"),
        ("tmp/.wh.build", b"", "outside the project's own places"),
        (f"{SITE}/other/__init__.py", b"", "outside the project's own places"),
        (
            "opt/cutedsl_nvfp4/x",
            b"see https://mirror.internal.example/simple/torch",
            "pip's global.index-url",
        ),
        ("opt/cutedsl_nvfp4/x", b"-----BEGIN OPENSSH " + b"PRIVATE KEY-----", "a private key"),
        ("opt/cutedsl_nvfp4/x", b"token = hf_" + b"a1" * 17, "a Hugging Face token"),
        ("opt/cutedsl_nvfp4/x", b"ghp_" + b"a1" * 18, "a GitHub token"),
        ("opt/cutedsl_nvfp4/x", b"AKIA" + b"A1" * 8, "an AWS key"),
        ("opt/cutedsl_nvfp4/x", b"https://me:" + b"pass@host/simple", "a password in an address"),
    ],
)
def test_check_layers_finds_what_even_a_later_layer_deletes(tmp_path, path: str, content: bytes, said: str):
    program = check_layers
    layers = [BASE, {**OURS, path: content}, {"opt/cutedsl_nvfp4/.wh.x": b""}]
    found = list(program.findings(program.Layout(write_layout(tmp_path, layers, {})), 1, VALUES))
    assert len(found) == 1
    assert found[0].startswith(f"{path}: ")
    assert said in found[0]


def test_check_layers_reads_the_configuration(tmp_path):
    program = check_layers
    config = {
        "history": [{"created_by": "RUN pip install --index-url https://mirror.internal.example/simple"}]
    }
    layout = program.Layout(write_layout(tmp_path, [BASE, OURS], config))
    assert list(program.findings(layout, 1, VALUES)) == ["configuration: a value of pip's global.index-url"]


def test_check_layers_knows_this_machine(monkeypatch):
    monkeypatch.setenv("COMPANY_TOKEN", "s3cret-value")
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("PIP_INDEX_URL", "https://pypi.org/simple https://mirror.internal.example/simple")
    values = check_layers.host_values()
    assert {"s3cret-value", "http://proxy.example:3128", "https://mirror.internal.example/simple"} <= set(
        values
    )
    assert str(ROOT) in values
    assert "https://pypi.org/simple" not in values


def test_check_layers_refuses_what_is_no_image(tmp_path, monkeypatch, capsys):
    program = check_layers
    layout = write_layout(tmp_path / "one", [BASE, OURS], {})
    for folder, layers in ((tmp_path / "nothing", "1"), (layout, "2"), (layout, "0")):
        monkeypatch.setattr(sys, "argv", ["check_layers", str(folder), "--base-layers", layers])
        assert program.main() == 2
    assert "the image has 2 layers" in capsys.readouterr().err


@pytest.mark.parametrize(
    "version, series, status",
    [("0.32.0", "abc", 0), ("unknown", "unknown", 0), ("0.33.0", "abc", 1), ("0.32.0", "abd", 1)],
)
def test_check_labels(tmp_path, monkeypatch, capsys, version: str, series: str, status: int):
    package = tmp_path / "vllm"
    package.mkdir()
    stamp = {"vllm_version": "0.32.0", "series_sha256": "abc"}
    (package / ".cutedsl_nvfp4_patches.json").write_text(json.dumps(stamp))
    spec = type("Spec", (), {"submodule_search_locations": [str(package)]})
    program = check_labels
    monkeypatch.setattr(program.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(sys, "argv", ["check_labels", version, series])
    assert program.main() == status
    assert ("the image holds" in capsys.readouterr().out) == ((version, series) != ("0.32.0", "abc"))


def test_a_revision_is_dirty_with_what_an_image_would_hold(tmp_path, monkeypatch):
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", tmp_path, *arguments], check=True, capture_output=True)

    program = image_arguments
    monkeypatch.setattr(program, "PROJECT_ROOT", tmp_path)
    shutil.copytree(ROOT / "patches", tmp_path / "patches")
    git("init", "--quiet")
    git("add", ".")
    git("-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "--quiet", "-m", "x")
    (tmp_path / "notes.txt").write_text("in no image")
    assert not program.image_arguments()["GIT_REVISION"].endswith("-dirty")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/new.py").write_text("untracked, and in the wheel")
    assert program.image_arguments()["GIT_REVISION"].endswith("-dirty")
