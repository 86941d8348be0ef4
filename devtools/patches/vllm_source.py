"""vLLM's Python sources of any released version, for reading and for trying patches on."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from devtools.setup.pins import PROJECT_ROOT

CACHE = PROJECT_ROOT / ".cache" / "vllm-source"


def unpack_sources(wheel: Path, folder: Path) -> None:
    """Unpack the wheel's *.py and METADATA into `folder`, which is complete or does not exist."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.endswith((".py", ".dist-info/METADATA"))]
            archive.extractall(scratch, names)
        Path(scratch).chmod(0o755)
        shutil.copytree(scratch, folder.with_suffix(".new"), dirs_exist_ok=True)
    folder.with_suffix(".new").rename(folder)


def source_tree(version: str, distribution: str = "vllm", cache: Path = CACHE) -> Path:
    """Folder with the sources of `distribution`==`version`; downloads its wheel the first time (330 MB).

    The wheel for Linux x86_64 is taken whatever runs this, and is not kept. RuntimeError if there is none.
    """
    folder = cache / f"{distribution}-{version}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".lock").open("w") as lock:  # tests run side by side
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            _download(distribution, version, cache, folder)
    return folder


def _download(distribution: str, version: str, cache: Path, folder: Path) -> None:
    print(f"downloading {distribution} {version} from the package index …", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--dest",
            scratch,
        ]
        command += ["--disable-pip-version-check", "--no-input", f"{distribution}=={version}"]
        answer = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if answer.returncode or not wheels:
            reason = "\n".join(line for line in answer.stderr.splitlines() if not line.startswith("WARNING"))
            raise RuntimeError(
                f"{reason}\n{distribution} {version} cannot be downloaded (above); check the version with "
                f"`pip index versions {distribution}`, or unpack its wheel into {folder}"
            )
        unpack_sources(wheels[0], folder)
