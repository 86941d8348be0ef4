"""Views of operands that TMA loads."""

import cutlass.cute as cute
from cutlass.cute.nvgpu import cpasync


def partition_loads(
    atom: cute.CopyAtom,
    shared: cute.Tensor,
    tiles: cute.Tensor,
    modes: int,
    member: int = 0,
    members: int = 1,
):
    """(shared by stage, global by tile) views of one TMA load whose box is the first `modes` modes."""
    return cpasync.tma_partition(
        atom,
        member,
        cute.make_layout(members),
        cute.group_modes(shared, 0, modes),
        cute.group_modes(tiles, 0, modes),
    )
