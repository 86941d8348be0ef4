"""Compile the kernel of experts layers that is the same on every chip; needs no GPU."""

from collections.abc import Callable

import cutlass
import torch

from ..compiled import compile_kernel
from .fake_operands import CUTE_TYPE, integers, sizes, stream, tensor, vector
from .routing import Combine


def compile_combine(topk: int, out_dtype: torch.dtype, arch: str, options: str = "") -> Callable:
    """f(y [M * T, H], ids [M * T], expert map, weights [M * T], out, whether there is a map, local experts)."""
    m, pairs, global_experts, hidden = sizes(4)
    arguments = (
        tensor(cutlass.BFloat16, pairs, hidden),
        vector(cutlass.Int32, pairs),
        vector(cutlass.Int32, global_experts),
        vector(cutlass.Float32, pairs),
        tensor(CUTE_TYPE[out_dtype], m, hidden),
        *integers(2),
        stream(),
    )
    return compile_kernel(Combine(topk), *arguments, arch=arch, options=options)
