"""Read a compiled Hopper kernel's machine code: tensor cores in use, nothing spilled, wgmmas not serialized."""

import re
from pathlib import Path

from cutedsl_nvfp4.sm90.tiles import LinearTile, NarrowTile, expert_widths
from devtools.kernels.sass.machine_code import disassemble, parse, resources


def problems(cubin: Path, config: LinearTile | None, experts: bool = False) -> list[str]:
    """What is wrong with the machine code of `config`'s linear kernel, or its `experts` kernel; nothing if all is well.

    Without a configuration the kernel multiplies no matrices, and only its use of registers is read.
    """
    sass = disassemble(cubin)
    wrong = parse(sass, *resources(cubin)).problems()
    if config is None:
        return wrong
    narrow = isinstance(config, NarrowTile)
    loops = 1
    if not narrow:
        loops = len(expert_widths(config)) if experts else 1 + bool(config.tail)
    panels = max(1, config.panels // 2) if experts and not narrow else 1  # of a warpgroup
    instruction = r"\bHMMA\.16816\.F32\.BF16\b" if narrow else r"\bHGMMA\.64x\d+x16\.F32\.BF16\b"
    expected = 4 * config.blocks * (config.tokens // 8 if narrow else loops * panels)
    found = len(re.findall(instruction, sass))
    if found != expected:
        wrong.append(f"{found} tensor core instructions in the main loop instead of {expected}")
    if not narrow and len(re.findall(r"WARPGROUP\.DEPBAR", sass)) > loops * (2 * panels + 1):
        wrong.append("ptxas serialized the wgmmas: see the comment in WideLinear.accumulate")
    return wrong
