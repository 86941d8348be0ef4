"""PTX of the sm_120 kernels that CuTe DSL does not expose, and exchanges between the four lanes of a row."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32
from cutlass._mlir.dialects import llvm
from cutlass._mlir.extras import types as T
from cutlass.cutlass_dsl import dsl_user_op

from ..sm90.fragments import _asm, _fields, pack_bf16


@dsl_user_op
def mma_m16n8k64(acc, a, b, a_scales, b_scales, a_selector: int, b_selector: int, *, loc=None, ip=None):
    """acc (4 f32) + a (4 x 8 e2m1) @ b (2 x 8 e2m1), each times its e4m3 scale per 16 k -> 4 f32.

    The scale registers' words are those of the lanes that the selectors name (layout.py).
    """
    types = [T.f32()] * 4
    operands = [v.ir_value(loc=loc, ip=ip) for v in (*a, *b, *acc, a_scales, b_scales)]
    text = (
        "mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::4X.m16n8k64.row.col.f32.e2m1.e2m1.f32.ue4m3 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13}, "
        f"$14, {{0, {a_selector}}}, $15, {{0, {b_selector}}};"
    )
    constraints = "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f,r,r"
    struct = _asm(llvm.StructType.get_literal(types), operands, text, constraints, loc, ip)
    return _fields(struct, types, Float32, loc, ip)


@dsl_user_op
def load_word(address: Int32, *, loc=None, ip=None) -> Uint32:
    """One Uint32 from shared memory."""
    operands = [address.ir_value(loc=loc, ip=ip)]
    return Uint32(
        _asm(T.i32(), operands, "ld.shared.b32 $0, [$1];", "=r,r,~{memory}", loc, ip, volatile=True)
    )


@dsl_user_op
def store_sums(address: Int32, values, *, loc=None, ip=None):
    """Four f32 to shared memory."""
    operands = [v.ir_value(loc=loc, ip=ip) for v in (address, *values)]
    text = "st.shared.v4.f32 [$0], {$1, $2, $3, $4};"
    _asm(None, operands, text, "r,f,f,f,f,~{memory}", loc, ip, volatile=True)


@dsl_user_op
def load_sums(address: Int32, *, loc=None, ip=None):
    """Four f32 from shared memory."""
    types = [T.f32()] * 4
    operands = [address.ir_value(loc=loc, ip=ip)]
    text = "ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];"
    struct = _asm(
        llvm.StructType.get_literal(types), operands, text, "=f,=f,=f,=f,r,~{memory}", loc, ip, volatile=True
    )
    return _fields(struct, types, Float32, loc, ip)


@dsl_user_op
def encode_pair(low: Float32, high: Float32, *, loc=None, ip=None) -> Uint32:
    """Two f32 -> the byte of their e2m1 codes, to nearest even, 6 saturates."""
    operands = [v.ir_value(loc=loc, ip=ip) for v in (high, low)]
    text = "{ .reg .b8 b; cvt.rn.satfinite.e2m1x2.f32 b, $1, $2; cvt.u32.u8 $0, b; }"
    return Uint32(_asm(T.i32(), operands, text, "=r,f,f", loc, ip))


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
