"""Layout.PLAIN, the checkpoint's own: what reference.py reads. The functions of sm90/layout.py, as identities."""

import torch


def lay_out_linear(codes: torch.Tensor, block_scales: torch.Tensor, groups: int) -> tuple[torch.Tensor, ...]:
    return codes, block_scales


def lay_out_experts(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return operands


def plain_linear(
    codes: torch.Tensor, block_scales: torch.Tensor, n: int, k: int, groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return codes, block_scales


def plain_experts(*operands: torch.Tensor | int) -> tuple[torch.Tensor, ...]:
    w13_codes, w13_block_scales, w2_codes, w2_block_scales, _, _ = operands
    return w13_codes, w13_block_scales, w2_codes, w2_block_scales
