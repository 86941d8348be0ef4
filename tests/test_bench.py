"""What the benchmarks' committed rows say: the tiles chosen from them, and the rows that the bars take."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))


def test_the_committed_rows_give_the_shipped_tiles(bench, monkeypatch, tmp_path):
    import choose_tiles

    shipped = choose_tiles.OUTPUT
    monkeypatch.setattr(choose_tiles, "OUTPUT", tmp_path / "measured.py")
    rows = ROOT / "docs/results/h200_linear_tuning.jsonl.gz"
    monkeypatch.setattr(sys, "argv", ["choose_tiles", str(rows), "--gpu", "NVIDIA H200"])
    choose_tiles.main()
    assert choose_tiles.OUTPUT.read_text() == shipped.read_text()


def test_bars_take_a_problem_whole_from_the_newest_run(bench):
    """Never this run's time over that run's peer."""
    import report

    def run(us: float, peer: float, tokens: tuple) -> dict:
        row = {"shape": "a", "n": 64, "k": 64, "groups": 1, "us": {report.OURS: us, "quack": peer}}
        return {"rows": [row | {"m": m} for m in tokens]}

    rows = report.newest([run(2.0, 1.0, (1, 16)), run(4.0, 8.0, (16,))])
    assert [(r["m"], r["us"][report.OURS], r["us"]["quack"]) for r in rows] == [(1, 2.0, 1.0), (16, 4.0, 8.0)]
