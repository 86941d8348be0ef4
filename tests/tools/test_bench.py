"""The benchmarks without a GPU: the tiles and the bars that their committed rows give, copies, checks, warm-up."""

import sys

import pytest
import torch

from tests.support.paths import ROOT


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))


def test_the_committed_rows_give_the_shipped_tiles(bench, monkeypatch, tmp_path):
    from bench.linear import choose as choose_tiles

    shipped = choose_tiles.OUTPUT
    monkeypatch.setattr(choose_tiles, "OUTPUT", tmp_path / "measured.py")
    rows = ROOT / "docs/results/h200_linear_tuning.jsonl.gz"
    monkeypatch.setattr(sys, "argv", ["choose_tiles", str(rows), "--gpu", "NVIDIA H200"])
    choose_tiles.main()
    assert choose_tiles.OUTPUT.read_text() == shipped.read_text()


def test_bars_take_a_problem_whole_from_the_newest_run(bench):
    """Never this run's time over that run's peer."""
    from bench import report

    def run(us: float, peer: float, tokens: tuple) -> dict:
        row = {"shape": "a", "n": 64, "k": 64, "groups": 1, "us": {report.OURS: us, "quack": peer}}
        return {"rows": [row | {"m": m} for m in tokens]}

    rows = report.newest([run(2.0, 1.0, (1, 16)), run(4.0, 8.0, (16,))])
    assert [(r["m"], r["us"][report.OURS], r["us"]["quack"]) for r in rows] == [(1, 2.0, 1.0), (16, 4.0, 8.0)]


def test_a_clone_copies_tensors_and_shares_the_rest(bench):
    from bench.linear.peers import clone

    config = object()
    prepared = (config, {"weight": torch.arange(6).view(2, 3).t(), "bias": None}, 1 / 2688)
    shared, tensors, scale = clone(prepared)
    assert shared is config and scale == 1 / 2688 and tensors["bias"] is None
    weight, copied = prepared[1]["weight"], tensors["weight"]
    assert torch.equal(copied, weight) and copied.stride() == weight.stride()
    assert copied.data_ptr() != weight.data_ptr()
    with pytest.raises(ValueError, match="strides"):
        clone(torch.zeros(1).expand(4))


def test_the_check_of_a_result_sees_one_wrong_group(bench):
    from bench.linear.tune import exact_product, random_weights, relative_error
    from bench.shapes import Shape
    from cutedsl_nvfp4.reference import dequantize

    shape = Shape("grouped", 128, 64, groups=2)
    codes, scales = random_weights(shape, "cpu")
    row_scale = torch.rand(shape.n) + 0.5
    x = torch.randn(3, shape.groups * shape.k).to(torch.bfloat16)
    weight = dequantize(codes, scales).double() * row_scale.double()[:, None]
    tokens = x.double().view(3, 2, 64)
    out = torch.cat([tokens[:, g] @ part.t() for g, part in enumerate(weight.chunk(2))], dim=1)
    rows, exact = exact_product(shape, codes, scales, row_scale, x)
    assert len(rows) == 64 and 0 < (rows < 64).sum() < 64
    error, rounding = relative_error(out.to(torch.bfloat16), rows, exact)
    assert error == rounding > 0
    out[:, 64:] *= 1.1
    assert relative_error(out.to(torch.bfloat16), rows, exact)[0] > 10 * rounding


def test_shapes_are_selected_by_slice_or_name(bench):
    from bench.shapes import model_shapes, selected_shapes

    assert selected_shapes(":") == model_shapes() and selected_shapes("2:4") == model_shapes()[2:4]
    assert [s.name for s in selected_shapes("pro.wo_b/8,flash.wq_b/1")] == ["pro.wo_b/8", "flash.wq_b/1"]
    with pytest.raises(KeyError, match="nonesuch"):
        selected_shapes("nonesuch")


def test_warming_takes_every_problem_of_the_peers_that_compile(bench):
    from bench.shapes import EXPERT_CASES, model_shapes
    from bench.warm import tasks

    found = [
        (p.name, peer.name)
        for p, peer, _ in tasks(model_shapes(), [1, 16], EXPERT_CASES, ["quack", "humming", "marlin"])
    ]
    plain = [s.name for s in model_shapes() if s.groups == 1]
    assert sorted(found) == sorted(
        [(case.name, "humming") for case in EXPERT_CASES]
        + 2 * [(name, peer) for name in plain for peer in ("quack", "humming")]
    )


def test_warming_names_a_failure_and_goes_on(bench, monkeypatch):
    from bench import warm
    from bench.linear.peers import CublasBf16
    from bench.shapes import model_shapes

    def broken(shape, peer, tokens) -> None:
        raise RuntimeError(f"no kernel for {shape.name}")

    monkeypatch.setattr(warm, "_warm_linear", broken)
    shape = model_shapes()[0]
    assert f"no kernel for {shape.name}" in warm.run((shape, CublasBf16, [1]), float("inf"))
    assert warm.run((shape, CublasBf16, [1]), 0.0) == "out of time"
