#!/usr/bin/env python3
"""Check what an image's labels say against the vLLM of the interpreter that runs this.

    devtools/image/check_labels.py VLLM_VERSION PATCHES_SHA256

`unknown` says nothing and passes: `docker compose build` cannot tell. The image's build runs this.
Exit status: 0 true or unknown, 1 not.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

STAMP = ".cutedsl_nvfp4_patches.json"  # written by apply_patches


def applied() -> dict[str, str]:
    """Version of the installed vLLM and hash of the series it is patched with, without importing it."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"{sys.executable} has no vLLM installed")
    stamp = json.loads((Path(spec.submodule_search_locations[0]) / STAMP).read_text(encoding="utf-8"))
    return {"VLLM_VERSION": stamp["vllm_version"], "PATCHES_SHA256": stamp["series_sha256"]}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("VLLM_VERSION")
    parser.add_argument("PATCHES_SHA256")
    said = vars(parser.parse_args())
    wrong = 0
    try:
        for name, true in applied().items():
            wrong += said[name] not in (true, "unknown")
            print(f"{name}={said[name]}" + ("" if said[name] == true else f"  (the image holds {true})"))
    except FileNotFoundError as error:
        print(f"check_labels: {error}; apply the patches first", file=sys.stderr)
        return 1
    if wrong:
        print(
            "check_labels: build with what devtools/image/arguments.py prints (`make build`)", file=sys.stderr
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
