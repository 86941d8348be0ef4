"""Weights as Blackwell's kernels read them: the checkpoint's codes, block scales in 128x4 tiles (format.py).

codes         uint8 [..., N, K' / 2]                  K' = K rounded up to 32: rows of whole 16 bytes
block scales  uint8 [..., ceil(N / 128), KB, 32, 16]  KB = ceil(K / 64); tiles of each group, of gate and up, apart
"""

import torch

from ..format import GROUP_SIZE, SCALE_DTYPE, padded_k, swizzle_scales, unswizzle_scales

PANEL_ROWS = 64  # rows that `plain_panels` counts by, as on Hopper


def _unsigned(block_scales: torch.Tensor) -> torch.Tensor:
    """Checked block scales with -0 made 0, in place: the tensor cores' scales (ue4m3) have no sign."""
    block_scales.view(torch.uint8).bitwise_and_(0x7F)
    return block_scales


def _padded(codes: torch.Tensor) -> torch.Tensor:
    """Codes with rows of whole 16 bytes: themselves, or where K is an odd number of groups, a copy with zeros."""
    half = codes.shape[-1]
    return torch.nn.functional.pad(codes, (0, padded_k(2 * half) // 2 - half)) if half % 16 else codes


def lay_out_linear(
    codes: torch.Tensor,  # uint8 [N, K/2]
    block_scales: torch.Tensor,  # e4m3 [N, K/16]
    groups: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Checkpoint weight -> (codes, block scales uint8 [groups * ceil(N/groups/128), KB, 32, 16])."""
    grouped = _unsigned(block_scales).view(groups, codes.shape[0] // groups, -1)
    return _padded(codes), swizzle_scales(grouped).flatten(0, 1)


def lay_out_experts(
    w13_codes: torch.Tensor,  # uint8 [E, 2I, H/2], gate (w1) rows first
    w13_block_scales: torch.Tensor,  # e4m3 [E, 2I, H/16]
    w2_codes: torch.Tensor,  # uint8 [E, H, I/2]
    w2_block_scales: torch.Tensor,  # e4m3 [E, H, I/16]
) -> tuple[torch.Tensor, ...]:
    """Checkpoint experts -> the same four in this layout; scales of w13 [E, 2 * ceil(I/128), KB, 32, 16]."""
    experts, two_i = w13_codes.shape[:2]
    gates_and_ups = _unsigned(w13_block_scales).reshape(2 * experts, two_i // 2, -1)
    w13_tiles = swizzle_scales(gates_and_ups).unflatten(0, (experts, 2)).flatten(1, 2)
    return _padded(w13_codes), w13_tiles, _padded(w2_codes), swizzle_scales(_unsigned(w2_block_scales))


def plain_linear(
    codes: torch.Tensor, block_scales: torch.Tensor, n: int, k: int, groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `lay_out_linear` -> (codes uint8 [N, K/2], block scales e4m3 [N, K/16], a copy)."""
    grouped = block_scales.unflatten(0, (groups, -1))
    return codes[:, : k // 2], unswizzle_scales(grouped, n // groups, k // GROUP_SIZE).flatten(0, 1)


def plain_panels(
    codes: torch.Tensor, block_scales: torch.Tensor, panels: torch.Tensor, n: int, k: int, groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`plain_linear` of some panels of 64 rows, counted group by group -> [P, 64, ...]; rows of padding are others'."""
    rows_per_group = n // groups
    panels_per_group = -(-rows_per_group // PANEL_ROWS)
    first = panels // panels_per_group * rows_per_group + panels % panels_per_group * PANEL_ROWS
    rows = (first.unsqueeze(1) + torch.arange(PANEL_ROWS, device=panels.device)).clamp(max=n - 1)
    plain_codes, plain_scales = plain_linear(codes, block_scales, n, k, groups)
    return plain_codes[rows], plain_scales.view(torch.uint8)[rows].view(SCALE_DTYPE)


def plain_experts(
    w13_codes: torch.Tensor,
    w13_block_scales: torch.Tensor,
    w2_codes: torch.Tensor,
    w2_block_scales: torch.Tensor,
    hidden: int,
    intermediate: int,
) -> tuple[torch.Tensor, ...]:
    """The inverse of `lay_out_experts`; scales are copies."""
    gates_and_ups = w13_block_scales.unflatten(1, (2, -1))
    w13 = unswizzle_scales(gates_and_ups, intermediate, hidden // GROUP_SIZE).flatten(1, 2)
    w2 = unswizzle_scales(w2_block_scales, hidden, intermediate // GROUP_SIZE)
    return w13_codes[..., : hidden // 2], w13, w2_codes[..., : intermediate // 2], w2
