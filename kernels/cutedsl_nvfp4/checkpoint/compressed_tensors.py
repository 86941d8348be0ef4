"""compressed-tensors' NVFP4 -> ModelOpt's, and its block FP8 -> DeepSeek's: config groups, and values that differ.

    weight_packed, weight_scale, weight_global_scale, input_global_scale      NVFP4
    weight         weight_scale  weight_scale_2       input_scale             (1 / the global scales)
    weight, weight_scale [N/128, K/128] in any floating dtype                 FP8
    weight, scale e8m0                                                        (refused unless powers of two)

Names that mean the same everywhere change in names.py; what depends on the tensor, here, as vLLM reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..format import GROUP_SIZE, SCALE_DTYPE, global_scale_from_divisor
from .layers import EXPERTS, Layer
from .names import INPUT_DIVISOR, WEIGHT_DIVISOR

FP8_BLOCK = [128, 128]
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": GROUP_SIZE}
FP8 = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": FP8_BLOCK}


def _is_nvfp4(name: str, group: dict[str, Any]) -> bool:
    """Whether a config group is NVFP4; False for block FP8, ValueError for anything else."""
    weights = group.get("weights") or {}
    for scheme in (NVFP4, FP8):
        if all(weights.get(key) == value for key, value in scheme.items()):
            return scheme is NVFP4
    described = {key: weights.get(key) for key in sorted(NVFP4.keys() | FP8.keys()) if key in weights}
    raise ValueError(
        f"quantization_config.config_groups.{name} has weights of {described}; of compressed-tensors' formats "
        f"NVFP4 ({NVFP4}) and block FP8 ({FP8}) are served. Export these layers in one of them, or unquantized"
    )


def native_scheme(
    quantization: dict[str, Any], layers: Iterable[Layer], drafted: Iterable[Layer] = ()
) -> dict[str, Any]:
    """compressed-tensors' `quantization_config` -> ModelOpt's, or DeepSeek's where there is FP8; for `layers`.

    Layers that are `drafted` have no part in the choice; those that are not NVFP4 are ignored.

    Raises ValueError for other formats, transforms, sparsity, groups without layers, and for FP8 beside
    NVFP4 outside the routed experts.
    """
    for key in ("transform_config", "sparsity_config"):
        if quantization.get(key):
            raise ValueError(f"quantization_config.{key}: not served; export the checkpoint without it")
    groups, ignored = quantization.get("config_groups") or {}, quantization.get("ignore") or []
    is_nvfp4 = {name: _is_nvfp4(name, group) for name, group in groups.items()}

    def group_of(layer: Layer) -> str | None:
        """The first group that matches is the layer's."""
        of = [name for name, group in groups.items() if layer.matches_targets(group["targets"])]
        return None if not of or layer.matches_targets(ignored) else of[0]

    in_nvfp4, in_fp8, unquantized, used = [], [], [], set()
    for layer in layers:
        group = group_of(layer)
        used.add(group)
        (unquantized if group is None else in_nvfp4 if is_nvfp4[group] else in_fp8).append(layer.name)
    of_drafts = {layer.name: group_of(layer) for layer in drafted}
    not_nvfp4 = [name for name, group in of_drafts.items() if group is None or not is_nvfp4[group]]
    empty = groups.keys() - used - set(of_drafts.values())
    if empty or not groups:
        raise ValueError(
            f"quantization_config.config_groups {sorted(empty)} target no layer of DeepSeek-V4; targets are "
            f"Linear, a module's name, or re: and a regular expression over names"
        )
    if not in_fp8:
        nvfp4_groups = [group for name, group in groups.items() if is_nvfp4[name] and name in used]
        weight_only = all(group.get("input_activations") is None for group in nvfp4_groups)
        return {
            "quant_method": "modelopt",
            "quant_algo": "W4A16_NVFP4" if weight_only else "NVFP4",
            "group_size": GROUP_SIZE,
            "ignore": unquantized + not_nvfp4,
        }
    not_experts = [name for name in in_nvfp4 if not name.endswith(EXPERTS)]
    other_experts = [name for name in in_fp8 + unquantized if name.endswith(EXPERTS)]
    if not_experts or other_experts:
        raise ValueError(
            f"quantization_config: FP8 layers are served beside NVFP4 routed experts only; "
            f"{', '.join((not_experts or other_experts)[:3])} would have to be "
            f"{'FP8 or unquantized' if not_experts else 'NVFP4'}. Export the checkpoint so, or all of it in NVFP4"
        )
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "weight_block_size": FP8_BLOCK,
        "moe_quant_algo": "NVFP4",
        "ignored_layers": unquantized,
    }


def _e8m0(scale: torch.Tensor, name: str) -> torch.Tensor:
    """Block scales in any floating dtype -> e8m0, which vLLM's FP8 layers have beside FP4 experts."""
    converted = scale.float().to(torch.float8_e8m0fnu)
    if not torch.equal(converted.float(), scale.float()):
        raise ValueError(
            f"{name}: FP8 block scales must be powers of two (ue8m0) here, got e.g. "
            f"{scale.float()[converted.float() != scale.float()][0].item()}; export with power-of-two scales, or "
            f"leave these layers unquantized"
        )
    return converted


def as_native(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """(checkpoint name, tensor) pairs as vLLM reads them, with divisors inverted and FP8 scales in e8m0.

    Draft layers pass as they are: the served model leaves them out. Raises ValueError naming the tensor for a divisor
    that is not finite and positive, or an FP8 scale that e8m0 cannot hold.
    """
    for name, tensor in weights:
        layer, _, leaf = name.rpartition(".")
        if "mtp." in name:
            pass
        elif leaf in (WEIGHT_DIVISOR, INPUT_DIVISOR):
            try:
                tensor = global_scale_from_divisor(tensor)
            except ValueError as error:
                raise ValueError(f"{name}: {error}; export the checkpoint again") from None
        elif leaf == "weight_scale" and tensor.dtype != SCALE_DTYPE:
            name, tensor = f"{layer}.scale", _e8m0(tensor, name)
        yield name, tensor
