"""NVFP4 arithmetic in plain torch: the one oracle for tests, benchmarks, self-check and CPU serving.

W4A16 (activations stay in their dtype)

    out[m, n] = sum_k x[m, k] * w[n, k] * row_scale[n] + bias[n]

W4A4 (activations are quantized with `act_scale`, then multiplied exactly)

    out[m, n] = sum_k xq[m, k] * w[n, k] * act_scale[m] * row_scale[n] + bias[n]

with w = e2m1 * block scale, without the global scale: `row_scale[n]` is the weight's global scale,
one per output row, so that fused segments with different global scales stay exact.
All operands are in the checkpoint's layout (format.py).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .format import (
    AMAX_PER_GLOBAL_SCALE,
    E2M1_MAX,
    E4M3_MAX,
    GROUP_SIZE,
    SCALE_DTYPE,
    check_k,
    decode_e2m1,
    encode_e2m1,
    pack_codes,
    unpack_codes,
)


def _divide(values: torch.Tensor, number: float) -> torch.Tensor:
    """values / number, correctly rounded: by a Python number torch multiplies with the reciprocal on CUDA."""
    return values / torch.full_like(values, number)


def quantize(x: torch.Tensor, global_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round [..., K] to NVFP4 -> (codes uint8 [..., K/2], block_scales e4m3 [..., K/16]).

    `global_scale` is positive f32 and broadcasts against [..., 1]: a scalar, or one per row. A group
    whose scale underflows to zero gets all-zero codes; magnitudes beyond what the scales hold saturate.
    """
    check_k(x.shape[-1])
    groups = x.float().unflatten(-1, (-1, GROUP_SIZE))
    ideal = _divide(groups.abs().amax(-1), E2M1_MAX) / global_scale
    block_scales = ideal.clamp(max=E4M3_MAX).to(SCALE_DTYPE)
    step = block_scales.float() * global_scale
    scaled = torch.where(step.unsqueeze(-1) > 0, groups / step.unsqueeze(-1), torch.zeros_like(groups))
    return pack_codes(encode_e2m1(scaled).flatten(-2)), block_scales


def dequantize(
    codes: torch.Tensor,
    block_scales: torch.Tensor,
    global_scale: torch.Tensor | float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """(codes [..., N, K/2], block_scales [..., N, K/16], global_scale) -> values [..., N, K].

    `global_scale` is a scalar or broadcasts against [..., N, 1]. The product is formed in f32 and
    rounded once to `dtype`.
    """
    values = decode_e2m1(unpack_codes(codes)).unflatten(-1, (-1, GROUP_SIZE))
    values = (values * block_scales.float().unsqueeze(-1)).flatten(-2)
    return (values * global_scale).to(dtype)


def dynamic_act_scale(x: torch.Tensor) -> torch.Tensor:
    """Per-token activation global scale f32 [M] of x [M, K]: amax / (6 * 448), 1 for an all-zero token."""
    amax = x.abs().amax(-1).float()
    return torch.where(amax > 0, _divide(amax, AMAX_PER_GLOBAL_SCALE), torch.ones_like(amax))


def _round_activations(x: torch.Tensor, act_scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] -> (its NVFP4 rounding without the global scale, f32 [M, K]; the scale used, f32 [M or 1, 1])."""
    scale = (dynamic_act_scale(x) if act_scale is None else act_scale.float()).reshape(-1, 1)
    return dequantize(*quantize(x, scale)), scale


def linear(
    x: torch.Tensor,  # [M, groups * K]
    codes: torch.Tensor,  # uint8 [N, K/2]
    block_scales: torch.Tensor,  # e4m3 [N, K/16]
    row_scale: torch.Tensor,  # f32 [N]
    act_scale: torch.Tensor | None = None,  # f32 [1] or [M]; None with quantize_activations: per token
    bias: torch.Tensor | None = None,  # [N]
    *,
    quantize_activations: bool = False,
    groups: int = 1,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """NVFP4 linear layer -> [M, N] of `out_dtype`.

    With `groups` > 1 the weight is block diagonal: output rows n of group g = n // (N / groups) see only
    x[:, g*K : (g+1)*K] (DeepSeek-V4's wo_a). Accumulates in f32.
    """
    m, n = x.shape[0], codes.shape[0]
    weight = dequantize(codes, block_scales)
    if quantize_activations:
        x32, x_scale = _round_activations(x, act_scale)
    else:
        x32, x_scale = x.float(), None
    if groups == 1:
        acc = F.linear(x32, weight)
    else:
        grouped = x32.view(m, groups, x32.shape[1] // groups).transpose(0, 1)
        acc = torch.bmm(grouped, weight.view(groups, n // groups, -1).transpose(1, 2))
        acc = acc.transpose(0, 1).reshape(m, n)
    acc = acc * row_scale
    if x_scale is not None:
        acc = acc * x_scale
    if bias is not None:
        acc = acc + bias.float()
    return acc.to(out_dtype)


def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float | None) -> torch.Tensor:
    """silu(gate) * up, with gate clamped to at most `limit` and up to +-`limit` first (DeepSeek-V4: 10)."""
    if limit is not None:
        gate = gate.clamp(max=limit)
        up = up.clamp(-limit, limit)
    return F.silu(gate) * up


def experts(
    x: torch.Tensor,  # [M, H]
    w13_codes: torch.Tensor,  # uint8 [E, 2I, H/2], gate rows (w1) first, then up rows (w3)
    w13_block_scales: torch.Tensor,  # e4m3 [E, 2I, H/16]
    w13_row_scale: torch.Tensor,  # f32 [E, 2I]
    w2_codes: torch.Tensor,  # uint8 [E, H, I/2]
    w2_block_scales: torch.Tensor,  # e4m3 [E, H, I/16]
    w2_row_scale: torch.Tensor,  # f32 [E, H]
    topk_weights: torch.Tensor,  # f32 [M, T]
    topk_ids: torch.Tensor,  # int [M, T], global expert ids; -1 is skipped
    act_scale_13: torch.Tensor | None = None,  # f32 [1] or [E]
    act_scale_2: torch.Tensor | None = None,  # f32 [1] or [E]
    expert_map: torch.Tensor | None = None,  # int [global experts] -> local id or -1
    *,
    quantize_activations: bool = False,
    swiglu_limit: float | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    observe: Callable[..., None] | None = None,
) -> torch.Tensor:
    """Mixture of experts -> [M, H] of `out_dtype`.

    out[m] = sum_t topk_weights[m, t] * w2[e] @ swiglu(w1[e] @ x[m], w3[e] @ x[m]), e = topk_ids[m, t].
    The intermediate is rounded to x's dtype, as every kernel that stores it does; the sum over t is in f32.
    `observe` is called with (0, x) and (1, the intermediates [P, I], their local expert ids int64 [P]).
    """
    if observe is not None:
        observe(0, x)
    m, hidden = x.shape
    local = topk_ids.long()
    if expert_map is not None:
        local = torch.where(local >= 0, expert_map.long()[local.clamp(min=0)], local)
    token, slot = (local >= 0).nonzero(as_tuple=True)
    expert_of = local[token, slot]  # [P], one entry per (token, expert) pair
    order = expert_of.argsort(stable=True)
    token, slot, expert_of = token[order], slot[order], expert_of[order]
    counts = torch.bincount(expert_of, minlength=w13_codes.shape[0]).tolist()

    def scale_of_pair(act_scale: torch.Tensor | None) -> torch.Tensor | None:
        return act_scale if act_scale is None or act_scale.numel() == 1 else act_scale[expert_of]

    def multiply(rows, rows_scale, codes, block_scales, row_scale) -> torch.Tensor:
        """rows f32 [P, K], sorted by expert, times each expert's weight [N, K] -> f32 [P, N]."""
        out = torch.empty(rows.shape[0], codes.shape[1], dtype=torch.float32, device=x.device)
        first = 0
        for expert, count in enumerate(counts):
            if count:
                pairs = slice(first, first + count)
                out[pairs] = (
                    F.linear(rows[pairs], dequantize(codes[expert], block_scales[expert])) * row_scale[expert]
                )
                first += count
        return out if rows_scale is None else out * rows_scale

    if quantize_activations and act_scale_13 is not None and act_scale_13.numel() > 1:
        rows, rows_scale = _round_activations(x[token], scale_of_pair(act_scale_13))
    elif quantize_activations:  # the same for every expert: round each token once
        rounded, scale = _round_activations(x, act_scale_13)
        rows, rows_scale = rounded[token], scale[token] if scale.shape[0] > 1 else scale
    else:
        rows, rows_scale = x[token].float(), None
    gate, up = multiply(rows, rows_scale, w13_codes, w13_block_scales, w13_row_scale).chunk(2, dim=-1)
    intermediate = swiglu(gate, up, swiglu_limit).to(x.dtype)
    if observe is not None:
        observe(1, intermediate, expert_of)
    if quantize_activations:
        rows, rows_scale = _round_activations(intermediate, scale_of_pair(act_scale_2))
    else:
        rows, rows_scale = intermediate.float(), None
    down = multiply(rows, rows_scale, w2_codes, w2_block_scales, w2_row_scale)
    weighted = down * topk_weights[token, slot].float().unsqueeze(-1)
    acc = torch.zeros(m, hidden, dtype=torch.float32, device=x.device)
    return acc.index_add_(0, token, weighted).to(out_dtype)
