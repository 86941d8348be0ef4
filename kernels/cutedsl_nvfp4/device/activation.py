"""SwiGLU, as every experts kernel applies it to a gate and an up value."""

import cutlass.cute as cute
from cutlass import Float32


@cute.jit
def swiglu(gate: Float32, up: Float32, limit: Float32) -> Float32:
    """silu(min(gate, limit)) * clamp(up, -limit, limit); NaN stays NaN."""
    # With nan=True, because PTX's min and max otherwise turn a NaN into the limit, and hide it.
    gate = cute.arch.fmin(gate, limit, nan=True)
    up = cute.arch.fmax(cute.arch.fmin(up, limit, nan=True), -limit, nan=True)
    return up * gate * cute.arch.rcp_approx(1.0 + cute.math.exp(-gate, fastmath=True))
