"""Compile one Hopper linear kernel; needs no GPU."""

from collections.abc import Callable

import cutlass
import cutlass.cute as cute
import torch
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from ..compiled import compile_kernel
from ..tiles import Config, Narrow
from .layout import CODE_WORDS, SCALE_WORDS
from .narrow import NarrowLinear
from .wide import WideLinear

ARCH = "sm_90a"
_CUTE_TYPE = {torch.bfloat16: cutlass.BFloat16, torch.float32: cutlass.Float32}


def compile_linear(
    config: Config,
    out_dtype: torch.dtype,
    has_bias: bool = False,
    aligned_rows: bool = True,
    options: str = "",
) -> Callable:
    """Compile one configuration for sm_90a; needs no GPU.

    The result is called as f(x, codes, scales, row_scale, bias, out, k, panels per group, SCALE_BIAS), for
    Wide followed by (token tiles per group, most CTAs). Without a bias any f32 [N] tensor stands in for it.
    """
    m, n, k_all, panels, blocks = (cute.sym_int() for _ in range(5))
    x = make_fake_tensor(cutlass.BFloat16, (m, k_all), (cute.sym_int64(divisibility=8), 1), assumed_align=16)
    codes = make_fake_compact_tensor(
        cutlass.Int64, (panels, blocks, CODE_WORDS), stride_order=(2, 1, 0), assumed_align=16
    )
    scales = make_fake_compact_tensor(
        cutlass.Int32, (panels, blocks, SCALE_WORDS), stride_order=(2, 1, 0), assumed_align=16
    )
    row_scale = make_fake_compact_tensor(cutlass.Float32, (n,), assumed_align=4)
    bias = make_fake_compact_tensor(cutlass.Float32, (n,), assumed_align=4)
    out = make_fake_compact_tensor(_CUTE_TYPE[out_dtype], (m, n), stride_order=(1, 0), assumed_align=16)
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    if isinstance(config, Narrow):
        kernel, numbers = NarrowLinear(config, has_bias), 3
    else:
        kernel, numbers = WideLinear(config, has_bias, aligned_rows), 5
    arguments = (x, codes, scales, row_scale, bias, out, *(cutlass.Int32(1),) * numbers, stream)
    return compile_kernel(kernel, *arguments, arch=ARCH, options=options)
