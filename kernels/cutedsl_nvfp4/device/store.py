"""Stores of 16 bytes to global memory."""

import cutlass
import cutlass.cute as cute
from cutlass import Uint32


@cute.jit
def store_words(target: cute.Pointer, words):
    """Four Uint32 to an address known to be a multiple of 16, in one access."""
    piece = cute.make_rmem_tensor(4, Uint32)
    for i in cutlass.range_constexpr(4):
        piece[i] = words[i]
    target = cute.recast_ptr(target.align(16), dtype=Uint32)
    cute.autovec_copy(piece, cute.make_tensor(target, cute.make_layout(4)))
