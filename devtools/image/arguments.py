#!/usr/bin/env python3
"""Print what the image's build has to be told, as NAME=value lines: base images, labels, the date of its files.

    env $(devtools/image/arguments.py) docker buildx bake

Base images and VLLM_VERSION come from versions.env, PATCHES_SHA256 from patches/, GIT_REVISION from git; with
changed or untracked files among those that an image is built from, the revision is `-dirty`.
Exit status: 0 printed, 1 not.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from devtools.patches.series import PatchSyntaxError, read_series
from devtools.setup.pins import PROJECT_ROOT, read_pins

# what the Dockerfile's `compiled` stage builds for the GPU image; the build fails if it built anything else
KERNEL_ARCHITECTURES = (
    "sm_90a"  # KERNEL_ARCHITECTURES in the environment asks for others, such as sm_90a,sm_100a
)

# what an image is built from, relative to PROJECT_ROOT
SOURCES = (
    ".dockerignore",
    "Dockerfile",
    "docker-bake.hcl",
    "devtools",
    "kernels",
    "patches",
    "scripts",
    "versions.env",
)

# SOURCE_DATE_EPOCH, 1980-01-01, the oldest date a wheel can hold. BuildKit only sets those back to it that are
# younger: with the commit's date, files that a clone has had for longer would keep theirs and change the digest.
OLDEST = "315532800"


def git(*arguments: str) -> str:
    """Output of a git command; RuntimeError if git cannot answer."""
    command = ["git", "-c", f"safe.directory={PROJECT_ROOT}", "-C", str(PROJECT_ROOT), *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError("git is not installed; it says which revision the image is built from") from None
    if answer.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {answer.stderr.strip()}; build from a git clone")
    return answer.stdout.strip()


def image_arguments() -> dict[str, str]:
    pins = read_pins()
    dirty = "-dirty" if git("status", "--porcelain", "--", *SOURCES) else ""
    return {
        "VLLM_IMAGE": pins["VLLM_IMAGE"],
        "VLLM_CPU_IMAGE": pins["VLLM_CPU_IMAGE"],
        "VLLM_VERSION": pins["VLLM_VERSION"],
        "PATCHES_SHA256": read_series(PROJECT_ROOT / "patches").sha256,
        "GIT_REVISION": git("rev-parse", "HEAD") + dirty,
        "KERNEL_ARCHITECTURES": os.environ.get("KERNEL_ARCHITECTURES", KERNEL_ARCHITECTURES),
        "SOURCE_DATE_EPOCH": OLDEST,
    }


def main() -> int:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    try:
        for name, value in image_arguments().items():
            print(f"{name}={value}")
    except (RuntimeError, PatchSyntaxError, ValueError) as error:
        print(f"image_arguments: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
