#!/usr/bin/env python3
"""Compare the weights of two DeepSeek-V4 checkpoints, in whatever formats they are; see docs/convert.md.

Needs torch (.venv/bin/python). Exit status: 0 compared; 1 not, or with --at-least not all or below it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))

if __name__ == "__main__":
    try:
        from cutedsl_nvfp4.checkpoint.compare import main
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        sys.exit("compare_checkpoints needs torch: run it with .venv/bin/python (make setup)")
    sys.exit(main(sys.argv[1:]))
