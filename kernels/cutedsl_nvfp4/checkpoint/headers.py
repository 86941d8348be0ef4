"""Headers of safetensors files, read by hand and believed only as far as they can be checked.

A safetensors file is an 8-byte little-endian header length, the header (JSON: tensor name -> dtype, shape,
[begin, end) in the data), and the data, which the tensors fill without gap or overlap.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import BinaryIO

BYTES_OF = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


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


def elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _no_duplicates(pairs: list) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:200]!r} appears twice")
    return found


def parse_json(text: bytes, what: str) -> dict:
    """JSON object -> dict, or CheckpointError; refuses duplicate keys."""
    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON: {error}; download the file again") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{what} is a JSON {type(parsed).__name__}, not an object")
    return parsed


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _parse_entry(name: str, entry: object, file: str, data_start: int, data_bytes: int) -> Tensor:
    where = f"{file}: tensor {name[:200]!r}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{where} lacks dtype, shape or data_offsets; the header is damaged")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BYTES_OF:
        raise CheckpointError(f"{where} has dtype {str(dtype)[:40]!r}; known are {', '.join(BYTES_OF)}")
    if not isinstance(shape, list) or len(shape) > 16 or not all(map(_is_count, shape)):
        raise CheckpointError(f"{where} has shape {str(shape)[:80]}, not a list of at most 16 sizes >= 0")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise CheckpointError(f"{where} has data_offsets {str(offsets)[:80]}, not two numbers >= 0")
    begin, end = offsets
    if begin > end or end > data_bytes:
        raise CheckpointError(
            f"{where} lies at bytes {begin} to {end} of {data_bytes}; the file is cut off or damaged: download it again"
        )
    if elements(tuple(shape)) * BYTES_OF[dtype] != end - begin:
        raise CheckpointError(
            f"{where}: {dtype} {shape} needs {elements(tuple(shape)) * BYTES_OF[dtype]} bytes, "
            f"its offsets span {end - begin}"
        )
    return Tensor(file, dtype, tuple(shape), data_start + begin, end - begin)


def read_header(handle: BinaryIO, file_bytes: int, file: str) -> dict[str, Tensor]:
    """Tensors of the safetensors file open as `handle`, `file_bytes` long; CheckpointError if anything is off."""
    prefix = handle.read(8) if file_bytes >= 8 else b""
    if len(prefix) < 8:
        raise CheckpointError(f"{file} has {file_bytes} bytes, too few for a safetensors file")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES or length > file_bytes - 8:
        raise CheckpointError(
            f"{file}: its header claims {length} bytes; the file has {file_bytes} and at most {MAX_HEADER_BYTES} are "
            f"accepted. It is not a safetensors file, or it is cut off: download it again"
        )
    text = handle.read(length)
    if len(text) < length:
        raise CheckpointError(f"{file}: the header ends after {len(text)} of {length} bytes")
    header = parse_json(text, f"{file}: the header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file}: __metadata__ is not a map of strings")
    data_start = 8 + length
    tensors = {
        name: _parse_entry(name, entry, file, data_start, file_bytes - data_start)
        for name, entry in header.items()
    }
    expected = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != expected:
            problem = "overlaps another tensor" if tensor.offset < expected else "leaves a gap before it"
            raise CheckpointError(
                f"{file}: tensor {name[:200]!r} {problem} (starts at byte {tensor.offset - data_start} of the data, "
                f"expected {expected - data_start})"
            )
        expected += tensor.nbytes
    if expected != file_bytes:
        raise CheckpointError(
            f"{file}: {file_bytes - expected} bytes after the last tensor belong to none; the file is damaged"
        )
    return tensors
