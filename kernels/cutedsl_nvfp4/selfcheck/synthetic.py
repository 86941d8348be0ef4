"""Stage one of the self-check: every kernel on small random operands of its own."""

from collections.abc import Callable
from dataclasses import replace

import torch

from ..blackwell import quantize as quantize_kernel
from ..blackwell.quantize import plain_codes, plain_scales
from ..family import Family, Kernel, Layout, family_of_arch
from ..format import AMAX_PER_GLOBAL_SCALE, GROUP_SIZE, SCALE_DTYPE
from ..prepare import prepare_experts, prepare_linear
from ..reference import dynamic_act_scale, quantize
from .products import (
    STATIC_SIZE,
    ExpertsLayer,
    LinearLayer,
    Multiply,
    SelfCheckFailed,
    Variant,
    check_experts,
    check_product,
)

# (x, act_scale or None, groups) -> (codes, block scales, act scale)
Quantizer = Callable[
    [torch.Tensor, torch.Tensor | None, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]
]
CPU = torch.device("cpu")


def synthetic_linear(
    n: int,
    k: int,
    out_dtype: torch.dtype,
    has_bias: bool,
    device: torch.device,
    generator: torch.Generator,
    layout: Layout,
    groups: int = 1,
    act_scale: float | None = None,
) -> LinearLayer:
    """A layer of random operands: every code, scales from 2^-6 to 448 and zero, a global scale for each row."""
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randint(8, 127, (n, k // GROUP_SIZE), dtype=torch.uint8, generator=generator)
    scales[torch.rand(scales.shape, generator=generator) < 0.02] = 0
    global_scales = torch.rand(n, generator=generator) + 0.5
    operands = prepare_linear(
        codes.to(device), scales.view(SCALE_DTYPE).to(device), global_scales.to(device), [1] * n,
        layout=layout, groups=groups, name="synthetic",
    )  # fmt: skip
    bias = torch.randn(n, generator=generator).to(device) * 1000 if has_bias else None
    scale = None if act_scale is None else torch.tensor([act_scale], device=device)
    return LinearLayer("synthetic", operands, out_dtype, bias, scale)


def synthetic_experts(
    topk: int,
    device: torch.device,
    generator: torch.Generator,
    layout: Layout,
    static: bool = False,
) -> ExpertsLayer:
    """A layer of five local random experts, with ragged sizes; `static` gives its activations scales."""
    local, hidden, intermediate = (5, 272, 144) if layout is Layout.SM90 else (5, 288, 160)

    def random(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.randint(0, 256, (local, n, k // 2), dtype=torch.uint8, generator=generator)
        scales = torch.randint(
            0x20, 0x50, (local, n, k // GROUP_SIZE), dtype=torch.uint8, generator=generator
        )
        scales[torch.rand(scales.shape, generator=generator) < 0.02] = 0
        return codes.to(device), scales.to(device).view(SCALE_DTYPE)

    size = 0.1 / hidden**0.5  # brings gate and up near one, where SwiGLU bends
    operands = prepare_experts(
        *random(2 * intermediate, hidden), (torch.rand(local, 2, generator=generator).to(device) + 0.5) * size,
        *random(hidden, intermediate), torch.rand(local, generator=generator).to(device) + 0.5,
        layout=layout, name="synthetic",
    )  # fmt: skip
    expert_map = torch.full((max(8, topk),), -1, dtype=torch.int32, device=device)
    expert_map[:7] = torch.tensor([2, -1, 0, 4, -1, 1, 3], dtype=torch.int32, device=device)
    layer = ExpertsLayer("synthetic", operands, topk, len(expert_map), expert_map, 2.0)
    if not static:
        return layer
    # of x and of an intermediate of at most 2 * 2
    scales = torch.full((1,), 1 / STATIC_SIZE), torch.linspace(4, 8, local) / AMAX_PER_GLOBAL_SCALE
    return replace(layer, act_scale_13=scales[0].to(device), act_scale_2=scales[1].to(device))


def kernels(variant: Variant, topk: int) -> list[Kernel]:
    """The kernels that checking `variant` launches."""
    family = family_of_arch(variant.arch)
    if variant.operation == "experts":
        layer = synthetic_experts(topk, CPU, torch.Generator().manual_seed(0), family.layout, variant.static)
        return family.experts.kernels(layer.problem, family.experts.choices()[variant.name], variant.arch)
    found = family.quantizers(variant.arch)
    if variant.operation == "quantize":
        return [found[variant.name]]
    return [*found.values(), family.linear.shipped(variant.arch)[variant.name]]


def check_variant(variant: Variant, topk: int, device: torch.device, multiply: Multiply) -> float:
    """Run `variant` on small ragged problems -> worst error over its limit; raises SelfCheckFailed."""
    family = family_of_arch(variant.arch)
    if variant.operation == "quantize":
        return check_quantizer(family.quantizers(variant.arch)[variant.name].arguments[0], device)
    if variant.operation == "linear":
        return check_linear(family.linear.shipped(variant.arch)[variant.name], family, device, multiply)
    tiles = family.experts.choices()[variant.name]
    generator = torch.Generator().manual_seed(0)
    layer = synthetic_experts(topk, device, generator, family.layout, variant.static)
    return max(check_experts(layer, m, tiles, generator, multiply) for m in (1, 2 * tiles.tokens + 3))


# (N, K, groups, act_scale), none of them whole tiles: of kernels for W4A16, and for W4A4
W4A16_PROBLEMS = ((3 * 64 + 8, 17 * 64 + 16, 1, None), (5 * 64 + 8, 80, 1, None))
W4A4_PROBLEMS = ((3 * 128 + 72, 17 * 64 + 16, 1, None), (2 * 200, 80, 2, 0.01))


def check_linear(kernel: Kernel, family: Family, device: torch.device, multiply: Multiply) -> float:
    """A linear kernel on small ragged problems -> worst error over its limit."""
    tile, generator, worst = kernel.tile, torch.Generator().manual_seed(0), 0.0
    for n, k, groups, act_scale in W4A4_PROBLEMS if family.w4a4 else W4A16_PROBLEMS:
        has_bias = groups == 1 if kernel.has_bias is None else kernel.has_bias
        n += 3 * groups if kernel.aligned is False else 0
        layer = synthetic_linear(
            n, k, kernel.out_dtype, has_bias, device, generator, family.layout, groups, act_scale
        )
        most = 2 * tile.tokens + 3
        for m in (1, most if tile.takes(most) else tile.tokens - 3):
            worst = max(worst, check_product(layer, m, tile, generator, multiply))
    return worst


def check_quantizer(dynamic: bool, device: torch.device, quantizer: Quantizer = quantize_kernel.run) -> float:
    """A quantizing kernel against reference.quantize, bit for bit -> 0; raises SelfCheckFailed for one wrong bit."""
    generator = torch.Generator().manual_seed(0)
    for m, k, groups in ((1, 80, 1), (131, 1104, 1), (37, 4096, 2)):
        x = (torch.randn(m, groups * k, generator=generator) * 3).to(torch.bfloat16)
        x[:, :16], x[0, 16:32] = 0, -0.0
        if m > 2:
            x[1] = 0
            x[2] *= 1000
        scale = None if dynamic else torch.tensor([0.001])
        got = quantizer(x.to(device), None if dynamic else scale.to(device), groups)
        scale = dynamic_act_scale(x) if dynamic else scale
        codes, scales = quantize(x, scale.reshape(-1, 1))
        for what, ours, right in (
            ("act scale", got[2].cpu(), scale),
            ("code", plain_codes(got[0].cpu(), k, groups), codes),
            ("block scale", plain_scales(got[1].cpu(), m, k, groups), scales.view(torch.uint8)),
        ):
            wrong = (ours != right).nonzero()
            if len(wrong):
                at = wrong[0].tolist()
                raise SelfCheckFailed(
                    f"{len(wrong)} of {right.numel()} values differ from the reference's, the first is the {what} at "
                    f"{at} of x [{m}, {groups} * {k}]: {ours[tuple(at)].item()} instead of {right[tuple(at)].item()}"
                )
    return 0.0
