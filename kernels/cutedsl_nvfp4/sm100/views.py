"""Views of operands of data-centre Blackwell, in the order of TMA's dimensions."""

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Float4E2M1FN, Int32, Int64

ATOM_WORDS = 64  # int64 in a scale atom of 512 bytes, the unit TMA moves


class Operand(NamedTuple):
    """What TMA needs of an operand in global memory."""

    atom: cute.CopyAtom
    tensor: cute.Tensor  # coordinates


class Operands(NamedTuple):
    """All that TMA loads."""

    weights: Operand
    tokens: Operand
    weight_scales: Operand
    token_scales: Operand


class Stages(NamedTuple):
    """Where TMA leaves the operands in shared memory; the last mode counts the stages."""

    weights: cute.Tensor
    tokens: cute.Tensor
    weight_scales: cute.Tensor
    token_scales: cute.Tensor


class Load(NamedTuple):
    """A CTA's loads of an operand."""

    atom: cute.CopyAtom
    shared: cute.Tensor  # (box, stages)
    tiles: cute.Tensor  # (box, coordinates of a tile ...), of global memory


def codes_view(
    codes: cute.Tensor,  # uint8 [M, groups * K'/2] or [N, K'/2]
    rows: Int32,
    k: Int32,
    groups: Int32,
    by_row: bool,
) -> cute.Tensor:
    """Packed codes -> e2m1 (rows, K, groups), from which TMA fills with zeros beyond the rows of a group.

    k is a row's padded length of one group. `by_row`: a row holds all groups (activations), else a group
    holds all its rows (weights).
    """
    k = cute.assume(k, divby=32)
    row, group = (Int64(k) * groups, Int64(k)) if by_row else (Int64(k), Int64(k) * rows)
    layout = cute.make_layout(
        (rows, k, groups), stride=(cute.assume(row, divby=32), 1, cute.assume(group, divby=32))
    )
    return cute.make_tensor(cute.recast_ptr(codes.iterator, dtype=Float4E2M1FN), layout)


def scales_view(scales: cute.Tensor, groups: Int32) -> cute.Tensor:
    """uint8 [groups * tiles, KB, 32, 16] -> int64 (64, KB, row tiles of a group, groups), the order of TMA's box."""
    blocks, tiles = scales.shape[1], scales.shape[0] // groups
    tile = cute.assume(ATOM_WORDS * Int64(blocks), divby=ATOM_WORDS)
    group = cute.assume(tile * tiles, divby=ATOM_WORDS)
    layout = cute.make_layout((ATOM_WORDS, blocks, tiles, groups), stride=(1, ATOM_WORDS, tile, group))
    return cute.make_tensor(cute.recast_ptr(scales.iterator, dtype=Int64), layout)
