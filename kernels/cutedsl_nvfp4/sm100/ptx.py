"""PTX of the sm_100 kernels that CuTe DSL does not expose."""

from cutlass import Float32, Int32
from cutlass.cutlass_dsl import dsl_user_op

from ..device.ptx import asm


@dsl_user_op
def fence_after_wait(*, loc=None, ip=None):
    """Orders tcgen05 operations after a wait for a barrier that other threads' tcgen05 operations led to."""
    asm(None, [], "tcgen05.fence::after_thread_sync;", "~{memory}", loc, ip, volatile=True)


@dsl_user_op
def fence_before_arrive(*, loc=None, ip=None):
    """Orders tcgen05 operations before an arrival that other threads' tcgen05 operations wait for."""
    asm(None, [], "tcgen05.fence::before_thread_sync;", "~{memory}", loc, ip, volatile=True)


@dsl_user_op
def store_bf16(address: Int32, value: Float32, *, loc=None, ip=None):
    """One f32, rounded to bf16, to shared memory."""
    operands = [v.ir_value(loc=loc, ip=ip) for v in (address, value)]
    text = "{ .reg .b16 half; cvt.rn.bf16.f32 half, $1; st.shared.b16 [$0], half; }"
    asm(None, operands, text, "r,f,~{memory}", loc, ip, volatile=True)
