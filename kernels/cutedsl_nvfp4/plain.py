"""Layout.PLAIN, the checkpoint's own: what reference.py reads. The functions of sm90/layout.py, as identities."""

import torch


def lay_out_linear(codes: torch.Tensor, block_scales: torch.Tensor, groups: int) -> tuple[torch.Tensor, ...]:
    return codes, block_scales


def lay_out_experts(
    w13_codes: torch.Tensor,
    w13_block_scales: torch.Tensor,
    w2_codes: torch.Tensor,
    w2_block_scales: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    return w13_codes, w13_block_scales, w2_codes, w2_block_scales


def plain_linear(
    codes: torch.Tensor, block_scales: torch.Tensor, n: int, k: int, groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return codes, block_scales


def plain_experts(
    w13_codes: torch.Tensor,
    w13_block_scales: torch.Tensor,
    w2_codes: torch.Tensor,
    w2_block_scales: torch.Tensor,
    hidden: int,
    intermediate: int,
) -> tuple[torch.Tensor, ...]:
    return w13_codes, w13_block_scales, w2_codes, w2_block_scales
