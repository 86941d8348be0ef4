"""FP4 and FP8 conversions of both Blackwell families, which CuTe DSL does not expose."""

from cutlass import Float32, Uint32
from cutlass._mlir.extras import types as T
from cutlass.cutlass_dsl import dsl_user_op

from ..device.ptx import asm


@dsl_user_op
def fma(a: Float32, b: Float32, c: Float32, *, loc=None, ip=None) -> Float32:
    """a * b + c, rounded once."""
    operands = [v.ir_value(loc=loc, ip=ip) for v in (a, b, c)]
    return Float32(asm(T.f32(), operands, "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", loc, ip))


@dsl_user_op
def encode_e2m1x8(values, *, loc=None, ip=None) -> Uint32:
    """Eight f32 -> their e2m1 codes, rounded to nearest even, saturated at 6; value i in bits 4i .. 4i + 3."""
    operands = [v.ir_value(loc=loc, ip=ip) for v in values]
    pairs = " ".join(f"cvt.rn.satfinite.e2m1x2.f32 b{i}, ${2 * i + 2}, ${2 * i + 1};" for i in range(4))
    text = f"{{ .reg .b8 b0, b1, b2, b3; {pairs} mov.b32 $0, {{b0, b1, b2, b3}}; }}"
    return Uint32(asm(T.i32(), operands, text, "=r" + ",f" * 8, loc, ip))


@dsl_user_op
def encode_e4m3(value: Float32, *, loc=None, ip=None) -> Uint32:
    """A non-negative f32 -> the bits of its e4m3 value, rounded to nearest even, saturated at 448."""
    text = "{ .reg .b16 h; cvt.rn.satfinite.e4m3x2.f32 h, $1, $1; cvt.u32.u16 $0, h; and.b32 $0, $0, 0xff; }"
    return Uint32(asm(T.i32(), [value.ir_value(loc=loc, ip=ip)], text, "=r,f", loc, ip))


@dsl_user_op
def decode_e4m3(bits: Uint32, *, loc=None, ip=None) -> Float32:
    """The value of e4m3 bits, exactly."""
    text = (
        "{ .reg .b16 b, lo, hi; .reg .b32 h; cvt.u16.u32 b, $1; cvt.rn.f16x2.e4m3x2 h, b; "
        "mov.b32 {lo, hi}, h; cvt.f32.f16 $0, lo; }"
    )
    return Float32(asm(T.f32(), [bits.ir_value(loc=loc, ip=ip)], text, "=f,r", loc, ip))
