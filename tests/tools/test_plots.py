"""docs/results/plots: the committed pictures are what bench/plots.py draws of the committed rows, and only of those."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import matplotlib
import pytest

from bench import plots, report

COMMITTED = plots.RESULTS / "plots"
ROWS = {name: rows for name, (rows, _) in plots.PLOTS.items()}


@pytest.fixture
def results(tmp_path) -> Path:
    """A folder with a copy of the committed rows."""
    folder = tmp_path / "results"
    folder.mkdir()
    for rows in ROWS.values():
        shutil.copy(plots.RESULTS / rows, folder)
    return folder


def draw(results: Path, out: Path) -> dict[str, bytes]:
    assert plots.main(["--results", str(results), "--out", str(out)]) == 0
    return {path.name: path.read_bytes() for path in out.iterdir()}


def edit(path: Path, change: Callable[[dict], dict | None]) -> None:
    """Every row of a file through `change`; None drops it."""
    if path.suffix == ".jsonl":
        rows = [change(json.loads(line)) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows if row))
        return
    runs = report.read(path)
    for run in runs:
        run["rows"] = [row for row in map(change, run["rows"]) if row]
    path.write_text(json.dumps({"runs": runs}))


def test_the_committed_rows_draw_the_committed_pictures(tmp_path):
    drawn = draw(plots.RESULTS, tmp_path / "out")
    committed = {path.name: path.read_bytes() for path in COMMITTED.iterdir()}
    assert drawn.keys() == committed.keys() == plots.PLOTS.keys()
    for name, content in drawn.items():
        assert content == committed[name], f"{name} is not what the rows give: make plots"
        assert len(content) < 60_000, name


def test_this_machines_settings_do_not_show(tmp_path, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 30)
    monkeypatch.setitem(matplotlib.rcParams, "lines.linestyle", ":")
    assert draw(plots.RESULTS, tmp_path / "out") == {p.name: p.read_bytes() for p in COMMITTED.iterdir()}
    assert matplotlib.rcParams["font.size"] == 30


@pytest.mark.parametrize("name", ROWS)
def test_one_changed_row_changes_its_picture_alone(results, tmp_path, name):
    path = results / ROWS[name]
    if path.suffix == ".jsonl":
        drawn_row = {"label": "image,exp12,gpu0,a", "kind": "decode", "size": 64}
        edit(
            path,
            lambda row: row | {"step_ms": row["step_ms"] + 1} if drawn_row.items() <= row.items() else row,
        )
    else:
        runs = report.read(path)
        row = next(row for row in runs[-1]["rows"] if "marlin" in row["us"])
        row["us"]["marlin"] *= 1.1
        path.write_text(json.dumps({"runs": runs}))
    drawn = draw(results, tmp_path / "out")
    assert {n for n, content in drawn.items() if content != (COMMITTED / n).read_bytes()} == {name}


def test_a_copy_that_is_written_again_draws_the_same(results, tmp_path):
    """The change above is the row's, not of writing it."""
    for rows in ROWS.values():
        edit(results / rows, lambda row: row)
    assert draw(results, tmp_path / "out") == {p.name: p.read_bytes() for p in COMMITTED.iterdir()}


DAMAGES = {
    "not JSON": lambda path: path.write_text("{"),
    "empty": lambda path: path.write_text(""),
    "not there": lambda path: path.unlink(),
    "no rows": lambda path: edit(path, lambda row: None),
    "no times": lambda path: edit(
        path, lambda row: {k: v for k, v in row.items() if k not in ("us", "step_ms")}
    ),
    "a time of zero": lambda path: edit(
        path, lambda row: row | ({"repeats_ms": []} if "label" in row else {"floor_us": 0})
    ),
    "a peer nobody timed": lambda path: edit(
        path,
        lambda row: (
            (None if row["label"].startswith("stock") else row)
            if "label" in row
            else row | {"us": {kernel: us for kernel, us in row["us"].items() if kernel != "marlin"}}
        ),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ROWS)
def test_rows_it_cannot_read_are_named(results, tmp_path, capsys, name, damage):
    DAMAGES[damage](results / ROWS[name])
    assert plots.main(["--results", str(results), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert str(results / ROWS[name]) in said and f"no {name}" in said
    assert not (tmp_path / "out" / name).exists()


def test_rows_of_two_gpus_are_not_one_picture(results, tmp_path, capsys):
    path = results / "h200_linear.json"
    runs = report.read(path)
    runs[0]["gpu"] = "NVIDIA H100"
    path.write_text(json.dumps({"runs": runs}))
    assert plots.main(["--results", str(results), "--out", str(tmp_path / "out")]) == 1
    assert "rows of 2 GPUs" in capsys.readouterr().err


def test_a_layer_without_a_name_is_refused(results, tmp_path, capsys):
    edit(results / "h200_experts.json", lambda row: row | {"case": "nonesuch"})
    assert plots.main(["--results", str(results), "--out", str(tmp_path / "out")]) == 1
    assert "'nonesuch'" in capsys.readouterr().err


def test_every_measured_layer_has_a_panel_in_a_set_order():
    from bench.shapes import EXPERT_CASES

    assert plots.CASES.keys() == {case.name for case in EXPERT_CASES}


def test_the_server_is_compared_on_one_gpu_alone(results, tmp_path):
    """Rows of another GPU or of other layers draw nothing."""

    def others(row: dict) -> dict:
        return row if ",exp12,gpu0," in row["label"] else row | {"step_ms": 2 * row["step_ms"]}

    edit(results / "h200_serving.jsonl", others)
    assert (
        draw(results, tmp_path / "out")["h200_serving.svg"] == (COMMITTED / "h200_serving.svg").read_bytes()
    )


def test_repeats_that_overlap_are_no_difference(results):
    path = results / "h200_serving.jsonl"

    def words() -> list[str]:
        figure, title = plots.serving(path)
        return [title, *(text.get_text() for axes in figure.axes for text in axes.texts)]

    before = words()
    assert before.count("repeats\noverlap") == 2 and "1.25×" in before

    def spread(row: dict) -> dict:
        wide = row["label"] == "image,exp12,gpu0,a" and (row["kind"], row["size"]) == ("decode", 64)
        return row | {"repeats_ms": [1.0, 100.0]} if wide else row

    edit(path, spread)
    assert words().count("repeats\noverlap") == 3 and "1.25×" not in words()


def test_lines_compare_the_same_problems():
    """A row that one peer lacks is in no line: a mean over other problems would be another figure."""

    def row(k: int, **us: float) -> dict:
        return {"m": 1, "k": k, "floor_us": 1.0, "us": {report.OURS: us.pop("ours"), **us}}

    rows = [row(1, ours=2.0, quack=4.0, marlin=8.0), row(2, ours=50.0, quack=90.0)]
    kept = plots.complete(rows, ("quack", "marlin"))
    assert [plots.curve(kept, kernel) for kernel in (report.OURS, "quack", "marlin")] == [[2.0], [4.0], [8.0]]


def test_names_at_the_lines_ends_are_kept_apart():
    assert plots.apart([1.0, 4.0, 1.1], 1.5) == [1.0, 4.0, 1.5]
