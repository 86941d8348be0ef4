"""Measure candidate tiles of the experts on every case and token count -> JSON lines, one per configuration.

    PYTHONPATH=kernels python3 -m bench.experts.tune OUT.jsonl [--cases flash,pro_tp8] [--seconds S]

Every tile is tried for both products at once, then the best w13 with every w2 of the same tokens, and the
other way round. The result of the first configuration of a token count is the reference: others must agree.
"""

import json
import sys
import time

import torch

from bench.experts import candidates
from bench.experts.measure import Layer, floor_us, routed_inputs
from bench.shapes import EXPERT_CASES, experts_parser
from bench.timing import capture, ceilings, microseconds
from cutedsl_nvfp4.sm90.tiles import ExpertTiles


def measure(layer: Layer, m: int, routing: str, limits: dict, file, deadline: float) -> None:
    case = layer.case
    inputs = routed_inputs(layer.case, m, routing)
    times: dict[ExpertTiles, float] = {}
    expected = None

    def attempt(tiles: ExpertTiles) -> None:
        nonlocal expected
        if tiles in times:
            return
        try:
            tiles.check()
        except ValueError:
            return
        got = layer.run(*inputs[0], tiles=tiles).float()
        expected = got if expected is None else expected
        difference = ((got - expected).norm() / expected.norm().clamp(min=1e-30)).item()
        if not difference < 1e-2:
            sys.exit(f"{tiles} is wrong on {case}, M = {m}: differs by {difference}")
        graph = capture([lambda i=i: layer.run(*i, tiles=tiles) for i in inputs])
        times[tiles] = microseconds(graph, len(inputs), repeats=3, target_us=1000.0)
        row = {"case": case.name, "m": m, "routing": routing, "w13": repr(tiles.w13), "w2": repr(tiles.w2)}
        file.write(json.dumps(row | {"us": times[tiles]}) + "\n")

    groups = candidates.by_tokens(m * case.topk / case.known)
    for configs in groups:
        for config in configs:
            attempt(ExpertTiles(config, config))
    for configs in groups:
        if time.monotonic() > deadline:
            sys.exit("out of time")
        same = [t for t in times if t.w13 in configs]
        if not same:
            continue
        best = min(same, key=times.get)
        if times[best] > 1.3 * min(times.values()):
            continue
        for config in configs:
            attempt(ExpertTiles(best.w13, config))
            attempt(ExpertTiles(config, best.w2))
    file.flush()
    ranked = sorted(times, key=times.get)[:3]
    text = "; ".join(f"{times[t]:.1f} {t.w13} | {t.w2}" for t in ranked)
    floor = floor_us(case, [i[2] for i in inputs], limits["bytes_per_s"], limits["flops"])
    print(f"{case.name} M={m} {routing} floor {floor:.1f}: {text}", flush=True)


def main() -> None:
    parser = experts_parser(__doc__)
    parser.add_argument("--routing", default="uniform", help="uniform, zipf, or both separated by a comma")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    limits = ceilings()
    print(torch.cuda.get_device_name(), limits, flush=True)
    with open(arguments.out, "w") as file:
        for case in EXPERT_CASES:
            if case.name in arguments.cases.split(","):
                layer = Layer(case)
                for m in map(int, arguments.tokens.split(",")):
                    for routing in arguments.routing.split(","):
                        measure(layer, m, routing, limits, file, deadline)
                del layer
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
