"""Register-level pieces both Hopper kernels share: weight decode, and PTX that CuTe DSL does not expose."""

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32
from cutlass._mlir.dialects import llvm
from cutlass._mlir.extras import types as T
from cutlass.cute.nvgpu import cpasync
from cutlass.cutlass_dsl import dsl_user_op

from .decode import unpack_scales, unpack_word


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


def _fields(struct, types, wrap, loc, ip):
    return tuple(wrap(llvm.extractvalue(t, struct, [i], loc=loc, ip=ip)) for i, t in enumerate(types))


@dsl_user_op
def multiply_by_half(values: Uint32, pair: Uint32, half: int, *, loc=None, ip=None) -> Uint32:
    """bf16x2 `values` * {pair[half], pair[half]}; ptxas turns the broadcast into HMUL2's operand selector."""
    name = ("lo", "hi")[half]
    text = (
        "{ .reg .b16 lo, hi; .reg .b32 both; mov.b32 {lo, hi}, $2; "
        f"mov.b32 both, {{{name}, {name}}}; mul.rn.bf16x2 $0, $1, both; }}"
    )
    operands = [values.ir_value(loc=loc, ip=ip), pair.ir_value(loc=loc, ip=ip)]
    return Uint32(_asm(T.i32(), operands, text, "=r,r,r", loc, ip))


@dsl_user_op
def settle(value: Uint32, *, loc=None, ip=None) -> Uint32:
    """The value itself, computed no later than here: keeps decode from sinking between wgmmas, which makes
    ptxas serialize them (C7513)."""
    return Uint32(_asm(T.i32(), [value.ir_value(loc=loc, ip=ip)], "", "=r,0", loc, ip, volatile=True))


@dsl_user_op
def load_matrices(address: Int32, *, loc=None, ip=None):
    """ldmatrix.x4: four 8x8 bf16 matrices -> four Uint32; lane l gives the address of row l % 8 of l // 8."""
    types = [T.i32()] * 4
    text = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];"
    struct = _asm(
        llvm.StructType.get_literal(types),
        [address.ir_value(loc=loc, ip=ip)],
        text,
        "=r,=r,=r,=r,r,~{memory}",
        loc,
        ip,
        volatile=True,
    )
    return _fields(struct, types, Uint32, loc, ip)


@dsl_user_op
def store_matrices_transposed(
    address: Int32, a: Uint32, b: Uint32, c: Uint32, d: Uint32, *, loc=None, ip=None
):
    """stmatrix.x4.trans: the inverse lane mapping of `load_matrices`, each matrix transposed."""
    operands = [v.ir_value(loc=loc, ip=ip) for v in (address, a, b, c, d)]
    text = "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1, $2, $3, $4};"
    _asm(None, operands, text, "r,r,r,r,r,~{memory}", loc, ip, volatile=True)


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
    struct = _asm(llvm.StructType.get_literal(types), operands, text, constraints, loc, ip)
    return _fields(struct, types, Float32, loc, ip)


@dsl_user_op
def pack_bf16(low: Float32, high: Float32, *, loc=None, ip=None) -> Uint32:
    """Two f32 -> bf16x2, round to nearest even."""
    operands = [high.ir_value(loc=loc, ip=ip), low.ir_value(loc=loc, ip=ip)]
    return Uint32(_asm(T.i32(), operands, "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", loc, ip))


@dsl_user_op
def store_shared(address: Int32, value: Float32, *, loc=None, ip=None):
    """One f32 to shared memory."""
    operands = [v.ir_value(loc=loc, ip=ip) for v in (address, value)]
    _asm(None, operands, "st.shared.f32 [$0], $1;", "r,f,~{memory}", loc, ip, volatile=True)


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


@dsl_user_op
def store_word_in_cluster(address: Int32, value: Int32, *, loc=None, ip=None):
    """One int32 to an address from `address_in_cluster`; visible after a cluster barrier."""
    operands = [v.ir_value(loc=loc, ip=ip) for v in (address, value)]
    _asm(None, operands, "st.shared::cluster.u32 [$0], $1;", "r,r,~{memory}", loc, ip, volatile=True)


@dsl_user_op
def signal_in_cluster(address: Int32, values, barrier: Int32, *, loc=None, ip=None):
    """store_in_cluster without a cluster barrier: `barrier`, in the same CTA, counts the bytes once they are there."""
    n = len(values)
    operands = [v.ir_value(loc=loc, ip=ip) for v in (address, *values, barrier)]
    registers = ", ".join(f"${i + 1}" for i in range(n))
    text = f"st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v{n}.f32 [$0], {{{registers}}}, [${n + 1}];"
    _asm(None, operands, text, "r" + ",f" * n + ",r,~{memory}", loc, ip, volatile=True)


def weight_registers(word: Uint32, scale_word: Uint32, odd: int, bias: Uint32):
    """One code word and its rows' scales -> the A fragment of one k16 step: 4 Uint32, weights * 2^-8 in bf16.

    Register 2 * p + h holds row r + 8 * h and k = 8 * p + 2 * c + {0, 1}; see layout.py.
    """
    pair = unpack_scales(scale_word, odd, bias)
    return tuple(multiply_by_half(register, pair, i % 2) for i, register in enumerate(unpack_word(word)))


@dsl_user_op
def load_words(address: Int32, count: int, *, loc=None, ip=None):
    """`count` (2 or 4) consecutive Uint32 from shared memory, in one access."""
    types = [T.i32()] * count
    registers = ", ".join(f"${i}" for i in range(count))
    text = f"ld.shared.v{count}.b32 {{{registers}}}, [${count}];"
    constraints = ",".join(["=r"] * count + ["r", "~{memory}"])
    struct = _asm(
        llvm.StructType.get_literal(types),
        [address.ir_value(loc=loc, ip=ip)],
        text,
        constraints,
        loc,
        ip,
        volatile=True,
    )
    return _fields(struct, types, Uint32, loc, ip)


@dsl_user_op
def copy_async(address: Int32, source: Int64, size: Int32, wanted, *, loc=None, ip=None):
    """cp.async of 16 bytes to shared memory, of which `size` (0 or 16) are read and the rest is zero, if `wanted`."""
    operands = [v.ir_value(loc=loc, ip=ip) for v in (address, source, size, Int32(wanted))]
    text = "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p cp.async.cg.shared.global [$0], [$1], 16, $2; }"
    _asm(None, operands, text, "r,l,r,r,~{memory}", loc, ip, volatile=True)


@dsl_user_op
def arrive_after_copies(barrier: Int32, *, loc=None, ip=None):
    """One of the arrivals `barrier` was initialized for, once this thread's `copy_async`s have landed."""
    operands = [barrier.ir_value(loc=loc, ip=ip)]
    text = "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];"
    _asm(None, operands, text, "r,~{memory}", loc, ip, volatile=True)


@dsl_user_op
def load_coherent(address: Int64, *, loc=None, ip=None):
    """Four Int32 from global memory past L1: for what a kernel before the previous one wrote."""
    types = [T.i32()] * 4
    text = "ld.relaxed.gpu.global.v4.b32 {$0, $1, $2, $3}, [$4];"
    operands = [address.ir_value(loc=loc, ip=ip)]
    struct = _asm(llvm.StructType.get_literal(types), operands, text, "=r,=r,=r,=r,l", loc, ip, volatile=True)
    return _fields(struct, types, Int32, loc, ip)


@cute.jit
def swiglu(gate: Float32, up: Float32, limit: Float32) -> Float32:
    """silu(min(gate, limit)) * clamp(up, -limit, limit); NaN stays NaN."""
    gate = cute.arch.fmin(gate, limit, nan=True)
    up = cute.arch.fmax(cute.arch.fmin(up, limit, nan=True), -limit, nan=True)
    return up * gate * cute.arch.rcp_approx(1.0 + cute.math.exp(-gate, fastmath=True))


@cute.jit
def store_output(mOut: cute.Tensor, m: Int32, n: Int32, value: Float32):
    """One element with bounds check, converted to the output's type."""
    if m < mOut.shape[0] and n < mOut.shape[1]:
        mOut[m, n] = value.to(mOut.element_type)


def smem_address(pointer: cute.Pointer) -> Int32:
    """Shared-memory pointer -> 32-bit address for the PTX above."""
    return Int32(pointer.toint())


@cute.jit
def tokens_view(mX: cute.Tensor, k: Int32):
    """x [M, groups * K] -> (M, K, groups), so that TMA fills with zeros beyond K instead of crossing groups."""
    k = cute.assume(k, divby=16)
    layout = cute.make_layout((mX.shape[0], k, mX.shape[1] // k), stride=(mX.stride[0], 1, k))
    return cute.make_tensor(mX.iterator, layout)


@cute.jit
def results_view(mOut: cute.Tensor):
    """out [M, N] whose rows are known to be whole 16-byte pieces, as TMA's strides have to be."""
    n = cute.assume(mOut.shape[1], divby=8)
    return cute.make_tensor(mOut.iterator, cute.make_layout((mOut.shape[0], n), stride=(n, 1)))


def block_view(packed: cute.Tensor, words: int):
    """[P, KB, words] -> (words, KB, P), the order of TMA's dimensions."""
    layout = cute.make_layout((words, packed.shape[1], packed.shape[0]), stride=(1, words, packed.stride[0]))
    return cute.make_tensor(packed.iterator, layout)


def expert_view(packed: cute.Tensor, words: int):
    """[E, P, KB, words] -> (words, KB, P, E), the order of TMA's dimensions."""
    layout = cute.make_layout(
        (words, packed.shape[2], packed.shape[1], packed.shape[0]),
        stride=(1, words, packed.stride[1], packed.stride[0]),
    )
    return cute.make_tensor(packed.iterator, layout)


def partition_loads(
    atom: cute.CopyAtom,
    shared: cute.Tensor,
    tiles: cute.Tensor,
    modes: int,
    member: int = 0,
    members: int = 1,
):
    """(shared by stage, global by tile) views of one TMA load whose box is the first `modes` modes."""
    return cpasync.tma_partition(
        atom,
        member,
        cute.make_layout(members),
        cute.group_modes(shared, 0, modes),
        cute.group_modes(tiles, 0, modes),
    )
