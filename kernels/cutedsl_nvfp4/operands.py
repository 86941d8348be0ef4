"""What every family checks before it launches, and where its result goes."""

from collections.abc import Iterable

import torch

from .family import arch_of
from .tile_choice import Tile

MAX_LOCAL_EXPERTS = 1024  # the routing kernels' (device/routing.py)
TYPE_NAMES = {torch.bfloat16: "bf16", torch.float32: "f32"}


def linear_variants(
    plain: Iterable[Tile], general: Iterable[Tile]
) -> list[tuple[Tile, torch.dtype, bool, bool]]:
    """(tile, result type, has a bias, aligned rows) of every linear kernel of a family that tells these apart.

    `plain` tiles serve results without a bias whose rows are whole 16-byte pieces, `general` ones the others.
    """
    return [
        *((tile, dtype, False, True) for tile in plain for dtype in TYPE_NAMES),
        *(
            (tile, dtype, has_bias, aligned)
            for tile in general
            for dtype in TYPE_NAMES
            for has_bias, aligned in ((True, True), (True, False), (False, False))
        ),
    ]


def check_experts_call(
    x: torch.Tensor,  # [M, H]
    weights: tuple[torch.Tensor, ...],
    topk_weights: torch.Tensor,  # [M, T]
    topk_ids: torch.Tensor,  # [M, T]
    expert_map: torch.Tensor | None,
    hidden: int,
    intermediate: int,
    num_local_experts: int,
    out_dtype: torch.dtype,
) -> None:
    """Raise ValueError for anything but the weights' own shapes that `run` cannot take."""
    arch_of(x.device)  # there is none but on a CUDA device
    if any(t.device != x.device for t in (*weights, topk_weights, topk_ids)):
        raise ValueError(f"x, weights and routing must be on one CUDA device, x is on {x.device}")
    if x.dtype != torch.bfloat16 or x.dim() != 2 or x.shape[1] != hidden:
        raise ValueError(f"x must be bf16 [M, {hidden}], got {x.dtype} {tuple(x.shape)}")
    if hidden % 16 or intermediate % 16:
        raise ValueError(f"hidden size {hidden} and intermediate size {intermediate} must be multiples of 16")
    if not 1 <= num_local_experts <= MAX_LOCAL_EXPERTS:
        raise ValueError(
            f"{num_local_experts} local experts; the routing kernel takes 1 to {MAX_LOCAL_EXPERTS}"
        )
    if topk_ids.dim() != 2 or topk_ids.shape[0] != x.shape[0] or topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"topk_ids and topk_weights must be [{x.shape[0]}, T], got {tuple(topk_ids.shape)} "
            f"and {tuple(topk_weights.shape)}"
        )
    if expert_map is not None and (expert_map.dim() != 1 or expert_map.device != x.device):
        raise ValueError(f"expert_map must be [experts] on {x.device}, got {tuple(expert_map.shape)}")
    if out_dtype not in TYPE_NAMES:
        raise ValueError(f"out_dtype must be torch.bfloat16 or torch.float32, got {out_dtype}")


def check_experts_tensor(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless one of a matrix's tensors is what prepare_experts makes."""
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous {str(dtype).removeprefix('torch.')} {shape} from prepare_experts, "
            f"got {tensor.dtype} {tuple(tensor.shape)}"
        )


def linear_result(
    out: torch.Tensor | None, m: int, n: int, out_dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """`out`, checked, or new memory [m, n]."""
    if out is None:
        return torch.empty((m, n), dtype=out_dtype, device=device)
    if out.shape != (m, n) or out.dtype != out_dtype or not out.is_contiguous():
        raise ValueError(f"out must be contiguous {out_dtype} {(m, n)}, got {out.dtype} {tuple(out.shape)}")
    return out


def experts_result(
    out: torch.Tensor | None, m: int, hidden: int, out_dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """`out`, checked, or new memory [m, hidden]; experts store whole 16-byte pieces."""
    if out is not None and out.shape == (m, hidden) and out.is_contiguous() and out.data_ptr() % 16:
        raise ValueError(f"out must start at a multiple of 16 bytes, it starts at {out.data_ptr():#x}")
    return linear_result(out, m, hidden, out_dtype, device)


def check_vectors(row_scale: torch.Tensor, bias: torch.Tensor | None, n: int, out_dtype: torch.dtype) -> None:
    """Raise ValueError for a row scale, a bias or a result type that no linear kernel takes."""
    if row_scale.dtype != torch.float32 or row_scale.shape != (n,) or not row_scale.is_contiguous():
        raise ValueError(
            f"row_scale must be contiguous f32 [{n}], got {row_scale.dtype} {tuple(row_scale.shape)}"
        )
    if bias is not None and (bias.dtype not in TYPE_NAMES or bias.shape != (n,)):
        raise ValueError(f"bias must be f32 or bf16 [{n}], got {bias.dtype} {tuple(bias.shape)}")
    if out_dtype not in TYPE_NAMES:
        raise ValueError(f"out_dtype must be torch.bfloat16 or torch.float32, got {out_dtype}")


def addressable(x: torch.Tensor) -> torch.Tensor:
    """x [M, K] as TMA and 16-byte copies can address it: itself, or a copy."""
    if x.stride(1) != 1 or x.stride(0) % 8 or x.stride(0) < x.shape[1] or x.data_ptr() % 16:
        return x.clone(memory_format=torch.contiguous_format)
    return x
