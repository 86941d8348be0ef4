"""Read a compiled Hopper kernel's machine code: tensor cores in use, nothing spilled, wgmmas not serialized."""

import re
from pathlib import Path

from cutedsl_nvfp4.family import Kernel
from cutedsl_nvfp4.sm90.tiles import NarrowTile, expert_widths
from devtools.kernels.sass.machine_code import disassemble, parse, resources


def problems(cubin: Path, kernel: Kernel) -> list[str]:
    """What is wrong with `kernel`'s machine code; nothing if all is well.

    Of a kernel that multiplies no matrices only the use of registers is read.
    """
    sass = disassemble(cubin)
    wrong = parse(sass, *resources(cubin)).problems()
    tile, experts = kernel.tile, kernel.kind == "product"
    if tile is None:
        return wrong
    narrow = isinstance(tile, NarrowTile)
    loops = 1
    if not narrow:
        loops = len(expert_widths(tile)) if experts else 1 + bool(tile.tail)
    panels = max(1, tile.panels // 2) if experts and not narrow else 1  # of a warpgroup
    instruction = r"\bHMMA\.16816\.F32\.BF16\b" if narrow else r"\bHGMMA\.64x\d+x16\.F32\.BF16\b"
    expected = 4 * tile.blocks * (tile.tokens // 8 if narrow else loops * panels)
    found = len(re.findall(instruction, sass))
    if found != expected:
        wrong.append(f"{found} tensor core instructions in the main loop instead of {expected}")
    if not narrow and len(re.findall(r"WARPGROUP\.DEPBAR", sass)) > loops * (2 * panels + 1):
        wrong.append("ptxas serialized the wgmmas: see the comment in WideLinearKernel.accumulate")
    return wrong
