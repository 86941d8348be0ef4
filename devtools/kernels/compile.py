#!/usr/bin/env python3
"""Compile this package's kernels ahead of time, for a server that compiles none; needs no GPU.

    devtools/kernels/compile.py DIR [--arch sm_90a] [--jobs N] [--sass]

Writes DIR/NAME.so for every kernel of an architecture, and DIR/manifest.json with what they were made from. A server
finds them through CUTEDSL_NVFP4_KERNELS=DIR; with CUTEDSL_NVFP4_FORBID_JIT=1 it uses nothing else. Needs
nvidia-cutlass-dsl and a C compiler as linker. --sass reads every kernel's machine code (with nvdisasm and cuobjdump)
and fails for one that spills registers or does without tensor cores.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # devtools, wherever this is run from

ARCHITECTURES = ("sm_90a", "sm_100a", "sm_103a", "sm_120a", "sm_121a")


def kernels(arch: str) -> dict[str, tuple]:
    """{name: (what compiles it, given options; what finds fault with its machine code, given a cubin)} of `arch`."""
    from cutedsl_nvfp4.family import family_of_arch

    family = family_of_arch(arch)
    sass = import_module(f"devtools.kernels.sass.{family.name}")
    return {
        name: (kernel.build, partial(sass.problems, kernel=kernel))
        for name, kernel in family.shipped(arch).items()
    }


def compile_one(name: str, arch: str, folder: Path, sass: bool) -> tuple[str, int, list[str]]:
    """Compile kernel `name` into `folder` -> (name, bytes of the library, what is wrong with its machine code)."""
    from cutedsl_nvfp4 import compiled

    build, find_problems = kernels(arch)[name]
    with tempfile.TemporaryDirectory() as scratch:
        function = build(options=f"--keep-cubin --dump-dir {scratch}" if sass else "")
        problems = []
        if sass:
            (cubin,) = Path(scratch).glob("*.cubin")
            problems = find_problems(cubin)
        return name, compiled.export(function, name, folder).stat().st_size, problems


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", choices=ARCHITECTURES, default="sm_90a")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--sass", action="store_true", help="read the machine code of every kernel")
    arguments = parser.parse_args()
    from cutedsl_nvfp4 import __version__

    names = list(kernels(arguments.arch))
    started, total, bad = time.monotonic(), 0, 0
    with ProcessPoolExecutor(arguments.jobs) as pool:
        runs = [
            pool.submit(compile_one, name, arguments.arch, arguments.folder, arguments.sass) for name in names
        ]
        for done, run in enumerate(runs, 1):
            name, size, problems = run.result()
            total += size
            bad += bool(problems)
            for problem in problems:
                print(f"{name}: {problem}", file=sys.stderr)
            if done % 20 == 0 or done == len(names):
                print(f"{done} of {len(names)} kernels, {time.monotonic() - started:.0f} s", flush=True)
    manifest = {
        "architecture": arguments.arch,
        "package": __version__,
        "nvidia-cutlass-dsl": version("nvidia-cutlass-dsl"),
        "kernels": sorted(names),
    }
    (arguments.folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    print(f"{len(names)} kernels for {arguments.arch}, {total / 1e6:.1f} MB, in {arguments.folder}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
