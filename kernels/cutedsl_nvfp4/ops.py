"""torch.ops.cutedsl.*: the opaque ops every layer calls. Tensors and numbers in, tensors out.

    nvfp4_linear    out[m, n] = act_scale[m] * row_scale[n] * sum_k x'[m, k] w[n, k] + bias[n]
    nvfp4_experts   out[m] = sum_t topk_weights[m, t] * w2 @ swiglu(w1 @ x, w3 @ x) of expert topk_ids[m, t]

x' is x (W4A16), or with `quantize_activations` x rounded to NVFP4 (W4A4) with global scale `act_scale`,
per token where act_scale is None. Weights are the operands prepare.py made for the same device, in the `layout` that
it was asked for. An op never mutates, allocates nothing but its result and scratch, and keeps no state between calls.
"""

import torch

from . import reference, settings
from .family import Layout, family_for


def _require_reference(device: torch.device, op: str, batch_invariant: bool) -> None:
    """Raise unless the torch reference may serve `device` and does what is asked."""
    if batch_invariant:
        raise ValueError("the torch reference does not promise batch-invariant results")
    if device.type == "cpu" or settings.implementation() is settings.Implementation.REFERENCE:
        return
    raise RuntimeError(
        f"cutedsl::{op} has no kernel for {device}; vLLM should have selected another kernel. "
        f"CUTEDSL_NVFP4_IMPL=reference runs the slow torch reference"
    )


def _check_linear(
    x: torch.Tensor, codes: torch.Tensor, row_scale: torch.Tensor, n: int, k: int, groups: int
) -> None:
    if x.dim() != 2 or x.shape[1] != groups * k:
        raise ValueError(f"x must be [M, {groups} * {k}], got {tuple(x.shape)}")
    if n % groups:
        raise ValueError(f"N = {n} rows do not divide into {groups} groups")
    if codes.numel() != n * k // 2 or row_scale.shape != (n,):
        raise ValueError(
            f"codes {tuple(codes.shape)} and row_scale {tuple(row_scale.shape)} do not belong to N = {n}, K = {k}"
        )


@torch.library.custom_op("cutedsl::nvfp4_linear", mutates_args=())
def nvfp4_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    block_scales: torch.Tensor,
    row_scale: torch.Tensor,
    act_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    groups: int,
    quantize_activations: bool,
    out_dtype: torch.dtype,
    layout: str,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """x [M, groups * K] times the prepared weight [N, K] -> [M, N] of `out_dtype`.

    With groups > 1, rows n of group g = n // (N / groups) see x[:, g*K : (g+1)*K] only. `layout` is the Layout that
    the operands were prepared in. With `batch_invariant` a row's result does not depend on the other rows; ValueError
    from kernels that do not offer it, or not the arithmetic that is asked for.
    """
    if layout != Layout.PLAIN:
        family = family_for(Layout(layout), x.device)
        family.require(quantize_activations, batch_invariant)
        return family.linear.run(
            x, codes, block_scales, row_scale, act_scale, bias,
            n=n, k=k, groups=groups, out_dtype=out_dtype, batch_invariant=batch_invariant,
        )  # fmt: skip
    _check_linear(x, codes, row_scale, n, k, groups)
    _require_reference(x.device, "nvfp4_linear", batch_invariant)
    return reference.linear(
        x, codes, block_scales, row_scale, act_scale, bias,
        quantize_activations=quantize_activations, groups=groups, out_dtype=out_dtype,
    )  # fmt: skip


@nvfp4_linear.register_fake
def _(x, codes, block_scales, row_scale, act_scale, bias, n, k, groups, quantize_activations, out_dtype, layout,
      batch_invariant=False):  # fmt: skip
    return x.new_empty((x.shape[0], n), dtype=out_dtype)


@torch.library.custom_op("cutedsl::nvfp4_experts", mutates_args=())
def nvfp4_experts(
    x: torch.Tensor,
    w13_codes: torch.Tensor,
    w13_block_scales: torch.Tensor,
    w13_row_scale: torch.Tensor,
    w2_codes: torch.Tensor,
    w2_block_scales: torch.Tensor,
    w2_row_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    act_scale_13: torch.Tensor | None,
    act_scale_2: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    quantize_activations: bool,
    swiglu_limit: float | None,
    out_dtype: torch.dtype,
    layout: str,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """x [M, H] through its top-k prepared experts -> [M, H] of `out_dtype`; see reference.experts.

    `layout` and `batch_invariant` as in `nvfp4_linear`.
    """
    weights = (w13_codes, w13_block_scales, w13_row_scale, w2_codes, w2_block_scales, w2_row_scale)
    routing = (topk_weights, topk_ids, act_scale_13, act_scale_2, expert_map)
    if layout != Layout.PLAIN:
        family = family_for(Layout(layout), x.device)
        family.require(quantize_activations, batch_invariant)
        return family.experts.run(
            x, *weights, *routing, hidden=w2_row_scale.shape[1], intermediate=w13_row_scale.shape[1] // 2,
            swiglu_limit=swiglu_limit, out_dtype=out_dtype, batch_invariant=batch_invariant,
        )  # fmt: skip
    if x.dim() != 2 or topk_ids.shape != topk_weights.shape or topk_ids.shape[0] != x.shape[0]:
        raise ValueError(
            f"x must be [M, H] and topk_ids, topk_weights [M, T], got {tuple(x.shape)}, "
            f"{tuple(topk_ids.shape)}, {tuple(topk_weights.shape)}"
        )
    _require_reference(x.device, "nvfp4_experts", batch_invariant)
    return reference.experts(
        x, *weights, *routing, quantize_activations=quantize_activations, swiglu_limit=swiglu_limit,
        out_dtype=out_dtype,
    )  # fmt: skip


@nvfp4_experts.register_fake
def _(x, w13_codes, w13_block_scales, w13_row_scale, w2_codes, w2_block_scales, w2_row_scale, topk_weights,
      topk_ids, act_scale_13, act_scale_2, expert_map, quantize_activations, swiglu_limit, out_dtype, layout,
      batch_invariant=False):  # fmt: skip
    return x.new_empty(x.shape, dtype=out_dtype)
