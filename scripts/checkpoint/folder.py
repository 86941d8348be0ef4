"""A checkpoint's files: a folder, or a repository on the Hugging Face hub read by range requests."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .headers import CheckpointError, Tensor, parse_json, read_header

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
PARTIAL = ".partial"  # ends the name of a file that is being written
# what belongs to a checkpoint beside its tensors: configs, tokenizer, code and license
COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*", "encoding/*")
MAX_JSON_BYTES = 256_000_000
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Folder:
    """A local folder of files."""

    def __init__(self, path: Path):
        self.path = path
        self.label = str(path)

    def files(self) -> dict[str, int]:
        """Name -> bytes of every file at the top of the folder."""
        return {entry.name: entry.stat().st_size for entry in os.scandir(self.path) if entry.is_file()}

    def open(self, file: str) -> BinaryIO:
        return (self.path / file).open("rb")


class Hub:
    """A model repository on the Hugging Face hub; only the byte ranges that are read are fetched."""

    def __init__(self, repository: str, revision: str | None):
        try:
            from huggingface_hub import HfFileSystem
        except ImportError:
            raise CheckpointError(
                f"{repository} is no folder here, and reading it from the hub needs the package huggingface-hub: "
                f"pip install huggingface-hub, or use .venv/bin/python"
            ) from None
        self.label = repository
        self.root = repository + (f"@{revision}" if revision else "")
        self.system = HfFileSystem()

    def files(self) -> dict[str, int]:
        with _hub_errors(self.label):
            listing = self.system.ls(self.root, detail=True)
        return {os.path.basename(row["name"]): row["size"] for row in listing if row["type"] == "file"}

    @contextmanager
    def open(self, file: str) -> Iterator[BinaryIO]:
        with (
            _hub_errors(self.label),
            self.system.open(f"{self.root}/{file}", "rb", block_size=2**20) as handle,
        ):
            yield handle


@contextmanager
def _hub_errors(label: str) -> Iterator[None]:
    """Whatever huggingface-hub's HTTP client raises -> CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{label} is no folder here and cannot be read from the hub ({type(error).__name__}: {error}); check the "
            f"name, the network, and HF_TOKEN for a gated model"
        ) from None


@dataclass(frozen=True)
class Checkpoint:
    """Every tensor of a checkpoint by the name it is stored under, its config, and its other files."""

    source: Folder | Hub
    config: dict
    tensors: dict[str, Tensor]
    files: dict[str, int]

    @property
    def num_layers(self) -> int:
        layers = self.config.get("num_hidden_layers")
        if not isinstance(layers, int) or layers < 1:
            raise CheckpointError(f"{CONFIG} has num_hidden_layers = {layers!r}, expected a number >= 1")
        return layers


def find_source(location: str, revision: str | None = None) -> Folder | Hub:
    """A folder's path, or the id of a repository on the hub."""
    if os.path.isdir(location):
        return Folder(Path(location))
    if os.path.exists(location) or not _HUB_ID.fullmatch(location):
        raise CheckpointError(
            f"{location!r} is neither a folder nor the id of a model on the hub (owner/name)"
        )
    return Hub(location, revision)


def download(location: str, revision: str | None = None) -> Folder:
    """A local folder of `location`; a hub id is downloaded into huggingface-hub's cache, resuming if cut off."""
    if isinstance(find_source(location, revision), Folder):
        return Folder(Path(location))
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", *COMPANIONS]
    with _hub_errors(location):
        return Folder(Path(snapshot_download(location, revision=revision, allow_patterns=patterns)))


def read_json(source: Folder | Hub, file: str, files: dict[str, int]) -> dict:
    if file not in files:
        raise CheckpointError(
            f"{source.label} has no {file}; it is not a checkpoint, or its download is incomplete"
        )
    if files[file] > MAX_JSON_BYTES:
        raise CheckpointError(f"{file} has {files[file]} bytes, more than {MAX_JSON_BYTES}")
    with source.open(file) as handle:
        return parse_json(handle.read(), file)


def check_file_name(file: object, files: dict[str, int]) -> str:
    """`file` if it names a safetensors file at the top of the folder; an index may not point anywhere else."""
    if not isinstance(file, str) or os.path.basename(file) != file or "\\" in file or "\0" in file:
        raise CheckpointError(
            f"{INDEX} points to {str(file)[:200]!r}; only files in the checkpoint's own folder are read"
        )
    if not file.endswith(".safetensors"):
        raise CheckpointError(f"{INDEX} points to {file[:200]!r}, which is not a .safetensors file")
    if file not in files:
        raise CheckpointError(f"{INDEX} lists {file[:200]}, which is missing; the download is incomplete")
    return file


def read_index(index: dict, files: dict[str, int]) -> dict[str, str]:
    """The index's parsed JSON -> tensor name -> file."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX} has no weight_map; download it again")
    for file in {str(file): file for file in weight_map.values()}.values():
        check_file_name(file, files)
    return weight_map


def read_checkpoint(source: Folder | Hub) -> Checkpoint:
    """Config, index and all headers of `source`, checked against each other; no tensor data is read."""
    files = source.files()
    config = read_json(source, CONFIG, files)
    weight_map = read_index(read_json(source, INDEX, files), files) if INDEX in files else None
    shards = sorted(
        set(weight_map.values()) if weight_map else (f for f in files if f.endswith(".safetensors"))
    )
    if not shards:
        raise CheckpointError(f"{source.label} holds no .safetensors file")
    tensors: dict[str, Tensor] = {}
    for file in shards:
        with source.open(file) as handle:
            found = read_header(handle, files[file], file)
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
            f"{len(missing)} tensors of {INDEX} are in no file, the first {min(missing)}; the download is incomplete"
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
