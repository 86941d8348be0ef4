"""scripts/calibrate_checkpoint.py: measured activation scales become input_scale, or nothing changes."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cutedsl_nvfp4.checkpoint import calibrate
from cutedsl_nvfp4.checkpoint.folder import INDEX, Folder, read_checkpoint
from cutedsl_nvfp4.checkpoint.headers import CheckpointError
from recipe import texts
from tests.support.checkpoints import dialects as checkpoints
from tests.support.checkpoints import small
from tests.support.paths import DEMO, ROOT
from tests.support.servers.vllm import LOGPROB_CHECKS, OURS_CHECKS, Server, environment, red

NAME = "layers.0.ffn.experts"


def without_input_scales(folder: Path) -> Path:
    folder.mkdir()
    for file in DEMO.glob("*.json"):
        shutil.copy(file, folder)
    tensors = load_file(DEMO / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(".input_scale")}
    save_file(kept, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return without_input_scales(tmp_path_factory.mktemp("calibrated") / "checkpoint")


def test_experts_share_the_largest_scale_with_margin():
    measured = {
        f"{NAME}.0.w1": 1.0,
        f"{NAME}.1.w1": 0.0,
        f"{NAME}.0.w2": 0.0,
        f"{NAME}.1.w2": 3.0,
        "layers.0.attn.wkv": 5.0,
    }
    assert calibrate.settle(measured, 2.0) == {
        f"{NAME}.0.w1": 2.0, f"{NAME}.1.w1": 2.0, f"{NAME}.0.w2": 6.0, f"{NAME}.1.w2": 6.0, "layers.0.attn.wkv": 10.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    "measured", [{"layers.0.attn.wkv": 0.0}, {f"{NAME}.0.w2": 0.0, f"{NAME}.1.w2": 0.0, f"{NAME}.0.w1": 1.0}]
)
def test_what_saw_only_zeros_has_no_scale(measured):
    with pytest.raises(CheckpointError, match=r"nothing but zeros, the first layers\.0"):
        calibrate.settle(measured, 2.0)


def test_scales_of_the_export_are_not_replaced():
    with pytest.raises(CheckpointError, match="every NVFP4 linear has an input_scale from the export"):
        calibrate.linears_to_calibrate(read_checkpoint(Folder(DEMO)))


def test_other_dialects_are_refused(tmp_path):
    tensors, config = checkpoints.transformers_names(*checkpoints.demo())
    small.write(tmp_path / "hf", tensors, config)
    with pytest.raises(CheckpointError, match="convert it first"):
        calibrate.linears_to_calibrate(read_checkpoint(Folder(tmp_path / "hf")))


def test_an_interrupted_write_leaves_the_checkpoint_as_it_was(tmp_path, monkeypatch):
    folder = without_input_scales(tmp_path / "checkpoint")
    before = read_checkpoint(Folder(folder))

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(calibrate, "write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        calibrate.write_scales(before, dict.fromkeys(calibrate.linears_to_calibrate(before), 1.0))
    assert not (folder / INDEX).exists()
    monkeypatch.undo()
    calibrate.write_scales(before, dict.fromkeys(calibrate.linears_to_calibrate(before), 1.0))
    assert len(read_checkpoint(Folder(folder)).tensors) == len(before.tensors) + 608


def test_bad_input_is_refused_before_anything_is_served(tmp_path, capsys):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xff")
    for arguments, words in (
        ((DEMO, tmp_path / "missing.txt"), "missing.txt"),
        ((DEMO, tmp_path / "empty.txt"), "is empty"),
        ((DEMO, tmp_path / "binary.txt"), "give UTF-8 text files"),
        (
            (tmp_path / "nothing", tmp_path / "empty.txt"),
            "nothing is no folder; scales are written into a local",
        ),
        (("owner/name", tmp_path / "empty.txt"), "owner/name is no folder; scales are written into a local"),
        ((DEMO, ROOT / "README.md", "--margin", 0.5), "--margin is 0.5, expected 1 to 1024"),
        ((DEMO, ROOT / "README.md"), "nothing to calibrate"),
    ):
        assert calibrate.main([*map(str, arguments)]) == 1
        assert words in capsys.readouterr().err


@pytest.mark.serving
@pytest.mark.xdist_group("calibration")
class TestCalibratedDemo:
    """The demo's own scales were measured in training, on these texts and more; ours have a margin of 2."""

    def test_scales_agree_with_those_of_the_training(self, folder, tmp_path):
        documents = [*texts.tales(), *texts.long_letters()]
        (tmp_path / "texts.txt").write_text("\n".join(d.prompt + d.continuation for d in documents))
        script = ROOT / "scripts/calibrate_checkpoint.py"
        result = subprocess.run(
            [sys.executable, script, folder, tmp_path / "texts.txt", "--length", "4096"],
            env=environment(), capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]
        assert "608 input_scale written" in result.stdout
        ours, trained = load_file(folder / calibrate.SCALES_FILE), load_file(DEMO / "model.safetensors")
        for name, scale in ours.items():
            ratio = float(scale) / float(trained[name])
            assert ratio > 1 if ".experts." in name else 1.2 < ratio < 3, (name, ratio)

    def test_the_demo_is_served_with_them(self, folder, tmp_path):
        env = {"CUTEDSL_NVFP4_ACTIVATIONS": "nvfp4"}
        with Server(folder, tmp_path / "server.log", env) as server:
            assert server.get("/kernels")["activations"] == "nvfp4:checkpoint"
            report = server.smoke_test(*LOGPROB_CHECKS, *OURS_CHECKS)
            log = server.log()
        assert report["status"] == 0, red(report)
        assert "Raised to what the text needs" not in log
