"""NVFP4 W4A4 linear on workstation Blackwell: quantizes, chooses the tile, compiles it once, launches it.

out[m, n] = act_scale[m] * row_scale[n] * sum_k x'[m, g * K + k] * w[n, k] + bias[n],  g = n // (N / groups)

Keeps family.Linear.
"""

from functools import cache

import torch

from ..blackwell import quantize
from ..blackwell.linear import check_operands
from ..family import Kernel, LinearProblem, arch_of, sm_count
from ..operands import TYPE_NAMES, linear_result, linear_variants
from . import tiles
from .tiles import LinearTile

TOKEN_GROUP = 2048  # tokens whose tiles run next to each other: their codes fit in L2 for every K in use


def run(
    x: torch.Tensor,  # bf16 [M, groups * K]
    codes: torch.Tensor,  # uint8 [N, K' / 2], K' = K rounded up to 32
    block_scales: torch.Tensor,  # uint8 [groups * ceil(N / groups / 128), KB, 32, 16]
    row_scale: torch.Tensor,  # f32 [N]
    act_scale: torch.Tensor | None = None,  # f32 [1] or [M]; None: each token's own
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
    """NVFP4 W4A4 linear -> [M, N] of `out_dtype`, on torch's current stream; see reference.linear.

    codes and block_scales come from `prepare_linear` for Layout.BLOCK_SCALED. They, row_scale and bias are read
    before the previous kernel on the stream has finished (programmatic dependent launch), so they must not be
    written by a kernel that lets its successor start early. `tile` overrides the choice; `out` receives the result
    instead of new memory. Raises ValueError for operands that do not fit.
    """
    check_operands(x, codes, block_scales, row_scale, bias, n, k, groups, out_dtype, batch_invariant)
    m = x.shape[0]
    out = linear_result(out, m, n, out_dtype, x.device)
    if m == 0 or n == 0:
        return out
    aligned = n // groups * out.element_size() % 16 == 0 and out.data_ptr() % 16 == 0
    if tile is None:
        tile = tiles.choose(n, k, m, groups, plain=bias is None and aligned)
    launch = _kernel(tile, out_dtype, bias is not None, aligned, arch_of(x.device)).load()
    x_codes, x_scales, act_scale = quantize.run(x, act_scale, groups)
    launch(
        x_codes, x_scales, act_scale, codes, block_scales, row_scale, row_scale if bias is None else bias.float(),
        out, int(act_scale.numel() > 1), groups, max(1, TOKEN_GROUP // tile.tokens), sm_count(x.device),
    )  # fmt: skip
    return out


def chosen(problem: LinearProblem, max_tokens: int, batch_invariant: bool) -> dict[LinearTile, int]:
    """Every tile that `run` takes for 1 .. max_tokens tokens, each with the fewest tokens that take it."""
    plain = not problem.has_bias and _aligned(problem)
    return tiles.chosen(problem.n, problem.k, problem.groups, max_tokens, plain)


def kernels(problem: LinearProblem, tile: LinearTile, arch: str) -> list[Kernel]:
    """The kernels that `run` launches with `tile`: the quantizer and the product."""
    product = _kernel(tile, problem.out_dtype, problem.has_bias, _aligned(problem), arch)
    return [quantize.kernel(not problem.static, arch), product]


def _aligned(problem: LinearProblem) -> bool:
    return problem.n // problem.groups * problem.out_dtype.itemsize % 16 == 0


@cache
def shipped(arch: str) -> dict[str, Kernel]:
    """{name: kernel} of everything that `run` can ask for on `arch`, but for the quantizer."""
    variants = linear_variants(tiles.shipped(), tiles.general())
    return {kernel.name: kernel for kernel in (_kernel(*variant, arch) for variant in variants)}


@cache
def _kernel(tile: LinearTile, out_dtype: torch.dtype, has_bias: bool, aligned: bool, arch: str) -> Kernel:
    ending = ("_bias" if has_bias else "") + ("" if aligned else "_ragged")
    numbers = "_".join(str(value) for value in vars(tile).values())
    return Kernel(
        name=f"nvfp4_linear_{arch.replace('_', '')}_{numbers}_{TYPE_NAMES[out_dtype]}{ending}",
        module="sm120.compile",
        kind="linear",
        arguments=(tile, out_dtype, has_bias, aligned, arch),
        tile=tile,
        out_dtype=out_dtype,
        has_bias=has_bias,
        aligned=aligned,
    )
