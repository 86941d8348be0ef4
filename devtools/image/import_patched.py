#!/usr/bin/env python3
"""Import every module the patch series changes, from the vLLM of the interpreter that runs this.

    devtools/image/import_patched.py

Exit status: 0 all imported, 1 one did not (its traceback is printed). The image's build runs it.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from devtools.patches.series import read_series

PATCHES = Path(__file__).resolve().parents[2] / "patches"


def patched_modules() -> list[str]:
    """Dotted names of the modules that the series changes, sorted."""
    paths = {change.new_path for patch in read_series(PATCHES).patches for change in patch.changes}
    modules = (path[: -len(".py")] for path in paths if path and path.endswith(".py"))
    return sorted(name.replace("/", ".").removesuffix(".__init__") for name in modules)


def main() -> int:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    names, failed = patched_modules(), 0
    for name in names:
        try:
            importlib.import_module(name)
        except Exception:
            failed += 1
            print(f"FAILED    {name}\n{traceback.format_exc()}", file=sys.stderr)
        else:
            print(f"imported  {name}")
    print(f"{len(names) - failed} of {len(names)} patched modules import")
    return 1 if failed or not names else 0


if __name__ == "__main__":
    sys.exit(main())
