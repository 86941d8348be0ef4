"""Compile the tuning runs' candidates ahead of time, so that a GPU does not wait for them; needs no GPU.

    PYTHONPATH=kernels python3 -m bench.ahead FOLDER [--jobs N] [linear] [experts] [shipped]

Every kernel's machine code is read too: one that spills is named, not written. The tuning runs then find the
kernels through CUTEDSL_NVFP4_KERNELS=FOLDER, and compile what is missing there.
"""

import argparse
import os
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from bench.experts import candidates as of_experts
from bench.linear import candidates as of_linears
from bench.shapes import EXPERT_CASES, EXPERT_TOKENS
from cutedsl_nvfp4 import compiled
from cutedsl_nvfp4.family import ExpertsProblem, Kernel, LinearProblem
from cutedsl_nvfp4.sm90 import FAMILY
from cutedsl_nvfp4.sm90.tiles import ExpertTiles
from devtools.kernels.sass import sm90 as sass

ARCH = "sm_90a"


def by_name(kernels: Iterable[Kernel]) -> dict[str, Kernel]:
    return {kernel.name: kernel for kernel in kernels}


def linear_candidates() -> dict[str, Kernel]:
    problem = LinearProblem(64, 64)  # results without a bias, of whole 16-byte pieces
    tiles = of_linears.narrow() + of_linears.wide()
    return by_name(kernel for tile in tiles for kernel in FAMILY.linear.kernels(problem, tile, ARCH))


def expert_candidates() -> dict[str, Kernel]:
    problem = ExpertsProblem(64, 64, 6, 64, 64)
    means = {m * case.topk / case.known for case in EXPERT_CASES for m in EXPERT_TOKENS}
    return by_name(
        kernel
        for mean in means
        for tiles in of_experts.by_tokens(mean)
        for tile in tiles
        for kernel in FAMILY.experts.kernels(problem, ExpertTiles(tile, tile), ARCH)
    )


def shipped_kernels() -> dict[str, Kernel]:
    return FAMILY.shipped(ARCH)


SETS = {"linear": linear_candidates, "experts": expert_candidates, "shipped": shipped_kernels}


def compile_one(kernel: Kernel, folder: Path) -> list[str]:
    with tempfile.TemporaryDirectory() as scratch:
        function = kernel.build(options=f"--keep-cubin --dump-dir {scratch}")
        (cubin,) = Path(scratch).glob("*.cubin")
        problems = sass.problems(cubin, kernel)
    if not problems:
        compiled.export(function, kernel.name, folder)
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("sets", nargs="*", help=f"of {', '.join(SETS)}; without any linear and experts")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    if unknown := set(arguments.sets) - set(SETS):
        parser.error(f"no set of kernels is called {', '.join(sorted(unknown))}; there are {', '.join(SETS)}")
    sets = arguments.sets or ["linear", "experts"]
    wanted = {name: kernel for chosen in sets for name, kernel in SETS[chosen]().items()}
    wanted = {name: k for name, k in wanted.items() if not (arguments.folder / f"{name}.so").exists()}
    with ProcessPoolExecutor(arguments.jobs) as pool:
        runs = {name: pool.submit(compile_one, k, arguments.folder) for name, k in wanted.items()}
        for name, run in runs.items():
            for problem in run.result():
                print(f"{name} is left out: {problem}", flush=True)
    print(f"{len(wanted)} kernels compiled into {arguments.folder}")


if __name__ == "__main__":
    main()
