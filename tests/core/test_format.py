"""format.py: every code, every tie, every byte position, every scale that must be refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cutedsl_nvfp4 import format
from cutedsl_nvfp4.format import (
    E2M1_VALUES,
    check_block_scales,
    check_global_scale,
    check_k,
    decode_e2m1,
    encode_e2m1,
    global_scale_from_amax,
    global_scale_from_divisor,
    pack_codes,
    swizzle_128x4,
    swizzle_scales,
    swizzled_shape,
    unpack_codes,
    unswizzle_128x4,
    unswizzle_scales,
)

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def nearest_even_code(x: torch.Tensor) -> torch.Tensor:
    """The definition: the nearest of the eight magnitudes, ties to the even code, exact in f64."""
    distance = (x.double().abs().clamp(max=1e6).unsqueeze(-1) - torch.tensor(MAGNITUDES).double()).abs()
    nearest = distance == distance.amin(-1, keepdim=True)
    preference = torch.tensor([2, 1, 2, 1, 2, 1, 2, 1])  # even codes first among equals
    code = (nearest * preference).argmax(-1).to(torch.uint8)
    return code | (torch.signbit(x).to(torch.uint8) << 3)


def e4m3(*values: float) -> torch.Tensor:
    return torch.tensor(values).to(torch.float8_e4m3fn)


# --- element codes ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_encode_every_16_bit_value(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[~torch.isnan(every)]
    assert torch.equal(encode_e2m1(every), nearest_even_code(every))


@pytest.mark.parametrize(
    "tie, code", [(0.25, 0), (0.75, 2), (1.25, 2), (1.75, 4), (2.5, 4), (3.5, 6), (5.0, 6)]
)
def test_ties_go_to_the_even_code_and_their_neighbours_do_not(tie, code):
    tie = torch.tensor(tie)
    below, above = torch.nextafter(tie, torch.tensor(0.0)), torch.nextafter(tie, torch.tensor(9.0))
    lower = MAGNITUDES.index(max(value for value in MAGNITUDES if value < tie))
    got = encode_e2m1(torch.stack((below, tie, above, -below, -tie, -above)))
    assert got.tolist() == [lower, code, lower + 1, 8 + lower, 8 + code, 8 + lower + 1]


@pytest.mark.parametrize("x", [6.0, 6.5, 7.0, 1e30, float("inf")])
def test_encode_saturates_at_six(x):
    assert encode_e2m1(torch.tensor([x, -x])).tolist() == [7, 15]


def test_signed_zero_survives_in_both_directions():
    assert encode_e2m1(torch.tensor([0.0, -0.0, 0.2, -0.2])).tolist() == [0, 8, 0, 8]
    assert torch.signbit(decode_e2m1(torch.tensor([0, 8], dtype=torch.uint8))).tolist() == [False, True]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
)
def test_decode_is_exact(dtype):
    got = decode_e2m1(torch.arange(16, dtype=torch.uint8), dtype)
    assert got.dtype == dtype
    assert got.double().tolist() == [*MAGNITUDES, *(-value for value in MAGNITUDES)]


def test_encode_inverts_decode():
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(encode_e2m1(torch.tensor(E2M1_VALUES)), codes)
    assert torch.equal(encode_e2m1(decode_e2m1(codes)), codes)


# --- packing ---


def test_low_nibble_is_the_even_k():
    codes = torch.tensor([[0x1, 0x2, 0xF, 0x0], [0x8, 0x7, 0xA, 0xB]], dtype=torch.uint8)
    packed = torch.tensor([[0x21, 0x0F], [0x78, 0xBA]], dtype=torch.uint8)
    assert torch.equal(pack_codes(codes), packed)
    assert torch.equal(unpack_codes(packed), codes)


def test_unpack_every_byte():
    every = torch.arange(256, dtype=torch.uint8)
    expected = [nibble for byte in range(256) for nibble in (byte % 16, byte // 16)]
    assert unpack_codes(every).tolist() == expected


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_pack_unpack_round_trip(data):
    shape = data.draw(st.lists(st.integers(0, 5), min_size=0, max_size=3))
    pairs = data.draw(st.integers(0, 20))
    seed = data.draw(st.integers(0, 2**31))
    codes = torch.randint(
        0, 16, (*shape, 2 * pairs), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    assert torch.equal(unpack_codes(pack_codes(codes)), codes)


def test_packing_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match=r"odd number of codes: K = 3"):
        pack_codes(torch.zeros(2, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"uint8, got torch\.int8; view the bytes as uint8"):
        unpack_codes(torch.zeros(2, 3, dtype=torch.int8))


# --- scales ---


@pytest.mark.parametrize("k", [0, -16, 8, 17, 100])
def test_check_k_refuses(k):
    with pytest.raises(ValueError, match=rf"wq_a: K = {k} is not a positive multiple of 16.*pad.*`ignore`"):
        check_k(k, "wq_a: K")


@pytest.mark.parametrize("k", [16, 4096, 7168])
def test_check_k_accepts(k):
    check_k(k)


def test_global_scale_from_amax_fills_the_range():
    scale = global_scale_from_amax(torch.tensor([2688.0, 1344.0], dtype=torch.bfloat16))
    assert scale.dtype == torch.float32 and scale.tolist() == [1.0, 0.5]


def test_divisor_is_inverted():
    amax = torch.tensor([3.0, 0.02])
    assert torch.allclose(
        global_scale_from_divisor(2688.0 / amax), global_scale_from_amax(amax), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("divisor", [0.0, -1.0, float("nan"), float("inf")])
def test_divisor_must_be_finite_and_positive(divisor):
    with pytest.raises(ValueError, match=rf"divisor must be finite and positive, got .*{divisor}"):
        global_scale_from_divisor(torch.tensor([1.0, divisor]))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), float("-inf")])
def test_global_scale_must_be_finite_and_positive(scale):
    message = (
        rf"wq_a: global scale must be finite and positive, got {scale} \(1 of 3 values\).*Export it again"
    )
    with pytest.raises(ValueError, match=message):
        check_global_scale(torch.tensor([1.0, scale, 2.0]), "wq_a")


def test_block_scales_that_are_valid():
    check_block_scales(e4m3(0.0, -0.0, 2.0**-9, 1.0, 448.0), "wq_a")
    every_valid = torch.tensor([*range(0x7F), 0x80], dtype=torch.uint8).view(torch.float8_e4m3fn)
    check_block_scales(every_valid, "wq_a")


@pytest.mark.parametrize("bits", [0x7F, 0xFF, *range(0x81, 0xFF, 9), 0xFE])
def test_block_scales_that_are_not(bits):
    scales = torch.full((3, 4), 0x38, dtype=torch.uint8)
    scales[1, 2] = bits
    scales = scales.view(torch.float8_e4m3fn)
    value = scales[1, 2].float().item()
    kind = "1 NaN, 0 negative" if bits & 0x7F == 0x7F else "0 NaN, 1 negative"
    with pytest.raises(ValueError) as error:
        check_block_scales(scales, "wq_a")
    message = str(error.value)
    assert message.startswith(f"wq_a: block scale at [1, 2] is {value} ({kind} of 12)")
    assert "export the checkpoint again" in message


def test_block_scales_of_another_dtype():
    with pytest.raises(
        ValueError, match=r"wq_a: block scales must be torch\.float8_e4m3fn, got torch\.uint8"
    ):
        check_block_scales(torch.zeros(2, 2, dtype=torch.uint8), "wq_a")


# --- 128x4 layout ---

RAGGED_SHAPES = [
    (128, 4),
    (256, 8),
    (1, 1),
    (130, 5),
    (127, 3),
    (129, 7),
    (384, 12),
    (3, 130, 6),
    (2, 128, 1),
]


def distinct_scales(*shape: int) -> torch.Tensor:
    """Scales in which neighbours differ, none of them the padding's zero."""
    count = torch.Size(shape).numel()
    return (torch.arange(count) % 113 + 1).to(torch.uint8).view(shape).view(torch.float8_e4m3fn)


@pytest.mark.parametrize("shape", RAGGED_SHAPES)
def test_swizzle_is_vllms(shape, monkeypatch):
    from vllm.model_executor.layers.quantization.utils.nvfp4_utils import swizzle_blockscale

    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)  # vLLM's ends in .cuda()
    scales = distinct_scales(*shape)
    expected = swizzle_blockscale(scales)
    got = swizzle_128x4(scales)
    assert got.dtype == scales.dtype and got.shape == expected.shape
    assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


def test_swizzle_puts_every_scale_at_its_documented_byte():
    rows, groups = 200, 10
    scales = distinct_scales(rows, groups)
    swizzled = swizzle_128x4(scales).view(torch.uint8).flatten()
    tiles_along_groups = swizzled_shape(rows, groups)[1] // 4
    used = torch.zeros_like(swizzled, dtype=torch.bool)
    for row in range(rows):
        for group in range(groups):
            tile = (row // 128) * tiles_along_groups + group // 4
            byte = tile * 512 + (row % 32) * 16 + (row % 128 // 32) * 4 + group % 4
            assert swizzled[byte] == scales.view(torch.uint8)[row, group], (row, group)
            used[byte] = True
    assert used.sum() == rows * groups and not swizzled[~used].any()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 300), st.integers(1, 20), st.sampled_from([(), (1,), (2,), (2, 3)]))
def test_unswizzle_inverts_swizzle(rows, groups, batch):
    scales = distinct_scales(*batch, rows, groups)
    back = unswizzle_128x4(swizzle_128x4(scales), rows, groups)
    assert back.dtype == scales.dtype and back.is_contiguous()
    assert torch.equal(back.view(torch.uint8), scales.view(torch.uint8))


@pytest.mark.parametrize("rows, groups", [(129, 4), (128, 5), (0, 4)])
def test_unswizzle_refuses_another_shape(rows, groups):
    with pytest.raises(ValueError, match=rf"layout of {rows} x {groups} scales is .*, got \(128, 4\)"):
        unswizzle_128x4(swizzle_128x4(distinct_scales(128, 4)), rows, groups)


@pytest.mark.parametrize("shape", [(200, 10), (2, 130, 5), (3, 2, 1, 1), (0, 4)], ids=str)
def test_swizzled_scales_have_an_axis_for_every_tile(shape):
    scales = distinct_scales(*shape)
    before = scales.view(torch.uint8).clone()
    tiles = swizzle_scales(scales)
    *batch, rows, groups = shape
    assert tiles.dtype == torch.uint8
    assert tiles.shape == (*batch, -(-rows // 128), -(-groups // 4), 32, 16)
    expected = swizzle_128x4(scales).view(torch.uint8)
    assert torch.equal(tiles.flatten(), expected.flatten())
    assert torch.equal(unswizzle_scales(tiles, rows, groups).view(torch.uint8), before)
    assert torch.equal(scales.view(torch.uint8), before)


@pytest.mark.parametrize("at_once", [1, 128 * 8 * 2, 1 << 26])
def test_whole_tiles_are_swizzled_in_their_own_storage(at_once, monkeypatch):
    monkeypatch.setattr(format, "SCALES_CHECKED_AT_ONCE", at_once)
    scales = distinct_scales(3, 256, 8)
    before, expected = scales.clone(), swizzle_128x4(scales)
    tiles = swizzle_scales(scales)
    assert tiles.data_ptr() == scales.data_ptr()
    assert torch.equal(tiles.flatten(), expected.view(torch.uint8).flatten())
    assert torch.equal(unswizzle_scales(tiles, 256, 8).view(torch.uint8), before.view(torch.uint8))
