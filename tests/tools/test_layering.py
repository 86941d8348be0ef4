"""The layering lint finds every kind of planted violation, and the package has none."""

import os
import re
import subprocess
import sys

import pytest

from devtools.kernels import lint_layering
from tests.support.paths import ROOT


def test_package_keeps_its_layers():
    assert lint_layering.check_package(lint_layering.PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "source", "finding"),
    [
        ("prepare.py", "import vllm\n", "prepare.py:1: vllm is used only in vllm/*"),
        ("prepare.py", "import vllm.platforms as p\n", "vllm is used only in"),
        ("sm90/linear.py", "from vllm.logger import init_logger\n", "vllm is used only in"),
        ("ops.py", "def f():\n    from vllm import envs\n", "ops.py:2: vllm is used only in"),
        (
            "ops.py",
            "import importlib\nimportlib.import_module('vllm.envs')\n",
            "ops.py:2: vllm is used only in",
        ),
        (
            "ops.py",
            "if TYPE_CHECKING:\n    import cutlass\n",
            "ops.py:2: cutlass is used only in device/*, blackwell/*, sm*/*, compiled.py",
        ),
        ("vllm/linear.py", "import cutlass.cute as cute\n", "cutlass is used only in"),
        (
            "prepare.py",
            "import torch\ntorch.library.custom_op\n",
            "prepare.py:2: torch.library is used only in",
        ),
        ("prepare.py", "from torch.library import register_fake\n", "torch.library is used only in"),
        ("vllm/cpu/metadata.py", "from torch import library\n", "torch.library is used only in"),
        ("format.py", "import numpy\n", "format.py:1: imports numpy, but format.py imports torch alone"),
        ("format.py", "from .reference import linear\n", "imports cutedsl_nvfp4.reference.linear"),
        ("reference.py", "from .prepare import x\n", "imports cutedsl_nvfp4.prepare.x"),
        ("reference.py", "from . import ops\n", "imports cutedsl_nvfp4.ops"),
        ("sm120/tiles.py", "import torch\n", "sm120/tiles.py imports cutedsl_nvfp4.tile_choice alone"),
        ("sm120/linear.py", "from ..sm90.ptx import settle\n", "sm120/* stays apart from sm90"),
        ("sm90/linear.py", "from ..sm100 import linear\n", "sm90/* stays apart from sm100"),
        ("sm90/linear.py", "from ..blackwell.quantize import run\n", "sm90/* stays apart from blackwell"),
        (
            "blackwell/experts.py",
            "def f():\n    from ..sm120 import tiles\n",
            "blackwell/* stays apart from sm120",
        ),
        ("device/ptx.py", "from ..blackwell import ptx\n", "device/* stays apart from blackwell"),
    ],
)
def test_planted_violation_is_found(file, source, finding):
    found = lint_layering.check_file(source, file)
    assert len(found) == 1, found
    assert finding in found[0]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("vllm/linear.py", "from vllm.logger import init_logger\n"),
        ("sm90/linear.py", "import cutlass\n"),
        ("sm120/linear.py", "from ..blackwell import quantize\nfrom ..device.ptx import settle\n"),
        ("compiled.py", "import cutlass.cute\n"),
        ("ops.py", "import torch\ntorch.library.custom_op\n"),
        ("reference.py", "import math\nimport torch.nn.functional as F\nfrom .format import decode_e2m1\n"),
        ("plugin.py", "from .vllm import plugin\nfrom cutedsl_nvfp4.vllm.linear import x\n"),
        ("prepare.py", "import vllm_like\nlibrary = torch.libraries\n"),
    ],
)
def test_allowed_import_is_not(file, source):
    assert lint_layering.check_file(source, file) == []


def test_empty_package_is_a_finding(tmp_path):
    assert "nothing was checked" in lint_layering.check_package(tmp_path)[0]


def test_a_circle_is_found(tmp_path):
    package = tmp_path / "package"
    (package / "inner").mkdir(parents=True)
    (package / "a.py").write_text("from cutedsl_nvfp4.inner import b\n")
    (package / "inner/__init__.py").write_text("")
    (package / "inner/b.py").write_text("from ..c import something\n")
    (package / "c.py").write_text("def late():\n    from . import a\n")
    (package / "d.py").write_text("from . import a, c\n")
    package = package.rename(tmp_path / "cutedsl_nvfp4")
    (circle,) = lint_layering.find_circles(package)
    assert circle == ["cutedsl_nvfp4.a", "cutedsl_nvfp4.c", "cutedsl_nvfp4.inner.b"]


def test_programs_without_suffix_only_forward():
    """ruff does not look at them: each hands over to a program that is there."""
    forwarding = [path for path in (ROOT / "scripts").iterdir() if path.is_file() and not path.suffix]
    assert len(forwarding) == 9
    for path in forwarding:
        text = path.read_text()
        (target,) = re.findall(r'(?:parents\[1\] / |with_name\()"(.*)"', text)
        folder = path.parent if "with_name" in text else ROOT
        assert "os.execv" in text and (folder / target).is_file() and os.access(path, os.X_OK)
        answer = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, cwd="/")
        assert answer.returncode == 0 and "usage:" in answer.stdout, answer.stderr
