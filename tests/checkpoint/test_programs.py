"""The programs in scripts/ that read checkpoints: they start from any folder, installed or not, and without torch."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT, SCRIPTS

PROGRAMS = (
    "convert_checkpoint",
    "calibrate_checkpoint",
    "inspect_checkpoint",
    "compare_checkpoints",
    "plan_memory",
)
KERNELS = ROOT / "kernels"
LIBRARY = KERNELS / "cutedsl_nvfp4/checkpoint"
# The library's modules that compute with tensors. All others need Python alone.
WITH_TORCH = {"compare", "compressed_tensors", "convert", "files", "quantize", "shards"}


def modules() -> dict[str, Path]:
    """Every module of the library by its dotted name below it."""
    paths = sorted(LIBRARY.rglob("*.py"))
    return {
        ".".join(path.relative_to(LIBRARY).with_suffix("").parts).removesuffix("__init__"): path
        for path in paths
    }


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    return subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd, env=env)


@pytest.mark.parametrize("program", PROGRAMS)
def test_old_paths_forward_to_the_programs(program, tmp_path):
    """By path from another folder, as a user has them in a note; the package is found beside them."""
    said = run(sys.executable, SCRIPTS / program, "--help", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith(f"usage: {program} ")


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_run_with_the_package_installed(program, tmp_path):
    """Copied away from kernels/, as in the image. PYTHONPATH stands for the installation."""
    for file in (program, f"{program}.py"):
        shutil.copy(SCRIPTS / file, tmp_path)
    said = run(sys.executable, tmp_path / program, "--help", cwd=tmp_path, PYTHONPATH=str(KERNELS))
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith(f"usage: {program} ")


def without_packages(code: str, cwd: Path) -> subprocess.CompletedProcess:
    """-S -I: no site-packages, so neither torch nor anything else that is not Python's own."""
    return run(sys.executable, "-S", "-I", "-c", code, cwd=cwd)


@pytest.mark.parametrize(
    "arguments", [["plan_memory", "demo", "H100"], ["inspect_checkpoint", "demo"]], ids=lambda s: s[0]
)
def test_programs_that_need_nothing_but_python(arguments):
    program = str(SCRIPTS / f"{arguments[0]}.py")
    code = f"import runpy, sys; sys.argv = {arguments!r}; runpy.run_path({program!r}, run_name='__main__')"
    said = without_packages(code, ROOT)
    assert said.returncode == 0, said.stderr


@pytest.mark.parametrize("program", ["convert_checkpoint", "calibrate_checkpoint", "compare_checkpoints"])
def test_programs_that_need_more_say_what(program, tmp_path):
    code = f"import runpy; runpy.run_path({str(SCRIPTS / program) + '.py'!r}, run_name='__main__')"
    said = without_packages(code, tmp_path)
    needed = "vLLM" if program.startswith("calibrate") else "torch"
    assert said.returncode == 1 and said.stderr.startswith(f"{program} needs {needed}: run it with ")


def test_modules_that_need_nothing_but_python(tmp_path):
    assert modules().keys() > WITH_TORCH
    plain = [name for name in modules() if name not in WITH_TORCH]
    imports = "".join(f"import cutedsl_nvfp4.checkpoint.{name}\n".replace(".\n", "\n") for name in plain)
    said = without_packages(f"import sys\nsys.path.insert(0, {str(KERNELS)!r})\n{imports}", tmp_path)
    assert said.returncode == 0, said.stderr


def test_modules_that_compute_are_told_from_the_others(tmp_path):
    """Each of WITH_TORCH fails without torch: the list is no longer than it must be."""
    for name in WITH_TORCH:
        code = f"import sys; sys.path.insert(0, {str(KERNELS)!r}); import cutedsl_nvfp4.checkpoint.{name}"
        assert "No module named 'torch'" in without_packages(code, tmp_path).stderr, name


def test_the_library_is_written_for_python_3_9():
    """Syntax; and annotations that Python 3.9 cannot evaluate are never evaluated."""
    for path in [*modules().values(), *(SCRIPTS / f"{program}.py" for program in PROGRAMS)]:
        tree = ast.parse(path.read_text(), feature_version=(3, 9))
        lazy = any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)
        annotations = [
            part
            for node in ast.walk(tree)
            for part in (getattr(node, "annotation", None), getattr(node, "returns", None))
            if part is not None
        ]
        unions = [
            part for part in annotations if any(isinstance(inner, ast.BitOr) for inner in ast.walk(part))
        ]
        assert lazy or not unions, path
