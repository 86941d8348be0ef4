"""NVFP4 rounding of 16 values in a thread's registers, bit for bit as reference.quantize, and where it goes by slot."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32

from ..format import E2M1_MAX, GROUP_SIZE
from .ptx import decode_e4m3, encode_e2m1x8, encode_e4m3, fma


@cute.jit
def largest(
    values: cute.Tensor,  # f32 [16]
) -> Float32:
    """The largest magnitude; NaN if one is."""
    amax = Float32(0.0)
    for i in cutlass.range_constexpr(GROUP_SIZE):
        amax = cute.arch.fmax(amax, cute.arch.fmax(values[i], -values[i], nan=True), nan=True)
    return amax


@cute.jit
def divide(x: Float32, by: Float32, inverse: Float32) -> Float32:
    """x / by, correctly rounded: `inverse` is 1 / by rounded, and one step of Newton's makes up for the rest.

    Markstein's theorem; the remainder is exact. Its sign is such that -0 stays -0. For a `by` below 2^-126 the
    result saturates.
    """
    quotient = x * inverse
    remainder = fma(quotient, by, -x)
    return fma(-remainder, inverse, quotient)


@cute.jit
def round_group(
    values: cute.Tensor,  # f32 [16]
    scale: Float32,
):
    """16 f32 and their global scale -> (codes of the first eight, of the last eight, e4m3 bits of the block scale)."""
    bits = encode_e4m3(largest(values) / Float32(E2M1_MAX) / scale)
    step = decode_e4m3(bits) * scale
    words = cute.make_rmem_tensor(2, Uint32)
    words.fill(Uint32(0))
    # A step of zero, of a group of zeros or one that underflows, gives codes of zero; so does NaN.
    if step > Float32(0.0):
        inverse = Float32(1.0) / step
        for half in cutlass.range_constexpr(2):
            words[half] = encode_e2m1x8([divide(values[half * 8 + i], step, inverse) for i in range(8)])
    return words[0], words[1], bits


def scale_offset(slot: Int32, group: Int32, tokens: Int32 | int, k_atoms: Int32) -> Int64:
    """Where the block scale of a slot's group lies among the tokens' scales, in bytes.

    Tile slot // tokens has ceil(tokens / 128) rows of `k_atoms` 128x4 atoms: 32 rows, 4 of row // 32, 4 groups.
    """
    row = slot % tokens
    atom_row = Int64(slot // tokens * ((tokens + 127) // 128) + row // 128)
    atom = (atom_row * k_atoms + group // 4) * 512
    return atom + (row % 32 * 16 + row % 128 // 32 * 4 + group % 4)
