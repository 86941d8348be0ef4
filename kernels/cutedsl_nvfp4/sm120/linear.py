"""NVFP4 W4A4 linear on workstation Blackwell: quantizes, chooses the tile, compiles it once, launches it.

out[m, n] = act_scale[m] * row_scale[n] * sum_k x'[m, g * K + k] * w[n, k] + bias[n],  g = n // (N / groups)
"""

from collections.abc import Callable, Iterable
from functools import cache

import torch

from ..blackwell import quantize
from ..blackwell.quantize import arch_of, arch_of_name
from ..compiled import compiled
from ..sm100.linear import TYPE_NAMES, check_shapes
from ..support import sm_count
from .tiles import LinearTile, choose, chosen, general, shipped

__all__ = [
    "chosen",
    "kernel_names",
    "load",
    "run",
    "shipped_kernels",
    "variant",
]  # of every family of Blackwell's

TOKEN_GROUP = 2048  # tokens whose tiles run next to each other: their codes fit in L2 for every K in use


def run(
    x: torch.Tensor,  # bf16 [M, groups * K]
    codes: torch.Tensor,  # uint8 [N, K' / 2], K' = K rounded up to 32
    block_scales: torch.Tensor,  # uint8 [groups * P, KB, 32, 16]
    row_scale: torch.Tensor,  # f32 [N]
    act_scale: torch.Tensor | None = None,  # f32 [1] or [M]; None: per token
    bias: torch.Tensor | None = None,  # f32 or bf16 [N]
    *,
    n: int,
    k: int,
    groups: int = 1,
    out_dtype: torch.dtype = torch.bfloat16,
    config: LinearTile | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """NVFP4 W4A4 linear -> [M, N] of `out_dtype`, on torch's current stream; see reference.linear.

    codes and block_scales come from `prepare_linear` for Layout.BLOCK_SCALED. They, row_scale and bias are read
    before the previous kernel on the stream has finished (programmatic dependent launch), so they must not be
    written by a kernel that lets its successor start early. `config` overrides the choice; `out` receives the result
    instead of new memory. Raises ValueError for operands that do not fit.
    """
    arch = arch_of(x.device)
    if any(t.device != x.device for t in (codes, block_scales, row_scale)):
        raise ValueError(
            f"x and weights must be on one CUDA device, x is on {x.device}, codes on {codes.device}"
        )
    check_shapes(x, codes, block_scales, row_scale, bias, n, k, groups, out_dtype)
    m = x.shape[0]
    if out is None:
        out = torch.empty((m, n), dtype=out_dtype, device=x.device)
    elif out.shape != (m, n) or out.dtype != out_dtype or not out.is_contiguous():
        raise ValueError(f"out must be contiguous {out_dtype} {(m, n)}, got {out.dtype} {tuple(out.shape)}")
    if m == 0 or n == 0:
        return out
    aligned_rows = n // groups * out.element_size() % 16 == 0 and out.data_ptr() % 16 == 0
    if config is None:
        config = choose(n, k, m, groups, plain=bias is None and aligned_rows)
    kind = (config, out_dtype, bias is not None, aligned_rows, arch)
    kernel = compiled(kernel_name(*kind), lambda: _compile(*kind))
    x_codes, x_scales, act_scale = quantize.run(x, act_scale, groups)
    kernel(
        x_codes, x_scales, act_scale, codes, block_scales, row_scale, row_scale if bias is None else bias.float(), out,
        int(act_scale.numel() > 1), groups, max(1, TOKEN_GROUP // config.tokens), sm_count(x.device),
    )  # fmt: skip
    return out


@cache
def shipped_kernels(arch: str) -> dict[str, tuple]:
    """{name: arguments of compile.compile_linear} of every kernel `run` can ask for, but the quantizer's."""
    variants = [(tile, dtype, False, True, arch) for tile in shipped() for dtype in TYPE_NAMES]
    variants += [
        (tile, dtype, has_bias, aligned, arch)
        for tile in general()
        for dtype in TYPE_NAMES
        for has_bias, aligned in ((True, True), (True, False), (False, False))
    ]
    return {kernel_name(*variant): variant for variant in variants}


@cache
def kernel_name(
    tile: LinearTile, out_dtype: torch.dtype, has_bias: bool, aligned_rows: bool, arch: str
) -> str:
    """The name a compiled tile has in `compiled` and in the ahead-of-time library."""
    ending = ("_bias" if has_bias else "") + ("" if aligned_rows else "_ragged")
    numbers = "_".join(str(value) for value in vars(tile).values())
    return f"nvfp4_linear_{arch.replace('_', '')}_{numbers}_{TYPE_NAMES[out_dtype]}{ending}"


def kernel_names(
    tiles: Iterable[LinearTile],
    n: int,
    groups: int,
    out_dtype: torch.dtype,
    has_bias: bool,
    dynamic: bool,
    device: torch.device,
) -> list[str]:
    """Names of the kernels that `run` launches with `tiles`; the quantizer's first."""
    arch, aligned = arch_of(device), n // groups * out_dtype.itemsize % 16 == 0
    names = [kernel_name(tile, out_dtype, has_bias, aligned, arch) for tile in tiles]
    return [quantize.kernel_name(dynamic, arch), *names]


def variant(name: str) -> tuple[LinearTile, torch.dtype, bool, bool]:
    """(tile, result type, whether with a bias, whether rows are aligned) of a kernel."""
    return shipped_kernels(arch_of_name(name))[name][:4]


def load(name: str) -> Callable:
    """The kernel called `name`, one of `shipped_kernels`, compiled or loaded now instead of at its first use."""
    return compiled(name, lambda: _compile(*shipped_kernels(arch_of_name(name))[name]))


def _compile(*variant) -> Callable:
    from .compile import compile_linear  # needs CuTe DSL, which ahead-of-time kernels do not

    return compile_linear(*variant)
