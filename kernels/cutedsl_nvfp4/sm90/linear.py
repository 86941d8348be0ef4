"""NVFP4 W4A16 linear on Hopper: chooses the tile, compiles it once, launches it. Keeps family.Linear.

out[m, n] = row_scale[n] * sum_k x[m, g * K + k] * w[n, k] + bias[n],  g = n // (N / groups)
"""

from functools import cache

import torch

from ..family import Kernel, LinearProblem, arch_of, sm_count
from ..operands import TYPE_NAMES, addressable, check_vectors, linear_result, linear_variants
from . import tiles
from .decode import SCALE_BIAS
from .layout import CODE_WORDS, SCALE_WORDS, packed_shape
from .tiles import PANEL_ROWS, LinearTile, NarrowTile

TOKEN_GROUP = 2048  # tokens whose tiles run next to each other: they fit in L2 for every K in use


def _check_operands(x, codes, block_scales, row_scale, act_scale, bias, n, k, groups, out_dtype) -> None:
    if n % groups:
        raise ValueError(f"N = {n} rows do not divide into {groups} groups")
    panels, blocks = groups * packed_shape(n // groups, k)[0], packed_shape(n, k)[1]
    if act_scale is not None:
        raise ValueError("act_scale must be None: Hopper's kernels multiply bf16 activations (W4A16)")
    if x.dtype != torch.bfloat16 or x.dim() != 2 or x.shape[1] != groups * k:
        raise ValueError(f"x must be bf16 [M, {groups} * {k}], got {x.dtype} {tuple(x.shape)}")
    for name, tensor, dtype, words in (
        ("codes", codes, torch.int64, CODE_WORDS),
        ("block_scales", block_scales, torch.int32, SCALE_WORDS),
    ):
        if tensor.dtype != dtype or tensor.shape != (panels, blocks, words):
            raise ValueError(
                f"{name} must be {str(dtype).removeprefix('torch.')} {(panels, blocks, words)} from prepare_linear "
                f"for N = {n}, K = {k}, {groups} groups, got {tensor.dtype} {tuple(tensor.shape)}"
            )
    check_vectors(row_scale, bias, n, out_dtype)


def run(
    x: torch.Tensor,  # bf16 [M, groups * K]
    codes: torch.Tensor,  # int64 [P, KB, 256]
    block_scales: torch.Tensor,  # int32 [P, KB, 64]
    row_scale: torch.Tensor,  # f32 [N]
    act_scale: torch.Tensor | None = None,  # None: activations stay bf16
    bias: torch.Tensor | None = None,  # f32 or bf16 [N]
    *,
    n: int,
    k: int,
    groups: int = 1,
    out_dtype: torch.dtype = torch.bfloat16,
    batch_invariant: bool = False,
    tile: LinearTile | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """NVFP4 linear -> [M, N] of `out_dtype`, on torch's current stream.

    codes and block_scales come from `prepare_linear` for Layout.SM90. They, row_scale and bias are read before the
    previous kernel on the stream has finished (programmatic dependent launch), so they must not be written by
    a kernel that lets its successor start early. With `batch_invariant` a row's result does not depend on the
    other rows. `tile` overrides the measured choice; `out` receives the result instead of new memory.
    Raises ValueError for operands that do not fit.
    """
    arch_of(x.device)  # there is none but on a CUDA device
    if codes.device != x.device:
        raise ValueError(f"x and codes must be on one CUDA device, got {x.device} and {codes.device}")
    _check_operands(x, codes, block_scales, row_scale, act_scale, bias, n, k, groups, out_dtype)
    m = x.shape[0]
    panels_per_group = codes.shape[0] // groups
    rows, padded = n // groups, panels_per_group * PANEL_ROWS
    if groups > 1 and rows != padded:  # compute the padding between groups too, and leave it out

        def spread(values: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(values.view(groups, rows), (0, padded - rows)).flatten()

        wide = run(
            x, codes, block_scales, spread(row_scale), None, None if bias is None else spread(bias),
            n=groups * padded, k=k, groups=groups, out_dtype=out_dtype, batch_invariant=batch_invariant, tile=tile,
        )  # fmt: skip
        narrow = wide.view(m, groups, padded)[:, :, :rows].reshape(m, n)
        return narrow if out is None else out.copy_(narrow)
    out = linear_result(out, m, n, out_dtype, x.device)
    if m == 0:
        return out
    x = addressable(x)
    aligned = n * out.element_size() % 16 == 0
    if tile is None:
        tile = tiles.choose(n, k, m, groups, batch_invariant, plain=bias is None and aligned)
    bias = None if bias is None else bias.float()
    numbers = (k, panels_per_group, SCALE_BIAS)
    if not isinstance(tile, NarrowTile):
        if not tile.fits_groups(panels_per_group, groups):
            raise ValueError(f"{tile} would mix groups: a group has {panels_per_group} panels")
        numbers += (max(1, TOKEN_GROUP // tile.tokens), sm_count(x.device) * tile.ctas_per_sm)
    launch = _kernel(tile, out_dtype, bias is not None, aligned).load()
    launch(x, codes, block_scales, row_scale, row_scale if bias is None else bias, out, *numbers)
    return out


def chosen(problem: LinearProblem, max_tokens: int, batch_invariant: bool) -> dict[LinearTile, int]:
    """Every tile that `run` takes for 1 .. max_tokens tokens, each with the fewest tokens that take it."""
    n = _padded_n(problem)
    plain = not problem.has_bias and n * problem.out_dtype.itemsize % 16 == 0
    return tiles.chosen(n, problem.k, problem.groups, max_tokens, batch_invariant, plain)


def kernels(problem: LinearProblem, tile: LinearTile, arch: str) -> list[Kernel]:
    """The kernel that `run` launches with `tile`."""
    aligned = _padded_n(problem) * problem.out_dtype.itemsize % 16 == 0
    return [_kernel(tile, problem.out_dtype, problem.has_bias, aligned)]


def _padded_n(problem: LinearProblem) -> int:
    """Rows as the kernel sees them: with the padding between groups."""
    if problem.groups == 1:
        return problem.n
    return -(-problem.n // problem.groups // PANEL_ROWS) * PANEL_ROWS * problem.groups


@cache
def shipped(arch: str) -> dict[str, Kernel]:
    """{name: kernel} of everything that `run` can ask for."""
    variants = linear_variants(tiles.shipped(), tiles.general())
    return {kernel.name: kernel for kernel in (_kernel(*variant) for variant in variants)}


@cache
def _kernel(tile: LinearTile, out_dtype: torch.dtype, has_bias: bool, aligned: bool) -> Kernel:
    kind = "narrow" if isinstance(tile, NarrowTile) else "wide"
    ending = ("_bias" if has_bias else "") + ("" if aligned or kind == "narrow" else "_ragged")
    numbers = "_".join(str(int(value)) for value in vars(tile).values())
    return Kernel(
        name=f"nvfp4_linear_sm90_{kind}_{numbers}_{TYPE_NAMES[out_dtype]}{ending}",
        module="sm90.compile",
        kind="linear",
        arguments=(tile, out_dtype, has_bias, aligned),
        tile=tile,
        out_dtype=out_dtype,
        has_bias=has_bias,
        aligned=aligned,
    )
