"""Register-level pieces both Hopper kernels share: weight decode, and PTX that CuTe DSL does not expose."""

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32
from cutlass._mlir.dialects import llvm
from cutlass._mlir.extras import types as T
from cutlass.cutlass_dsl import dsl_user_op

from ..device.ptx import asm, fields
from .decode import unpack_scales, unpack_word


@dsl_user_op
def multiply_by_half(values: Uint32, pair: Uint32, half: int, *, loc=None, ip=None) -> Uint32:
    """bf16x2 `values` * {pair[half], pair[half]}; ptxas turns the broadcast into HMUL2's operand selector."""
    name = ("lo", "hi")[half]
    text = (
        "{ .reg .b16 lo, hi; .reg .b32 both; mov.b32 {lo, hi}, $2; "
        f"mov.b32 both, {{{name}, {name}}}; mul.rn.bf16x2 $0, $1, both; }}"
    )
    operands = [values.ir_value(loc=loc, ip=ip), pair.ir_value(loc=loc, ip=ip)]
    return Uint32(asm(T.i32(), operands, text, "=r,r,r", loc, ip))


@dsl_user_op
def store_matrices_transposed(
    address: Int32, a: Uint32, b: Uint32, c: Uint32, d: Uint32, *, loc=None, ip=None
):
    """stmatrix.x4.trans: the inverse lane mapping of `load_matrices`, each matrix transposed."""
    operands = [v.ir_value(loc=loc, ip=ip) for v in (address, a, b, c, d)]
    text = "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1, $2, $3, $4};"
    asm(None, operands, text, "r,r,r,r,r,~{memory}", loc, ip, volatile=True)


@dsl_user_op
def mma_m16n8k16(acc, a, b, *, loc=None, ip=None):
    """acc (4 f32) + a (4 x bf16x2) @ b (2 x bf16x2) -> 4 f32."""
    types = [T.f32()] * 4
    operands = [v.ir_value(loc=loc, ip=ip) for v in (*a, *b, *acc)]
    text = (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    constraints = "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f"
    struct = asm(llvm.StructType.get_literal(types), operands, text, constraints, loc, ip)
    return fields(struct, types, Float32, loc, ip)


@dsl_user_op
def store_shared(address: Int32, value: Float32, *, loc=None, ip=None):
    """One f32 to shared memory."""
    operands = [v.ir_value(loc=loc, ip=ip) for v in (address, value)]
    asm(None, operands, "st.shared.f32 [$0], $1;", "r,f,~{memory}", loc, ip, volatile=True)


def weight_registers(word: Uint32, scale_word: Uint32, odd: int, bias: Uint32):
    """One code word and its rows' scales -> the A fragment of one k16 step: 4 Uint32, weights * 2^-8 in bf16.

    Register 2 * p + h holds row r + 8 * h and k = 8 * p + 2 * c + {0, 1}; see layout.py.
    """
    pair = unpack_scales(scale_word, odd, bias)
    return tuple(multiply_by_half(register, pair, i % 2) for i, register in enumerate(unpack_word(word)))


@dsl_user_op
def copy_async(address: Int32, source: Int64, size: Int32, wanted, *, loc=None, ip=None):
    """cp.async of 16 bytes to shared memory, of which `size` (0 or 16) are read and the rest is zero, if `wanted`."""
    operands = [v.ir_value(loc=loc, ip=ip) for v in (address, source, size, Int32(wanted))]
    text = "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p cp.async.cg.shared.global [$0], [$1], 16, $2; }"
    asm(None, operands, text, "r,l,r,r,~{memory}", loc, ip, volatile=True)


@dsl_user_op
def arrive_after_copies(barrier: Int32, *, loc=None, ip=None):
    """One of the arrivals `barrier` was initialized for, once this thread's `copy_async`s have landed."""
    operands = [barrier.ir_value(loc=loc, ip=ip)]
    text = "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];"
    asm(None, operands, text, "r,~{memory}", loc, ip, volatile=True)


@cute.jit
def store_output(mOut: cute.Tensor, m: Int32, n: Int32, value: Float32):
    """One element with bounds check, converted to the output's type."""
    if m < mOut.shape[0] and n < mOut.shape[1]:
        mOut[m, n] = value.to(mOut.element_type)
