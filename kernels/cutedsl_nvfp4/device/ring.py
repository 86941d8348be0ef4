"""A ring of pipeline stages: its barriers, and where a warp stands in it."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32


@cute.jit
def init_ring(
    full: cute.Pointer,
    empty: cute.Pointer,
    stages: cutlass.Constexpr[int],
    producers: cutlass.Constexpr[int],
    consumers: cutlass.Constexpr[int],
):
    """One thread's work: a phase of full[stage] ends with `producers` arrivals, of empty[stage] with `consumers`."""
    for stage in cutlass.range_constexpr(stages):
        cute.arch.mbarrier_init(full + stage, producers)
        cute.arch.mbarrier_init(empty + stage, consumers)


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
