"""Every patch is needed: without it (and without those that build on it) its Verify test fails."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from devtools.patches.series import (
    Conflict,
    Overlay,
    apply_patch,
    read_series,
    tree_reader,
)
from tests.support.paths import ROOT

ORIGINALS = "vllm/.cutedsl_nvfp4_originals"  # as in devtools/patches/apply.py
pytestmark = pytest.mark.proof

SERIES = read_series(ROOT / "patches")
SITE = Path(next(iter(find_spec("vllm").submodule_search_locations))).parent


@pytest.fixture(scope="module")
def originals() -> Path:
    """Upstream's own files, as apply_patches kept them when it patched this environment."""
    folder = SITE / ORIGINALS
    assert folder.is_dir(), f"{SITE} is not patched; run devtools/patches/apply.py"
    return folder


def tree_without(name: str | None, originals: Path, tree: Path) -> None:
    """Lay vllm/ into `tree`: links to the installed files, but the patched ones as without patch `name`.

    Patches that do not apply without it are left out too. None leaves out nothing.
    """
    shutil.copytree(SITE / "vllm", tree / "vllm", copy_function=os.symlink)
    installed, upstream = tree_reader(SITE), tree_reader(originals)
    touched = {change.path for patch in SERIES.patches for change in patch.changes}
    overlay = Overlay(lambda path: upstream(path) if path in touched else installed(path))
    left_out = False
    for patch in SERIES.patches:
        if patch.name == name:
            left_out = True
            continue
        try:
            apply_patch(patch, overlay)
        except Conflict:
            assert left_out, f"{patch.name} does not apply even with everything before it"
    for path in touched:
        (tree / path).unlink()
        (tree / path).write_text(overlay.get(path))


def run_tests(tree: Path, *nodes: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *nodes],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True,
    )  # fmt: skip


def test_all_verify_tests_pass_with_all_patches(originals, tmp_path):
    tree_without(None, originals, tmp_path)
    nodes = dict.fromkeys(node for patch in SERIES.patches for node in patch.verify)
    run = run_tests(tmp_path, *nodes)
    assert run.returncode == 0, run.stdout[-3000:]


@pytest.mark.parametrize("patch", SERIES.patches, ids=lambda patch: patch.name)
def test_verify_fails_without(patch, originals, tmp_path):
    tree_without(patch.name, originals, tmp_path)
    for node in patch.verify:
        run = run_tests(tmp_path, node)
        assert run.returncode == 1, (
            f"{node} passed (or did not run) without {patch.name}:\n{run.stdout[-2000:]}"
        )
