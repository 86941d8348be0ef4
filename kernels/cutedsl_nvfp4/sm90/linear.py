"""NVFP4 W4A16 linear on Hopper: chooses the tile, compiles it once, launches it.

out[m, n] = row_scale[n] * sum_k x[m, g * K + k] * w[n, k] + bias[n],  g = n // (N / groups)
"""

from collections.abc import Callable
from functools import cache

import cutlass
import cutlass.cute as cute
import torch
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from ..compiled import compile_kernel, compiled
from ..tiles import PANEL_ROWS, Config, Narrow, Wide, choose
from .decode import SCALE_BIAS
from .layout import CODE_WORDS, SCALE_WORDS, packed_shape
from .narrow import NarrowLinear
from .wide import WideLinear

ARCH = "sm_90a"
TOKEN_GROUP_ROWS = 2048  # tokens whose tiles run next to each other: they fit in L2 for every K in use
_CUTE_TYPE = {torch.bfloat16: cutlass.BFloat16, torch.float32: cutlass.Float32}


def compile_linear(
    config: Config,
    out_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
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
    bias = make_fake_compact_tensor(_CUTE_TYPE[bias_dtype or torch.float32], (n,), assumed_align=2)
    out = make_fake_compact_tensor(_CUTE_TYPE[out_dtype], (m, n), stride_order=(1, 0), assumed_align=16)
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    if isinstance(config, Narrow):
        kernel, numbers = NarrowLinear(config, bias_dtype is not None), 3
    else:
        kernel, numbers = WideLinear(config, bias_dtype is not None, aligned_rows), 5
    arguments = (x, codes, scales, row_scale, bias, out, *(cutlass.Int32(1),) * numbers, stream)
    return compile_kernel(kernel, *arguments, arch=ARCH, options=options)


def _check(x, codes, scales, row_scale, bias, n, k, groups, out_dtype) -> None:
    panels, blocks = packed_shape(n, k)
    if x.dtype != torch.bfloat16 or x.dim() != 2 or x.shape[1] != groups * k:
        raise ValueError(f"x must be bf16 [M, {groups} * {k}], got {x.dtype} {tuple(x.shape)}")
    if codes.dtype != torch.int64 or codes.shape != (panels, blocks, CODE_WORDS):
        raise ValueError(
            f"codes must be int64 {(panels, blocks, CODE_WORDS)} from pack_linear for N = {n}, K = {k}, "
            f"got {codes.dtype} {tuple(codes.shape)}"
        )
    if scales.dtype != torch.int32 or scales.shape != (panels, blocks, SCALE_WORDS):
        raise ValueError(
            f"scales must be int32 {(panels, blocks, SCALE_WORDS)} from pack_linear for N = {n}, K = {k}, "
            f"got {scales.dtype} {tuple(scales.shape)}"
        )
    if row_scale.dtype != torch.float32 or row_scale.shape != (n,):
        raise ValueError(f"row_scale must be f32 [{n}], got {row_scale.dtype} {tuple(row_scale.shape)}")
    if bias is not None and (bias.dtype not in _CUTE_TYPE or bias.shape != (n,)):
        raise ValueError(f"bias must be f32 or bf16 [{n}], got {bias.dtype} {tuple(bias.shape)}")
    if out_dtype not in _CUTE_TYPE:
        raise ValueError(f"out_dtype must be torch.bfloat16 or torch.float32, got {out_dtype}")
    if groups > 1 and (n % groups or n // groups % PANEL_ROWS):
        raise ValueError(
            f"N = {n} in {groups} groups: rows of a group must be a multiple of {PANEL_ROWS}, the rows of a "
            f"packed panel; run the groups one by one, or keep this layer unquantized"
        )


@cache
def _sm_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def run(
    x: torch.Tensor,  # bf16 [M, groups * K]
    codes: torch.Tensor,  # int64 [P, KB, 256]
    scales: torch.Tensor,  # int32 [P, KB, 64]
    row_scale: torch.Tensor,  # f32 [N]
    bias: torch.Tensor | None = None,  # f32 or bf16 [N]
    *,
    n: int,
    k: int,
    groups: int = 1,
    out_dtype: torch.dtype = torch.bfloat16,
    batch_invariant: bool = False,
    config: Config | None = None,
) -> torch.Tensor:
    """NVFP4 linear -> [M, N] of `out_dtype`, on torch's current stream.

    codes and scales come from `layout.pack_linear`. They, row_scale and bias are read before the previous
    kernel on the stream has finished (programmatic dependent launch), so they must not be written by a
    kernel that lets its successor start early. With `batch_invariant` a row's result does not depend on the
    other rows. `config` overrides the measured choice. Raises ValueError for operands that do not fit.
    """
    _check(x, codes, scales, row_scale, bias, n, k, groups, out_dtype)
    m = x.shape[0]
    out = torch.empty((m, n), dtype=out_dtype, device=x.device)
    if m == 0:
        return out
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.contiguous() if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
    panels_per_group = codes.shape[0] // groups
    if config is None:
        config = choose(n, k, m, groups, batch_invariant)
    aligned = n * out.element_size() % 16 == 0
    bias_dtype = None if bias is None else bias.dtype
    key = ("sm90_linear", config, out_dtype, bias_dtype, aligned or isinstance(config, Narrow))
    kernel = compiled(key, lambda: compile_linear(config, out_dtype, bias_dtype, key[-1]))
    numbers = (k, panels_per_group, SCALE_BIAS)
    if isinstance(config, Wide):
        if panels_per_group % config.panels and groups > 1:
            raise ValueError(f"{config} takes {config.panels} panels a tile, a group has {panels_per_group}")
        token_group = max(1, TOKEN_GROUP_ROWS // config.tokens)
        numbers += (token_group, _sm_count(x.device) * config.ctas_per_sm)
    kernel(x, codes, scales, row_scale, row_scale if bias is None else bias, out, *numbers)
    return out
