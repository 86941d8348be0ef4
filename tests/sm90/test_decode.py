"""The Hopper decode proved for every input: all codes, all scales, all words a register can hold."""

import numpy as np
import pytest
import torch

from cutedsl_nvfp4.format import E2M1_VALUES
from cutedsl_nvfp4.sm90 import decode


def bf16(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16)).view(torch.bfloat16)


CODES = np.arange(16, dtype=np.uint32)
SCALES = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()  # every scale >= 0


def test_placed_code_is_the_value_times_2_to_minus_126():
    placed = bf16(decode.place_code(CODES)).double() * 2.0**126
    assert torch.equal(placed, torch.tensor(E2M1_VALUES, dtype=torch.float64))
    assert torch.equal(torch.signbit(placed), torch.tensor([code >= 8 for code in range(16)]))


@pytest.mark.parametrize("position", range(8))
def test_word_holds_eight_independent_codes(position):
    """Every code in every position, beside random neighbours: neighbours never leak in or out."""
    rng = np.random.default_rng(position)
    codes = rng.integers(0, 16, (4096, 8), dtype=np.uint32)
    codes[:, position] = np.tile(CODES, 256)
    placed = decode.place_code(codes)
    registers = [placed[:, 2 * i] | (placed[:, 2 * i + 1] << np.uint32(16)) for i in range(4)]
    word = decode.pack_word(registers)
    assert word.dtype == np.uint32
    for got, expected in zip(decode.unpack_word(word), registers, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_words_are_used_fully():
    """Each of the 32 bits belongs to exactly one code bit, so packing is a bijection on 32-bit words."""
    single_bits = []
    for register in range(4):
        for bit in (6, 7, 8, 15, 22, 23, 24, 31):
            registers = [np.uint32(0)] * 4
            registers[register] = np.uint32(1 << bit)
            single_bits.append(int(decode.pack_word(registers)))
    assert sorted(single_bits) == [1 << bit for bit in range(32)]
    every_half = np.arange(1 << 16, dtype=np.uint32)
    for words in (every_half, every_half << np.uint32(16), every_half * np.uint32(0x10001)):
        np.testing.assert_array_equal(decode.pack_word(decode.unpack_word(words)), words)


def test_scale_bytes_are_exact_for_every_e4m3_scale():
    stored = np.array([decode.scale_byte(v) for v in SCALES.tolist()], dtype=np.uint32)
    assert stored[0] == 0 and stored[1:].min() > 0 and stored.max() <= 255
    assert len(set(stored.tolist())) == 127
    for odd in (0, 1):
        for high in (0, 1):
            shift = np.uint32(8 * odd + 16 * high)
            others = np.uint32(0xA5C3965A) & ~(np.uint32(0xFF) << shift)
            pair = decode.unpack_scales(decode.pack_scales((stored << shift) | others), odd)
            half = bf16((pair >> np.uint32(16 * high)) & np.uint32(0xFFFF)).double()
            assert torch.equal(half[1:], SCALES[1:] * 2.0**decode.SCALE_EXPONENT)


def test_every_product_is_exact_in_bf16():
    """16 codes x 127 scales through bf16 multiplication, as the kernel's HMUL2.BF16 does it."""
    codes = bf16(decode.place_code(CODES))[:, None]
    stored = np.array([decode.scale_byte(v) for v in SCALES.tolist()], dtype=np.uint32)
    scales = bf16(decode.unpack_scales(decode.pack_scales(stored), 0) & np.uint32(0xFFFF))[None, :]
    product = (codes * scales).double() * decode.EPILOGUE_SCALE
    exact = torch.tensor(E2M1_VALUES, dtype=torch.float64)[:, None] * SCALES[None, :]
    assert torch.equal(product[:, 1:], exact[:, 1:])
    assert torch.equal(product[0, :1], exact[0, :1])  # scale zero is stored beside code zero
