"""Checkpoint tensors -> kernel operands, once, at load.

The operands are the layer's parameters from then on: nothing is kept twice. A layout that only permutes bytes
does so in the checkpoint tensors' own storage, a chunk at a time; they must not be read afterwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import plain
from .blackwell import layout as block_scaled
from .family import Layout
from .format import GROUP_SIZE, check_block_scales, check_global_scale, check_k
from .sm90 import layout as sm90

# what lays weights out, and back: the functions of plain.py
LAYOUTS = {Layout.PLAIN: plain, Layout.SM90: sm90, Layout.BLOCK_SCALED: block_scaled}


@dataclass(frozen=True)
class PreparedLinear:
    """Operands of one linear layer, logical weight [N, K]."""

    # PLAIN: uint8 [N, K/2]; SM90: int64 [P, KB, 256], panels within a group; BLOCK_SCALED: PLAIN's, K padded to 32s
    codes: torch.Tensor
    # PLAIN: e4m3 [N, K/16]; SM90: int32 [P, KB, 64]; BLOCK_SCALED: uint8 [groups * ceil(N/groups/128), KB, 32, 16]
    block_scales: torch.Tensor
    row_scale: torch.Tensor  # f32 [N], the global scale of each row's segment
    n: int
    k: int
    layout: Layout
    groups: int = 1  # blocks on the diagonal of a block-diagonal weight


@dataclass(frozen=True)
class PreparedExperts:
    """Operands of E local experts with hidden size H and intermediate size I, expert-major throughout."""

    # PLAIN: uint8 [E, 2I, H/2], gate (w1) rows first; SM90: int64 [E, P, KB, 256]; BLOCK_SCALED: H padded to 32s
    w13_codes: torch.Tensor
    # PLAIN: e4m3 [E, 2I, H/16]; SM90: int32 [E, P, KB, 64]; BLOCK_SCALED: uint8 [E, 2 * ceil(I/128), KB, 32, 16]
    w13_block_scales: torch.Tensor
    w13_row_scale: torch.Tensor  # f32 [E, 2I], gate rows first
    w2_codes: torch.Tensor  # as w13's, of [E, H, I]
    w2_block_scales: torch.Tensor  # as w13's, of [E, H, I]
    w2_row_scale: torch.Tensor  # f32 [E, H]
    layout: Layout


def _check_pair(codes: torch.Tensor, block_scales: torch.Tensor, name: str) -> tuple[int, int]:
    """Validate dtype and shape of a (codes, block_scales) pair [..., N, *] -> (N, K)."""
    if codes.dtype != torch.uint8:
        raise ValueError(
            f"{name}: packed codes must be uint8, got {codes.dtype}; this tensor is not NVFP4. Convert or export "
            f"the checkpoint again, or list the layer under quantization_config.ignore"
        )
    n, k = codes.shape[-2], codes.shape[-1] * 2
    check_k(k, f"{name}: K")
    expected = (*codes.shape[:-1], k // GROUP_SIZE)
    if tuple(block_scales.shape) != expected:
        raise ValueError(
            f"{name}: block scales for codes of shape {tuple(codes.shape)} must be {expected} "
            f"(one per {GROUP_SIZE} values), got {tuple(block_scales.shape)}; the tensors do not belong together, "
            f"or were quantized with another group size. Convert or export the checkpoint again"
        )
    check_block_scales(block_scales, name)
    return n, k


def segment_row_scale(global_scales: torch.Tensor, segment_sizes: Sequence[int], name: str) -> torch.Tensor:
    """Global scales f32 [S] of fused segments -> f32 [N], each repeated over its segment's rows.

    `global_scales` may also be a scalar or [1], shared by every segment.
    """
    scales = global_scales.detach().float().reshape(-1)
    check_global_scale(scales, name)
    if scales.numel() == 1:
        return scales.expand(sum(segment_sizes)).contiguous()
    if scales.numel() != len(segment_sizes):
        raise ValueError(f"{name}: {scales.numel()} global scales for {len(segment_sizes)} fused segments")
    sizes = torch.tensor(list(segment_sizes), device=scales.device)
    return scales.repeat_interleave(sizes)


def prepare_linear(
    codes: torch.Tensor,  # uint8 [N, K/2]
    block_scales: torch.Tensor,  # e4m3 [N, K/16]
    global_scales: torch.Tensor,  # f32 [S], one per fused segment
    segment_sizes: Sequence[int],  # rows of each segment, summing to N
    *,
    layout: Layout,
    groups: int = 1,
    name: str = "linear",
) -> PreparedLinear:
    """Validate one linear layer's checkpoint tensors and lay them out for `layout`'s kernel.

    With `groups` > 1 the weight is block diagonal: rows of group g multiply the g-th K columns of x only.
    Raises ValueError naming `name`, the value and the remedy for a bad shape, dtype or scale.
    """
    n, k = _check_pair(codes, block_scales, name)
    row_scale = segment_row_scale(global_scales, segment_sizes, name)
    if row_scale.numel() != n:
        raise ValueError(f"{name}: segments of {list(segment_sizes)} rows do not add up to N = {n}")
    if n % groups:
        raise ValueError(f"{name}: N = {n} rows do not divide into {groups} groups")
    codes, block_scales = LAYOUTS[layout].lay_out_linear(codes, block_scales, groups)
    return PreparedLinear(codes, block_scales, row_scale, n, k, layout, groups)


def prepare_experts(
    w13_codes: torch.Tensor,  # uint8 [E, 2I, H/2]
    w13_block_scales: torch.Tensor,  # e4m3 [E, 2I, H/16]
    w13_global_scales: torch.Tensor,  # f32 [E, 2]: w1's, w3's
    w2_codes: torch.Tensor,  # uint8 [E, H, I/2]
    w2_block_scales: torch.Tensor,  # e4m3 [E, H, I/16]
    w2_global_scales: torch.Tensor,  # f32 [E]
    *,
    layout: Layout,
    name: str = "experts",
) -> PreparedExperts:
    """Validate a layer's local experts and lay them out for `layout`'s kernel, all experts at once.

    w1 and w3 keep their own global scale (they are scaled before SwiGLU). Raises ValueError as
    `prepare_linear` does.
    """
    two_i, hidden = _check_pair(w13_codes, w13_block_scales, f"{name}.w13")
    w2_rows, intermediate = _check_pair(w2_codes, w2_block_scales, f"{name}.w2")
    num_experts = w13_codes.shape[0]
    if two_i != 2 * intermediate or w2_rows != hidden or w2_codes.shape[0] != num_experts:
        raise ValueError(
            f"{name}: w13 of shape {tuple(w13_codes.shape)} and w2 of shape {tuple(w2_codes.shape)} (packed) "
            f"do not belong to the same experts: expected w13 [E, 2I, H/2] and w2 [E, H, I/2]"
        )
    for matrix, scales, expected in (
        ("w13", w13_global_scales, (num_experts, 2)),
        ("w2", w2_global_scales, (num_experts,)),
    ):
        if tuple(scales.shape) != expected:
            raise ValueError(f"{name}.{matrix}: global scales must be {expected}, got {tuple(scales.shape)}")
    check_global_scale(w13_global_scales.float(), f"{name}.w13")
    check_global_scale(w2_global_scales.float(), f"{name}.w2")
    w13_row_scale = w13_global_scales.detach().float().reshape(num_experts, 2)
    w13_row_scale = w13_row_scale.repeat_interleave(intermediate, dim=1).contiguous()
    w2_row_scale = w2_global_scales.detach().float().reshape(num_experts, 1).expand(-1, hidden).contiguous()
    w13_codes, w13_block_scales, w2_codes, w2_block_scales = LAYOUTS[layout].lay_out_experts(
        w13_codes, w13_block_scales, w2_codes, w2_block_scales
    )
    return PreparedExperts(
        w13_codes, w13_block_scales, w13_row_scale, w2_codes, w2_block_scales, w2_row_scale, layout
    )


def plain_linear(operands: PreparedLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """The checkpoint's (codes uint8 [N, K/2], block scales e4m3 [N, K/16]) back from any layout; may be copies."""
    o = operands
    return LAYOUTS[o.layout].plain_linear(o.codes, o.block_scales, o.n, o.k, o.groups)


def plain_panels(operands: PreparedLinear, panels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`plain_linear` of the weight's `panels` of 64 rows, int64 [P], counted group by group -> [P, 64, ...].

    Where a group ends inside a panel, what its remaining rows hold is not said.
    """
    o = operands
    return LAYOUTS[o.layout].plain_panels(o.codes, o.block_scales, panels, o.n, o.k, o.groups)


def plain_experts(operands: PreparedExperts) -> tuple[torch.Tensor, ...]:
    """The checkpoint's (w13 codes, block scales, w2 codes, block scales) back from any layout; may be copies."""
    o = operands
    return LAYOUTS[o.layout].plain_experts(
        o.w13_codes, o.w13_block_scales, o.w2_codes, o.w2_block_scales, o.w2_row_scale.shape[1],
        o.w13_row_scale.shape[1] // 2,
    )  # fmt: skip
