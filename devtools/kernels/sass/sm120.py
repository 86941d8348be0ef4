"""Read a compiled workstation kernel's machine code: block-scaled MMAs in the main loop, nothing spilled."""

from pathlib import Path

from cutedsl_nvfp4.family import Kernel
from devtools.kernels.sass.machine_code import read

INSTRUCTION = "OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X"
OTHER_PER_WARP = (
    60  # most instructions beside the MMAs of a stage; NVIDIA's own kernels: bench/blackwell/sass.py
)


def problems(cubin: Path, kernel: Kernel) -> list[str]:
    """What is wrong with `kernel`'s machine code; of one that multiplies nothing only spills are."""
    tile = kernel.tile
    code = read(cubin)
    wrong = code.problems()
    if tile is None:
        return wrong
    expected = tile.warp_blocks * (tile.warp_rows // 8) * (tile.warp_tokens // 16)
    if code.mma != {INSTRUCTION: expected} or code.mma_everywhere != code.mma:
        wrong.append(
            f"tensor core instructions in the main loop: {code.mma} instead of {expected} {INSTRUCTION}"
        )
    other = sum(code.other.values())
    if other > OTHER_PER_WARP:
        wrong.append(f"{other} other instructions in the main loop, at most {OTHER_PER_WARP} expected")
    return wrong
