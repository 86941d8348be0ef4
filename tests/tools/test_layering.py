"""The layering lint finds every kind of planted violation, and the package has none."""

import tomllib

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
            "ops.py:2: cutlass is used only in sm*/*, compiled.py",
        ),
        ("vllm/linear.py", "import cutlass.cute as cute\n", "cutlass is used only in"),
        (
            "prepare.py",
            "import torch\ntorch.library.custom_op\n",
            "prepare.py:2: torch.library is used only in",
        ),
        ("prepare.py", "from torch.library import register_fake\n", "torch.library is used only in"),
        ("vllm/cpu.py", "from torch import library\n", "torch.library is used only in"),
        ("format.py", "import numpy\n", "format.py:1: imports numpy, but format.py imports torch alone"),
        ("format.py", "from .reference import linear\n", "imports cutedsl_nvfp4.reference.linear"),
        ("reference.py", "from .prepare import x\n", "imports cutedsl_nvfp4.prepare.x"),
        ("reference.py", "from . import ops\n", "imports cutedsl_nvfp4.ops"),
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


def test_every_python_script_is_linted():
    """ruff finds scripts without suffix only where pyproject.toml names them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = set(settings["tool"]["ruff"]["extend-include"])
    scripts = {
        f"scripts/{path.name}"
        for path in (ROOT / "scripts").iterdir()
        if path.is_file() and not path.suffix and path.read_text().startswith("#!/usr/bin/env python3")
    }
    assert scripts == named
