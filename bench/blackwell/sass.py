"""Main loops of Blackwell's kernels compared with NVIDIA's own: instructions, registers, spills. Needs no GPU.

    PYTHONPATH=kernels python3 -m bench.blackwell.sass [--arch sm_100a] [--mix] [NAME ...]

A row a kernel: tensor core instructions of its main loop, other instructions for each of them, the same of NVIDIA's
example of that kind (nvidia_examples.py) with the same tile or its nearest, and the ratio. Exits 1 where a kernel
spills, or has more than BAR times the example's. --mix prints every instruction of both loops; NAME picks kernels
whose name contains it.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

from bench.blackwell.nvidia_examples import EXAMPLES
from cutedsl_nvfp4.blackwell.variants import Result
from cutedsl_nvfp4.family import family_of_arch
from devtools.kernels.sass.machine_code import MachineCode, read

ARCHITECTURES = ("sm_100a", "sm_103a", "sm_120a")
BAR = 1.2


@dataclass(frozen=True)
class Ours:
    """A kernel of this project, and the tile of NVIDIA's example that comes closest."""

    name: str
    build: Callable[..., object]  # takes options
    kind: str  # linear, w13, w2
    example_tile: tuple[int, int]


def ours(arch: str) -> Iterator[Ours]:
    """Every shipped kernel with a main loop; of those that differ in the type they store, the one for bf16."""
    family = family_of_arch(arch)
    seen = set()
    for name, kernel in family.shipped(arch).items():
        if kernel.tile is None or kernel.out_dtype is torch.float32:
            continue
        kind = kernel.kind
        if kind == "product":
            kind = "w2" if Result.ROWS in kernel.arguments else "w13"
        if (kind, kernel.tile) not in seen:
            seen.add((kind, kernel.tile))
            yield Ours(name, kernel.build, kind, nearest(family.name, kind, kernel.tile))


def nearest(family: str, kind: str, tile: object) -> tuple[int, int]:
    """The example's tile for one of ours: as many tokens and rows, or the fewest it takes."""
    if family == "sm120":
        return min(tile.tokens, 128), 64 if tile.rows <= 64 else 128
    columns = next(n for n in (64, 128, 256) if n >= tile.tokens) if kind == "linear" else 128
    return 128 * tile.ctas_per_mma, columns


@cache
def machine_code(build: Callable[..., object]) -> MachineCode:
    with tempfile.TemporaryDirectory() as folder:
        build(options=f"--keep-cubin --dump-dir {folder}")
        (cubin,) = Path(folder).glob("*.cubin")
        return read(cubin)


@cache
def example(kind: str, family: str, tile: tuple[int, int], arch: str) -> MachineCode:
    _, compile_example = EXAMPLES[kind, family]
    return machine_code(partial(compile_example, *tile, arch))


@dataclass(frozen=True)
class Comparison:
    ours: Ours
    code: MachineCode
    example: MachineCode

    @property
    def ratio(self) -> float:
        return self.code.other_per_mma / self.example.other_per_mma

    @property
    def problems(self) -> list[str]:
        wrong = self.code.problems()
        if not self.ratio <= BAR:
            wrong.append(
                f"{self.code.other_per_mma:.2f} other instructions for each MMA are {self.ratio:.2f} times those of "
                f"NVIDIA's example, more than {BAR}"
            )
        return wrong


def compare(kernel: Ours, arch: str) -> Comparison:
    family = "sm120" if arch.startswith("sm_12") else "sm100"
    found = example(kernel.kind, family, kernel.example_tile, arch)
    return Comparison(kernel, machine_code(kernel.build), found)


def _counts(instructions: dict[str, int]) -> str:
    return ", ".join(f"{count} {opcode}" for opcode, count in instructions.items())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--arch", choices=ARCHITECTURES, action="append", help="all of them where left out")
    parser.add_argument("--mix", action="store_true")
    arguments = parser.parse_args()
    bad = 0
    print(
        "| kernel | MMA in the loop | other per MMA | registers | example | its other per MMA | registers | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for arch in arguments.arch or ARCHITECTURES:
        for kernel in ours(arch):
            if arguments.names and not any(re.search(name, kernel.name) for name in arguments.names):
                continue
            found = compare(kernel, arch)
            tile = "x".join(map(str, kernel.example_tile))
            print(
                f"| {kernel.name} | {_counts(found.code.mma)} | {found.code.other_per_mma:.2f} | "
                f"{found.code.registers} | {tile} | {found.example.other_per_mma:.2f} | {found.example.registers} | "
                f"{found.ratio:.2f} |",
                flush=True,
            )
            if arguments.mix:
                print(f"  ours: {_counts(found.code.other)}\n  NVIDIA's: {_counts(found.example.other)}")
            for problem in found.problems:
                print(f"{kernel.name}: {problem}", file=sys.stderr)
                bad += 1
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
