"""The ring of a pipeline's stages, as a warp walks through it."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32


@cute.jit
def advance(stage: Int32, phase: Int32, stages: cutlass.Constexpr):
    """The next (stage, phase) of a ring of `stages`; the phase flips where the ring starts again."""
    stage += 1
    if stage == stages:
        stage = Int32(0)
        phase = phase ^ 1
    return stage, phase
