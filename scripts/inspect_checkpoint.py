#!/usr/bin/env python3
"""Say what a DeepSeek-V4 checkpoint holds, how it is served and what is wrong with it; see docs/convert.md.

Reads headers only: seconds for 800 GB. Needs Python >= 3.9, ../kernels/ beside it or the package installed, and
huggingface-hub for a checkpoint that is only on the hub. Exit status: 0 readable, 1 not.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))

from cutedsl_nvfp4.checkpoint.inspect import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
