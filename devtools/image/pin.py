#!/usr/bin/env python3
"""Write the digests of the base images' tags to versions.env, so that a build names exactly one base.

    devtools/image/pin.py            ask the registry through `docker buildx imagetools inspect`, and write
    devtools/image/pin.py --check    exit 1 if versions.env names another digest than the registry, write nothing

vllm/vllm-openai:v0.32.0 becomes vllm/vllm-openai:v0.32.0@sha256:…; the digest is that of the index over all
architectures. Either every image is pinned or nothing is written.
Exit status: 0 done, 1 not (the registry out of reach, an unknown tag, another digest).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from devtools.setup.pins import VERSIONS_FILE, read_pins

IMAGES = ("VLLM_IMAGE", "VLLM_CPU_IMAGE")


class PinFailed(Exception):
    """A digest cannot be found; nothing was written."""


def digest_of(tag: str) -> str:
    """sha256:… of `tag` in its registry."""
    # `json` is needed: buildx ignores {{.Manifest.Digest}} and prints everything it knows (docker/buildx#1175)
    command = ["docker", "buildx", "imagetools", "inspect", tag, "--format", "{{json .Manifest.Digest}}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise PinFailed("docker is not installed; it is what asks the registry") from None
    except subprocess.TimeoutExpired:
        raise PinFailed(f"the registry of {tag} did not answer within 60 s; is it reachable?") from None
    if answer.returncode:
        raise PinFailed(
            f"the registry did not tell the digest of {tag}: {answer.stderr.strip()}\n"
            f"If it is out of reach, run this where it can be reached; versions.env is unchanged"
        )
    digest = answer.stdout.strip().strip('"')
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise PinFailed(
            f"{' '.join(command)} printed {digest!r}, no digest; is buildx 0.10 or newer installed?"
        )
    return digest


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare only")
    args = parser.parse_args()
    pins = read_pins()
    text = VERSIONS_FILE.read_text(encoding="utf-8")
    try:
        for name in IMAGES:
            tag = pins[name].partition("@")[0]
            pinned = f"{tag}@{digest_of(tag)}"
            print(f"{name}={pinned}" + ("" if pinned == pins[name] else f"  (was {pins[name]})"))
            text = text.replace(f"\n{name}={pins[name]}\n", f"\n{name}={pinned}\n")
    except PinFailed as error:
        print(f"pin_images: {error}", file=sys.stderr)
        return 1
    if args.check:
        return 0 if text == VERSIONS_FILE.read_text(encoding="utf-8") else 1
    VERSIONS_FILE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
