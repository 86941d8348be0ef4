"""Room on the disks, asked for before anything large is written."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from .headers import CheckpointError


def format_bytes(count: float) -> str:
    """`count` bytes for a message: 1.5 GB, 20.0 MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


@dataclass(frozen=True)
class Use:
    """`nbytes` that `what` is going to write below `folder`, which need not exist yet."""

    folder: Path
    nbytes: int
    what: str
    remedy: str  # how it gets to another disk


def check_disks(uses: list[Use]) -> None:
    """CheckpointError if a file system lacks the room for what all of `uses` together write to it."""
    disks: dict[int, list[tuple[Path, Use]]] = {}
    for use in uses:
        folder = next(path for path in (use.folder, *use.folder.absolute().parents) if path.exists())
        disks.setdefault(os.stat(folder).st_dev, []).append((folder, use))
    for found in disks.values():
        folder = found[0][0]
        free, needed = shutil.disk_usage(folder).free, sum(use.nbytes for _, use in found)
        if free < needed:
            each = " and ".join(
                f"{use.what} needs {format_bytes(use.nbytes)} more" for _, use in found if use.nbytes
            )
            remedies = ", or ".join(use.remedy for _, use in found if use.nbytes)
            raise CheckpointError(
                f"{folder} has {format_bytes(free)} free, {each}: free {format_bytes(needed - free)}, or {remedies}"
            )
