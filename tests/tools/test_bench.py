"""The benchmarks without a GPU: the tiles and the bars that their committed rows give, copies, checks, warm-up."""

import gzip
import importlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections import Counter

import pytest
import torch

from bench import choice, report, warm
from bench.experts.choose import parse_tiles
from bench.experts.measure import best_tiles
from bench.linear.choose import read, runs
from bench.linear.measure import STRATA, draw
from bench.linear.peers import CublasBf16, clone
from bench.linear.predict import load, predict
from bench.linear.tune import exact_product, random_weights, relative_error
from bench.shapes import EXPERT_CASES, Shape, model_shapes, selected_shapes
from cutedsl_nvfp4.reference import dequantize
from cutedsl_nvfp4.sm90 import tiles
from cutedsl_nvfp4.sm90.tiles import NarrowTile, WideTile
from tests.support.paths import ROOT

RESULTS = ROOT / "docs/results"
SM90 = ROOT / "kernels/cutedsl_nvfp4/sm90"


def modules() -> list[str]:
    files = sorted((ROOT / "bench").rglob("*.py"))
    return [
        ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files if file.stem != "__init__"
    ]


@pytest.mark.parametrize("name", modules())
def test_every_module_imports_and_every_program_says_how_it_is_run(name):
    module = importlib.import_module(name)
    if hasattr(module, "main") and name != "bench.choice":  # whose main is the others'
        assert f"python3 -m {name} " in module.__doc__


@pytest.mark.parametrize("product", ["linear", "experts"])
def test_the_committed_rows_give_the_shipped_tiles(product, tmp_path):
    program = importlib.import_module(f"bench.{product}.choose")
    rows, out = RESULTS / f"h200_{product}_tuning.jsonl.gz", tmp_path / "tiles.json"
    program.main([str(rows), "--gpu", "NVIDIA H200", "--out", str(out)])
    assert out.read_bytes() == (SM90 / f"tiles_{product}.json").read_bytes()


def test_the_wheel_holds_the_shipped_tiles(tmp_path):
    package = tmp_path / "kernels"
    shutil.copytree(
        ROOT / "kernels", package, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    )
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", tmp_path]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, package], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = {name.removeprefix("cutedsl_nvfp4/sm90/") for name in zipfile.ZipFile(wheel).namelist()}
    assert held >= {path.name for path in SM90.glob("*.json")} >= {"tiles_linear.json", "tiles_experts.json"}


@pytest.mark.parametrize(
    "tile",
    [
        NarrowTile(),
        NarrowTile(16, split_k=8, signal=True),
        WideTile(),
        WideTile(3, 192, persistent=True, tail=96),
    ],
)
def test_a_tile_is_read_as_it_was_written(tile):
    assert choice.parse_tile(repr(tile)) == tile
    assert choice.parse_tile(repr(tile).replace("Tile", "")) == tile  # as in rows of before the present names
    assert tiles._tile(json.loads(json.dumps(choice.tile_fields(tile)))) == tile


@pytest.mark.parametrize(
    "text",
    [
        "",
        "WideTile",
        "WideTile(",
        "WideTile(2)",
        "WideTile(tokens=64) or 1",
        "WideTile(tokens=64, tokens=64)",
        "WideTile(rows=64)",
        "WideTile(tokens='64')",
        "WideTile(tokens=True)",
        "WideTile(persistent=1)",
        "WideTile(tokens=2 * 32)",
        "WideTile(**{'tokens': 64})",
        "sm90.WideTile(tokens=64)",
        "ExpertTiles(w13=NarrowTile(), w2=NarrowTile())",
        "print(tokens=64)",
    ],
)
def test_what_is_no_tile_is_refused(text):
    with pytest.raises(ValueError, match="not the repr of a tile"):
        choice.parse_tile(text)


def test_a_later_file_replaces_a_problem_whole(tmp_path):
    def rows(name: str, *found: tuple[int, str, float]) -> str:
        path = tmp_path / name
        lines = "".join(
            json.dumps({"n": 64, "k": 64, "groups": 1, "m": m, "config": config, "us": us}) + "\n"
            for m, config, us in found
        )
        path.write_bytes(gzip.compress(lines.encode()) if name.endswith(".gz") else lines.encode())
        return str(path)

    old = rows(
        "old.jsonl.gz",
        (1, "Narrow(tokens=8)", 1.0),
        (1, "Wide(tokens=64)", 2.0),
        (2, "Narrow(tokens=8)", 1.0),
    )
    new = rows("new.jsonl", (1, "WideTile(tokens=64)", 3.0))
    assert read([old, new]) == {(64, 64, 1, 1): {WideTile(2, 64): 3.0}, (64, 64, 1, 2): {NarrowTile(8): 1.0}}


@pytest.mark.parametrize(
    "tile, panels, m, expected",
    [
        (NarrowTile(16, split_k=2), 66, 5, 1),  # 132 CTAs, one an SM
        (NarrowTile(16, split_k=2), 67, 5, 2),
        (WideTile(2, 128), 264, 128, 1),
        (WideTile(2, 128), 264, 129, 2),
        (WideTile(2, 128, persistent=True, multicast=2), 131, 128, 1),  # 66 row tiles, in pairs
        (WideTile(2, 256, persistent=True, tail=64), 64, 1024, 1),  # 128 tiles
        (
            WideTile(2, 256, persistent=True, tail=64),
            64,
            1025,
            1.46,
        ),  # and 32 parts, for which 4 CTAs are left
        (WideTile(2, 256, persistent=True, tail=64), 4, 1025, 0.46),  # 8 tiles, cut into 32 parts, and 2 more
        (
            WideTile(2, 256, persistent=True, tail=64),
            264,
            256 + 150,
            2,
        ),  # three parts would take longer than a tile
        (WideTile(2, 256, persistent=True, tail=128), 264, 256 + 128, 1.5),  # a wave and one of parts
        (WideTile(2, 256, persistent=True, tail=64), 64, 1536, 1.92),  # 60 tiles cut into 240 parts
        (
            WideTile(2, 256, persistent=True, tail=64),
            32,
            1280,
            1,
        ),  # 80 tiles: three waves of parts would take longer
    ],
    ids=str,
)
def test_what_the_busiest_sm_computes(tile, panels, m, expected):
    assert load(tile, panels, m) == pytest.approx(expected)


def test_a_time_between_two_measured_ones():
    """N = 4096 by 128 x 256: 128 tiles up to 1,024 tokens, 160 up to 1,280, 256 up to 2,048, 288 up to 2,304."""
    tile, times = WideTile(2, 256), {1024: 80.0, 2048: 160.0, 4096: 320.0}
    at = {m: predict(tile, 64, times, m) for m in (1000, 1024, 1025, 2000, 2048, 2049, 3072, 4000)}
    assert at == {1000: 80, 1024: 80, 1025: 160, 2000: 160, 2048: 160, 2049: 240, 3072: 240, 4000: 320}
    assert predict(tile, 64, times, 8192) == 640  # nothing larger was measured: by what there is to do
    assert predict(tile, 64, times, 16) is None  # too far from all of them


def test_a_tile_is_kept_for_as_long_as_it_is_nearly_the_fastest():
    fast, even = WideTile(2, 64), WideTile(2, 128)
    us = {64: (1.0, 1.005), 128: (2.0, 2.01), 256: (4.1, 4.0), 512: (9.0, 8.0)}
    times = {(64, 64, 1, m): {fast: a, even: b} for m, (a, b) in us.items()}
    assert runs(times, [fast, even], loss=0.01) == {(64, 64, 1, 512): even}
    assert runs(times, [fast, even], loss=0.001) == {(64, 64, 1, 128): fast, (64, 64, 1, 512): even}


def test_drawn_problems_cover_every_shape_and_range():
    shapes = model_shapes()
    pairs = draw(shapes, 6 * len(shapes), seed=3)
    assert pairs == draw(shapes, 6 * len(shapes), seed=3) != draw(shapes, 6 * len(shapes), seed=4)
    counts = Counter((shape, low) for shape, m in pairs for low, high in STRATA if low <= m <= high)
    assert set(counts.values()) == {2} and len(counts) == 3 * len(shapes)


def test_the_fastest_tiles_of_experts_rows_are_found(tmp_path):
    rows = [
        {"case": "flash", "m": 1, "w13": repr(NarrowTile(tokens)), "w2": repr(NarrowTile(tokens)), "us": us}
        for tokens, us in ((8, 2.0), (16, 1.0), (24, 3.0))
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert best_tiles(str(path)) == {("flash", 1): parse_tiles(rows[1])}


EXPECTED = RESULTS / "expected_misses.json"


@pytest.fixture
def bench_check(tmp_path, capsys):
    """`make bench-check` after `change(row)` of every problem's row -> (exit status, what it said)."""

    def check(change=lambda row: None, expected=EXPECTED) -> tuple[int, str]:
        paths = []
        for product in ("linear", "experts"):
            path = tmp_path / f"{product}.json"
            runs = report.read(RESULTS / f"h200_{product}.json")
            for row in report.newest(runs):
                change(row)
            path.write_text(json.dumps({"runs": runs}))
            paths.append(str(path))
        status = report.main([*paths, "--bars", "--expected", str(expected)])
        return status, capsys.readouterr().out

    return check


def slower(name: str, factor: float):
    """A change that makes our time on one problem longer."""

    def change(row: dict) -> None:
        if report.problem(row) == name:
            row["us"][report.OURS] *= factor

    return change


def test_every_missed_bar_is_recorded_and_every_record_is_missed(bench_check):
    status, said = bench_check()
    assert status == 0 and "every miss is recorded" in said and "met now" not in said
    recorded = json.loads(EXPECTED.read_text())
    for bars_of, product in ((report.linear_bars, "linear"), (report.expert_bars, "experts")):
        bars = bars_of(report.newest(report.read(RESULTS / f"h200_{product}.json")))
        missed = sorted((bar.what, name) for bar in bars for name in bar.misses)
        assert sorted((entry["bar"], entry["problem"]) for entry in recorded[product]) == missed
        assert all(entry["reason"] for entry in recorded[product])


@pytest.mark.parametrize(
    "name, allowed",
    [
        ("pro.indexer_compressor M=1024", 1.01),  # behind a peer, as recorded
        ("flash.shared_w2/8 M=2048", 1.01),  # far from the floor, as recorded
        ("pro_tp8 M=16 zipf", 1.01),
        ("pro.wq_b/1 M=1", 1.001),  # misses nothing
    ],
)
def test_a_row_that_is_worse_than_recorded_is_red(bench_check, name, allowed):
    assert bench_check(slower(name, allowed))[0] == 0
    status, said = bench_check(slower(name, 5.0 if allowed == 1.001 else 1.03))
    worse = [line for line in said.splitlines() if line.startswith("worse than")]
    assert status == 1 and worse and all(name in line for line in worse)
    assert "every miss is recorded" not in said


@pytest.mark.parametrize("factor, status", [(0.99, 0), (0.97, 1)])
def test_a_mean_may_fall_short_as_far_as_recorded(bench_check, factor, status):
    def change(row: dict) -> None:
        if "case" in row and row["m"] >= 1024:
            row["us"]["marlin"] *= factor

    found, said = bench_check(change)
    assert found == status and ("over Marlin, M >= 1024: all has 2.12, recorded 2.188" in said) == (
        status == 1
    )


def test_a_recorded_miss_that_is_met_now_is_named(bench_check):
    status, said = bench_check(slower("pro.indexer_compressor M=1024", 0.8))
    (met,) = [line for line in said.splitlines() if line.startswith("met now")]
    assert status == 0 and "rows slower than 1/0.98 of the best peer: pro.indexer_compressor M=1024" in met


def test_a_record_of_what_nobody_measured_is_red(bench_check, tmp_path):
    recorded = json.loads(EXPECTED.read_text())
    recorded["experts"][0]["bar"] = "over Merlin"
    path = tmp_path / "expected.json"
    path.write_text(json.dumps(recorded))
    status, said = bench_check(expected=path)
    assert status == 1 and "over Merlin: all is recorded, and not measured" in said
    assert "over Marlin, M >= 1024: all has 2.19, and no miss is recorded" in said


def test_a_time_that_is_no_number_meets_no_bar(bench_check):
    assert bench_check(slower("pro.wo_b/1 M=8192", float("nan")))[0] == 1


def test_without_records_any_miss_is_red(capsys):
    assert report.main([str(RESULTS / "h200_linear.json"), "--bars"]) == 1
    assert "| over quack | 1.69 | >= 1.1 | yes |" in capsys.readouterr().out


def test_bars_take_a_problem_whole_from_the_newest_run():
    """Never this run's time over that run's peer."""

    def run(us: float, peer: float, tokens: tuple) -> dict:
        row = {"shape": "a", "n": 64, "k": 64, "groups": 1, "us": {report.OURS: us, "quack": peer}}
        return {"rows": [row | {"m": m} for m in tokens]}

    rows = report.newest([run(2.0, 1.0, (1, 16)), run(4.0, 8.0, (16,))])
    assert [(r["m"], r["us"][report.OURS], r["us"]["quack"]) for r in rows] == [(1, 2.0, 1.0), (16, 4.0, 8.0)]


def test_a_clone_copies_tensors_and_shares_the_rest():
    config = object()
    prepared = (config, {"weight": torch.arange(6).view(2, 3).t(), "bias": None}, 1 / 2688)
    shared, tensors, scale = clone(prepared)
    assert shared is config and scale == 1 / 2688 and tensors["bias"] is None
    weight, copied = prepared[1]["weight"], tensors["weight"]
    assert torch.equal(copied, weight) and copied.stride() == weight.stride()
    assert copied.data_ptr() != weight.data_ptr()
    with pytest.raises(ValueError, match="strides"):
        clone(torch.zeros(1).expand(4))


def test_the_check_of_a_result_sees_one_wrong_group():
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


def test_shapes_are_selected_by_slice_or_name():
    assert selected_shapes(":") == model_shapes() and selected_shapes("2:4") == model_shapes()[2:4]
    assert [s.name for s in selected_shapes("pro.wo_b/8,flash.wq_b/1")] == ["pro.wo_b/8", "flash.wq_b/1"]
    with pytest.raises(KeyError, match="nonesuch"):
        selected_shapes("nonesuch")


def test_warming_takes_every_problem_of_the_peers_that_compile():
    found = [
        (p.name, peer.name)
        for p, peer, _ in warm.tasks(model_shapes(), [1, 16], EXPERT_CASES, ["quack", "humming", "marlin"])
    ]
    plain = [s.name for s in model_shapes() if s.groups == 1]
    assert sorted(found) == sorted(
        [(case.name, "humming") for case in EXPERT_CASES]
        + 2 * [(name, peer) for name in plain for peer in ("quack", "humming")]
    )


def test_warming_names_a_failure_and_goes_on(monkeypatch):
    def broken(shape, peer, tokens) -> None:
        raise RuntimeError(f"no kernel for {shape.name}")

    monkeypatch.setattr(warm, "_warm_linear", broken)
    shape = model_shapes()[0]
    assert f"no kernel for {shape.name}" in warm.run((shape, CublasBf16, [1]), float("inf"))
    assert warm.run((shape, CublasBf16, [1]), 0.0) == "out of time"
