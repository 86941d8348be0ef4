"""Headers of safetensors files, read by hand and believed only as far as they can be checked.

A safetensors file is an 8-byte little-endian header length, the header (JSON: tensor name -> dtype, shape,
[begin, end) in the data), and the data, which the tensors fill without gap or overlap.

One reader for the server, for programs on Python 3.9 alone, and for files of which only a part is fetched. It is at
least as strict as the safetensors library, and names file and tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

BITS_OF = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
AGAIN = "download it again if it is incomplete, or export the checkpoint again"
_LFS = b"version "  # the first bytes of a Git LFS pointer


class CheckpointError(ValueError):
    """The checkpoint cannot be used; the message names file or tensor, the value found, and a remedy."""


@dataclass(frozen=True)
class Tensor:
    """Where a tensor's bytes are: `nbytes` from `offset` of `file`."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def part(self, index: int, parts: int, shape: tuple[int, ...]) -> Tensor:
        """The `index`-th of `parts` equal contiguous pieces, seen as `shape`."""
        nbytes = self.nbytes // parts
        return Tensor(self.file, self.dtype, shape, self.offset + index * nbytes, nbytes)


def bytes_of(dtype: str, shape: Sequence[int]) -> int:
    """Bytes that a tensor fills; a part of a byte counts whole."""
    return -(-math.prod(shape) * BITS_OF[dtype] // 8)


# --- JSON ---


def _unique(pairs: list[tuple[str, object]]) -> dict:
    """JSON object -> dict; ValueError for a key that occurs twice, where json would keep the last."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{twice[:200]!r} occurs twice")
    return found


def json_object(text: bytes) -> dict:
    """A JSON object -> dict; ValueError for anything else, and for a key that occurs twice. Its words follow a name."""
    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"is a JSON {type(parsed).__name__}, not an object")
    return parsed


def parse_json(text: bytes, file: str) -> dict:
    """`json_object`, with a CheckpointError that names `file`."""
    try:
        return json_object(text)
    except ValueError as error:
        raise CheckpointError(f"{file} {error}; download it again") from None


# --- headers ---


def not_whole(file: str, size: str, fault: object) -> CheckpointError:
    """The error of a `file` that is no safetensors file, or only a part of one."""
    return CheckpointError(f"{file} ({size}) is not a whole safetensors file: {fault}; {AGAIN}")


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0  # neither True nor 1.0


def _parse_entry(entry: object, file: str, data_start: int, data_bytes: int) -> Tensor:
    """What the header says of one tensor; ValueError, whose words follow the tensor's name."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError("lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS_OF:
        raise ValueError(f"has dtype {str(dtype)[:40]!r}; known are {', '.join(BITS_OF)}")
    if not isinstance(shape, list) or len(shape) > 16 or not all(map(_is_count, shape)):
        raise ValueError(f"has shape {str(shape)[:80]}, not a list of at most 16 sizes >= 0")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise ValueError(f"has data_offsets {str(offsets)[:80]}, not two numbers >= 0")
    begin, end = offsets
    if begin > end or end > data_bytes:
        raise ValueError(f"lies at bytes {begin} to {end} of {data_bytes}, so the file is cut off or damaged")
    if math.prod(shape) * BITS_OF[dtype] != 8 * (end - begin):
        needed = str(bytes_of(dtype, shape))[:80]
        raise ValueError(
            f"is {dtype} of shape {str(shape)[:80]}, which needs {needed} bytes, and its offsets span {end - begin}"
        )
    return Tensor(file, dtype, tuple(shape), data_start + begin, end - begin)


def _read_text(handle: BinaryIO, file_bytes: int) -> bytes:
    """The header's JSON."""
    prefix = handle.read(8) if file_bytes >= 8 else b""
    if len(prefix) < 8:
        raise ValueError(f"{file_bytes} bytes, too few for a header")
    if prefix == _LFS:
        raise ValueError("it is a Git LFS pointer, and `git lfs pull` fetches the file itself")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES or length > file_bytes - 8:
        raise ValueError(
            f"its header claims {length} bytes, and the file has {file_bytes}; at most {MAX_HEADER_BYTES} are accepted"
        )
    text = handle.read(length)
    if len(text) < length:
        raise ValueError(f"the header ends after {len(text)} of {length} bytes")
    return text


def _parse_header(text: bytes, file_bytes: int, file: str) -> dict[str, Tensor]:
    try:
        header = json_object(text)
    except ValueError as error:
        raise ValueError(f"the header {error}") from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is not a map of strings")
    data_start = 8 + len(text)
    tensors = {}
    for name, entry in header.items():
        try:
            tensors[name] = _parse_entry(entry, file, data_start, file_bytes - data_start)
        except ValueError as error:
            raise ValueError(f"tensor {name[:200]!r} {error}") from None
    expected = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != expected:
            problem = "overlaps another tensor" if tensor.offset < expected else "leaves a gap before it"
            raise ValueError(
                f"tensor {name[:200]!r} {problem}: it starts at byte {tensor.offset - data_start} of the data, "
                f"expected {expected - data_start}"
            )
        expected += tensor.nbytes
    if expected != file_bytes:
        raise ValueError(f"{file_bytes - expected} bytes after the last tensor belong to none")
    return tensors


def read_header(handle: BinaryIO, file_bytes: int, file: str) -> dict[str, Tensor]:
    """Tensors of the safetensors file open as `handle`, `file_bytes` long; CheckpointError if anything is off."""
    try:
        return _parse_header(_read_text(handle, file_bytes), file_bytes, file)
    except ValueError as error:
        raise not_whole(file, f"{file_bytes:,} bytes", error) from None
