"""PTX of the sm_120 kernels that CuTe DSL does not expose."""

from cutlass import Float32, Int32, Uint32
from cutlass._mlir.dialects import llvm
from cutlass._mlir.extras import types as T
from cutlass.cutlass_dsl import dsl_user_op

from ..device.ptx import asm, fields


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
    struct = asm(llvm.StructType.get_literal(types), operands, text, constraints, loc, ip)
    return fields(struct, types, Float32, loc, ip)


@dsl_user_op
def load_word(address: Int32, *, loc=None, ip=None) -> Uint32:
    """One Uint32 from shared memory."""
    operands = [address.ir_value(loc=loc, ip=ip)]
    return Uint32(asm(T.i32(), operands, "ld.shared.b32 $0, [$1];", "=r,r,~{memory}", loc, ip, volatile=True))


@dsl_user_op
def store_sums(address: Int32, values, *, loc=None, ip=None):
    """Four f32 to shared memory."""
    operands = [v.ir_value(loc=loc, ip=ip) for v in (address, *values)]
    text = "st.shared.v4.f32 [$0], {$1, $2, $3, $4};"
    asm(None, operands, text, "r,f,f,f,f,~{memory}", loc, ip, volatile=True)


@dsl_user_op
def load_sums(address: Int32, *, loc=None, ip=None):
    """Four f32 from shared memory."""
    types = [T.f32()] * 4
    operands = [address.ir_value(loc=loc, ip=ip)]
    text = "ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];"
    struct = asm(
        llvm.StructType.get_literal(types), operands, text, "=f,=f,=f,=f,r,~{memory}", loc, ip, volatile=True
    )
    return fields(struct, types, Float32, loc, ip)


@dsl_user_op
def encode_pair(low: Float32, high: Float32, *, loc=None, ip=None) -> Uint32:
    """Two f32 -> the byte of their e2m1 codes, to nearest even, 6 saturates."""
    operands = [v.ir_value(loc=loc, ip=ip) for v in (high, low)]
    text = "{ .reg .b8 b; cvt.rn.satfinite.e2m1x2.f32 b, $1, $2; cvt.u32.u8 $0, b; }"
    return Uint32(asm(T.i32(), operands, text, "=r,f,f", loc, ip))
