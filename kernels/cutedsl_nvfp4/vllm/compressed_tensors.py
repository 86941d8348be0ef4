"""compressed-tensors' NVFP4 -> ModelOpt's: the config's groups to one ignore list, divisors to multipliers.

    weight_packed, weight_scale, weight_global_scale, input_global_scale
    weight         weight_scale  weight_scale_2       input_scale         (1 / the global scales)

The names change in names.py, for every consumer; the values here, as vLLM reads them.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..format import GROUP_SIZE, global_scale_from_divisor
from .layers import Layer
from .names import INPUT_DIVISOR, WEIGHT_DIVISOR

NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": GROUP_SIZE}


def _require_nvfp4(name: str, group: dict[str, Any]) -> None:
    weights = group.get("weights") or {}
    different = {key: weights.get(key) for key, value in NVFP4.items() if weights.get(key) != value}
    if different:
        raise ValueError(
            f"quantization_config.config_groups.{name} is not NVFP4 ({different}, expected "
            f"{ {key: NVFP4[key] for key in different} }); of compressed-tensors' formats only NVFP4 is served. "
            f"Export the other layers unquantized, or all of the checkpoint with ModelOpt"
        )


def to_modelopt(quantization: dict[str, Any], layers: Iterable[Layer]) -> dict[str, Any]:
    """`quantization_config` of compressed-tensors -> ModelOpt's for the same checkpoint, whose layers are `layers`.

    Raises ValueError for other formats than NVFP4, for transforms and sparsity, and for a group without layers.
    """
    for key in ("transform_config", "sparsity_config"):
        if quantization.get(key):
            raise ValueError(f"quantization_config.{key}: not served; export the checkpoint without it")
    groups, ignored = quantization.get("config_groups") or {}, quantization.get("ignore") or []
    for name, group in groups.items():
        _require_nvfp4(name, group)
    unquantized, empty = [], set(groups)
    for layer in layers:
        of_groups = {name for name, group in groups.items() if layer.matches_targets(group["targets"])}
        if not of_groups or layer.matches_targets(ignored):
            unquantized.append(layer.name)
        else:
            empty -= of_groups
    if empty or not groups:
        raise ValueError(
            f"quantization_config.config_groups {sorted(empty)} target no layer of DeepSeek-V4; targets are "
            f"Linear, a module's name, or re: and a regular expression over names"
        )
    weight_only = all(group.get("input_activations") is None for group in groups.values())
    return {
        "quant_method": "modelopt",
        "quant_algo": "W4A16_NVFP4" if weight_only else "NVFP4",
        "group_size": GROUP_SIZE,
        "ignore": unquantized,
    }


def with_multipliers(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """(checkpoint name, tensor) pairs as vLLM reads them; global scales that are divisors come out inverted.

    Raises ValueError naming the tensor for a divisor that is not finite and positive.
    """
    for name, tensor in weights:
        if name.rpartition(".")[2] in (WEIGHT_DIVISOR, INPUT_DIVISOR):
            try:
                tensor = global_scale_from_divisor(tensor)
            except ValueError as error:
                raise ValueError(f"{name}: {error}; export the checkpoint again") from None
        yield name, tensor
