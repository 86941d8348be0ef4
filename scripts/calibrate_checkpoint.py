#!/usr/bin/env python3
"""Measure NVFP4 activation scales on texts and write them into a checkpoint as input_scale; see docs/convert.md.

Needs vLLM with this project's patches (.venv/bin/python). Exit status: 0 written, 1 nothing was changed.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))

if __name__ == "__main__":
    if find_spec("vllm") is None:
        sys.exit(
            "calibrate_checkpoint needs vLLM: run it with .venv/bin/python (make setup), or in the image"
        )
    from cutedsl_nvfp4.checkpoint.calibrate import main

    sys.exit(main(sys.argv[1:]))
