"""A checkpoint's files, in a folder or on the Hugging Face hub, and what their headers say."""

from __future__ import annotations

import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .config import MODEL_TYPE
from .headers import CheckpointError, Tensor, parse_json, read_header
from .hub import Hub, Unreachable, cached_snapshot

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
PARTIAL = ".partial"  # ends the name of a file that is being written
# what belongs to a checkpoint beside its tensors: configs, tokenizer, code and license
COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*", "encoding/*")
MAX_JSON_BYTES = 256_000_000
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Folder:
    """A local folder of files."""

    readers = 1
    incomplete = "the download is incomplete"

    def __init__(self, path: Path):
        self.path = path
        self.label = str(path)

    def files(self) -> dict[str, int]:
        """Name -> bytes of every file at the top of the folder."""
        return {entry.name: entry.stat().st_size for entry in os.scandir(self.path) if entry.is_file()}

    def below(self, folder: str) -> dict[str, int]:
        """Path -> bytes of every file in `folder` and its subfolders."""
        found = [path for path in (self.path / folder).rglob("*") if path.is_file()]
        return {path.relative_to(self.path).as_posix(): path.stat().st_size for path in found}

    def identity(self, file: str) -> tuple[int, int | str]:
        """(bytes, time of the last change), or in huggingface-hub's cache (bytes, hash of the contents)."""
        path = self.path / file
        stat = path.stat()
        if path.is_symlink() and (target := Path(os.readlink(path))).parent.name == "blobs":
            return stat.st_size, target.name
        return stat.st_size, stat.st_mtime_ns

    def open(self, file: str) -> BinaryIO:
        return (self.path / file).open("rb")


@dataclass(frozen=True)
class Checkpoint:
    """Every tensor of a checkpoint by the name it is stored under, its config, and its other files."""

    source: Folder | Hub
    config: dict
    tensors: dict[str, Tensor]
    files: dict[str, int]

    @property
    def weight_files(self) -> set[str]:
        """The files that hold tensors, and what says which does."""
        return {tensor.file for tensor in self.tensors.values()} | ({CONFIG, INDEX} & self.files.keys())

    @property
    def num_layers(self) -> int:
        model_type = self.config.get("model_type", MODEL_TYPE)
        if model_type != MODEL_TYPE:
            raise CheckpointError(
                f"{CONFIG} has model_type {str(model_type)[:200]!r}; these tools read {MODEL_TYPE} alone, DeepSeek-V4's"
            )
        layers = self.config.get("num_hidden_layers")
        if not isinstance(layers, int) or layers < 1:
            raise CheckpointError(f"{CONFIG} has num_hidden_layers = {layers!r}, expected a number >= 1")
        return layers


def find_source(location: str, revision: str | None = None) -> Folder | Hub:
    """A folder's path, or the id of a repository on the hub; its copy in the cache if the hub cannot be reached."""
    if os.path.isdir(location):
        return Folder(Path(location))
    if os.path.exists(location) or not _HUB_ID.fullmatch(location):
        raise CheckpointError(
            f"{location!r} is neither a folder nor the id of a model on the hub (owner/name)"
        )
    try:
        return Hub(location, revision)
    except Unreachable as error:
        copy = cached_snapshot(location, revision)
        if copy is None:
            raise
        print(f"note: {error}; reading the copy that was downloaded last, {copy}", file=sys.stderr)
        return Folder(copy)


def read_json(source: Folder | Hub, file: str, files: dict[str, int]) -> dict:
    if file not in files:
        raise CheckpointError(f"{source.label} has no {file}; it is not a checkpoint, or {source.incomplete}")
    if files[file] > MAX_JSON_BYTES:
        raise CheckpointError(f"{file} has {files[file]} bytes, more than {MAX_JSON_BYTES}")
    with source.open(file) as handle:
        return parse_json(handle.read(), file)


def check_file_name(file: object, files: dict[str, int], incomplete: str = Folder.incomplete) -> str:
    """`file` if it names a safetensors file at the top of the folder; an index may not point anywhere else."""
    if not isinstance(file, str) or os.path.basename(file) != file or "\\" in file or "\0" in file:
        raise CheckpointError(
            f"{INDEX} points to {str(file)[:200]!r}; only files in the checkpoint's own folder are read"
        )
    if not file.endswith(".safetensors"):
        raise CheckpointError(f"{INDEX} points to {file[:200]!r}, which is not a .safetensors file")
    if file not in files:
        raise CheckpointError(f"{INDEX} lists {file[:200]}, which is missing; {incomplete}")
    return file


def read_index(index: dict, files: dict[str, int], incomplete: str = Folder.incomplete) -> dict[str, str]:
    """The index's parsed JSON -> tensor name -> file. `incomplete` is what a missing file means."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX} has no weight_map; download it again")
    for file in {str(file): file for file in weight_map.values()}.values():
        check_file_name(file, files, incomplete)
    return weight_map


def read_checkpoint(source: Folder | Hub) -> Checkpoint:
    """Config, index and all headers of `source`, checked against each other; no tensor data is read."""
    files = source.files()
    config = read_json(source, CONFIG, files)
    weight_map = None
    if INDEX in files:
        weight_map = read_index(read_json(source, INDEX, files), files, source.incomplete)
    shards = sorted(
        set(weight_map.values()) if weight_map else (f for f in files if f.endswith(".safetensors"))
    )
    if not shards:
        raise CheckpointError(f"{source.label} holds no .safetensors file")

    def header(file: str) -> dict[str, Tensor]:
        with source.open(file) as handle:
            return read_header(handle, files[file], file)

    with ThreadPoolExecutor(source.readers) as pool:
        headers = list(pool.map(header, shards))
    tensors: dict[str, Tensor] = {}
    for file, found in zip(shards, headers):
        for name, tensor in found.items():
            if name in tensors:
                raise CheckpointError(f"{name} is both in {tensors[name].file} and in {file}")
            if weight_map is not None and weight_map.get(name) != file:
                raise CheckpointError(
                    f"{file} holds {name}, which {INDEX} places in {weight_map.get(name, 'no file')}; files of two "
                    f"exports are mixed: download the checkpoint again into an empty folder"
                )
            tensors[name] = tensor
    if weight_map is not None and (missing := weight_map.keys() - tensors.keys()):
        raise CheckpointError(
            f"{len(missing)} tensors of {INDEX} are in no file, the first {min(missing)}; {source.incomplete}"
        )
    return Checkpoint(source, config, tensors, files)


def write_json(path: Path, content: dict) -> None:
    """Write `content` so that `path` never exists half-written."""
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
