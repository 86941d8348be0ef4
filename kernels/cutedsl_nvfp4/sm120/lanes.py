"""Exchanges between the four lanes that hold a row of an MMA's result."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Uint32
from cutlass._mlir.dialects import llvm
from cutlass._mlir.extras import types as T
from cutlass.cutlass_dsl import dsl_user_op

from ..device.ptx import pack_bf16


@dsl_user_op
def as_word(value: Float32, *, loc=None, ip=None) -> Uint32:
    """The bits of an f32."""
    return Uint32(llvm.bitcast(T.i32(), value.ir_value(loc=loc, ip=ip), loc=loc, ip=ip))


@cute.jit
def choose(condition: cutlass.Boolean, yes: Uint32, no: Uint32) -> Uint32:
    """`yes` where the condition holds, else `no`."""
    return yes if condition else no


def shuffle(value, distance: int):
    """What lane l ^ distance has."""
    return cute.arch.shuffle_sync_bfly(value, distance)


def exchange(low, high, lane, distance: int):
    """Between lanes l and l ^ distance: the lower one gets both one's `low`, the upper one both one's `high`."""
    upper = (lane & distance) != 0
    received = shuffle(choose(upper, low, high), distance)
    return choose(upper, received, low), choose(upper, high, received)


def transpose_words(words: tuple, lane):
    """Four words of each of a row's four lanes -> lane q gets word q of lanes 0, 1, 2, 3."""
    a, b, c, d = words
    a, b = exchange(a, b, lane, 1)
    c, d = exchange(c, d, lane, 1)
    a, c = exchange(a, c, lane, 2)
    b, d = exchange(b, d, lane, 2)
    return a, b, c, d


def transpose_bytes(word, lane):
    """Four bytes of each of a row's four lanes -> lane q gets byte q of lanes 0, 1, 2, 3."""
    # A byte stays where it is, the others come from the lanes at distance 1, 2 and 3, one shuffle each.
    own = lane % 4
    result = ((word >> (8 * own)) & 0xFF) << (8 * own)
    for distance in range(1, 4):
        other = own ^ distance
        result = result | (shuffle((word >> (8 * other)) & 0xFF, distance) << (8 * other))
    return result


def bf16_piece(values: tuple, lane):
    """A lane's values[2 * j + i] of columns 8 * j + 2 * (lane % 4) + i of 32 -> (8 neighbours, their first column)."""
    words = tuple(pack_bf16(values[2 * j], values[2 * j + 1]) for j in range(4))
    return transpose_words(words, lane), lane % 4 * 8


def f32_pieces(values: tuple, lane):
    """As `bf16_piece`, of f32: two pieces of four neighbouring columns."""
    pieces = []
    for half in range(2):
        pairs = [
            exchange(as_word(values[4 * half + i]), as_word(values[4 * half + 2 + i]), lane, 1)
            for i in range(2)
        ]
        words = (pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1])
        pieces.append((words, half * 16 + lane % 2 * 8 + lane % 4 // 2 * 4))
    return pieces
