"""Read a compiled workstation kernel's machine code: block-scaled MMAs in the main loop, nothing spilled."""

from pathlib import Path

from cutedsl_nvfp4.family import Kernel
from cutedsl_nvfp4.sm120.tiles import LinearTile
from devtools.kernels.sass.machine_code import MachineCode, read

INSTRUCTION = "OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X"
OTHER_PER_WARP = (
    60  # most instructions beside the MMAs of a stage; NVIDIA's own kernels: bench/blackwell/sass.py
)


def problems(cubin: Path, kernel: Kernel) -> list[str]:
    """What is wrong with `kernel`'s machine code; of one that multiplies nothing only spills are."""
    code, tile = read(cubin), kernel.tile
    return code.problems() + (main_loop_problems(code, tile) if tile else [])


def main_loop_problems(code: MachineCode, tile: LinearTile) -> list[str]:
    wrong = []
    expected = tile.warp_blocks * (tile.warp_rows // 8) * (tile.warp_tokens // 16)
    if code.mma != {INSTRUCTION: expected} or code.mma_everywhere != code.mma:
        wrong.append(
            f"tensor core instructions in the main loop: {code.mma} instead of {expected} {INSTRUCTION}"
        )
    other = sum(code.other.values())
    if other > OTHER_PER_WARP:
        wrong.append(f"{other} other instructions in the main loop, at most {OTHER_PER_WARP} expected")
    return wrong
