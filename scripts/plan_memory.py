#!/usr/bin/env python3
"""Plan a DeepSeek-V4's memory on GPUs: weights, caches, the longest context, the flags; see docs/memory.md.

Needs Python >= 3.9, and ../kernels/ beside it or the package installed. Exit status: 0 it fits, 1 it does not.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))

from cutedsl_nvfp4.checkpoint.planner.plan import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
