"""Where a warp stands in a ring of pipeline stages."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32


@cute.jit
def advance(stage: Int32, phase: Int32, stages: cutlass.Constexpr[int]):
    """The place after (stage, phase) in a ring of `stages` stages.

    `phase` is the parity of the phase to wait for at barrier `stage`. A barrier completes one phase each turn of the
    ring, so that parity flips where the turn ends.
    """
    stage += 1
    if stage == stages:
        stage = Int32(0)
        phase = phase ^ 1
    return stage, phase
