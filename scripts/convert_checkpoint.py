#!/usr/bin/env python3
"""Write an all-NVFP4 DeepSeek-V4 checkpoint from a native, experts-only, HF-named or BF16 one; see docs/convert.md.

Needs torch (.venv/bin/python). Exit status: 0 DST is complete, 1 it is not; the same command then goes on.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))

if __name__ == "__main__":
    try:
        from cutedsl_nvfp4.checkpoint.convert import main
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        sys.exit("convert_checkpoint needs torch: run it with .venv/bin/python (make setup)")
    sys.exit(main(sys.argv[1:]))
