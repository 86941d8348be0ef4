"""Compile the tuning runs' candidates ahead of time, so that a GPU does not wait for them; needs no GPU.

    PYTHONPATH=kernels python3 -m bench.ahead FOLDER [--jobs N] [linear] [experts] [shipped]

Every kernel's machine code is read too: one that spills is named, not written. The tuning runs then find the
kernels through CUTEDSL_NVFP4_KERNELS=FOLDER, and compile what is missing there.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch

from bench.experts import candidates as of_experts
from bench.linear import candidates as of_linears
from bench.shapes import EXPERT_CASES, EXPERT_TOKENS
from cutedsl_nvfp4 import compiled
from cutedsl_nvfp4.sm90 import experts, linear
from cutedsl_nvfp4.sm90.compile import compile_linear
from devtools.kernels.sass import sm90 as sass

Kernel = tuple[Callable, object, bool]  # what compiles it, its tiles, whether it is an experts kernel


def linear_candidates() -> dict[str, Kernel]:
    configs = of_linears.narrow() + of_linears.wide()
    return {
        linear.kernel_name(c, torch.bfloat16, False, True): (
            partial(compile_linear, c, torch.bfloat16),
            c,
            False,
        )
        for c in configs
    }


def expert_kernels(shipped: dict[str, tuple]) -> dict[str, Kernel]:
    return {
        name: (partial(experts.build, *kernel), kernel[1] if kernel[0] == "product" else None, True)
        for name, kernel in shipped.items()
    }


def expert_candidates() -> dict[str, Kernel]:
    means = {m * case.topk / case.known for case in EXPERT_CASES for m in EXPERT_TOKENS}
    configs = {c for mean in means for configs in of_experts.by_tokens(mean) for c in configs}
    products = [("product", c, first) for c in configs for first in (True, False)]
    others = [*(("route", ctas) for ctas in experts.ROUTE_CTAS), ("combine", 6, torch.bfloat16)]
    return expert_kernels({experts.kernel_name(*kernel): kernel for kernel in products + others})


def shipped_kernels() -> dict[str, Kernel]:
    found = {
        name: (partial(compile_linear, *arguments), arguments[0], False)
        for name, arguments in linear.shipped_kernels().items()
    }
    return found | expert_kernels(experts.shipped_kernels())


SETS = {"linear": linear_candidates, "experts": expert_candidates, "shipped": shipped_kernels}


def compile_one(name: str, kernel: Kernel, folder: Path) -> list[str]:
    build, tiles, is_experts = kernel
    with tempfile.TemporaryDirectory() as scratch:
        function = build(options=f"--keep-cubin --dump-dir {scratch}")
        (cubin,) = Path(scratch).glob("*.cubin")
        problems = sass.problems(cubin, tiles, is_experts)
    if not problems:
        compiled.export(function, name, folder)
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
        runs = {name: pool.submit(compile_one, name, k, arguments.folder) for name, k in wanted.items()}
        for name, run in runs.items():
            for problem in run.result():
                print(f"{name} is left out: {problem}", flush=True)
    print(f"{len(wanted)} kernels compiled into {arguments.folder}")


if __name__ == "__main__":
    main()
