"""Read a compiled Hopper kernel's machine code: tensor cores in use, nothing spilled, wgmmas not serialized."""

import re
import shutil
import site
import subprocess
from functools import cache
from pathlib import Path

from ..tiles import Config, Narrow, expert_widths


@cache
def tool(name: str) -> str:
    """Path of a CUDA binary tool, on PATH or from its PyPI package; raises FileNotFoundError where it is not."""
    found = shutil.which(name)
    for folder in site.getsitepackages():
        found = found or next((str(path) for path in Path(folder).glob(f"nvidia/**/bin/{name}")), None)
    if found is None:
        raise FileNotFoundError(f"{name} is not installed (PyPI: nvidia-cuda-{name})")
    return found


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def problems(cubin: Path, config: Config | None, experts: bool = False) -> list[str]:
    """What is wrong with the machine code of `config`'s linear kernel, or its `experts` kernel; nothing if all is well.

    Without a configuration the kernel multiplies no matrices, and only its use of registers is read.
    """
    usage = _run(tool("cuobjdump"), "-res-usage", str(cubin))
    sass = _run(tool("nvdisasm"), "-c", str(cubin))
    wrong = []
    if not (re.search(r"\bSTACK:0\b", usage) and re.search(r"\bLOCAL:0\b", usage)):
        wrong.append(f"uses stack or local memory: {' '.join(usage.split()[-12:])}")
    if re.search(r"\b(LDL|STL)\b", sass):
        wrong.append("spills registers (LDL, STL)")
    if config is None:
        return wrong
    narrow = isinstance(config, Narrow)
    loops = len(expert_widths(config)) if experts and not narrow else 1
    panels = max(1, config.panels // 2) if experts and not narrow else 1  # of a warpgroup
    instruction = r"\bHMMA\.16816\.F32\.BF16\b" if narrow else r"\bHGMMA\.64x\d+x16\.F32\.BF16\b"
    expected = 4 * config.blocks * (config.tokens // 8 if narrow else loops * panels)
    found = len(re.findall(instruction, sass))
    if found != expected:
        wrong.append(f"{found} tensor core instructions in the main loop instead of {expected}")
    if not narrow and len(re.findall(r"WARPGROUP\.DEPBAR", sass)) > loops * (2 * panels + 1):
        wrong.append("ptxas serialized the wgmmas: see the comment in WideLinear.accumulate")
    return wrong
