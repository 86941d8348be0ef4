"""Fill the peers' on-disk caches of compiled kernels, so that the timed runs wait for no compiler.

    PYTHONPATH=kernels python3 -m bench.warm [--jobs N] [--shapes I:J] [--tokens 1,16] [--cases flash]
        [--peers quack,humming] [--seconds S]

Each of `--jobs` processes on the one GPU takes a (shape, M, peer) or an (expert case, peer) at a time, prepares
its weights and calls it once, a linear at one token count and a case at all. What fails is printed and left
out. A linear takes less than 1 GB, a case up to 15 GB. The timed run must see the same variables:

    QUACK_CACHE_DIR     quack's objects, else /tmp/USER/quack_cache. Found again under the same minor version of
                        Python and the same CuTe DSL, TVM FFI and quack.
    HUMMING_CACHE_DIR   Humming's machine code, else ~/.humming/cache. Found again under the same NVRTC, folders of
                        CUDA's and Humming's headers and modification times of the latter; which tiles it
                        takes depends on the GPU's memory bandwidth.

This project's own kernels come from devtools/kernels/compile.py through CUTEDSL_NVFP4_KERNELS.
"""

import argparse
import multiprocessing
import time
import traceback
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache

import torch

from bench.experts.measure import random_experts, routed_inputs
from bench.experts.peers import EXPERT_PEERS
from bench.linear.measure import GLOBAL_SCALE
from bench.linear.peers import PEERS
from bench.linear.tune import random_weights
from bench.shapes import EXPERT_CASES, EXPERT_TOKENS, TOKENS, ExpertCase, Shape, selected_shapes

Task = tuple[Shape | ExpertCase, type, Sequence[int]]  # what to run, on which peer, at which token counts


def tasks(
    shapes: Iterable[Shape], tokens: Sequence[int], cases: Iterable[ExpertCase], names: Sequence[str]
) -> list[Task]:
    """Every problem on every peer named that compiles; the cases first, which take longest.

    Shapes alternate, since one process waits for another that compiles the same kernel.
    """

    def compiling(peers: Sequence[type]) -> list[type]:
        return [peer for peer in peers if peer.compiles and peer.name in names]

    plain = [shape for shape in shapes if shape.groups == 1]  # what peers can do
    return [(case, peer, EXPERT_TOKENS) for peer in compiling(EXPERT_PEERS) for case in cases] + [
        (shape, peer, (m,)) for peer in compiling(PEERS) for m in tokens for shape in plain
    ]


def run(task: Task, deadline: float) -> str:
    """Compile what one task needs -> "" or why that failed."""
    problem, peer, tokens = task
    if time.monotonic() > deadline:
        return "out of time"
    try:
        warm = _warm_linear if isinstance(problem, Shape) else _warm_experts
        warm(problem, _made(peer), tokens)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:  # a peer's, whatever it is, is not this run's
        return traceback.format_exc(limit=-3)
    return ""


@cache
def _made(peer: type):
    return peer()


def _warm_linear(shape: Shape, peer, tokens: Sequence[int]) -> None:
    weights = peer.prepare(*random_weights(shape), GLOBAL_SCALE)
    for m in tokens:
        peer.call(torch.randn(m, shape.k, device="cuda").to(torch.bfloat16), weights)


def _warm_experts(case: ExpertCase, peer, tokens: Sequence[int]) -> None:
    weights = peer.prepare(case, *random_experts(case), GLOBAL_SCALE)
    for m in tokens:
        x, topk_weights, ids = routed_inputs(case, m, "uniform")[0]
        peer.call(x, weights, peer.route(case, ids, weights), topk_weights)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=12)
    parser.add_argument("--shapes", default=":", help="slice of the shape list, or names separated by commas")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="of the linears")
    parser.add_argument("--cases", default=",".join(case.name for case in EXPERT_CASES), help="may be empty")
    parser.add_argument("--peers", default="quack,humming")
    parser.add_argument("--seconds", type=float, default=500.0, help="no task starts later")
    arguments = parser.parse_args()
    started = time.monotonic()
    todo = tasks(
        selected_shapes(arguments.shapes),
        [int(m) for m in arguments.tokens.split(",")],
        [case for case in EXPERT_CASES if case.name in arguments.cases.split(",")],
        arguments.peers.split(","),
    )
    failed = 0
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
        runs = {pool.submit(run, task, started + arguments.seconds): task for task in todo}
        for done in as_completed(runs):
            (problem, peer, tokens), failure = runs[done], done.result()
            failed += bool(failure)
            seconds = time.monotonic() - started
            print(f"{seconds:.0f} s {peer.name} {problem.name} {tokens} {failure or 'warm'}", flush=True)
    print(f"{len(todo) - failed} of {len(todo)} warm", flush=True)


if __name__ == "__main__":
    main()
