"""Fake tensors that kernels are compiled against: symbolic sizes, so that one kernel serves every M, N and K."""

import cutlass
import cutlass.cute as cute
import torch
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

CUTE_TYPE = {torch.bfloat16: cutlass.BFloat16, torch.float32: cutlass.Float32}


def sizes(count: int, divisibility: int = 1) -> tuple:
    """`count` symbolic sizes, each different from the others."""
    return tuple(cute.sym_int(divisibility=divisibility) for _ in range(count))


def tensor(element, *shape, align: int = 16) -> object:
    """A compact row-major tensor that starts at a multiple of `align` bytes."""
    order = tuple(reversed(range(len(shape))))
    return make_fake_compact_tensor(element, shape, stride_order=order, assumed_align=align)


def vector(element, length) -> object:
    """[length], aligned to its elements of four bytes."""
    return tensor(element, length, align=4)


def activations(m, k) -> object:
    """bf16 [m, k] whose rows start at multiples of 16 bytes, as TMA and 16-byte copies need them."""
    stride = (cute.sym_int64(divisibility=8), 1)
    return make_fake_tensor(cutlass.BFloat16, (m, k), stride, assumed_align=16)


def integers(count: int) -> tuple:
    """`count` int32 arguments."""
    return (cutlass.Int32(1),) * count


def stream() -> object:
    """torch's current stream, which the compiled function asks for itself."""
    return make_fake_stream(use_tvm_ffi_env_stream=True)
