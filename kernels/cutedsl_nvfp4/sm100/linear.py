"""NVFP4 W4A4 linear on data-centre Blackwell: quantizes the activations, chooses the tile, compiles and launches it.

out[m, n] = act_scale[m] * row_scale[n] * sum_k x'[m, g * K + k] * w[n, k] + bias[n],  g = n // (N / groups),
with x' = x rounded to NVFP4 without its global scale act_scale. Two kernels, the second started early. Keeps
family.Linear.
"""

from functools import cache

import torch

from ..blackwell import quantize
from ..blackwell.linear import check_operands
from ..family import Kernel, LinearProblem, arch_of, sm_count
from ..operands import TYPE_NAMES, linear_result
from . import tiles
from .tiles import LinearTile

TOKEN_GROUP = 2048  # tokens whose tiles run next to each other: they fit in L2 for every K in use


def run(
    x: torch.Tensor,  # bf16 [M, groups * K]
    codes: torch.Tensor,  # uint8 [N, K'/2], K' = K rounded up to 32
    block_scales: torch.Tensor,  # uint8 [groups * ceil(N/groups/128), ceil(K/64), 32, 16]
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
    """NVFP4 linear -> [M, N] of `out_dtype`, on torch's current stream.

    codes and block_scales come from `prepare_linear` for Layout.BLOCK_SCALED. They, row_scale and bias are read before
    the previous kernels on the stream have finished (programmatic dependent launch), so they must not be written
    by a kernel that lets its successor start early. `tile` overrides the choice; `out` receives the result
    instead of new memory. Raises ValueError for operands that do not fit.
    """
    check_operands(x, codes, block_scales, row_scale, bias, n, k, groups, out_dtype, batch_invariant)
    m = x.shape[0]
    out = linear_result(out, m, n, out_dtype, x.device)
    if m == 0 or n == 0:
        return out
    tile = tiles.choose(n, k, m, groups) if tile is None else tile
    if not tile.takes(m):
        raise ValueError(f"{tile} takes at most {tile.tokens} tokens, got {m}")
    launch = _kernel(tile, out_dtype, arch_of(x.device)).load()
    x_codes, x_scales, act_scale = quantize.run(x, act_scale, groups)
    launch(
        codes, block_scales, x_codes, x_scales, act_scale, row_scale, row_scale if bias is None else bias.float(),
        out, groups, int(act_scale.numel() > 1), float(bias is not None),
        max(1, TOKEN_GROUP // tile.tokens), sm_count(x.device),
    )  # fmt: skip
    return out


def chosen(problem: LinearProblem, max_tokens: int, batch_invariant: bool) -> dict[LinearTile, int]:
    """Every tile that `run` takes for 1 .. max_tokens tokens, each with the fewest tokens that take it."""
    return tiles.chosen(problem.n, problem.k, problem.groups, max_tokens)


def kernels(problem: LinearProblem, tile: LinearTile, arch: str) -> list[Kernel]:
    """The kernels that `run` launches with `tile`: the quantizer and the product."""
    return [quantize.kernel(not problem.static, arch), _kernel(tile, problem.out_dtype, arch)]


@cache
def shipped(arch: str) -> dict[str, Kernel]:
    """{name: kernel} of everything that `run` can ask for on `arch`, but for the quantizer."""
    found = (_kernel(tile, dtype, arch) for tile in tiles.shipped() for dtype in TYPE_NAMES)
    return {kernel.name: kernel for kernel in found}


@cache
def _kernel(tile: LinearTile, out_dtype: torch.dtype, arch: str) -> Kernel:
    numbers = "_".join(str(value) for value in vars(tile).values())
    name = f"nvfp4_linear_{arch.replace('_', '')}_{numbers}_{TYPE_NAMES[out_dtype]}"
    return Kernel(name, "sm100.compile", "linear", (tile, out_dtype, arch), tile, out_dtype)
