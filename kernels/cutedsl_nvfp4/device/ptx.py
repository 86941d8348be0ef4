"""PTX that CuTe DSL does not expose and that kernels of more than one architecture use."""

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32
from cutlass._mlir.dialects import llvm
from cutlass._mlir.extras import types as T
from cutlass.cutlass_dsl import dsl_user_op


def asm(result, operands, text, constraints, loc, ip, volatile=False):
    """PTX `text` as one operation; `volatile` where it must stay in place although nothing reads its result.

    Accesses to shared memory also name "~{memory}", so that the compiler moves no other access across them.
    """
    return llvm.inline_asm(
        result,
        operands,
        text,
        constraints,
        has_side_effects=volatile,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
        loc=loc,
        ip=ip,
    )


def fields(struct, types, wrap, loc, ip):
    """The members of the struct that an operation with several results returns."""
    return tuple(wrap(llvm.extractvalue(t, struct, [i], loc=loc, ip=ip)) for i, t in enumerate(types))


def smem_address(pointer: cute.Pointer) -> Int32:
    """Shared-memory pointer -> 32-bit address for the PTX above."""
    return Int32(pointer.toint())


@dsl_user_op
def load_words(address: Int32, count: int, *, loc=None, ip=None):
    """`count` (2 or 4) consecutive Uint32 from shared memory, in one access."""
    types = [T.i32()] * count
    registers = ", ".join(f"${i}" for i in range(count))
    text = f"ld.shared.v{count}.b32 {{{registers}}}, [${count}];"
    constraints = ",".join(["=r"] * count + ["r", "~{memory}"])
    struct = asm(
        llvm.StructType.get_literal(types),
        [address.ir_value(loc=loc, ip=ip)],
        text,
        constraints,
        loc,
        ip,
        volatile=True,
    )
    return fields(struct, types, Uint32, loc, ip)


@dsl_user_op
def load_matrices(address: Int32, *, loc=None, ip=None):
    """ldmatrix.x4: four 8x8 bf16 matrices -> four Uint32; lane l gives the address of row l % 8 of l // 8."""
    types = [T.i32()] * 4
    text = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];"
    struct = asm(
        llvm.StructType.get_literal(types),
        [address.ir_value(loc=loc, ip=ip)],
        text,
        "=r,=r,=r,=r,r,~{memory}",
        loc,
        ip,
        volatile=True,
    )
    return fields(struct, types, Uint32, loc, ip)


@dsl_user_op
def load_coherent(address: Int64, *, loc=None, ip=None):
    """Four Int32 from global memory past L1: for what a kernel before the previous one wrote."""
    # A weak load may return what L1 held earlier, because this kernel has not waited for that one.
    types = [T.i32()] * 4
    text = "ld.relaxed.gpu.global.v4.b32 {$0, $1, $2, $3}, [$4];"
    operands = [address.ir_value(loc=loc, ip=ip)]
    struct = asm(llvm.StructType.get_literal(types), operands, text, "=r,=r,=r,=r,l", loc, ip, volatile=True)
    return fields(struct, types, Int32, loc, ip)


@dsl_user_op
def pack_bf16(low: Float32, high: Float32, *, loc=None, ip=None) -> Uint32:
    """Two f32 -> bf16x2, round to nearest even."""
    operands = [high.ir_value(loc=loc, ip=ip), low.ir_value(loc=loc, ip=ip)]  # cvt takes the upper half first
    return Uint32(asm(T.i32(), operands, "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", loc, ip))


@dsl_user_op
def settle(value: Uint32, *, loc=None, ip=None) -> Uint32:
    """The value itself, computed no later than here: keeps decode from sinking between wgmmas, which makes
    ptxas serialize them (C7513)."""
    return Uint32(asm(T.i32(), [value.ir_value(loc=loc, ip=ip)], "", "=r,0", loc, ip, volatile=True))
