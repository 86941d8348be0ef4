"""What both Blackwell families' products of experts write, and how a thread stores a piece of it."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32


class Output(NamedTuple):
    """What becomes of the sums of a product."""

    row_scale: cute.Tensor  # f32 [E, N]
    act_scale: cute.Tensor  # f32 [1], [E] or [R]
    by_slot: Int32  # 1 for an act_scale of every slot
    by_expert: Int32  # 1 for an act_scale of every expert
    pairs: cute.Tensor  # int32 [R], the pair of each slot
    out: cute.Tensor  # uint8 [R, I/2], bf16 [R, I] or bf16 [M * T, H]
    out_scales: cute.Tensor  # uint8 [tiles * atoms, ceil(I/64), 32, 16]; any without NVFP4
    out_act_scale: cute.Tensor  # f32 [1] or [E], the scale h is rounded with; any without NVFP4
    out_by_expert: Int32  # 1 for an out_act_scale of every expert
    limit: Float32  # SwiGLU's


@cute.jit
def store_words(
    words: tuple,  # two or four Uint32
    mOut: cute.Tensor,  # of any type
    row: Int64,
    column: Int32,
):
    """Words to `column` and following of the row that starts at element `row`, in one access."""
    piece = cute.make_rmem_tensor(len(words), Uint32)
    for i in cutlass.range_constexpr(len(words)):
        piece[i] = words[i]
    target = cute.recast_ptr((mOut.iterator + (row + column)).align(4 * len(words)), dtype=Uint32)
    cute.autovec_copy(piece, cute.make_tensor(target, cute.make_layout(len(words))))
