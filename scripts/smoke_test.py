#!/usr/bin/env python3
"""Check an OpenAI-compatible server, and which kernels serve its NVFP4 layers; see docs/smoke-test.md.

Needs Python >= 3.9 and the folder smoke/ beside it, nothing else. Exit status: 0 every check is green or
skipped for a stated reason, 1 a check is red, 2 the checks could not run.
"""

import sys

from smoke.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
