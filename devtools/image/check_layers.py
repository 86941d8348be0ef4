#!/usr/bin/env python3
"""Check that the layers an image adds to its base hold this project and nothing of whoever built it.

    devtools/image/check_layers.py LAYOUT --base-layers N

LAYOUT is an OCI layout: the folder that an image was built into.

Every layer is read as it is stored, so what a later one deletes still counts, and so does the image's
configuration: environment, labels, history. Refused are paths outside the project's own places, private
keys and access tokens, and what this machine's pip, apt, proxies and environment say: run it where the
image was built. Exit status: 0 clean, 1 not, 2 LAYOUT is no such image.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from devtools.setup.pins import PROJECT_ROOT

PACKAGES = r"usr/(local/)?lib/python3(\.\d+)?/(dist|site)-packages/"
OURS = re.compile(
    rf"opt/cutedsl_nvfp4/|cache/(models|jit)$|{PACKAGES}(vllm/|cutedsl_nvfp4(-[\w.]+\.dist-info)?/)"
)
SECRETS = {
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a Hugging Face token": rb"\bhf_[A-Za-z0-9]{30,}",
    "a GitHub token": rb"\b(?:gh[oprsu]_[A-Za-z0-9]{36}|github_pat_\w{22,})",
    "an AWS key": rb"\bAKIA[0-9A-Z]{16}\b",
    "a password in an address": rb"://[^/\s:@'\"{}<>]+:[^/\s:@'\"{}<>]+@",
}
PUBLIC = re.compile(
    r"(https?://)?(pypi\.org|files\.pythonhosted\.org|deb\.debian\.org|security\.debian\.org)\b"
)
TELLING = re.compile(r"(?i)token|secret|passw|credential|api_?key|_proxy$|index_url|find_links|trusted_host")
SHORTEST = 8  # characters; a shorter value would be found everywhere


def host_values() -> dict[str, str]:
    """Values that belong to this machine alone, with where each comes from."""
    found = {str(PROJECT_ROOT): "the project's folder", socket.gethostname(): "the host's name"}
    for name, value in os.environ.items():
        if TELLING.search(name):
            found.update(dict.fromkeys(value.split(), f"${name}"))
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    for name, value in re.findall(r"^([\w.:-]+)='(.*)'$", pip, re.M):
        if TELLING.search(name.replace("-", "_")):
            found.update(
                dict.fromkeys(value.split(r"\n") if r"\n" in value else value.split(), f"pip's {name}")
            )
    for file in (Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")):
        if file.is_file():
            addresses = re.findall(r"\b\w+://[^\s\]]+", file.read_text(encoding="utf-8", errors="replace"))
            found.update(dict.fromkeys(addresses, str(file)))
    return {
        value: source for value, source in found.items() if len(value) >= SHORTEST and not PUBLIC.match(value)
    }


class Layout:
    """The one image of an OCI layout folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        manifests = json.loads((folder / "index.json").read_text(encoding="utf-8"))["manifests"]
        if len(manifests) != 1:
            raise ValueError(
                f"{folder} holds {len(manifests)} images, expected one; build one target into it"
            )
        self.manifest = json.loads(self.blob(manifests[0]).read_bytes())
        if "layers" not in self.manifest:
            raise ValueError(f"{folder} holds an image for several platforms; build for one")

    def blob(self, descriptor: dict) -> Path:
        return self.folder / "blobs" / descriptor["digest"].replace(":", "/")

    def config(self) -> bytes:
        return self.blob(self.manifest["config"]).read_bytes()

    def files(self, first_layer: int) -> Iterator[tuple[str, bytes]]:
        """(path, contents) of everything but folders in the layers from `first_layer` on; a link is its target."""
        for layer in self.manifest["layers"][first_layer:]:
            with tarfile.open(self.blob(layer)) as archive:
                for member in archive:
                    if member.isfile():
                        yield member.name, archive.extractfile(member).read()
                    elif not member.isdir() or member.name.startswith("cache/"):
                        yield member.name, member.linkname.encode()


def findings(layout: Layout, base_layers: int, values: dict[str, str]) -> Iterator[str]:
    """What is wrong with the image, a line each; empty if nothing is."""
    patterns = {what: re.compile(pattern) for what, pattern in SECRETS.items()}
    patterns |= {
        f"a value of {source}": re.compile(re.escape(value.encode())) for value, source in values.items()
    }

    def told(where: str, content: bytes) -> Iterable[str]:
        return (f"{where}: {what}" for what, pattern in patterns.items() if pattern.search(content))

    yield from told("configuration", layout.config())
    for path, content in layout.files(base_layers):
        if not OURS.match(path):
            yield f"{path}: outside the project's own places"
        yield from told(path, content)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("layout", type=Path, metavar="LAYOUT")
    parser.add_argument(
        "--base-layers", type=int, required=True, metavar="N", help="layers that are the base's"
    )
    args = parser.parse_args()
    try:
        layout = Layout(args.layout)
        layers = len(layout.manifest["layers"])
        if not 0 < args.base_layers < layers:
            raise ValueError(f"--base-layers {args.base_layers}: the image has {layers} layers in all")
        values = host_values()
        wrong = list(findings(layout, args.base_layers, values))
        files = sum(1 for _ in layout.files(args.base_layers))
    except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
        print(f"check_layers: {error}", file=sys.stderr)
        return 2
    for line in wrong:
        print(f"check_layers: {line}", file=sys.stderr)
    print(
        f"{layers - args.base_layers} layers, {files} files, {len(values)} values of this machine: "
        + (f"{len(wrong)} things that do not belong there" if wrong else "clean")
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
