"""What a checkpoint's linears are stored as: one `Linear` per matrix, whatever the dialect of names and scales."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

from . import names
from .headers import CheckpointError, Tensor

GROUP_SIZE = 16
FP8_BLOCK = 128
MXFP4_BLOCK = 32
WIDE = {"BF16": "bf16", "F16": "f16", "F32": "f32"}
PACKED_DTYPES = ("U8", "I8")


@dataclass(frozen=True)
class Linear:
    """A weight of logical shape [n, k] in one `format`: bf16, f16, f32, fp8, mxfp4 or nvfp4.

    `weight` and `scale` are the elements and their block scales (None for the wide formats). NVFP4 has a
    `global_scale`, and may have an `input_scale`; with `divisors` both are reciprocals (compressed-tensors).
    """

    name: str
    kind: str
    format: str
    n: int
    k: int
    weight: Tensor
    scale: Tensor | None = None
    global_scale: Tensor | None = None
    input_scale: Tensor | None = None
    divisors: bool = False

    @property
    def nbytes(self) -> int:
        parts = (self.weight, self.scale, self.global_scale, self.input_scale)
        return sum(part.nbytes for part in parts if part is not None)


@dataclass(frozen=True)
class Contents:
    """A checkpoint's tensors by what they are. `copied` holds MTP, under the names it has in the source."""

    linears: dict[str, Linear]
    parameters: dict[str, Tensor]
    copied: dict[str, Tensor]


def _expect(tensor: Tensor, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    if tensor.shape != shape or tensor.dtype not in dtypes:
        raise CheckpointError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}, expected {' or '.join(dtypes)} {list(shape)}"
        )


def _scalar(tensor: Tensor | None, name: str) -> Tensor | None:
    if tensor is not None and (tensor.dtype != "F32" or tensor.shape not in ((), (1,))):
        raise CheckpointError(f"{name} is {tensor.dtype} {list(tensor.shape)}, expected one F32 number")
    return tensor


def _linear(name: str, leaves: dict[str, Tensor]) -> Linear:
    kind = names.kind_of(name)
    leaves = dict(leaves)
    divisors = "weight_packed" in leaves
    weight = leaves.pop("weight_packed", None) or leaves.pop("weight", None)
    if weight is None:
        raise CheckpointError(
            f"{name} has {', '.join(sorted(leaves))} but no weight; the export is incomplete"
        )
    if len(weight.shape) != 2:
        raise CheckpointError(f"{name}.weight has shape {list(weight.shape)}; a linear's has two dimensions")
    n, stored = weight.shape
    scale = next(
        (leaves.pop(leaf) for leaf in ("scale", "weight_scale", "weight_scale_inv") if leaf in leaves), None
    )
    suffix = ("global_scale", "input_global_scale") if divisors else ("scale_2", "input_scale")
    global_scale = _scalar(leaves.pop(f"weight_{suffix[0]}", None), f"{name}.weight_{suffix[0]}")
    input_scale = _scalar(leaves.pop(suffix[1], None), f"{name}.{suffix[1]}")
    if leaves:
        raise CheckpointError(
            f"{name} has unexpected {', '.join(sorted(leaves))} beside {weight.dtype} weights"
        )
    found = Linear(name, kind, "", n, stored, weight, scale, global_scale, input_scale, divisors)
    if weight.dtype in WIDE:
        if scale or global_scale or input_scale:
            raise CheckpointError(f"{name} is {weight.dtype} and has scales; one of the two is left over")
        return replace(found, format=WIDE[weight.dtype])
    if scale is None:
        raise CheckpointError(f"{name} is {weight.dtype} without block scales; the export is incomplete")
    if weight.dtype == "F8_E4M3":
        blocks = (-(-n // FP8_BLOCK), -(-stored // FP8_BLOCK))
        _expect(scale, f"{name}'s scale", blocks, ("F8_E8M0", "F32", "BF16", "F16"))
        return replace(found, format="fp8")
    if weight.dtype not in PACKED_DTYPES:
        raise CheckpointError(
            f"{name} is {weight.dtype}; known are BF16, F16, F32, FP8 blocks, MXFP4 and NVFP4"
        )
    k = 2 * stored
    if global_scale is None:
        _expect(scale, f"{name}'s scale", (n, k // MXFP4_BLOCK), ("F8_E8M0", "U8"))
        if k % MXFP4_BLOCK:
            raise CheckpointError(f"{name} is MXFP4 with K = {k}, not a multiple of {MXFP4_BLOCK}")
        return replace(found, format="mxfp4", k=k)
    if k % GROUP_SIZE:
        raise CheckpointError(f"{name} is NVFP4 with K = {k}, not a multiple of {GROUP_SIZE}")
    _expect(scale, f"{name}.weight_scale", (n, k // GROUP_SIZE), ("F8_E4M3",))
    return replace(found, format="nvfp4", k=k)


def _unstack(name: str, tensor: Tensor) -> dict[str, Tensor] | None:
    """HF's stacked experts [E, out, in] -> one tensor per native expert name, or None if `name` is not one."""
    layer, rest = names.split_layer(name)
    if layer is None or rest not in names.STACKED:
        return None
    matrices = names.STACKED[rest]
    if len(tensor.shape) != 3 or tensor.shape[1] % len(matrices) or tensor.dtype not in WIDE:
        raise CheckpointError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}; stacked experts are read only as BF16, F16 or F32 "
            f"[experts, out, in]"
        )
    experts, rows, columns = tensor.shape
    parts = experts * len(matrices)
    return {
        f"layers.{layer}.ffn.experts.{expert}.{matrix}": tensor.part(
            expert * len(matrices) + position, parts, (rows // len(matrices), columns)
        )
        for expert in range(experts)
        for position, matrix in enumerate(matrices)
    }


def read_contents(tensors: dict[str, Tensor], num_layers: int) -> Contents:
    """Tensors by their names in the files -> what they are. CheckpointError on the first that does not fit."""
    leaves: dict[str, dict[str, Tensor]] = defaultdict(dict)
    parameters: dict[str, Tensor] = {}
    copied: dict[str, Tensor] = {}

    def put(where: dict, key: str, tensor: Tensor, source: str) -> None:
        if key in where:
            raise CheckpointError(f"{source} is stored twice, under native and HF names")
        where[key] = tensor

    for name, tensor in tensors.items():
        if names.is_mtp(name, num_layers):
            copied[name] = tensor
        elif (unstacked := _unstack(name, tensor)) is not None:
            for linear, part in unstacked.items():
                put(leaves[linear], "weight", part, linear)
        else:
            native, leaf = names.identify(name)
            if leaf:
                put(leaves[native], leaf, tensor, name)
            else:
                put(parameters, native, tensor, name)
    linears = {name: _linear(name, leaves[name]) for name in sorted(leaves, key=names.natural_order)}
    return Contents(linears, dict(sorted(parameters.items())), dict(sorted(copied.items())))
