"""The two instructions of the sm_120 kernels that Hopper lacks, in software, so that the rest runs there.

Written from the PTX manual's description of block-scaled `mma.sync` and of its m16n8k64 fragments, and from nothing in
sm120/layout.py: a lane with the wrong operand gives the wrong result here too.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32
from cutlass._mlir.extras import types as T
from cutlass.cutlass_dsl import dsl_user_op

from cutedsl_nvfp4.device.ptx import asm

ARCH = "sm_90a"


def install() -> None:
    """Make the kernels that this process compiles from now on use the emulation."""
    from cutedsl_nvfp4.sm120 import experts_kernel as grouped
    from cutedsl_nvfp4.sm120 import mainloop

    mainloop.mma_m16n8k64 = mma_m16n8k64
    grouped.encode_pair = encode_pair


@dsl_user_op
def dot8(a: Uint32, b: Uint32, *, loc=None, ip=None) -> Int32:
    """Four times the dot product of eight e2m1 codes with eight e2m1 codes, exact."""
    operands = [a.ir_value(loc=loc, ip=ip), b.ir_value(loc=loc, ip=ip)]
    half = (
        "shr.b32 x, $1, {s}; and.b32 x, x, 0x7777; prmt.b32 x, 0x03020100, 0x0C080604, x; "
        "shr.b32 y, $2, {s}; and.b32 y, y, 0x7777; prmt.b32 y, 0x03020100, 0x0C080604, y; "
        "xor.b32 m, $1, $2; shr.b32 m, m, {t}; and.b32 m, m, 0x1111; prmt.b32 m, 0x0000FF00, 0, m; "
        "and.b32 n, y, m; not.b32 m, m; and.b32 y, y, m; "
        "dp4a.s32.s32 p, x, y, p; dp4a.s32.s32 q, x, n, q; "
    )
    text = (
        "{ .reg .b32 x, y, m, n; .reg .s32 p, q; mov.s32 p, 0; mov.s32 q, 0; "
        + half.format(s=0, t=3)
        + half.format(s=16, t=19)
        + "sub.s32 $0, p, q; }"
    )
    return Int32(asm(T.i32(), operands, text, "=r,r,r", loc, ip))


@dsl_user_op
def e4m3(bits: Uint32, *, loc=None, ip=None) -> Float32:
    """The value of an e4m3 scale in the low byte; the sign is ignored and NaN not made."""
    text = (
        "{ .reg .b32 x; .reg .f32 f; and.b32 x, $1, 0x7F; shl.b32 x, x, 20; mov.b32 f, x; "
        "mul.f32 $0, f, 0f7B800000; }"
    )
    return Float32(asm(T.f32(), [bits.ir_value(loc=loc, ip=ip)], text, "=f,r", loc, ip))


@cute.jit
def mma_m16n8k64(
    acc: tuple,
    a: tuple,
    b: tuple,
    a_scales: Uint32,
    b_scales: Uint32,
    a_selector: cutlass.Constexpr[int],
    b_selector: cutlass.Constexpr[int],
):
    """fragments.mma_m16n8k64's signature and result."""
    lane = cute.arch.lane_idx()
    row, column = lane // 4, lane % 4 * 2
    sums = cute.make_rmem_tensor(4, Float32)
    row_scales = [cute.arch.shuffle_sync(a_scales, row * 4 + 2 * a_selector + h) for h in range(2)]
    column_scales = [cute.arch.shuffle_sync(b_scales, (column + i) * 4 + b_selector) for i in range(2)]
    for v in cutlass.range_constexpr(4):
        sums[v] = acc[v]
    for quarter in cutlass.range(4, unroll=1):
        for p in cutlass.range_constexpr(2):
            shift = (2 * p + quarter // 2) * 8  # k = 32 p + 8 quarter is in this group of 16
            rows = [cute.arch.shuffle_sync(a[2 * p + h], row * 4 + quarter) for h in range(2)]
            columns = [cute.arch.shuffle_sync(b[p], (column + i) * 4 + quarter) for i in range(2)]
            for v in cutlass.range_constexpr(4):
                h, i = v // 2, v % 2
                scale = e4m3(row_scales[h] >> shift) * e4m3(column_scales[i] >> shift)
                sums[v] = sums[v] + Float32(dot8(rows[h], columns[i])) * Float32(0.25) * scale
    return sums[0], sums[1], sums[2], sums[3]


@cute.jit
def encode_pair(low: Float32, high: Float32) -> Uint32:
    """fragments.encode_pair's signature and result: ties to even, 6 saturates."""
    codes = Uint32(0)
    for i, value in enumerate((low, high)):
        magnitude = cute.arch.fmax(value, -value)
        code = Uint32(0)
        for boundary, up in ((0.25, 0), (0.75, 1), (1.25, 0), (1.75, 1), (2.5, 0), (3.5, 1), (5.0, 0)):
            above = magnitude >= boundary if up else magnitude > boundary
            code += Uint32(above)
        sign = Uint32(0)
        if value < 0.0:
            sign = Uint32(8)
        codes = codes | ((code | sign) << (4 * i))
    return codes
