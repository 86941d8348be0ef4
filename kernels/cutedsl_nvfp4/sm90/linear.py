"""NVFP4 W4A16 linear on Hopper: chooses the tile, compiles it once, launches it.

out[m, n] = row_scale[n] * sum_k x[m, g * K + k] * w[n, k] + bias[n],  g = n // (N / groups)
"""

from functools import cache

import torch

from ..compiled import compiled
from ..support import sm_count
from .decode import SCALE_BIAS
from .layout import CODE_WORDS, SCALE_WORDS, packed_shape
from .tiles import PANEL_ROWS, LinearTile, NarrowTile, choose, general, shipped

TOKEN_GROUP = 2048  # tokens whose tiles run next to each other: they fit in L2 for every K in use
TYPE_NAMES = {torch.bfloat16: "bf16", torch.float32: "f32"}


def _check_shapes(x, codes, scales, row_scale, bias, n, k, groups, out_dtype) -> None:
    panels, blocks = groups * packed_shape(n // groups, k)[0], packed_shape(n, k)[1]
    if n % groups:
        raise ValueError(f"N = {n} rows do not divide into {groups} groups")
    if x.dtype != torch.bfloat16 or x.dim() != 2 or x.shape[1] != groups * k:
        raise ValueError(f"x must be bf16 [M, {groups} * {k}], got {x.dtype} {tuple(x.shape)}")
    if codes.dtype != torch.int64 or codes.shape != (panels, blocks, CODE_WORDS):
        raise ValueError(
            f"codes must be int64 {(panels, blocks, CODE_WORDS)} from prepare_linear for N = {n}, K = {k}, "
            f"{groups} groups, got {codes.dtype} {tuple(codes.shape)}"
        )
    if scales.dtype != torch.int32 or scales.shape != (panels, blocks, SCALE_WORDS):
        raise ValueError(
            f"scales must be int32 {(panels, blocks, SCALE_WORDS)} from prepare_linear for N = {n}, K = {k}, "
            f"{groups} groups, got {scales.dtype} {tuple(scales.shape)}"
        )
    if row_scale.dtype != torch.float32 or row_scale.shape != (n,):
        raise ValueError(f"row_scale must be f32 [{n}], got {row_scale.dtype} {tuple(row_scale.shape)}")
    if bias is not None and (bias.dtype not in TYPE_NAMES or bias.shape != (n,)):
        raise ValueError(f"bias must be f32 or bf16 [{n}], got {bias.dtype} {tuple(bias.shape)}")
    if out_dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"out_dtype must be torch.bfloat16 or torch.float32, got {out_dtype}")


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
    config: LinearTile | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """NVFP4 linear -> [M, N] of `out_dtype`, on torch's current stream.

    codes and scales come from `prepare_linear` for Layout.SM90. They, row_scale and bias are read before the
    previous kernel on the stream has finished (programmatic dependent launch), so they must not be written by
    a kernel that lets its successor start early. With `batch_invariant` a row's result does not depend on the
    other rows. `config` overrides the measured choice; `out` receives the result instead of new memory.
    Raises ValueError for operands that do not fit.
    """
    if x.device.type != "cuda" or codes.device != x.device:
        raise ValueError(f"x and codes must be on one CUDA device, got {x.device} and {codes.device}")
    _check_shapes(x, codes, scales, row_scale, bias, n, k, groups, out_dtype)
    m = x.shape[0]
    panels_per_group = codes.shape[0] // groups
    rows, padded = n // groups, panels_per_group * PANEL_ROWS
    if groups > 1 and rows != padded:  # compute the padding between groups too, and leave it out

        def spread(values: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(values.view(groups, rows), (0, padded - rows)).flatten()

        wide = run(
            x, codes, scales, spread(row_scale), None if bias is None else spread(bias), n=groups * padded, k=k,
            groups=groups, out_dtype=out_dtype, batch_invariant=batch_invariant, config=config,
        )  # fmt: skip
        narrow = wide.view(m, groups, padded)[:, :, :rows].reshape(m, n)
        return narrow if out is None else out.copy_(narrow)
    if out is None:
        out = torch.empty((m, n), dtype=out_dtype, device=x.device)
    elif out.shape != (m, n) or out.dtype != out_dtype or not out.is_contiguous():
        raise ValueError(f"out must be contiguous {out_dtype} {(m, n)}, got {out.dtype} {tuple(out.shape)}")
    if m == 0:
        return out
    if x.stride(1) != 1 or x.stride(0) % 8 or x.stride(0) < x.shape[1] or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)  # what TMA can address
    aligned_rows = n * out.element_size() % 16 == 0
    if config is None:
        config = choose(n, k, m, groups, batch_invariant, plain=bias is None and aligned_rows)
    bias = None if bias is None else bias.float()
    kernel = compiled(
        kernel_name(config, out_dtype, bias is not None, aligned_rows),
        lambda: _compile(config, out_dtype, bias is not None, aligned_rows),
    )
    numbers = (k, panels_per_group, SCALE_BIAS)
    if not isinstance(config, NarrowTile):
        if not config.fits_groups(panels_per_group, groups):
            raise ValueError(f"{config} would mix groups: a group has {panels_per_group} panels")
        numbers += (max(1, TOKEN_GROUP // config.tokens), sm_count(x.device) * config.ctas_per_sm)
    kernel(x, codes, scales, row_scale, row_scale if bias is None else bias, out, *numbers)
    return out


@cache
def shipped_kernels() -> dict[str, tuple]:
    """{name: arguments of compile.compile_linear} of every kernel `run` can ask for."""
    dtypes = (torch.bfloat16, torch.float32)
    variants = [(config, dtype, False, True) for config in shipped() for dtype in dtypes]
    variants += [
        (config, dtype, has_bias, aligned)
        for config in general()
        for dtype in dtypes
        for has_bias, aligned in ((True, True), (True, False), (False, False))
    ]
    return {kernel_name(*variant): variant for variant in variants}


def load(name: str):
    """The kernel called `name`, one of `shipped_kernels`, compiled or loaded now instead of at its first use."""
    return compiled(name, lambda: _compile(*shipped_kernels()[name]))


@cache
def kernel_name(config: LinearTile, out_dtype: torch.dtype, has_bias: bool, aligned_rows: bool) -> str:
    """The name a compiled configuration has in `compiled` and in the ahead-of-time library."""
    kind = "narrow" if isinstance(config, NarrowTile) else "wide"
    ending = ("_bias" if has_bias else "") + ("" if aligned_rows or kind == "narrow" else "_ragged")
    numbers = "_".join(str(int(value)) for value in vars(config).values())
    return f"nvfp4_linear_sm90_{kind}_{numbers}_{TYPE_NAMES[out_dtype]}{ending}"


def _compile(config: LinearTile, out_dtype: torch.dtype, has_bias: bool, aligned_rows: bool):
    from .compile import compile_linear  # needs CuTe DSL, which ahead-of-time kernels do not

    return compile_linear(config, out_dtype, has_bias, aligned_rows)
