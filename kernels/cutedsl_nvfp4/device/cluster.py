"""Shared memory of the other CTAs of a cluster."""

from cutlass import Int32
from cutlass._mlir.extras import types as T
from cutlass.cutlass_dsl import dsl_user_op

from .ptx import asm


@dsl_user_op
def address_in_cluster(address: Int32, rank: Int32, *, loc=None, ip=None) -> Int32:
    """A shared-memory address of this CTA -> the same place in CTA `rank` of the cluster."""
    operands = [address.ir_value(loc=loc, ip=ip), Int32(rank).ir_value(loc=loc, ip=ip)]
    return Int32(asm(T.i32(), operands, "mapa.shared::cluster.u32 $0, $1, $2;", "=r,r,r", loc, ip))


@dsl_user_op
def store_in_cluster(address: Int32, values, *, loc=None, ip=None):
    """Two or four f32 to an address from `address_in_cluster`; visible after a cluster barrier."""
    n = len(values)
    operands = [v.ir_value(loc=loc, ip=ip) for v in (address, *values)]
    registers = ", ".join(f"${i + 1}" for i in range(n))
    text = f"st.shared::cluster.v{n}.f32 [$0], {{{registers}}};"
    asm(None, operands, text, "r" + ",f" * n + ",~{memory}", loc, ip, volatile=True)


@dsl_user_op
def store_word_in_cluster(address: Int32, value: Int32, *, loc=None, ip=None):
    """One int32 to an address from `address_in_cluster`; visible after a cluster barrier."""
    operands = [v.ir_value(loc=loc, ip=ip) for v in (address, value)]
    asm(None, operands, "st.shared::cluster.u32 [$0], $1;", "r,r,~{memory}", loc, ip, volatile=True)


@dsl_user_op
def signal_in_cluster(address: Int32, values, barrier: Int32, *, loc=None, ip=None):
    """store_in_cluster without a cluster barrier: `barrier`, in the same CTA, counts the bytes once they are there."""
    # .weak: only the barrier's wait orders the values, for whoever waits; complete_tx counts 4 n bytes
    n = len(values)
    operands = [v.ir_value(loc=loc, ip=ip) for v in (address, *values, barrier)]
    registers = ", ".join(f"${i + 1}" for i in range(n))
    text = f"st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v{n}.f32 [$0], {{{registers}}}, [${n + 1}];"
    asm(None, operands, text, "r" + ",f" * n + ",r,~{memory}", loc, ip, volatile=True)
