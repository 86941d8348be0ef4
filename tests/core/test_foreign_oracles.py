"""Decoding, packing, scale directions and the swizzle, against vLLM's emulation and compressed-tensors.

A quantizer and a decoder by one hand agree even when both are wrong; these two share no line with ours.
"""

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
    convert_swizzled_to_linear,
    dequantize_to_dtype,
    ref_nvfp4_quant,
)
from vllm.model_executor.layers.quantization.utils.nvfp4_utils import swizzle_blockscale

from cutedsl_nvfp4 import reference
from cutedsl_nvfp4.format import (
    GROUP_SIZE,
    decode_e2m1,
    encode_e2m1,
    global_scale_from_amax,
    global_scale_from_divisor,
    pack_codes,
    swizzle_128x4,
    unpack_codes,
    unswizzle_128x4,
)
from tests.core.golden.make_nvfp4 import compress, golden

GOLDEN = json.loads((Path(__file__).parent / "golden/nvfp4.json").read_text())
SHAPES = [(1, 16), (7, 48), (128, 64), (130, 272)]


def heavy_tailed(*shape: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (x * x.abs() ** 2).bfloat16()


def foreign_values(codes: torch.Tensor, scales: torch.Tensor, global_scale: float) -> torch.Tensor:
    return dequantize_to_dtype(codes, scales, torch.tensor(global_scale), torch.float32, swizzle=False)


# --- codes and packing ---


def test_every_byte_unpacks_as_theirs():
    every = torch.arange(256, dtype=torch.uint8).view(1, 256)
    theirs = unpack_fp4_from_uint8(every, 1, 512, dtype=torch.float32)
    ours = decode_e2m1(unpack_codes(every))
    assert torch.equal(ours, theirs)
    assert torch.equal(torch.signbit(ours), torch.signbit(theirs))


@pytest.mark.parametrize("shape", SHAPES)
def test_values_pack_as_theirs(shape):
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(pack_codes(codes), pack_fp4_to_uint8(decode_e2m1(codes)))


# --- dequantizing, and the direction of every scale ---


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("global_scale", [1.0, 2.0**-9, 3.7e-5], ids=["one", "power_of_two", "any"])
def test_dequantize_as_vllm_emulates(shape, global_scale, random_weight):
    codes, scales = random_weight(*shape)
    ours = reference.dequantize(codes, scales, global_scale)
    # theirs multiplies the two scales first: one rounding of f32 apart where neither is a power of two
    torch.testing.assert_close(ours, foreign_values(codes, scales, global_scale), rtol=3e-7, atol=0)


def test_experts_dequantize_as_vllm_emulates(random_weight):
    codes, scales = random_weight(3, 5, 32)
    global_scale = torch.tensor([0.25, 2.0, 0.001])
    theirs = dequantize_to_dtype(codes, scales, global_scale, torch.float32, swizzle=False)
    ours = reference.dequantize(codes, scales, global_scale[:, None, None])
    torch.testing.assert_close(ours, theirs, rtol=3e-7, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_of_compressed_tensors_read_as_it_reads_them(shape):
    """Their global scale divides; through `global_scale_from_divisor` it multiplies."""
    weight = heavy_tailed(*shape)
    state = compress(weight)
    multiplier = global_scale_from_divisor(state["weight_global_scale"])
    ours = reference.dequantize(state["weight_packed"], state["weight_scale"], multiplier)
    assert float(multiplier) == pytest.approx(float(weight.abs().amax()) / (6 * 448), rel=1e-6)
    error = (ours - weight.float()).norm() / weight.float().norm()
    assert error < 0.15, "not what was compressed"
    upside_down = reference.dequantize(
        state["weight_packed"], state["weight_scale"], state["weight_global_scale"]
    )
    assert (upside_down - weight.float()).norm() / weight.float().norm() > 2


# --- quantizing ---


@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_as_vllm_emulates(shape):
    """Bytes equal, save where the quotient of one lands on a tie of the other by a rounding of f32."""
    x = heavy_tailed(*shape, seed=2)
    global_scale = global_scale_from_amax(x.abs().amax())
    codes, scales = reference.quantize(x, global_scale)
    their_values, their_scales = ref_nvfp4_quant(x, 1.0 / global_scale, GROUP_SIZE)
    same_scale = scales.float() == their_scales
    assert same_scale.float().mean() >= 0.99
    ours = decode_e2m1(unpack_codes(codes)).unflatten(-1, (-1, GROUP_SIZE))[same_scale]
    theirs = their_values.unflatten(-1, (-1, GROUP_SIZE))[same_scale]
    assert (ours == theirs).float().mean() >= 0.999
    assert torch.equal(codes, pack_codes(encode_e2m1(decode_e2m1(unpack_codes(codes)))))


# --- golden bytes ---


def test_golden_bytes_are_what_the_installed_package_makes():
    made = golden()
    assert {**made, "made_by": None} == {**GOLDEN, "made_by": None}


def test_golden_bytes_decode_to_golden_values():
    codes = torch.tensor(GOLDEN["weight_packed"], dtype=torch.uint8)
    scales = torch.tensor(GOLDEN["weight_scale"], dtype=torch.uint8).view(torch.float8_e4m3fn)
    multiplier = global_scale_from_divisor(torch.tensor(GOLDEN["weight_global_scale"]))
    ours = reference.dequantize(codes, scales, multiplier)
    # theirs is computed in bf16: 8 bits, twice rounded
    torch.testing.assert_close(ours, torch.tensor(GOLDEN["values"]), rtol=2**-7, atol=1e-9)
    exact = foreign_values(codes, scales, 1.0 / GOLDEN["weight_global_scale"][0])
    torch.testing.assert_close(ours, exact, rtol=3e-7, atol=0)


# --- the 128x4 layout ---


@pytest.fixture
def vllm_swizzle_on_cpu(monkeypatch):
    """vLLM's swizzle moves its result to the GPU; here it stays."""
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)


@pytest.mark.parametrize("rows, groups", [(1, 1), (32, 4), (128, 4), (129, 5), (300, 33), (512, 64)])
def test_swizzle_as_vllm(rows, groups, vllm_swizzle_on_cpu):
    scales = torch.randint(
        0, 0x7F, (rows, groups), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
    )
    scales = scales.view(torch.float8_e4m3fn)
    swizzled = swizzle_128x4(scales)
    theirs = swizzle_blockscale(scales)
    assert torch.equal(swizzled.view(torch.uint8).flatten(), theirs.view(torch.uint8).flatten())
    back = convert_swizzled_to_linear(theirs.view(torch.uint8), rows, groups * GROUP_SIZE, GROUP_SIZE)
    assert torch.equal(back[:, :groups], scales.view(torch.uint8))
    assert torch.equal(unswizzle_128x4(swizzled, rows, groups).view(torch.uint8), scales.view(torch.uint8))


def test_swizzle_of_experts_as_vllm(vllm_swizzle_on_cpu):
    scales = torch.randint(
        0, 0x7F, (3, 130, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(5)
    )
    scales = scales.view(torch.float8_e4m3fn)
    ours, theirs = swizzle_128x4(scales), swizzle_blockscale(scales)
    assert torch.equal(ours.view(torch.uint8).flatten(), theirs.view(torch.uint8).flatten())
