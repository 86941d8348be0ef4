"""The self-check of Blackwell's kernels on the CPU: it passes the reference's products and names what is planted."""

import dataclasses

import pytest
import torch

from cutedsl_nvfp4 import family, reference
from cutedsl_nvfp4.blackwell import quantize
from cutedsl_nvfp4.family import Layout
from cutedsl_nvfp4.format import padded_k, swizzle_scales
from cutedsl_nvfp4.prepare import plain_experts, plain_linear, prepare_experts, prepare_linear
from cutedsl_nvfp4.selfcheck.products import (
    ExpertsLayer,
    LinearLayer,
    SelfCheckFailed,
    Variant,
    check_product,
)
from cutedsl_nvfp4.selfcheck.report import Report, check_layers
from cutedsl_nvfp4.selfcheck.synthetic import check_quantizer, check_variant
from cutedsl_nvfp4.sm100 import linear, tiles
from cutedsl_nvfp4.sm120 import linear as sm120_linear
from tests.support.faults.kernel import PLANTED, emulated

ARCH = "sm_100a"
NAME = "model.layers.3.attn.wo_b"


@pytest.fixture(autouse=True)
def on_a_b200(monkeypatch):
    monkeypatch.setattr(family, "capability_of", lambda device: 100)


def layer(random_weight, n=200, k=144, groups=1, out_dtype=torch.bfloat16, act_scale=None, bias=None):
    operands = prepare_linear(
        *random_weight(n, k), torch.tensor([0.5, 0.002]), [n // 4, n - n // 4],
        layout=Layout.BLOCK_SCALED, groups=groups,
    )  # fmt: skip
    scale = None if act_scale is None else torch.tensor([act_scale])
    return LinearLayer(NAME, operands, out_dtype, bias, scale)


def quantized(x, act_scale, groups):
    """sm100.quantize.run's results, by the reference."""
    scale = reference.dynamic_act_scale(x) if act_scale is None else act_scale
    codes, scales = reference.quantize(x, scale.reshape(-1, 1))
    k = x.shape[1] // groups
    codes = codes.unflatten(1, (groups, k // 2))
    codes = torch.nn.functional.pad(codes, (0, padded_k(k) // 2 - k // 2)).flatten(1)
    return codes, swizzle_scales(scales.unflatten(1, (groups, -1)).transpose(0, 1)).flatten(0, 1), scale


# --- products ---


@pytest.mark.parametrize("act_scale", [None, 0.03], ids=["dynamic", "static"])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("n, k, groups", [(200, 144, 1), (64, 64, 1), (96, 80, 2), (1280, 64, 2)])
def test_right_products_pass(random_weight, n, k, groups, out_dtype, act_scale):
    """Ragged rows and K, padding between groups, more panels and tokens than are compared."""
    report = Report()
    checked = layer(random_weight, n, k, groups, out_dtype, act_scale)
    check_layers([checked], 256, False, report, emulated)
    assert report.layers == 1 and report.products == len(checked.tiles(256, False)) > 1
    assert 0 < report.worst_error <= 1


@pytest.mark.parametrize("act_scale", [None, 0.03], ids=["dynamic", "static"])
@pytest.mark.parametrize("fault", PLANTED)
def test_planted_fault_is_caught_and_named(random_weight, fault, act_scale):
    checked = layer(random_weight, act_scale=act_scale)
    with pytest.raises(SelfCheckFailed) as failed:
        check_layers([checked], 64, False, Report(), PLANTED[fault])
    assert str(failed.value).startswith(f"{NAME} (N = 200, K = 144, groups = 1, torch.bfloat16, M = ")
    assert ("not written" if fault == "dropped_tile" else "relative error") in str(failed.value)


def inverted_act_scale(inputs, checked, tile, out):
    """The activations' scale divides where it should multiply."""
    emulated(inputs, checked, tile, out)
    out.mul_(checked.act_scale.reciprocal().square())


def unquantized(inputs, checked, tile, out):
    """W4A16 where W4A4 was asked for."""
    operands = checked.operands
    scales = plain_linear(operands)
    out.copy_(reference.linear(*inputs, *scales, operands.row_scale, bias=checked.bias))


def next_token(inputs, checked, tile, out):
    """Every token gets its neighbour's activations."""
    emulated((inputs[0].roll(1, 0),), checked, tile, out)


@pytest.mark.parametrize("fault", [inverted_act_scale, unquantized, next_token])
def test_faults_of_the_activations_are_caught(random_weight, fault):
    checked = layer(random_weight, act_scale=0.03)
    tile = tiles.choose(200, 144, 40)
    generator = torch.Generator().manual_seed(0)
    assert check_product(checked, 40, tile, generator, emulated) <= 1
    with pytest.raises(SelfCheckFailed, match="relative error"):
        check_product(checked, 40, tile, generator, fault)


def test_bias_is_part_of_the_product(random_weight):
    checked = layer(random_weight, bias=torch.full((200,), 50.0))
    without = dataclasses.replace(checked, bias=None)
    generator = torch.Generator().manual_seed(0)
    (tile,) = checked.tiles(1, False)
    assert check_product(checked, 1, tile, generator, emulated) <= 1
    with pytest.raises(SelfCheckFailed, match="relative error"):
        check_product(
            checked, 1, tile, generator, lambda inputs, _, tile, out: emulated(inputs, without, tile, out)
        )


# --- experts ---


def experts_layer(random_weight, policy="dynamic", hidden=128, intermediate=64) -> ExpertsLayer:
    operands = prepare_experts(
        *random_weight(8, 2 * intermediate, hidden), torch.full((8, 2), 0.01),
        *random_weight(8, hidden, intermediate, seed=1), torch.full((8,), 0.5), layout=Layout.BLOCK_SCALED,
    )  # fmt: skip
    layer = ExpertsLayer("model.layers.3.ffn.experts", operands, 6, 8, None, 10.0)
    if policy == "dynamic":
        return layer
    scales = torch.tensor([0.01]), torch.linspace(0.003, 0.005, 8)
    return dataclasses.replace(layer, act_scale_13=scales[0], act_scale_2=scales[1])


@pytest.mark.parametrize("policy", ["static", "dynamic"])
def test_right_experts_pass(random_weight, policy):
    report = Report()
    checked = experts_layer(random_weight, policy)
    check_layers([checked], 64, False, report, emulated)
    assert report.layers == 1 and report.products == len(checked.tiles(64, False)) > 1
    assert 0 < report.worst_error <= 1


def inverted_act_scale_2(inputs, checked, tile, out):
    emulated(inputs, dataclasses.replace(checked, act_scale_2=checked.act_scale_2.reciprocal()), tile, out)


def neighbouring_expert(inputs, checked, tile, out):
    x, weights, ids = inputs
    emulated((x, weights, (ids + 1) % checked.num_global_experts), checked, tile, out)


def gate_and_up_exchanged(inputs, checked, tile, out):
    codes = checked.operands.w13_codes
    operands = dataclasses.replace(checked.operands, w13_codes=torch.cat(codes.chunk(2, dim=1)[::-1], dim=1))
    emulated(inputs, dataclasses.replace(checked, operands=operands), tile, out)


def intermediate_not_rounded(inputs, checked, tile, out):
    """W4A16 where W4A4 was asked for."""
    w13, w13_scales, w2, w2_scales = plain_experts(checked.operands)
    x, weights, ids = inputs
    rows = checked.operands.w13_row_scale, checked.operands.w2_row_scale
    out.copy_(
        reference.experts(
            x, w13, w13_scales, rows[0], w2, w2_scales, rows[1], weights, ids, expert_map=checked.expert_map,
            swiglu_limit=checked.swiglu_limit,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    "fault",
    [*PLANTED.values(), inverted_act_scale_2, neighbouring_expert, gate_and_up_exchanged, intermediate_not_rounded],
    ids=[*PLANTED, "inverted act_scale_2", "neighbouring expert", "gate and up exchanged", "not rounded"],
)  # fmt: skip
def test_planted_fault_in_experts_is_caught_and_named(random_weight, fault):
    with pytest.raises(SelfCheckFailed) as failed:
        check_layers([experts_layer(random_weight, "static")], 64, False, Report(), fault)
    assert str(failed.value).startswith(
        "model.layers.3.ffn.experts (E = 8 of 8, H = 128, I = 64, top-k = 6, M = "
    )


@pytest.mark.parametrize("capability", [100, 121])
@pytest.mark.parametrize("policy", ["static", "dynamic"])
def test_kernels_of_experts_are_checked_in_the_child(random_weight, monkeypatch, policy, capability):
    monkeypatch.setattr(family, "capability_of", lambda device: capability)
    variants = experts_layer(random_weight, policy).variants(8192, False)
    assert len(variants) == len(set(variants)) > 2
    for variant in variants:
        assert (variant.arch, variant.operation) == (f"sm_{capability}a", "experts")
        assert variant.static == (policy == "static")
        assert 0 < check_variant(variant, 6, torch.device("cpu"), emulated) <= 1
        for fault in PLANTED.values():
            with pytest.raises(SelfCheckFailed):
                check_variant(variant, 6, torch.device("cpu"), fault)


# --- which kernels ---


@pytest.mark.parametrize("n", [384, 381])
@pytest.mark.parametrize("bias", [None, torch.ones(1)], ids=["", "bias"])
def test_kernels_of_a_workstations_layer_are_shipped(random_weight, monkeypatch, n, bias):
    monkeypatch.setattr(family, "capability_of", lambda device: 121)
    first, *products = layer(random_weight, n, 128, bias=bias).variants(8192, False)
    assert first == Variant("sm120", "sm_121a", "quantize", "nvfp4_quantize_sm121a_dynamic")
    assert products and {variant.name for variant in products} <= set(sm120_linear.shipped("sm_121a"))


def test_kernels_of_a_layer_are_shipped_and_its_quantizer_is_the_first(random_weight):
    first, *products = layer(random_weight, 7168, 128).variants(8192, False)
    assert first == Variant("sm100", ARCH, "quantize", "nvfp4_quantize_sm100a_dynamic")
    assert len(products) > 2 and {variant.name for variant in products} <= set(linear.shipped(ARCH))
    static = layer(random_weight, act_scale=0.1).variants(1, False)
    assert static[0].name == "nvfp4_quantize_sm100a_static" in quantize.shipped(ARCH)


SHIPPED = [Variant("sm100", ARCH, "linear", name) for name in linear.shipped(ARCH)]
SHIPPED += [Variant("sm120", "sm_121a", "linear", name) for name in sm120_linear.shipped("sm_121a")]


@pytest.mark.parametrize("variant", SHIPPED, ids=str)
def test_every_shipped_kernel_is_checked_on_problems_it_takes(variant, monkeypatch):
    monkeypatch.setattr(family, "capability_of", lambda device: 100 if variant.family == "sm100" else 121)
    device = torch.device("cpu")
    assert 0 < check_variant(variant, 6, device, emulated) <= 1
    for fault in PLANTED.values():
        with pytest.raises(SelfCheckFailed):
            check_variant(variant, 6, device, fault)


# --- the quantizer ---


@pytest.mark.parametrize("dynamic", [False, True])
def test_right_quantizer_passes(dynamic):
    assert check_quantizer(dynamic, torch.device("cpu"), quantized) == 0


def swapped_nibbles(codes, scales, act_scale):
    return codes << 4 | codes >> 4, scales, act_scale


def scale_columns_swapped(codes, scales, act_scale):
    return codes, scales.view(-1, 4, 4).transpose(1, 2).reshape(scales.shape), act_scale


def one_code_off(codes, scales, act_scale):
    codes[-1, -4] ^= 1
    return codes, scales, act_scale


def sign_of_zero_lost(codes, scales, act_scale):
    low, high = codes & 15, codes >> 4
    low, high = (torch.where(nibble == 8, 0, nibble) for nibble in (low, high))
    return low | high << 4, scales, act_scale


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("fault", [swapped_nibbles, scale_columns_swapped, one_code_off, sign_of_zero_lost])
def test_one_wrong_bit_of_the_quantizer_is_a_failure(dynamic, fault):
    with pytest.raises(
        SelfCheckFailed, match=r"differ from the reference's, the first is the (code|block scale) at"
    ):
        check_quantizer(dynamic, torch.device("cpu"), lambda *arguments: fault(*quantized(*arguments)))


def test_scale_of_a_whole_tensor_instead_of_a_token_is_a_failure():
    def of_the_tensor(x, act_scale, groups):
        return quantized(x, reference.dynamic_act_scale(x).amax().expand(len(x)), groups)

    with pytest.raises(SelfCheckFailed, match="the first is the act scale at"):
        check_quantizer(True, torch.device("cpu"), of_the_tensor)
