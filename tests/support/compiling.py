"""Compile kernels in tests, and read their machine code."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from cutedsl_nvfp4.family import Kernel
from tests.support.paths import ROOT

COMPILE = ROOT / "devtools/kernels/compile.py"


def cubin(kernel: Kernel, folder: Path) -> Path:
    """`kernel` compiled into `folder`, which holds nothing else -> its cubin."""
    kernel.build(options=f"--keep-cubin --dump-dir {folder}")
    (found,) = folder.glob("*.cubin")
    return found


def problems(kernel: Kernel, folder: Path, family: str, taken_for: Kernel | None = None) -> list[str]:
    """What is wrong with the machine code of `kernel` of `family`, read as `taken_for`'s where that is given."""
    sass = import_module(f"devtools.kernels.sass.{family}")
    return sass.problems(cubin(kernel, folder), taken_for or kernel)


def compile_ahead(folder: Path, arch: str, names: list[str]) -> dict:
    """Run devtools/kernels/compile.py --sass for the kernels `names` of `arch` alone -> its manifest."""
    code = (
        "import runpy, sys\n"
        "from cutedsl_nvfp4.family import Family\n"
        "shipped = Family.shipped\n"
        f"Family.shipped = lambda family, arch: {{name: shipped(family, arch)[name] for name in {names!r}}}\n"
        f"sys.argv = ['compile', {str(folder / arch)!r}, '--arch', {arch!r}, '--jobs', '1', '--sass']\n"
        f"runpy.run_path({str(COMPILE)!r}, run_name='__main__')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    manifest = json.loads((folder / arch / "manifest.json").read_text())
    libraries = [f"{name}.so" for name in manifest["kernels"]]
    assert sorted(path.name for path in (folder / arch).iterdir()) == ["manifest.json", *libraries]
    assert manifest["kernels"] == sorted(names) and manifest["architecture"] == arch
    return manifest
