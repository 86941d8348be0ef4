"""scripts/compare_checkpoints.py: true errors, worst first, between any two formats."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from cutedsl_nvfp4.checkpoint.compare import compare, draw, main
from recipe import export
from tests.support.checkpoints import small
from tests.support.paths import DEMO

WORST = "layers.1.attn.wo_b"


@pytest.fixture(scope="module")
def values() -> dict:
    return small.demo_values()


@pytest.fixture(scope="module")
def bf16(tmp_path_factory, values) -> Path:
    return small.write(
        tmp_path_factory.mktemp("bf16") / "src", small.native_dtypes(values), small.config(None)
    )


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Path:
    """The demo with one linear's block scales doubled."""
    tensors = export.load_checkpoint(DEMO)
    scales = tensors[f"{WORST}.weight_scale"]
    tensors[f"{WORST}.weight_scale"] = (scales.float() * 0.5).to(torch.float8_e4m3fn)
    contents = json.loads((DEMO / "config.json").read_text())
    return small.write(tmp_path_factory.mktemp("damaged") / "src", tensors, contents)


def test_checkpoint_equals_itself():
    found, notes = compare(DEMO, DEMO, set())
    assert notes == [] and len(found) > 600
    assert all(row.snr_db is None and row.largest == 0 and row.cosine == pytest.approx(1) for row in found)


def test_nvfp4_against_bf16_of_the_same_values(bf16, values):
    """The only error is BF16's rounding, which is known."""
    found, notes = compare(bf16, DEMO, {"attention"})
    assert notes == [] and len(found) == 15
    for row in found:
        exact = values[f"{row.name}.weight"].double()
        stored = exact.bfloat16().double()
        noise = float((exact - stored).square().sum())
        expected = 10 * math.log10(float(stored.square().sum()) / noise)
        assert row.formats == ("bf16", "nvfp4")
        assert row.snr_db == pytest.approx(expected, abs=0.01)
        assert row.largest == pytest.approx(float((exact - stored).abs().max()), rel=1e-3)


@pytest.mark.parametrize("jobs", [1, 2])
def test_worst_comes_first(damaged, jobs):
    found, _ = compare(DEMO, damaged, set(), jobs)
    assert found[0].name == WORST and found[0].snr_db == pytest.approx(6.02, abs=0.3)
    assert found[0].cosine > 0.99 and all(row.snr_db is None for row in found[1:])


def test_native_formats_are_read(tmp_path, bf16, values):
    native = small.write(tmp_path / "src", small.native(values), small.config(small.NATIVE_QUANTIZATION))
    found, notes = compare(bf16, native, set())
    by_name = {row.name: row for row in found}
    assert notes == []
    assert (
        by_name["layers.1.attn.wq_a"].formats == ("bf16", "fp8") and by_name["layers.1.attn.wq_a"].snr_db > 28
    )
    expert = by_name["layers.1.ffn.experts.3.w1"]
    assert expert.formats == ("bf16", "mxfp4") and 12 < expert.snr_db < 40
    assert by_name["norm.weight"].snr_db is None


@pytest.fixture(scope="module")
def incomplete(tmp_path_factory) -> Path:
    """The demo without one linear, and with a parameter of another shape."""
    tensors = export.load_checkpoint(DEMO)
    for name in [name for name in tensors if name.startswith("layers.2.attn.wo_a.")]:
        del tensors[name]
    tensors["norm.weight"] = tensors["norm.weight"][:-1].clone()
    contents = json.loads((DEMO / "config.json").read_text())
    return small.write(tmp_path_factory.mktemp("incomplete") / "src", tensors, contents)


def test_what_only_one_has_is_told(incomplete):
    _, notes = compare(DEMO, incomplete, set())
    assert notes == ["1 only in A, the first layers.2.attn.wo_a", "norm.weight is [256] in A and [255] in B"]


def test_notes_are_about_the_chosen_kinds(incomplete):
    assert compare(DEMO, incomplete, {"shared"})[1] == []
    assert compare(DEMO, incomplete, {"attention"})[1] == ["1 only in A, the first layers.2.attn.wo_a"]
    assert compare(DEMO, incomplete, {"rest"})[1] == ["norm.weight is [256] in A and [255] in B"]


@pytest.mark.parametrize(
    "kinds, words", [("attention", "layers.2.attn.wo_a"), ("rest", "norm.weight is"), ("mtp", "no tensor is in both")]
)  # fmt: skip
def test_at_least_fails_on_what_was_not_compared(incomplete, kinds, words, capsys):
    arguments = [str(DEMO), str(incomplete), "--jobs", "1", "--only", kinds]
    assert main(arguments) == 0
    capsys.readouterr()
    assert main([*arguments, "--at-least", "20"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("not everything could be compared: ") and words in error
    assert main([*arguments[:-1], "shared", "--at-least", "20"]) == 0


def test_plot_has_a_point_for_every_unequal_tensor(bf16, damaged, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    for name, a, b, count in (("one", DEMO, damaged, 1), ("many", bf16, DEMO, 300)):
        found, _ = compare(a, b, set())
        draw(found, tmp_path / f"{name}.png")
        (axes,) = pyplot.gcf().axes
        drawn = {line.get_label(): sorted(zip(*line.get_data())) for line in axes.lines}
        unequal = [row for row in found if row.snr_db is not None]
        assert drawn == {
            kind: sorted((int(row.name.split(".")[1]), row.snr_db) for row in unequal if row.kind == kind)
            for kind in {row.kind for row in unequal}
        }
        assert len(unequal) >= count
        assert [text.get_text() for text in axes.get_legend().get_texts()] == list(drawn)
        pyplot.close()


def test_command(damaged, tmp_path, capsys):
    arguments = [str(DEMO), str(damaged), "--jobs", "1", "--json", str(tmp_path / "report.json")]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(WORST in line and "nvfp4 -> nvfp4" in line for line in lines)
    assert json.loads((tmp_path / "report.json").read_text())["tensors"][0]["name"] == WORST
    assert main([*arguments, "--at-least", "20"]) == 1
    assert f"{WORST} is at" in capsys.readouterr().err


def test_png(damaged, tmp_path):
    status = main([str(DEMO), str(damaged), "--jobs", "1", "--png", str(tmp_path / "error.png")])
    assert status == 0 and (tmp_path / "error.png").read_bytes().startswith(b"\x89PNG")


def test_png_without_matplotlib(damaged, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status = main([str(DEMO), str(damaged), "--jobs", "1", "--png", str(tmp_path / "error.png")])
    assert status == 1 and "pip install matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "error.png").exists()
