"""PTX that CuTe DSL does not expose, and views of operands, for the Blackwell kernels."""

import cutlass.cute as cute
from cutlass import Float4E2M1FN, Float32, Int32, Int64, Uint32
from cutlass._mlir.dialects import llvm
from cutlass._mlir.extras import types as T
from cutlass.cute.nvgpu import cpasync
from cutlass.cutlass_dsl import dsl_user_op

ATOM_WORDS = 64  # int64 in a scale atom of 512 bytes, the unit TMA moves


def _asm(result, operands, text, constraints, loc, ip, volatile=False):
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


@dsl_user_op
def fence_after_wait(*, loc=None, ip=None):
    """Orders tcgen05 operations after a wait for a barrier that other threads' tcgen05 operations led to."""
    _asm(None, [], "tcgen05.fence::after_thread_sync;", "~{memory}", loc, ip, volatile=True)


@dsl_user_op
def fence_before_arrive(*, loc=None, ip=None):
    """Orders tcgen05 operations before an arrival that other threads' tcgen05 operations wait for."""
    _asm(None, [], "tcgen05.fence::before_thread_sync;", "~{memory}", loc, ip, volatile=True)


@dsl_user_op
def fma(a: Float32, b: Float32, c: Float32, *, loc=None, ip=None) -> Float32:
    """a * b + c, rounded once."""
    operands = [v.ir_value(loc=loc, ip=ip) for v in (a, b, c)]
    return Float32(_asm(T.f32(), operands, "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", loc, ip))


@dsl_user_op
def encode_e2m1x8(values, *, loc=None, ip=None) -> Uint32:
    """Eight f32 -> their e2m1 codes, rounded to nearest even, saturated at 6; value i in bits 4i .. 4i + 3."""
    operands = [v.ir_value(loc=loc, ip=ip) for v in values]
    pairs = " ".join(f"cvt.rn.satfinite.e2m1x2.f32 b{i}, ${2 * i + 2}, ${2 * i + 1};" for i in range(4))
    text = f"{{ .reg .b8 b0, b1, b2, b3; {pairs} mov.b32 $0, {{b0, b1, b2, b3}}; }}"
    return Uint32(_asm(T.i32(), operands, text, "=r" + ",f" * 8, loc, ip))


@dsl_user_op
def encode_e4m3(value: Float32, *, loc=None, ip=None) -> Uint32:
    """A non-negative f32 -> the bits of its e4m3 value, rounded to nearest even, saturated at 448."""
    text = "{ .reg .b16 h; cvt.rn.satfinite.e4m3x2.f32 h, $1, $1; cvt.u32.u16 $0, h; and.b32 $0, $0, 0xff; }"
    return Uint32(_asm(T.i32(), [value.ir_value(loc=loc, ip=ip)], text, "=r,f", loc, ip))


@dsl_user_op
def decode_e4m3(bits: Uint32, *, loc=None, ip=None) -> Float32:
    """The value of e4m3 bits, exactly."""
    text = (
        "{ .reg .b16 b, lo, hi; .reg .b32 h; cvt.u16.u32 b, $1; cvt.rn.f16x2.e4m3x2 h, b; "
        "mov.b32 {lo, hi}, h; cvt.f32.f16 $0, lo; }"
    )
    return Float32(_asm(T.f32(), [bits.ir_value(loc=loc, ip=ip)], text, "=f,r", loc, ip))


@dsl_user_op
def store_bf16(address: Int32, value: Float32, *, loc=None, ip=None):
    """One f32, rounded to bf16, to shared memory."""
    operands = [v.ir_value(loc=loc, ip=ip) for v in (address, value)]
    text = "{ .reg .b16 half; cvt.rn.bf16.f32 half, $1; st.shared.b16 [$0], half; }"
    _asm(None, operands, text, "r,f,~{memory}", loc, ip, volatile=True)


@dsl_user_op
def address_in_cluster(address: Int32, rank: Int32, *, loc=None, ip=None) -> Int32:
    """A shared-memory address of this CTA -> the same place in CTA `rank` of the cluster."""
    operands = [address.ir_value(loc=loc, ip=ip), Int32(rank).ir_value(loc=loc, ip=ip)]
    return Int32(_asm(T.i32(), operands, "mapa.shared::cluster.u32 $0, $1, $2;", "=r,r,r", loc, ip))


@dsl_user_op
def store_in_cluster(address: Int32, values, *, loc=None, ip=None):
    """Two or four f32 to an address from `address_in_cluster`; visible after a cluster barrier."""
    n = len(values)
    operands = [v.ir_value(loc=loc, ip=ip) for v in (address, *values)]
    registers = ", ".join(f"${i + 1}" for i in range(n))
    text = f"st.shared::cluster.v{n}.f32 [$0], {{{registers}}};"
    _asm(None, operands, text, "r" + ",f" * n + ",~{memory}", loc, ip, volatile=True)


def smem_address(pointer: cute.Pointer) -> Int32:
    """Shared-memory pointer -> 32-bit address for the PTX above."""
    return Int32(pointer.toint())


def codes_view(codes: cute.Tensor, rows: Int32, k: Int32, groups: Int32, by_row: bool):
    """Packed codes -> e2m1 (rows, K, groups), from which TMA fills with zeros beyond the rows of a group.

    k is a row's padded length of one group. `by_row`: a row holds all groups (activations), else a group
    holds all its rows (weights).
    """
    k = cute.assume(k, divby=32)
    row, group = (Int64(k) * groups, Int64(k)) if by_row else (Int64(k), Int64(k) * rows)
    layout = cute.make_layout(
        (rows, k, groups), stride=(cute.assume(row, divby=32), 1, cute.assume(group, divby=32))
    )
    return cute.make_tensor(cute.recast_ptr(codes.iterator, dtype=Float4E2M1FN), layout)


def scales_view(scales: cute.Tensor, groups: Int32):
    """uint8 [groups * tiles, KB, 32, 16] -> int64 (64, KB, row tiles of a group, groups), the order of TMA's box."""
    blocks, tiles = scales.shape[1], scales.shape[0] // groups
    tile = cute.assume(ATOM_WORDS * Int64(blocks), divby=ATOM_WORDS)
    group = cute.assume(tile * tiles, divby=ATOM_WORDS)
    layout = cute.make_layout((ATOM_WORDS, blocks, tiles, groups), stride=(1, ATOM_WORDS, tile, group))
    return cute.make_tensor(cute.recast_ptr(scales.iterator, dtype=Int64), layout)


def partition_loads(atom: cute.CopyAtom, shared: cute.Tensor, tiles: cute.Tensor, modes: int):
    """(shared by stage, global by tile) views of one TMA load whose box is the first `modes` modes."""
    return cpasync.tma_partition(
        atom, 0, cute.make_layout(1), cute.group_modes(shared, 0, modes), cute.group_modes(tiles, 0, modes)
    )
