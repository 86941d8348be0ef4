"""Fast NVFP4 quantization of what checkpoints store, equal bit for bit to `reference.quantize`.

Everything is done in chunks of rows that fit a core's L2 cache. Sources are widened to f32 exactly (FP8 blocks,
BF16); MXFP4 is re-labelled without arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ..format import AMAX_PER_GLOBAL_SCALE, E2M1_MAX, E2M1_VALUES, E4M3_MAX, GROUP_SIZE, encode_e2m1
from .dialects import FP8_BLOCK, MXFP4_BLOCK, Linear
from .headers import CheckpointError

CHUNK_ELEMENTS = 1 << 17  # 512 KB of f32
TORCH_DTYPES = {
    "U8": torch.uint8, "I8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.uint8,
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32,
}  # fmt: skip

# e4m3 holds the powers of two from 2**-9 (its smallest subnormal) to 2**8
E4M3_MIN_POWER, E4M3_MAX_POWER = -9, 8
E8M0_BIAS, E8M0_NAN = 127, 255
F32_MIN_POWER = -126
SEARCH_OFFSETS = range(-3, 6)  # of a block scale's e4m3 byte: 0.79 to 1.5 times the scale that amax gives


def _power_of_two(byte: torch.Tensor) -> torch.Tensor:
    """e8m0 bytes -> f32 powers of two; infinity for NaN (255)."""
    exponent = byte.to(torch.int32)
    return torch.where(exponent == 0, 1 << 22, exponent << 23).view(torch.float32)


def _widen_fp8(values: torch.Tensor) -> torch.Tensor:
    """e4m3 -> f32 * 2**-8, exact: its bits are those of a float16, shifted. NaN is not kept (`Rows.amax` finds it)."""
    return (values.view(torch.int8).to(torch.int16) << 7).bitwise_and_(~0x4000).view(torch.float16).float()


class Rows:
    """The values of a wide or FP8 linear, f32, a chunk of rows at a time; `weight` and `scale` are its tensors."""

    def __init__(self, linear: Linear, weight: torch.Tensor, scale: torch.Tensor | None):
        self.linear, self.weight = linear, weight
        self.scale = None
        if linear.format == "fp8":
            self.scale = _power_of_two(scale) if linear.scale.dtype == "F8_E8M0" else scale.float()
            if not bool(torch.isfinite(self.scale).all()):
                raise CheckpointError(
                    f"{linear.name}: its scale holds NaN or infinity; the tensor is damaged"
                )
            self.scale = self.scale * 2.0**8  # see _widen_fp8

    def chunks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, f32 [rows, k]) of consecutive chunks, none across two FP8 block rows."""
        n, k = self.weight.shape
        rows = min(FP8_BLOCK, 1 << max(0, int(math.log2(max(1, CHUNK_ELEMENTS // k)))))
        for first in range(0, n, rows):
            values = self.weight[first : first + rows]
            values = values.float() if self.scale is None else _widen_fp8(values)
            if self.scale is not None:
                scale = self.scale[first // FP8_BLOCK]
                if k % FP8_BLOCK:
                    values *= scale.repeat_interleave(FP8_BLOCK)[:k]
                else:
                    values.view(-1, k // FP8_BLOCK, FP8_BLOCK).mul_(scale[:, None])
            yield first, values

    def amax(self) -> float:
        """Largest magnitude; CheckpointError on NaN or infinity."""
        largest = 0.0
        if self.scale is not None and int((self.weight.view(torch.uint8) & 0x7F).max()) == 0x7F:
            raise CheckpointError(f"{self.linear.name} holds NaN; the tensor is damaged")
        for _, values in self.chunks():
            low, high = torch.aminmax(values)
            chunk = max(-low.item(), high.item())
            if not math.isfinite(chunk):
                raise CheckpointError(f"{self.linear.name} holds NaN or infinity; the tensor is damaged")
            largest = max(largest, chunk)
        return largest


def global_scale(amax: float) -> torch.Tensor:
    """f32 scalar amax / (6 * 448); 1 for an all-zero tensor, which any scale represents."""
    return (
        torch.tensor(amax if amax > 0 else AMAX_PER_GLOBAL_SCALE, dtype=torch.float32) / AMAX_PER_GLOBAL_SCALE
    )


def _codes_of(groups: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """f32 [..., G, 16] / step [..., G, 1] -> uint8 codes, as encode_e2m1 rounds.

    The magnitudes of e2m1 are 0 to 2 in steps of 1/2, to 4 in steps of 1, to 6 in steps of 2: the code is the
    sum of the three rounded parts, and rounding half to even is rounding to the even code.
    """
    scaled = groups / step
    magnitude = scaled.abs()
    code = magnitude.clamp(max=2.0).mul_(2.0).round_()
    code += magnitude.clamp(2.0, 4.0).round_()
    code += magnitude.clamp_(4.0, 6.0).mul_(0.5).round_()
    code -= 4.0
    code += scaled.signbit().mul(8.0)
    return code.to(torch.uint8)


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes [..., K], contiguous -> uint8 [..., K/2]; pairs are seen as little-endian 16-bit numbers."""
    pairs = codes.view(torch.int16)
    return (pairs | (pairs >> 4)).to(torch.uint8)


def quantize_chunk(
    values: torch.Tensor, scale: torch.Tensor, search: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """f32 [R, K], global scale -> (codes uint8 [R, K/2], block scales as bytes uint8 [R, K/16]).

    Without `search` the result is `reference.quantize`'s. With it each group takes, of the e4m3 scales around
    that one, the one with the least squared error.
    """
    groups = values.unflatten(-1, (-1, GROUP_SIZE))
    largest = (
        (groups.view(torch.int32) & 0x7FFFFFFF).amax(-1).view(torch.float32)
    )  # f32 amax takes 4 times as long
    ideal = largest / E2M1_MAX / scale
    block_scales = ideal.clamp_(max=E4M3_MAX).to(torch.float8_e4m3fn)
    if search:
        block_scales = _search(groups, block_scales, scale)
    step = (block_scales.float() * scale).unsqueeze(-1)
    zero = step == 0
    if bool(zero.any()):
        groups = torch.where(zero, 0.0, groups)
        step = torch.where(zero, 1.0, step)
    return _pack(_codes_of(groups, step).flatten(-2)), block_scales.view(torch.uint8)


def _search(groups: torch.Tensor, block_scales: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    start = block_scales.view(torch.uint8).to(torch.int16)
    magnitudes = groups.abs()
    best = least = None
    for offset in SEARCH_OFFSETS:
        candidate = (start + offset).clamp_(1, 0x7E).to(torch.uint8)
        step = candidate.view(torch.float8_e4m3fn).float() * scale
        scaled = magnitudes / step.unsqueeze(-1)
        # the nearest e2m1 magnitude, plus 6: the sum of the parts that _codes_of rounds
        nearest = scaled.clamp(max=2.0).mul_(2.0).round_().mul_(0.5)
        nearest += scaled.clamp(2.0, 4.0).round_()
        nearest += scaled.clamp(4.0, 6.0).mul_(0.5).round_().mul_(2.0)
        error = nearest.sub_(6.0).sub_(scaled).square_().sum(-1).mul_(step.square())
        if least is None:
            best, least = candidate, error
        else:
            better = error < least
            best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    best = torch.where(start == 0, 0, best).to(torch.uint8)  # what underflows stays zero
    return best.view(torch.float8_e4m3fn)


def dequantize_chunk(codes: torch.Tensor, block_scales: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The inverse of `quantize_chunk`: f32 [R, K]."""
    table = torch.tensor(E2M1_VALUES, device=codes.device)
    values = table[torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(-2).int()].unflatten(
        -1, (-1, GROUP_SIZE)
    )
    return (values * (block_scales.view(torch.float8_e4m3fn).float() * scale).unsqueeze(-1)).flatten(-2)


def dequantize_mxfp4(codes: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """uint8 [R, K/2], e8m0 bytes [R, K/32] -> f32 [R, K]."""
    table = torch.tensor(E2M1_VALUES, device=codes.device)
    values = table[torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(-2).int()].unflatten(
        -1, (-1, MXFP4_BLOCK)
    )
    return (values * _power_of_two(exponents).unsqueeze(-1)).flatten(-2)


# --- MXFP4 -> NVFP4: the codes stay, every block of 32 becomes two groups of 16 with the same scale ---


def check_mxfp4(linear: Linear, exponents: torch.Tensor) -> int:
    """The largest e8m0 byte of `exponents`; CheckpointError on NaN."""
    largest = int(exponents.max())
    if largest == E8M0_NAN:
        raise CheckpointError(f"{linear.name}: its scale holds NaN (byte 255); the tensor is damaged")
    return largest


def mxfp4_global_power(largest: int) -> int:
    """Largest e8m0 byte -> the exponent of weight_scale_2 that puts its block at e4m3's largest power of two."""
    return max(largest - E8M0_BIAS - E4M3_MAX_POWER, F32_MIN_POWER)


def relabel_scales(exponents: torch.Tensor, power: int) -> torch.Tensor:
    """e8m0 bytes [N, K/32] -> e4m3 bytes [N, K/16] of 2**(exponent - power); what is too small becomes 2**-9."""
    table = torch.ldexp(
        torch.ones(256), (torch.arange(256) - E8M0_BIAS - power).clamp(E4M3_MIN_POWER, E4M3_MAX_POWER)
    )
    pairs = table.to(torch.float8_e4m3fn).view(torch.uint8).to(torch.int16) * 0x0101
    lookup = pairs.to(exponents.device)[exponents.flatten().int()]
    return lookup.view(torch.uint8).view(exponents.shape[0], -1)


def shift_codes(codes: torch.Tensor, exponents: torch.Tensor, power: int) -> tuple[torch.Tensor, int]:
    """Round the codes of blocks below e4m3's range to the scale 2**-9 -> (codes, how many nonzero codes changed value).

    codes uint8 [N, K/2], exponents e8m0 [N, K/32]. Most checkpoints have no such block.
    """
    too_small = E8M0_BIAS + power + E4M3_MIN_POWER - exponents.to(torch.int32)
    if int(too_small.max()) <= 0:
        return codes, 0
    blocks = codes.clone().view(codes.shape[0], -1, 16)
    values = torch.tensor(E2M1_VALUES, device=codes.device)
    lossy = 0
    for shift in too_small[too_small > 0].unique().tolist():
        chosen = too_small == shift
        nibbles = torch.stack((blocks[chosen] & 0xF, blocks[chosen] >> 4), dim=-1)
        scaled = values[nibbles.int()] * 2.0**-shift
        rounded = encode_e2m1(scaled)
        lossy += int((values[rounded.int()] != scaled).sum())
        blocks[chosen] = rounded[..., 0] | (rounded[..., 1] << 4)
    return blocks.view_as(codes), lossy
