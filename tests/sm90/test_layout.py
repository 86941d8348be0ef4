"""The packed weights hold what each thread's tensor-core fragment needs, where the kernels read it."""

import pytest
import torch

from cutedsl_nvfp4.format import E2M1_VALUES, pack_codes, unpack_codes
from cutedsl_nvfp4.sm90 import decode
from cutedsl_nvfp4.sm90.layout import BLOCK_K, PANEL_ROWS, pack_linear, packed_shape, unpack_linear


def random_weight(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Valid operands with every code and every non-negative scale, zero and minus zero included."""
    generator = torch.Generator().manual_seed(seed)
    *batch, n, k = shape
    codes = torch.randint(0, 256, (*batch, n, k // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 127, (*batch, n, k // 16), dtype=torch.uint8, generator=generator)
    scales[..., 0, 0] = 0x80
    scales[..., -1, -1] = 0
    return codes, scales.view(torch.float8_e4m3fn)


def without_zero_groups(codes: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    nibbles = unpack_codes(codes).unflatten(-1, (-1, 16))
    zero = scales.float() == 0
    return pack_codes(nibbles.masked_fill(zero.unsqueeze(-1), 0).flatten(-2)), scales.float().abs()


@pytest.mark.parametrize(
    "shape", [(64, 64), (128, 256), (1, 16), (65, 80), (200, 144), (3, 70, 48), (2, 2, 64, 64)]
)
def test_round_trip(shape):
    codes, scales = random_weight(*shape)
    packed = pack_linear(codes, scales)
    *batch, n, k = shape
    assert packed[0].shape == (*batch, *packed_shape(n, k), 256) and packed[0].dtype == torch.int64
    assert packed[1].shape == (*batch, *packed_shape(n, k), 64) and packed[1].dtype == torch.int32
    got_codes, got_scales = unpack_linear(*packed, n, k)
    expected_codes, expected_scales = without_zero_groups(codes, scales)
    assert torch.equal(got_codes, expected_codes)
    assert torch.equal(got_scales.float(), expected_scales)


def test_fragments_are_the_tensor_cores():
    """Every thread of the four warps, decoded as the kernel does, against PTX's m16n8k16 A fragment."""
    n, k = PANEL_ROWS, 2 * BLOCK_K
    codes, scales = random_weight(n, k, seed=1)
    packed_codes, packed_scales = pack_linear(codes, scales)
    value = torch.tensor(E2M1_VALUES, dtype=torch.float64)[unpack_codes(codes).int()]
    value = value * scales.double().repeat_interleave(16, dim=1)
    words = packed_codes.view(torch.int32).view(2, 4, 32, 4).to(torch.int64) & 0xFFFFFFFF
    scale_words = packed_scales.view(2, 4, 8, 2).to(torch.int64) & 0xFFFFFFFF

    def as_bf16(bits: int) -> torch.Tensor:
        return torch.tensor([bits & 0xFFFF, bits >> 16]).to(torch.int32).to(torch.int16).view(torch.bfloat16)

    for block in range(2):
        for warp in range(4):
            for lane in range(32):
                for step in range(4):
                    registers = decode.unpack_word(int(words[block, warp, lane, step]))
                    pair = as_bf16(
                        decode.unpack_scales(int(scale_words[block, warp, lane // 4, step // 2]), step % 2)
                    )
                    for index, register in enumerate(registers):
                        half = index % 2
                        got = (as_bf16(register) * pair[half]).double() * decode.EPILOGUE_SCALE
                        row = 16 * warp + 8 * half + lane // 4
                        column = 64 * block + 16 * step + 8 * (index // 2) + 2 * (lane % 4)
                        assert torch.equal(got, value[row, column : column + 2]), (
                            block,
                            warp,
                            lane,
                            step,
                            index,
                        )


def test_padding_is_zero():
    packed_codes, packed_scales = pack_linear(*random_weight(1, 16))
    codes, scales = unpack_linear(packed_codes, packed_scales, PANEL_ROWS, BLOCK_K)
    assert not codes[1:].any() and not codes[:, 8:].any()
    assert not scales.view(torch.uint8)[1:].any() and not scales.view(torch.uint8)[:, 1:].any()


def test_refuses_what_it_cannot_pack():
    codes, scales = random_weight(64, 64)
    bad = scales.clone()
    bad.view(torch.uint8)[5, 2] = 0x81
    with pytest.raises(ValueError, match="negative"):
        pack_linear(codes, bad)
    with pytest.raises(ValueError, match="block scales"):
        pack_linear(codes, scales[:, :2])
    with pytest.raises(ValueError, match="multiple of 16"):
        pack_linear(codes[:, :12], scales[:, :1])
