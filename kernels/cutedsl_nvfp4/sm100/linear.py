"""NVFP4 W4A4 linear on data-centre Blackwell: quantizes the activations, chooses the tile, compiles and launches it.

out[m, n] = act_scale[m] * row_scale[n] * sum_k x'[m, g * K + k] * w[n, k] + bias[n],  g = n // (N / groups),
with x' = x rounded to NVFP4 without its global scale act_scale. Two kernels, the second started early.
"""

from collections.abc import Iterable
from functools import cache

import torch

from ..blackwell import quantize
from ..blackwell.quantize import arch_of, arch_of_name
from ..compiled import compiled
from ..format import check_k, padded_k
from ..support import sm_count
from .tiles import LinearTile, choose, chosen, shipped

__all__ = [
    "chosen",
    "kernel_names",
    "load",
    "run",
    "shipped_kernels",
    "variant",
]  # of every family of Blackwell's

TOKEN_GROUP = 2048  # tokens whose tiles run next to each other: they fit in L2 for every K in use
TYPE_NAMES = {torch.bfloat16: "bf16", torch.float32: "f32"}


def check_shapes(x, codes, block_scales, row_scale, bias, n, k, groups, out_dtype) -> None:
    """Raise ValueError unless the operands are those of `run`, of either family of Blackwell's."""
    check_k(k)
    if n % groups:
        raise ValueError(f"N = {n} rows do not divide into {groups} groups")
    scales_shape = (groups * -(-n // groups // 128), -(-k // 64), 32, 16)
    if x.dtype != torch.bfloat16 or x.dim() != 2 or x.shape[1] != groups * k:
        raise ValueError(f"x must be bf16 [M, {groups} * {k}], got {x.dtype} {tuple(x.shape)}")
    for name, tensor, dtype, shape in (
        ("codes", codes, torch.uint8, (n, padded_k(k) // 2)),
        ("block_scales", block_scales, torch.uint8, scales_shape),
        ("row_scale", row_scale, torch.float32, (n,)),
    ):
        if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {dtype} {shape} from prepare_linear for N = {n}, K = {k}, {groups} groups, "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
        if dtype is torch.uint8 and tensor.data_ptr() % 16:
            raise ValueError(f"{name} must start at a multiple of 16 bytes, got {tensor.data_ptr():#x}")
    if bias is not None and (bias.dtype not in TYPE_NAMES or bias.shape != (n,)):
        raise ValueError(f"bias must be f32 or bf16 [{n}], got {bias.dtype} {tuple(bias.shape)}")
    if out_dtype not in TYPE_NAMES:
        raise ValueError(f"out_dtype must be torch.bfloat16 or torch.float32, got {out_dtype}")


def run(
    x: torch.Tensor,  # bf16 [M, groups * K]
    codes: torch.Tensor,  # uint8 [N, K'/2], K' = K rounded up to 32
    scales: torch.Tensor,  # uint8 [groups * ceil(N/groups/128), ceil(K/64), 32, 16]
    row_scale: torch.Tensor,  # f32 [N]
    act_scale: torch.Tensor | None = None,  # f32 [1] or [M]; None: each token's own
    bias: torch.Tensor | None = None,  # f32 or bf16 [N]
    *,
    n: int,
    k: int,
    groups: int = 1,
    out_dtype: torch.dtype = torch.bfloat16,
    config: LinearTile | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """NVFP4 linear -> [M, N] of `out_dtype`, on torch's current stream.

    codes and scales come from `prepare_linear` for Layout.BLOCK_SCALED. They, row_scale and bias are read before
    the previous kernels on the stream have finished (programmatic dependent launch), so they must not be written
    by a kernel that lets its successor start early. `config` overrides the choice; `out` receives the result
    instead of new memory. Raises ValueError for operands that do not fit.
    """
    if x.device.type != "cuda" or codes.device != x.device:
        raise ValueError(f"x and codes must be on one CUDA device, got {x.device} and {codes.device}")
    check_shapes(x, codes, scales, row_scale, bias, n, k, groups, out_dtype)
    m = x.shape[0]
    if out is None:
        out = torch.empty((m, n), dtype=out_dtype, device=x.device)
    elif out.shape != (m, n) or out.dtype != out_dtype or not out.is_contiguous():
        raise ValueError(f"out must be contiguous {out_dtype} {(m, n)}, got {out.dtype} {tuple(out.shape)}")
    if m == 0 or n == 0:
        return out
    config = choose(n, k, m, groups) if config is None else config
    if not config.takes(m):
        raise ValueError(f"{config} takes at most {config.tokens} tokens, got {m}")
    arch = arch_of(x.device)
    kernel = compiled(kernel_name(config, out_dtype, arch), lambda: _compile(config, out_dtype, arch))
    x_codes, x_scales, act_scale = quantize.run(x, act_scale, groups)
    kernel(
        codes, scales, x_codes, x_scales, act_scale, row_scale, row_scale if bias is None else bias.float(), out,
        groups, int(act_scale.numel() > 1), float(bias is not None),
        max(1, TOKEN_GROUP // config.tokens), sm_count(x.device),
    )  # fmt: skip
    return out


@cache
def shipped_kernels(arch: str) -> dict[str, tuple]:
    """{name: arguments of compile.compile_linear} of every kernel `run` can ask for, but the quantizer's."""
    return {kernel_name(tile, dtype, arch): (tile, dtype, arch) for tile in shipped() for dtype in TYPE_NAMES}


@cache
def kernel_name(config: LinearTile, out_dtype: torch.dtype, arch: str) -> str:
    """The name a compiled tile has in `compiled` and in the ahead-of-time library."""
    numbers = "_".join(str(int(value)) for value in vars(config).values())
    return f"nvfp4_linear_{arch.replace('_', '')}_{numbers}_{TYPE_NAMES[out_dtype]}"


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
    arch = arch_of(device)
    return [quantize.kernel_name(dynamic, arch), *(kernel_name(tile, out_dtype, arch) for tile in tiles)]


def variant(name: str) -> tuple[LinearTile, torch.dtype, None, None]:
    """(tile, result type, whether with a bias, whether rows are aligned) of a kernel; None where it takes both."""
    tile, out_dtype, _ = shipped_kernels(arch_of_name(name))[name]
    return tile, out_dtype, None, None


def load(name: str):
    """The kernel called `name`, compiled or loaded now instead of at its first use."""
    return compiled(name, lambda: _compile(*shipped_kernels(arch_of_name(name))[name]))


def _compile(config: LinearTile, out_dtype: torch.dtype, arch: str):
    from .compile import compile_linear  # needs CuTe DSL, which ahead-of-time kernels do not

    return compile_linear(config, out_dtype, arch)
