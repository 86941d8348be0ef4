"""A checkpoint's safetensors files and index, checked from headers alone before any tensor is read.

headers.py checks a file: the header's length and JSON, that tensors fill the file without gaps, that shapes fit
their bytes. vLLM compares neither files with the index, nor dtypes and shapes with what the model needs: it casts
what it finds, and some of its loaders fill a parameter in part. Flipped bits inside a tensor's data are out of
reach here.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..format import GROUP_SIZE
from . import headers
from .folder import INDEX
from .headers import AGAIN
from .names import listed

logger = logging.getLogger(__name__)

LISTED = 5  # names shown in an error

FLOATS = {"F64", "F32", "F16", "BF16"}
INTEGERS = {"I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8"}
# {dtype of a parameter: dtypes of a tensor it can take without losing its meaning}; others are left to the loader
STORED_DTYPES = {
    **dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), FLOATS),
    **dict.fromkeys((torch.int32, torch.int64), INTEGERS),
    torch.uint8: {"U8", "I8"},
}
# A layer with the first tensor is NVFP4: {tensor: dtypes it may have}. ModelOpt's names, compressed-tensors'.
NVFP4_DTYPES = (
    {"weight_scale_2": FLOATS, "weight": {"U8"}, "weight_scale": {"F8_E4M3"}, "input_scale": FLOATS},
    {
        "weight_global_scale": FLOATS, "weight_packed": {"U8"}, "weight_scale": {"F8_E4M3"},
        "input_global_scale": FLOATS,
    },
)  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """What a header says of one tensor."""

    file: Path | str  # a path, or a URI in object storage
    dtype: str  # safetensors' name: U8, F8_E4M3, F32, …
    shape: tuple[int, ...]


def read_header(file: str | Path) -> dict[str, StoredTensor]:
    """Tensors of one safetensors `file` by name. Raises ValueError naming the file if it is not a whole one."""
    file = Path(file)
    try:
        with file.open("rb") as handle:
            tensors = headers.read_header(handle, os.fstat(handle.fileno()).st_size, str(file))
    except OSError as error:
        size = f"{file.stat().st_size:,} bytes" if file.is_file() else "not a file"
        raise headers.not_whole(str(file), size, error) from error
    return {name: StoredTensor(file, tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def read_index(file: str | Path) -> dict[str, str]:
    """The weight map, {tensor: file name}, of index `file`.

    Raises ValueError naming the file and the entry where it is no index, or points out of its folder or to a
    file that does not exist.
    """
    file = Path(file)
    try:
        index = headers.json_object(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not a readable index: it {error}; {AGAIN}") from error
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{file} has no weight_map of tensors to files; {AGAIN}")
    for name, target in weight_map.items():
        if (
            not isinstance(target, str)
            or target in ("", "..")
            or Path(target).name != target
            or "\\" in target
        ):
            raise ValueError(
                f"{file} puts {name} into {target!r}, which is not the name of a file in the same folder; {AGAIN}"
            )
    missing = {target for target in weight_map.values() if not (file.parent / target).is_file()}
    if missing:
        raise ValueError(
            f"{file} names {len(missing)} files that are not in its folder: {listed(missing, LISTED)}; the download is "
            f"incomplete, or the index belongs to another checkpoint"
        )
    return weight_map


def _check_index(file: Path, tensors: dict[str, StoredTensor]) -> None:
    """Raise ValueError where index `file` and the headers disagree about where a tensor is."""
    weight_map = read_index(file)
    absent = {name for name in weight_map if name not in tensors}
    if absent:
        name = min(absent)
        raise ValueError(
            f"{file} lists {len(absent)} tensors that no file has: {listed(absent, LISTED)} ({name} should be in "
            f"{weight_map[name]}); {AGAIN}"
        )
    for name, target in sorted(weight_map.items()):
        if tensors[name].file.name != target:
            raise ValueError(
                f"{file} puts {name} into {target}, but it is in {tensors[name].file.name}; index and files belong "
                f"to different exports; {AGAIN}"
            )
    unlisted = tensors.keys() - weight_map.keys()
    if unlisted:
        logger.warning(
            "%s does not list %d tensors of its files; they are read all the same: %s",
            file, len(unlisted), listed(unlisted, LISTED),
        )  # fmt: skip


def _check_nvfp4(tensors: dict[str, StoredTensor]) -> None:
    """Raise ValueError where a tensor of an NVFP4 layer has a dtype or shape that the format does not allow."""
    for dtypes in NVFP4_DTYPES:
        marker, codes_leaf, scales_leaf, *_ = dtypes
        for marked in [name for name in tensors if name.endswith(f".{marker}")]:
            layer = marked.removesuffix(marker)
            for leaf, allowed in dtypes.items():
                tensor = tensors.get(layer + leaf)
                if tensor is not None and tensor.dtype not in allowed:
                    raise ValueError(
                        f"{layer}{leaf} in {tensor.file} has dtype {tensor.dtype}, but {marker} makes its layer NVFP4, "
                        f"which needs {' or '.join(sorted(allowed))}; convert or export the checkpoint again"
                    )
                if tensor is not None and allowed is FLOATS and math.prod(tensor.shape) != 1:
                    raise ValueError(
                        f"{layer}{leaf} in {tensor.file} has shape {tensor.shape}, but NVFP4 has one global scale per "
                        f"tensor; convert or export the checkpoint again"
                    )
            codes, scales = tensors.get(layer + codes_leaf), tensors.get(layer + scales_leaf)
            if codes is None or scales is None:
                continue  # coverage lists what is missing
            if len(codes.shape) < 2 or not math.prod(codes.shape) or (2 * codes.shape[-1]) % GROUP_SIZE:
                raise ValueError(
                    f"{layer}{codes_leaf} in {codes.file} has shape {codes.shape}; packed NVFP4 codes are [N, K/2] "
                    f"with K a multiple of {GROUP_SIZE}. Convert or export the checkpoint again"
                )
            expected = (*codes.shape[:-1], 2 * codes.shape[-1] // GROUP_SIZE)
            if scales.shape != expected:
                raise ValueError(
                    f"{layer}{scales_leaf} in {scales.file} has shape {scales.shape}, but codes of shape {codes.shape} "
                    f"need {expected}, one per {GROUP_SIZE} values; the tensors do not belong together, or were "
                    f"quantized with another group size. Convert or export the checkpoint again"
                )


def gather(headers: Iterable[tuple[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """(name, tensor) pairs of all files of a checkpoint -> tensors by name, after checking what is NVFP4.

    Raises ValueError for a name in two files, and for a dtype or shape that NVFP4 does not allow.
    """
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in headers:
        if name in tensors:
            raise ValueError(
                f"{name} is in both {tensors[name].file} and {tensor.file}; which one is meant cannot be told. Remove "
                f"the file that does not belong to the checkpoint, or add {INDEX}"
            )
        tensors[name] = tensor
    _check_nvfp4(tensors)
    return tensors


def read_checkpoint(files: Iterable[str | Path]) -> dict[str, StoredTensor]:
    """Every tensor of safetensors `files` of one folder, by name, after checking files, index and dtypes.

    Raises ValueError naming file and tensor, with what is wrong and what to do.
    """
    files = sorted(map(Path, files))
    tensors = gather(pair for file in files for pair in read_header(file).items())
    for folder in sorted({file.parent for file in files}):
        if (folder / INDEX).is_file():
            _check_index(folder / INDEX, tensors)
    return tensors


def check_whole_parameters(
    tensors: dict[str, StoredTensor],
    parameter_of: Callable[[str], tuple[torch.Tensor, tuple[int, ...]] | None],
    ranks: int,
) -> None:
    """Raise ValueError where a tensor cannot be the parameter it fills alone.

    `parameter_of(name)` is (parameter, shape of the tensor it takes, of which a rank may hold 1 / `ranks` along
    any dimension), or None for a tensor that is only a segment of its parameter or has none.
    """
    for name, tensor in tensors.items():
        found = parameter_of(name)
        if found is None or found[0].dtype not in STORED_DTYPES or tensor.dtype.startswith("F8_"):
            continue
        parameter, shape = found
        allowed = STORED_DTYPES[parameter.dtype]
        if tensor.dtype not in allowed:
            raise ValueError(
                f"{name} in {tensor.file} has dtype {tensor.dtype}, but the model keeps it as {parameter.dtype}; "
                f"expected {' or '.join(sorted(allowed))}. Convert or export the checkpoint again"
            )
        stored, wanted = tensor.shape or (1,), shape or (1,)
        fits = len(stored) == len(wanted) and all(
            own in (size, size * ranks) for own, size in zip(stored, wanted)
        )
        if not fits:
            raise ValueError(
                f"{name} in {tensor.file} has shape {tensor.shape}, but the model needs {shape}"
                + (f" on each of {ranks} ranks" if ranks > 1 else "")
                + "; config.json and weights belong to different checkpoints, or the tensor was cut"
            )


@contextmanager
def naming_the_tensor(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[Iterator]:
    """Gives an iterator over `weights`; an error raised inside gets a note that names the last one handed out."""
    last: list[str] = []

    def handed_out() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            last[:] = [f"{name} ({tensor.dtype}, shape {tuple(tensor.shape)})"]
            yield name, tensor

    try:
        yield handed_out()
    except Exception as error:
        if last:
            error.add_note(
                f"while loading {last[0]} of the checkpoint: it does not fit the model that config.json describes. "
                f"Check that both belong together; {AGAIN}"
            )
        raise
