"""What NVFP4 is: element codes, packing, groups, the direction of every scale, the 128x4 scale layout.

An NVFP4 tensor with logical shape [..., K] is three tensors:

    codes         uint8  [..., K/2]    two e2m1 codes a byte, the low nibble holds the even k
    block_scales  e4m3   [..., K/16]   one non-negative scale per group of 16 consecutive k
    global_scale  f32    scalar        one per tensor (or per row, see prepare.py)

    value[..., k] = E2M1_VALUES[code[..., k]] * block_scales[..., k // 16] * global_scale

Every scale in this project *multiplies when dequantizing*. A global scale chosen from data is
`amax / (6 * 448)`. Its reciprocal, which multiplies when quantizing, is always called `_inv`. File
formats that store the reciprocal (compressed-tensors) go through `global_scale_from_divisor` first.

Source of the format: OCP Microscaling specification v1.0 (E2M1) and NVIDIA's cuBLAS documentation,
"1D block scaling factors layout" (groups of 16, e4m3 scales, 128x4 layout).
"""

import torch

GROUP_SIZE = 16
SCALES_CHECKED_AT_ONCE = 1 << 26  # a layer's experts have many: bounds the memory a check takes
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E2M1_MAX = 6.0
E4M3_MAX = 448.0
AMAX_PER_GLOBAL_SCALE = E2M1_MAX * E4M3_MAX  # the largest magnitude a tensor with global scale 1 can hold

SCALE_DTYPE = torch.float8_e4m3fn
SCALE_TILE_ROWS = 128
SCALE_TILE_GROUPS = 4

# Round to nearest, ties to the even code: a tie goes down below code 1, 3, 5 or 7's lower neighbour.
_TIE_DOWN = (0.25, 1.25, 2.5, 5.0)  # |x| equal to one of these rounds to the lower (even) code
_TIE_UP = (0.75, 1.75, 3.5)  # and to one of these, to the upper (even) code


def check_k(k: int, name: str = "K") -> None:
    """Raise ValueError unless `k` is a positive multiple of the group size."""
    if k <= 0 or k % GROUP_SIZE:
        raise ValueError(
            f"{name} = {k} is not a positive multiple of {GROUP_SIZE}, the NVFP4 group size; "
            f"pad the tensor along K, or keep this layer unquantized (list it under `ignore`)"
        )


def padded_k(k: int) -> int:
    """K of a row of codes that starts and ends at a multiple of 16 bytes, the unit Blackwell's loads address."""
    return -(-k // 32) * 32


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [..., K] codes in 0..15 -> uint8 [..., K/2], low nibble = even k."""
    if codes.shape[-1] % 2:
        raise ValueError(f"cannot pack an odd number of codes: K = {codes.shape[-1]}")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [..., K/2] -> uint8 [..., K]; the inverse of `pack_codes`."""
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed codes are uint8, got {packed.dtype}; view the bytes as uint8 first")
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def decode_e2m1(codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Element codes 0..15 -> their values; exact in every floating dtype of 8 bits or more."""
    table = torch.tensor(E2M1_VALUES, dtype=dtype, device=codes.device)
    return table[codes.to(torch.int32)]


def encode_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Round to the nearest e2m1 value, ties to the even code, saturating at 6 -> uint8 codes.

    This is what the hardware's `cvt.rn.satfinite.e2m1x2.f32` does. NaN has no e2m1 code; the caller
    checks for it.
    """
    magnitude = x.abs().float()
    code = torch.zeros_like(magnitude, dtype=torch.uint8)
    for boundary in _TIE_DOWN:
        code += magnitude > boundary
    for boundary in _TIE_UP:
        code += magnitude >= boundary
    return code | (torch.signbit(x).to(torch.uint8) << 3)


def global_scale_from_amax(amax: torch.Tensor) -> torch.Tensor:
    """f32 global scale that maps `amax` onto the largest NVFP4 magnitude: amax / (6 * 448)."""
    return amax.float() / AMAX_PER_GLOBAL_SCALE


def global_scale_from_divisor(divisor: torch.Tensor) -> torch.Tensor:
    """compressed-tensors' `*_global_scale` (6 * 448 / amax, a divisor) -> this project's multiplier."""
    if not bool(torch.isfinite(divisor).all()) or bool((divisor <= 0).any()):
        raise ValueError(f"global scale divisor must be finite and positive, got {divisor.tolist()}")
    return 1.0 / divisor.float()


def check_global_scale(scale: torch.Tensor, name: str) -> None:
    """Raise ValueError unless every global scale is finite and positive."""
    bad = ~(torch.isfinite(scale) & (scale > 0))
    if bool(bad.any()):
        raise ValueError(
            f"{name}: global scale must be finite and positive, got {scale[bad].flatten()[0].item()} "
            f"({int(bad.sum())} of {scale.numel()} values); the tensor was not loaded, or the exporter "
            f"met an all-zero or overflowing layer. Export it again or keep the layer unquantized"
        )


def check_block_scales(scales: torch.Tensor, name: str) -> None:
    """Raise ValueError if any e4m3 block scale is NaN or negative (-0 counts as zero)."""
    if scales.dtype != SCALE_DTYPE:
        raise ValueError(f"{name}: block scales must be {SCALE_DTYPE}, got {scales.dtype}")
    bits = scales.view(torch.uint8)
    if any(
        bool(((some > 0x7E) & (some != 0x80)).any())
        for some in bits.reshape(-1).split(SCALES_CHECKED_AT_ONCE)
    ):
        nan = (bits & 0x7F) == 0x7F
        negative = (bits > 0x80) & ~nan
        bad = nan | negative
        where = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{name}: block scale at {where} is {scales[tuple(where)].float().item()} "
            f"({int(nan.sum())} NaN, {int(negative.sum())} negative of {bad.numel()}); NVFP4 block scales "
            f"are finite and non-negative, so this tensor is damaged or was never written. "
            f"Download or export the checkpoint again"
        )


def swizzled_shape(rows: int, groups: int) -> tuple[int, int]:
    """Padded (rows, groups) of the 128x4 layout."""
    return -(-rows // SCALE_TILE_ROWS) * SCALE_TILE_ROWS, -(-groups // SCALE_TILE_GROUPS) * SCALE_TILE_GROUPS


def swizzle_128x4(scales: torch.Tensor) -> torch.Tensor:
    """Row-major block scales [..., R, G] -> the 128x4 layout, [..., R', G'] with padding zero.

    Inside each tile of 128 rows x 4 groups, row r and group g land at byte
    (r % 32) * 16 + (r // 32) * 4 + g; tiles follow each other along G first, then R.
    """
    *batch, rows, groups = scales.shape
    padded_rows, padded_groups = swizzled_shape(rows, groups)
    padded = scales.new_zeros((*batch, padded_rows, padded_groups), dtype=torch.uint8)
    padded[..., :rows, :groups] = scales.view(torch.uint8)
    tiles = padded.view(*batch, padded_rows // 128, 4, 32, padded_groups // 4, 4)
    n = len(batch)
    order = (*range(n), n, n + 3, n + 2, n + 1, n + 4)  # row tile, group tile, r % 32, r // 32, g
    return tiles.permute(order).reshape(*batch, padded_rows, padded_groups).view(scales.dtype)


def unswizzle_128x4(swizzled: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """The inverse of `swizzle_128x4`: [..., R', G'] -> [..., rows, groups]."""
    *batch, padded_rows, padded_groups = swizzled.shape
    if (padded_rows, padded_groups) != swizzled_shape(rows, groups):
        raise ValueError(
            f"a 128x4 layout of {rows} x {groups} scales is {swizzled_shape(rows, groups)}, "
            f"got {(padded_rows, padded_groups)}"
        )
    tiles = swizzled.view(torch.uint8).view(*batch, padded_rows // 128, padded_groups // 4, 32, 4, 4)
    n = len(batch)
    order = (*range(n), n, n + 3, n + 2, n + 1, n + 4)
    plain = tiles.permute(order).reshape(*batch, padded_rows, padded_groups)
    return plain[..., :rows, :groups].contiguous().view(swizzled.dtype)


def swizzle_scales(scales: torch.Tensor) -> torch.Tensor:
    """e4m3 block scales [..., R, G] -> uint8 [..., ceil(R / 128), ceil(G / 4), 32, 16], 128x4 with its tiles as axes.

    Where no padding is needed and `scales` is contiguous, its own storage is rewritten, a row tile at a time.
    """
    *batch, rows, groups = scales.shape
    padded_rows, padded_groups = swizzled_shape(rows, groups)
    shape = (*batch, padded_rows // SCALE_TILE_ROWS, padded_groups // SCALE_TILE_GROUPS, 32, 16)
    if (rows, groups) != (padded_rows, padded_groups) or not scales.is_contiguous():
        return swizzle_128x4(scales).view(torch.uint8).view(shape)
    tiles = scales.view(torch.uint8).view(-1, SCALE_TILE_ROWS, groups)
    step = max(1, SCALES_CHECKED_AT_ONCE // tiles[0].numel()) if len(tiles) else 1
    for first in range(0, len(tiles), step):
        some = tiles[first : first + step]
        some.copy_(swizzle_128x4(some))
    return tiles.view(shape)


def unswizzle_scales(swizzled: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """The inverse of `swizzle_scales`, into new memory -> e4m3 [..., rows, groups]."""
    *batch, row_tiles, group_tiles, _, _ = swizzled.shape
    flat = swizzled.reshape(*batch, row_tiles * SCALE_TILE_ROWS, group_tiles * SCALE_TILE_GROUPS)
    return unswizzle_128x4(flat, rows, groups).view(SCALE_DTYPE)
