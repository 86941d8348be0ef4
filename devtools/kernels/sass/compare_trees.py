#!/usr/bin/env python3
"""Compare the machine code of every shipped kernel between two checkouts; needs no GPU.

    compare_trees.py digest TREE DIR [--arch sm_90a ...] [--jobs N]   write DIR/ARCH.json, and DIR/ARCH/NAME.sass.gz
    compare_trees.py compare DIR DIR                                  what differs; exit status 1 if anything does

The text compared is nvdisasm's instructions and labels. Symbol names, line information and headers are left out, so
that a renamed class or a moved file changes nothing. A tree is this project from commit 7f9f52e on. A `git worktree`
of the older commit makes the other tree.
"""

import argparse
import gzip
import hashlib
import json
import os
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from devtools.kernels.sass.machine_code import disassemble, resources

ARCHITECTURES = ("sm_90a", "sm_100a", "sm_103a", "sm_120a", "sm_121a")
# where a checkout keeps `kernels(arch)`, the list of what is shipped
COMPILERS = ("devtools/kernels/compile.py", "scripts/compile_kernels")

_LINE = re.compile(r"^\s*(?:(\.L_x_\d+):|/\*[0-9a-f]{4,}\*/\s+(.*?;))")
_SYMBOL = re.compile(r"\((?!\.L_x_)[\w.$@]+\)")


def instructions(sass: str) -> str:
    """Instructions and labels of what `nvdisasm -c` printed, one a line, without the names of symbols."""
    kept = []
    for line in sass.splitlines():
        if found := _LINE.match(line):
            label, instruction = found.groups()
            kept.append(f"{label}:" if label else _SYMBOL.sub("(SYMBOL)", " ".join(instruction.split())))
    return "\n".join(kept) + "\n"


@cache
def compiler(tree: Path) -> ModuleType:
    """The program of `tree` that lists its kernels."""
    for name in COMPILERS:
        if (path := tree / name).is_file():
            loader = SourceFileLoader("compile_kernels_of_tree", str(path))
            module = module_from_spec(spec_from_loader(loader.name, loader))
            sys.modules[loader.name] = module
            loader.exec_module(module)
            return module
    raise FileNotFoundError(f"{tree} has none of {', '.join(COMPILERS)}: it is no checkout of this project")


def digest_one(tree: Path, name: str, arch: str, folder: Path) -> tuple[str, dict]:
    """Compile kernel `name`, keep its text in `folder` -> (name, {sha256, instructions, registers, stack})."""
    with tempfile.TemporaryDirectory() as scratch:
        compiler(tree).kernels(arch)[name][0](options=f"--keep-cubin --dump-dir {scratch}")
        (cubin,) = Path(scratch).glob("*.cubin")
        text = instructions(disassemble(cubin))
        registers, stack = resources(cubin)
    if not text.strip():
        raise ValueError(f"{name}: no instruction found in what nvdisasm printed")
    with open(folder / f"{name}.sass.gz", "wb") as file:
        file.write(gzip.compress(text.encode(), mtime=0))
    return name, {
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "instructions": text.count(";\n"),
        "registers": registers,
        "stack": stack,
    }


def digest(tree: Path, folder: Path, architectures: list[str], jobs: int) -> None:
    """Write the digests of every shipped kernel of `tree` into `folder`."""
    kernels = str(tree / "kernels")
    if kernels not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        paths = os.pathsep.join(filter(None, (kernels, os.environ.get("PYTHONPATH"))))
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONPATH": paths})
    import cutedsl_nvfp4

    imported = Path(cutedsl_nvfp4.__file__).resolve().parents[2]
    assert imported == tree, f"the package imported is {imported}'s, not {tree}'s"
    for arch in architectures:
        (folder / arch).mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(jobs) as pool:
            names = list(compiler(tree).kernels(arch))
            runs = [pool.submit(digest_one, tree, name, arch, folder / arch) for name in names]
            found = dict(run.result() for run in runs)
        (folder / f"{arch}.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        print(f"{arch}: {len(found)} kernels", flush=True)


def compare(old: Path, new: Path) -> int:
    """Print what differs between two folders of digests -> the number of kernels that do."""
    different, total = 0, 0
    for arch in ARCHITECTURES:
        paths = [folder / f"{arch}.json" for folder in (old, new)]
        if not any(path.exists() for path in paths):
            continue
        before, after = (json.loads(path.read_text()) for path in paths)
        total += len(before)
        texts = {entry["sha256"] for name, entry in before.items() if name not in after}
        renamed = [n for n in after if n not in before and after[n]["sha256"] in texts]
        if renamed:
            print(f"{arch}: {len(renamed)} kernels of the same text have another name, such as {renamed[0]}")
        kept = {after[name]["sha256"] for name in renamed}
        for name in sorted(before.keys() ^ after.keys()):
            if (before.get(name) or after[name])["sha256"] not in kept:
                different += 1
                print(f"{arch} {name}: only in {'the first' if name in before else 'the second'}")
        for name in sorted(before.keys() & after.keys()):
            one, two = before[name], after[name]
            if one["sha256"] != two["sha256"]:
                different += 1
                changes = (
                    f"{key} {one[key]} -> {two[key]}" for key in ("registers", "stack", "instructions")
                )
                print(f"{arch} {name}: {', '.join(changes)}")
    print(f"{different} of {total} kernels differ")
    if not total:
        raise SystemExit(f"neither {old} nor {new} holds digests")
    return different


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("digest")
    write.add_argument("tree", type=Path)
    write.add_argument("folder", type=Path)
    write.add_argument("--arch", choices=ARCHITECTURES, action="append")
    write.add_argument("--jobs", type=int, default=os.cpu_count())
    two = commands.add_parser("compare")
    two.add_argument("first", type=Path)
    two.add_argument("second", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "compare":
        return 1 if compare(arguments.first, arguments.second) else 0
    architectures = arguments.arch or list(ARCHITECTURES)
    digest(arguments.tree.resolve(), arguments.folder, architectures, arguments.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
