"""This project's Hopper linear compared with its peers on every DeepSeek-V4 linear -> JSON with ceilings and rows.

    PYTHONPATH=kernels python3 -m bench.linear.measure OUT.json [--shapes I:J] [--tokens 1,16] [--peers quack]
        [--seconds S]

Per (shape, M): every implementation is timed in CUDA graphs over rotated weights (more bytes than L2 holds),
`REPEATS` repeats interleaved between implementations, medians. The result is checked against float64 on
sampled rows. `floor_us` uses the ceilings measured in the same run, `datasheet_us` the vendor's numbers.
bench/warm.py before it, and CUTEDSL_NVFP4_KERNELS, spare the run the peers' and this project's compilers.
"""

import statistics
import sys
import time

import torch

from bench.linear.peers import PEERS, clone
from bench.linear.tune import exact_product, operands, relative_error
from bench.peers import empty_result, import_peers
from bench.report import OURS, save
from bench.shapes import Shape, linear_parser, selected_shapes
from bench.timing import (
    DATASHEET_BYTES_PER_S,
    DATASHEET_FLOPS,
    capture,
    ceilings,
    copies,
    floor_us,
    interleaved,
)
from cutedsl_nvfp4.sm90.linear import run

GLOBAL_SCALE = 1 / 2688
REPEATS = 5


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


def measure(shape: Shape, tokens: list[int], peers: list, limits: dict, rows: list, deadline: float) -> None:
    found, reference = implementations(shape, peers)
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
                error, rounding = relative_error(call(x, weights[0]), *exact)
                used = weights[: 16 if m >= 512 else None]
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
        row["repeats_us"] = times
        rows.append(row)
        text = "  ".join(f"{name} {us:.2f}" for name, us in row["us"].items())
        print(f"{shape.name} M={m}  floor {row['floor_us']:.2f}  {text}", flush=True)


def main() -> None:
    parser = linear_parser(__doc__)
    parser.add_argument("--peers", default=",".join(peer.name for peer in PEERS))
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    peers, missing = import_peers(PEERS, arguments.peers.split(","))
    print("missing peers:", missing or "none", flush=True)
    limits = ceilings()
    result = empty_result(missing, limits)
    print(limits, flush=True)
    for shape in selected_shapes(arguments.shapes):
        if time.monotonic() > deadline:
            sys.exit(f"out of time at {shape}")
        measure(shape, [int(m) for m in arguments.tokens.split(",")], peers, limits, result["rows"], deadline)
        save(result, arguments.out)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
