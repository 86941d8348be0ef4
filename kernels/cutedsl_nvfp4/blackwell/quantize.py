"""Activations to NVFP4 on Blackwell: compiles the kernel once, launches it.

x [M, groups * K] -> codes, block scales in 128x4 tiles, and the scale of each token. See quantize_kernel.py.
"""

from functools import cache

import torch

from ..family import Kernel, arch_of
from ..format import GROUP_SIZE, padded_k, unswizzle_scales
from ..operands import addressable


def quantized_shapes(m: int, k: int, groups: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the codes and the block scales of x [m, groups * k]."""
    return (m, groups * padded_k(k) // 2), (groups * -(-m // 128), -(-k // 64), 32, 16)


def plain_codes(codes: torch.Tensor, k: int, groups: int = 1) -> torch.Tensor:
    """What `run` wrote -> uint8 [M, groups * K/2], as reference.quantize gives it."""
    return codes.unflatten(1, (groups, -1))[:, :, : k // 2].flatten(1)


def plain_scales(scales: torch.Tensor, m: int, k: int, groups: int = 1) -> torch.Tensor:
    """What `run` wrote -> uint8 [M, groups * K/16], the bits reference.quantize gives."""
    plain = unswizzle_scales(scales.unflatten(0, (groups, -1)), m, k // GROUP_SIZE)
    return plain.view(torch.uint8).transpose(0, 1).flatten(1)


def run(
    x: torch.Tensor,  # bf16 [M, groups * K]
    act_scale: torch.Tensor | None = None,  # f32 [1] or [M]; None: each token's own
    groups: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x -> (codes uint8, block scales uint8, see `quantized_shapes`; act scale f32 [1] or [M]), on torch's stream.

    Bits are reference.quantize's. Block scales of tokens beyond M are not written. Raises ValueError for operands
    that do not fit.
    """
    if x.dtype != torch.bfloat16 or x.dim() != 2 or x.shape[1] % (groups * GROUP_SIZE):
        raise ValueError(
            f"x must be bf16 [M, {groups} * K] with K a multiple of {GROUP_SIZE}, got {x.dtype} {tuple(x.shape)}"
        )
    m, k = x.shape[0], x.shape[1] // groups
    dynamic = act_scale is None
    if dynamic:
        act_scale = torch.empty(m, dtype=torch.float32, device=x.device)
    elif act_scale.dtype != torch.float32 or act_scale.shape not in ((1,), (m,)):
        raise ValueError(
            f"act_scale must be f32 [1] or [{m}], got {act_scale.dtype} {tuple(act_scale.shape)}"
        )
    shapes = quantized_shapes(m, k, groups)
    codes, scales = (torch.empty(shape, dtype=torch.uint8, device=x.device) for shape in shapes)
    if m == 0:
        return codes, scales, act_scale
    launch = kernel(dynamic, arch_of(x.device)).load()
    launch(addressable(x), act_scale, codes, scales, groups, k, int(act_scale.numel() > 1))
    return codes, scales, act_scale


def shipped(arch: str) -> dict[str, Kernel]:
    """{name: kernel} of everything that `run` can ask for."""
    return {found.name: found for found in (kernel(dynamic, arch) for dynamic in (False, True))}


@cache
def kernel(dynamic: bool, arch: str) -> Kernel:
    """The kernel that rounds with each token's own scale (`dynamic`), or with scales that are known."""
    name = f"nvfp4_quantize_{arch.replace('_', '')}_{'dynamic' if dynamic else 'static'}"
    return Kernel(name, "blackwell.compile", "quantize", (dynamic, arch))
