"""Workstation Blackwell's host path without the chip: what is launched, with kernels emulated in torch."""

import math

import pytest
import torch

from cutedsl_nvfp4 import family, reference
from cutedsl_nvfp4.family import Kernel, Layout
from cutedsl_nvfp4.format import padded_k, swizzle_scales, unswizzle_scales
from cutedsl_nvfp4.prepare import plain_experts, plain_linear, prepare_experts, prepare_linear
from cutedsl_nvfp4.sm120 import experts, linear
from cutedsl_nvfp4.sm120.tiles import LinearTile, shipped_expert_tiles
from tests.support.blackwell_experts import emulate


@pytest.fixture
def workstation(monkeypatch):
    """The CPU passes for an sm_120a device."""
    monkeypatch.setattr(family, "capability_of", lambda device: 120)


def quantize(x, act_scale=None, groups=1):
    """sm100.quantize.run in torch."""
    m, k = x.shape[0], x.shape[1] // groups
    act_scale = reference.dynamic_act_scale(x) if act_scale is None else act_scale
    codes, scales = reference.quantize(x.view(m, groups, k), act_scale.view(-1, 1, 1))
    codes = torch.nn.functional.pad(codes, (0, (padded_k(k) - k) // 2)).flatten(1)
    return codes, swizzle_scales(scales.transpose(0, 1).contiguous()).flatten(0, 1), act_scale


def dense(x, x_scales, act_scale, codes, scales, row_scale, bias, out, act_stride, groups, token_group, ctas):
    """DenseKernel's docstring in torch; `bias` has been told from none by the kernel's name."""
    assert ctas == 188 and act_stride == (act_scale.numel() > 1) and token_group >= 1
    m, n = out.shape
    k = codes.shape[1] * 2
    blocks = unswizzle_scales(x_scales.unflatten(0, (groups, -1)), m, k // 16)
    tokens = reference.dequantize(x.view(m, groups, -1).transpose(0, 1), blocks)
    blocks = unswizzle_scales(scales.unflatten(0, (groups, -1)), n // groups, k // 16)
    weight = reference.dequantize(codes.view(groups, n // groups, -1), blocks)
    sums = torch.bmm(tokens, weight.transpose(1, 2)).transpose(0, 1).reshape(m, n)
    sums = sums * row_scale * act_scale.view(-1, 1)
    out.copy_((sums + bias if bias is not None else sums).to(out.dtype))


@pytest.fixture
def launched(monkeypatch, workstation):
    """`linear.run` on CPU tensors; the names of the kernels it launched."""
    names = []

    def load(kernel):
        names.append(kernel.name)
        assert "_bias" in kernel.name or kernel.name in linear.shipped("sm_120a")

        def launch(*operands):
            operands = list(operands)
            operands[6] = operands[6] if kernel.has_bias else None
            dense(*operands)

        return launch

    monkeypatch.setattr(Kernel, "load", load)
    monkeypatch.setattr(linear.quantize, "run", quantize)
    monkeypatch.setattr(linear, "sm_count", lambda device: 188)
    return names


def prepared(random_weight, n, k, groups=1):
    codes, scales = random_weight(n, k, seed=n)
    row_scale = torch.tensor([0.01, 0.02])
    return prepare_linear(
        codes, scales, row_scale, [n // 2, n - n // 2], layout=Layout.BLOCK_SCALED, groups=groups
    )


@pytest.mark.parametrize("act_scale", [None, torch.tensor([0.02])], ids=["token", "tensor"])
@pytest.mark.parametrize(
    "m, n, k, groups, bias, dtype, ending",
    [
        (3, 256, 128, 1, None, torch.bfloat16, "_bf16"),
        (70, 264, 80, 1, None, torch.float32, "_f32"),
        (33, 4 * 40, 96, 4, None, torch.bfloat16, "_bf16"),
        (5, 100, 64, 1, None, torch.bfloat16, "_bf16_ragged"),
        (5, 100, 64, 1, torch.bfloat16, torch.float32, "_f32_bias"),
        (1, 50, 48, 1, torch.float32, torch.bfloat16, "_bf16_bias_ragged"),
    ],
)
def test_linear_is_the_reference(random_weight, launched, m, n, k, groups, bias, dtype, ending, act_scale):
    weight = prepared(random_weight, n, k, groups)
    x = torch.randn(m, groups * k, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    bias = None if bias is None else torch.linspace(-1, 1, n).to(bias)
    got = linear.run(
        x, weight.codes, weight.block_scales, weight.row_scale, act_scale, bias,
        n=n, k=k, groups=groups, out_dtype=dtype,
    )  # fmt: skip
    expected = reference.linear(
        x, *plain_linear(weight), weight.row_scale, act_scale, bias,
        quantize_activations=True, groups=groups, out_dtype=torch.float32,
    )  # fmt: skip
    assert got.dtype == dtype and (got - expected).norm() / expected.norm() < (
        1e-6 if dtype == torch.float32 else 3e-3
    )
    assert len(launched) == 1 and launched[0].endswith(ending) and launched[0] in linear.shipped("sm_120a")


def test_no_tokens_launch_nothing(random_weight, launched):
    weight = prepared(random_weight, 64, 64)
    x = torch.empty(0, 64, dtype=torch.bfloat16)
    out = linear.run(x, weight.codes, weight.block_scales, weight.row_scale, n=64, k=64)
    assert out.shape == (0, 64) and launched == []


def test_operands_that_do_not_fit_are_named(random_weight, launched):
    weight = prepared(random_weight, 64, 96)
    operands = {"codes": weight.codes, "block_scales": weight.block_scales, "row_scale": weight.row_scale}
    x = torch.zeros(2, 96, dtype=torch.bfloat16)
    for name, value, message in (
        ("x", x.float(), "x must be bf16"),
        ("codes", weight.codes[:, :-1], "codes must be contiguous uint8"),
        ("block_scales", weight.block_scales[:, :1], "block_scales must be contiguous uint8"),
        ("row_scale", weight.row_scale.double(), "row_scale must be contiguous f32"),
        ("bias", torch.zeros(3), "bias must be f32 or bf16"),
        ("out_dtype", torch.float16, "out_dtype must be"),
        ("k", 80, "x must be bf16"),
        ("groups", 3, "do not divide into 3 groups"),
        ("out", torch.zeros(2, 3), "out must be contiguous"),
    ):
        arguments = {"x": x, **operands, "n": 64, "k": 96} | {name: value}
        with pytest.raises(ValueError, match=message):
            linear.run(**arguments)


def test_another_device_is_refused(random_weight):
    weight = prepared(random_weight, 64, 64)
    with pytest.raises(ValueError, match="CUDA device, got cpu"):
        linear.run(
            torch.zeros(1, 64, dtype=torch.bfloat16), weight.codes, weight.block_scales, weight.row_scale, n=64, k=64
        )  # fmt: skip


# --- experts ---

SCALES = {
    "tensor": (torch.tensor([0.002]), torch.tensor([0.05])),
    "expert": (torch.linspace(0.001, 0.003, 5), torch.linspace(0.02, 0.08, 5)),
    "token": (None, None),
}


@pytest.mark.parametrize("tiles", shipped_expert_tiles(), ids=lambda tiles: str(tiles.tokens))
@pytest.mark.parametrize("policy", SCALES)
def test_experts_are_the_reference(random_weight, monkeypatch, policy, tiles):
    launched = emulate(monkeypatch, 120)
    w13, w2 = random_weight(5, 192, 256, seed=1), random_weight(5, 256, 96, seed=2)
    scales = torch.full((5, 2), 0.01), torch.full((5,), 0.02)
    weights = prepare_experts(*w13, scales[0], *w2, scales[1], layout=Layout.BLOCK_SCALED)
    generator = torch.Generator().manual_seed(3)
    m = {16: 9, 64: 100, 128: 300}[tiles.tokens]
    x = torch.randn(m, 256, generator=generator).to(torch.bfloat16)
    ids = torch.rand(m, 5, generator=generator).argsort(1)[:, :3].to(torch.int32)
    ids[0] = -1
    topk_weights = torch.rand(m, 3, generator=generator)
    operands = (
        weights.w13_codes, weights.w13_block_scales, weights.w13_row_scale,
        weights.w2_codes, weights.w2_block_scales, weights.w2_row_scale, topk_weights, ids, *SCALES[policy],
    )  # fmt: skip
    options = {"swiglu_limit": 7.0, "out_dtype": torch.float32}
    got = experts.run(x, *operands, hidden=256, intermediate=96, tiles=tiles, **options)
    plain = plain_experts(weights)
    expected = reference.experts(
        x, *plain[:2], weights.w13_row_scale, *plain[2:], weights.w2_row_scale, topk_weights, ids, *SCALES[policy],
        quantize_activations=True, **options,
    )  # fmt: skip
    assert got.isfinite().all() and not got[0].any()
    assert (got - expected).norm() / expected.norm() < 5e-3
    second = ["gather"] if SCALES[policy][1] is None else []
    assert [kind for kind, *_ in launched] == ["route", "gather", "product", *second, "product", "combine"]
    assert experts.run(x, *operands, hidden=256, intermediate=96, **options).shape == got.shape
    assert math.isclose(got.norm().item(), expected.norm().item(), rel_tol=1e-2)


def test_a_tile_of_one_panel_takes_no_w13():
    from cutedsl_nvfp4.sm120.experts_kernel import ExpertsKernel

    for tile, result in ((LinearTile(), "nvfp4"), (LinearTile(64, 256, 2, 4, 1, 2, 4, 2), "rows")):
        with pytest.raises(ValueError, match="w13 takes two panels"):
            ExpertsKernel(tile, result)
