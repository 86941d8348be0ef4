"""Read a compiled Blackwell kernel's machine code: block-scaled MMAs in the main loop, nothing spilled."""

import re
from pathlib import Path

from cutedsl_nvfp4.family import Kernel
from cutedsl_nvfp4.sm100.tiles import TILE_K, GroupedTile, LinearTile
from devtools.kernels.sass.machine_code import MachineCode, read

OTHER_PER_MMA = 19.0  # most instructions beside each MMA of the main loop; NVIDIA's own examples: bench/sass


def problems(cubin: Path, kernel: Kernel) -> list[str]:
    """What is wrong with `kernel`'s machine code; of one that multiplies nothing only spills are."""
    code, tile = read(cubin), kernel.tile
    return code.problems() + (main_loop_problems(code, tile) if tile else [])


def main_loop_problems(code: MachineCode, tile: LinearTile | GroupedTile) -> list[str]:
    wrong = []
    expected = TILE_K // 64 * (tile.panels if isinstance(tile, GroupedTile) else 1)
    # as sm_100a and sm_103a call it
    instruction = rf"UTCOMMA{'[.]2CTA' * (tile.ctas_per_mma - 1)}[.](4X|BLOCK16)"
    right = len(code.mma) == 1 and all(re.fullmatch(instruction, opcode) for opcode in code.mma)
    if not right or sum(code.mma.values()) != expected or code.mma_everywhere != code.mma:
        wrong.append(
            f"tensor core instructions in the main loop: {code.mma} instead of {expected} {instruction}"
        )
    if code.other_per_mma > OTHER_PER_MMA:
        wrong.append(
            f"{code.other_per_mma:.1f} instructions beside each MMA, at most {OTHER_PER_MMA} expected"
        )
    return wrong
