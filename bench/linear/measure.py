"""This project's Hopper linear compared with its peers on every DeepSeek-V4 linear -> JSON with ceilings and rows.

    PYTHONPATH=kernels python3 -m bench.linear.measure OUT.json [--shapes I:J] [--tokens 1,16 | --draw 684 --seed 1]
        [--done ROWS.json] [--peers quack] [--seconds S]

Per (shape, M): every implementation is timed in CUDA graphs over rotated weights (more bytes than L2 holds),
`REPEATS` repeats interleaved between implementations, medians. The result is checked against float64 on
sampled rows, and must have no element that was left as it was. `floor_us` uses the ceilings measured in the same run,
`datasheet_us` the vendor's numbers. With `--draw` so many pairs of a shape and an M are drawn, as many from every shape
and from every range of `STRATA`. A run that was cut off goes on with `--done`, which names the files it has written.
bench/warm.py before it, and CUTEDSL_NVFP4_KERNELS, spare the run the peers' and this project's compilers.
"""

import math
import random
import statistics
import sys
import time
from collections.abc import Iterable, Sequence

import torch

from bench.linear.peers import PEERS, clone
from bench.linear.tune import exact_product, operands, relative_error
from bench.peers import empty_result, import_peers
from bench.report import OURS, read, save
from bench.shapes import Shape, linear_parser, selected_shapes
from bench.timing import (
    DATASHEET_BYTES_PER_S,
    DATASHEET_FLOPS,
    capture,
    ceilings,
    copies,
    floor_us,
    interleaved,
    warm_up,
)
from cutedsl_nvfp4.sm90.linear import run

GLOBAL_SCALE = 1 / 2688
REPEATS = 5
STRATA = ((1, 32), (33, 512), (513, 16384))  # of tokens: decoding, small batches, prefill
CLOCKED = 512  # tokens from which on the power cap may decide, so that clocks are read


def draw(shapes: Sequence[Shape], count: int, seed: int) -> list[tuple[Shape, int]]:
    """`count` pairs of a shape and tokens, log-uniform in a range of STRATA; every shape has each range in turn."""
    generator = random.Random(seed)
    pairs = []
    for i in range(count):
        low, high = STRATA[i // len(shapes) % len(STRATA)]
        tokens = math.exp(generator.uniform(math.log(low), math.log(high + 1)))
        pairs.append((shapes[i % len(shapes)], min(int(tokens), high)))
    return pairs


def poison(m: int, n: int) -> None:
    """Leave NaN where the allocator then finds room for a result [m, n] of two-byte elements."""
    torch.full((m, n), math.nan, dtype=torch.bfloat16, device="cuda")


def clock(graph: torch.cuda.CUDAGraph, us: float) -> int:
    """MHz of the SMs at the end of 20 ms of a graph that takes so long."""
    for _ in range(max(2, round(20_000 / us))):
        graph.replay()
    mhz = torch.cuda.clock_rate()
    torch.cuda.synchronize()
    return mhz


def implementations(shape: Shape, peers: list):
    """{name: (call(x, weights), list of rotated weights)}, and what the check needs."""
    codes, scales, rotated, row_scale = operands(shape)

    def ours(x, weights):
        return run(x, *weights, row_scale, n=shape.n, k=shape.k, groups=shape.groups)

    found = {OURS: (ours, rotated)}
    if shape.groups == 1:
        for peer in peers:
            count = copies(round(shape.n * shape.k * peer.bytes_per_weight))
            try:
                weights = peer.prepare(codes, scales, GLOBAL_SCALE)
                rotations = [weights, *(clone(weights) for _ in range(count - 1))]
            except (AssertionError, ValueError, RuntimeError) as error:
                print(f"{peer.name} cannot prepare {shape}: {type(error).__name__}: {error}", flush=True)
                continue
            found[peer.name] = (peer.call, rotations)
    return found, (codes, scales, row_scale)


def measure(
    shape: Shape, tokens: Iterable[int], peers: list, limits: dict, rows: list, deadline: float
) -> None:
    found, reference = implementations(shape, peers)
    warm_up()
    for m in tokens:
        if time.monotonic() > deadline:
            print("out of time at", shape, m, flush=True)
            return
        x = torch.randn(m, shape.groups * shape.k, device="cuda").to(torch.bfloat16)
        row = {
            "shape": shape.name,
            "n": shape.n,
            "k": shape.k,
            "groups": shape.groups,
            "m": m,
            "floor_us": floor_us(shape, m, limits["bytes_per_s"], limits["flops"]),
            "datasheet_us": floor_us(shape, m, DATASHEET_BYTES_PER_S, DATASHEET_FLOPS),
            "us": {},
            "error_over_rounding": {},
        }
        exact = exact_product(shape, *reference, x)
        graphs = {}
        for name, (call, weights) in found.items():
            try:
                poison(m, shape.n)
                out = call(x, weights[0])
                error, rounding = relative_error(out, *exact)
                if not out.isfinite().all():
                    error = math.nan
                used = weights[: 4 if m >= 4096 else 16 if m >= 512 else None]
                graphs[name] = (capture([lambda c=call, w=w, x=x: c(x, w) for w in used]), len(used))
            except (AssertionError, ValueError, RuntimeError) as failure:
                if name == OURS:
                    raise
                print(
                    f"{name} cannot run {shape.name} M={m}: {type(failure).__name__}: {failure}"[:300],
                    flush=True,
                )
                continue
            row["error_over_rounding"][name] = error / rounding
            if name == OURS and not error <= 1.05 * rounding:
                sys.exit(f"wrong result: {row}")
        times = interleaved(graphs, REPEATS)
        row["us"] = {name: statistics.median(values) for name, values in times.items()}
        row["repeats_us"] = {name: [round(us, 3) for us in values] for name, values in times.items()}
        if m >= CLOCKED:
            row["sm_mhz"] = {
                name: clock(graph, calls * row["us"][name]) for name, (graph, calls) in graphs.items()
            }
        rows.append(row)
        text = "  ".join(f"{name} {us:.2f}" for name, us in row["us"].items())
        print(f"{shape.name} M={m}  floor {row['floor_us']:.2f}  {text}", flush=True)


def main() -> None:
    parser = linear_parser(__doc__)
    parser.add_argument("--peers", default=",".join(peer.name for peer in PEERS))
    parser.add_argument(
        "--draw", type=int, metavar="COUNT", help="draw pairs of a shape and an M, in place of --tokens"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--done", nargs="*", default=[], metavar="ROWS.json", help="measure none of these again"
    )
    arguments = parser.parse_args()
    shapes = selected_shapes(arguments.shapes)
    if arguments.draw:
        print("seed", arguments.seed, flush=True)
        pairs = draw(shapes, arguments.draw, arguments.seed)
    else:
        pairs = [(shape, int(m)) for shape in shapes for m in arguments.tokens.split(",")]
    done = {(row["shape"], row["m"]) for path in arguments.done for run in read(path) for row in run["rows"]}
    deadline = time.monotonic() + arguments.seconds
    peers, missing = import_peers(PEERS, arguments.peers.split(","))
    print("missing peers:", missing or "none", flush=True)
    limits = ceilings()
    result = empty_result(missing, limits)
    print(limits, flush=True)
    for shape in shapes:
        tokens = sorted({m for drawn, m in pairs if drawn is shape and (shape.name, m) not in done})
        if not tokens:
            continue
        if time.monotonic() > deadline:
            sys.exit(f"out of time at {shape}")
        measure(shape, tokens, peers, limits, result["rows"], deadline)
        save(result, arguments.out)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
