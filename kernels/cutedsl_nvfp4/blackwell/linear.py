"""What the linear layers of both Blackwell families check before they launch."""

import torch

from ..family import arch_of
from ..format import check_k, padded_k
from ..operands import check_vectors


def check_operands(x, codes, block_scales, row_scale, bias, n, k, groups, out_dtype, batch_invariant) -> None:
    """Raise ValueError unless the operands are those of `run`."""
    arch_of(x.device)  # there is none but on a CUDA device
    if any(t.device != x.device for t in (codes, block_scales, row_scale)):
        raise ValueError(
            f"x and weights must be on one CUDA device, x is on {x.device}, codes on {codes.device}"
        )
    if batch_invariant:
        raise ValueError("the Blackwell kernels do not promise batch-invariant results")
    check_k(k)
    if n % groups:
        raise ValueError(f"N = {n} rows do not divide into {groups} groups")
    scales_shape = (groups * -(-n // groups // 128), -(-k // 64), 32, 16)
    if x.dtype != torch.bfloat16 or x.dim() != 2 or x.shape[1] != groups * k:
        raise ValueError(f"x must be bf16 [M, {groups} * {k}], got {x.dtype} {tuple(x.shape)}")
    for name, tensor, shape in (
        ("codes", codes, (n, padded_k(k) // 2)),
        ("block_scales", block_scales, scales_shape),
    ):
        if tensor.dtype != torch.uint8 or tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous uint8 {shape} from prepare_linear for N = {n}, K = {k}, {groups} groups, "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
        if tensor.data_ptr() % 16:
            raise ValueError(f"{name} must start at a multiple of 16 bytes, got {tensor.data_ptr():#x}")
    check_vectors(row_scale, bias, n, out_dtype)
