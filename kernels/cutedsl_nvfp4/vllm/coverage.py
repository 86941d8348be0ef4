"""Every tensor of the checkpoint has a place in the model, and every parameter has its tensors.

Checked from names alone, before anything is read: vLLM tracks what it loaded by whole parameters, so one
missing expert or one missing half of a fused layer goes unnoticed, and packed codes that were never written
cannot be told from others by value.
"""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import torch
from torch.nn import Module, Parameter

from ..checkpoint.compressed_tensors import as_native
from ..checkpoint.config import holds_nvfp4
from ..checkpoint.draft import draft_head
from ..checkpoint.files import StoredTensor, check_whole_parameters, gather, read_checkpoint
from ..checkpoint.layers import FUSED
from ..checkpoint.names import draft_index, listed
from .architectures import is_checked

# Parameters whose tensors a checkpoint need not have, and tensors that may stay unread: name pattern and why.
# Experts of other ranks are not among the latter: by name they have a place on every rank.
OPTIONAL_PARAMETERS = (
    (r"input_scale$", "weight-only checkpoints have none; W4A16 and dynamic scales need none"),
)
UNREAD_TENSORS = (
    (r"(^|\.)mtp\.", "draft layers, read only for speculative decoding"),
    (
        r"^((vision|aligner)\.|image_)",
        "the vision tower, which vLLM leaves out where images are switched off",
    ),
)

LISTED = 10  # names shown in an error


def _place(name: str, parameters: set[str]) -> tuple[str, str] | None:
    """(parameter, segment) that a tensor of vLLM's name `name` fills, or None."""
    if expert := re.fullmatch(r"(.*\.experts)\.(\d+)\.w([123])\.(.+)", name):
        base, index, matrix, leaf = expert.groups()
        merged = "w2" if matrix == "2" else "w13"
        for parameter in (f"{base}.routed_experts.{merged}_{leaf}", f"{base}.{merged}_{leaf}"):
            if parameter in parameters:
                return parameter, f"{index}.w{matrix}"
        return None
    segment = ""
    for fused, parts in FUSED.items():
        for part in parts:
            if f".{part}." in name:
                name, segment = name.replace(f".{part}.", f".{fused}."), part
    for parameter in (name, f"{name}_inv"):
        if parameter in parameters:
            return parameter, segment
    return None


def _segments(parameter: str, num_experts: int) -> set[str]:
    """The segments that `parameter` needs; {""} for one that takes a single tensor."""
    if merged := re.search(r"\.experts\.(?:routed_experts\.)?(w13|w2)_", parameter):
        matrices = ("1", "3") if merged.group(1) == "w13" else ("2",)
        return {f"{expert}.w{matrix}" for expert in range(num_experts) for matrix in matrices}
    for fused, parts in FUSED.items():
        if f".{fused}." in parameter:
            return set(parts)
    return {""}


def check_coverage(names: set[str], parameters: set[str], mapper, num_experts: int, is_elsewhere) -> None:
    """Raise ValueError listing checkpoint tensors without a place and parameters without their tensors.

    `names` are the checkpoint's, `mapper` renames one to vLLM's or drops it (`apply_list`), `parameters` are
    the model's, and `is_elsewhere(name)` tells a layer that another pipeline rank holds.
    """
    needed = {parameter: _segments(parameter, num_experts) for parameter in parameters}
    filled: dict[str, set[str]] = defaultdict(set)
    places: dict[tuple[str, str], str] = {}  # (parameter, segment): the checkpoint's tensor for it
    unplaced = []
    for name in sorted(names):
        mapped = mapper.apply_list([name])
        if not mapped and any(re.search(pattern, name) for pattern, _ in UNREAD_TENSORS):
            continue
        if mapped and is_elsewhere(mapped[0]):
            continue
        place = _place(mapped[0], parameters) if mapped else None
        if place is None or place[1] not in needed[place[0]]:
            unplaced.append(name)
        elif place[1] in filled[place[0]]:
            raise ValueError(
                f"the checkpoint holds {places[place]} and {name}, which are the same tensor by two names; "
                f"delete one"
            )
        else:
            filled[place[0]].add(place[1])
            places[place] = name
    missing = []
    for parameter in parameters:
        if any(re.search(pattern, parameter) for pattern, _ in OPTIONAL_PARAMETERS):
            continue
        absent = needed[parameter] - filled[parameter]
        missing += [f"{parameter} [{segment}]" if segment else parameter for segment in absent]
    problems, remedies = [], ["download it again if it is incomplete"]
    if missing:
        problems.append(
            f"{len(missing)} parameters would stay unwritten because the checkpoint lacks their tensors: "
            f"{listed(missing, LISTED)}"
        )
    if unplaced:
        problems.append(
            f"{len(unplaced)} tensors of the checkpoint have no place in the model: {listed(unplaced, LISTED)}"
        )
    unlisted = {
        name.removesuffix(".weight")
        for (parameter, segment), name in places.items()
        if f"{parameter}_scale_2" in parameters
        and segment not in filled[f"{parameter}_scale"] | filled[f"{parameter}_scale_2"]
    }
    if unlisted:
        remedies.append(
            f"add to quantization_config.ignore what is stored unquantized: {listed(unlisted, LISTED)}"
        )
    stored = {name.removesuffix(".weight_scale") for name in unplaced if name.endswith(".weight_scale")}
    if stored:
        remedies.append(
            f"take off quantization_config.ignore what is stored quantized: {listed(stored, LISTED)}"
        )
    if problems:
        raise ValueError(
            f"the checkpoint and the model do not fit. {'; '.join(problems)}. What to do: {'; '.join(remedies)}"
        )


def _is_drafted(model: Module) -> Callable[[str], bool]:
    """Whether a tensor's name is one of the draft layers that `model`'s config.json declares, counted as its layers.

    vLLM's model classes know `mtp.{i}` alone and leave that out themselves.
    """
    head = draft_head(vars(model.config))
    layers = range(head.layers if head is not None else 0)
    return lambda name: "mtp." not in name and draft_index(name, model.config.num_hidden_layers) in layers


def native_weights(
    model: Module, weights: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) pairs as a loader reads them -> as `model` takes them: a DeepSeek-V4 `as_native`, others as is."""
    if not is_checked(model):
        return iter(weights)
    is_drafted = _is_drafted(model)
    return as_native((name, tensor) for name, tensor in weights if not is_drafted(name))


def check_weight_coverage(model: Module, files: list[str]) -> None:
    """`check_coverage` for a DeepSeek-V4 `model` about to be loaded from `files`; other models pass.

    Raises ValueError for files without headers too, where the model has NVFP4 layers.
    """
    if not is_checked(model):
        return
    pickles = [str(file) for file in files if not str(file).endswith(".safetensors")]
    if not pickles:
        check_stored(model, read_checkpoint(files))
    elif holds_nvfp4(getattr(model.config, "quantization_config", None)):
        raise ValueError(
            f"{pickles[0]} is not a safetensors file, and NVFP4 layers are loaded from those alone: coverage is "
            f"checked from their headers before anything is read. Store the checkpoint as safetensors"
        )


def check_streamed(model: Module, files: list[str], headers: dict) -> None:
    """`check_coverage` for a DeepSeek-V4 `model` about to be loaded by Run:ai's streamer; other models pass.

    `headers` are the streamer's: {position in `files`: of each tensor its name, dtype (safetensors' word) and shape}.
    Of files in object storage there is nothing else; local ones are read as every other loader's.
    """
    if not is_checked(model):
        return
    if all(map(os.path.isfile, files)):
        check_stored(model, read_checkpoint(files))
    else:
        stored = (
            (entry.name, StoredTensor(files[position], entry.dtype, tuple(entry.shape)))
            for position, entries in headers.items()
            for entry in entries
        )
        check_stored(model, gather(stored))


def check_stored(model: Module, tensors: dict[str, StoredTensor]) -> None:
    """Raise ValueError where a checkpoint's `tensors` do not fit a DeepSeek-V4 `model`, by name, dtype and shape."""
    from vllm.distributed import get_tensor_model_parallel_world_size
    from vllm.model_executor.models.utils import is_pp_missing_parameter

    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.numel()}
    is_drafted = _is_drafted(model)
    check_coverage(
        {name for name in tensors if not is_drafted(name)},
        set(parameters),
        model.hf_to_vllm_mapper,
        model.config.n_routed_experts,
        lambda name: is_pp_missing_parameter(name, model),
    )
    config, names = model.config, set(parameters)
    padded = {  # parameters that vLLM makes larger than the tensor: suffix -> the tensor's shape
        "attn_sink": (config.num_attention_heads,),
        "embed_tokens.weight": (config.vocab_size, config.hidden_size),
        "lm_head.weight": (config.vocab_size, config.hidden_size),
    }

    def parameter_of(name: str) -> tuple[Parameter, tuple[int, ...]] | None:
        mapped = model.hf_to_vllm_mapper.apply_list([name])
        place = _place(mapped[0], names) if mapped else None
        if place is None or place[1]:
            return None
        parameter = parameters[place[0]]
        suffix = next((suffix for suffix in padded if place[0].endswith(suffix)), None)
        return parameter, padded.get(suffix, tuple(parameter.shape))

    check_whole_parameters(tensors, parameter_of, get_tensor_model_parallel_world_size())
