"""This project's Hopper experts compared with their peers on DeepSeek-V4's layers -> JSON with ceilings and rows.

    PYTHONPATH=kernels python3 -m bench.experts.measure OUT.json [--cases flash] [--tokens 1,64] [--seconds S]

Per (case, M, routing): every implementation is timed in CUDA graphs over several routings (so that weights
come from memory), `REPEATS` repeats interleaved between implementations, medians. Results are checked
against float64 on sampled tokens; so is a path that rounds to bf16 what must be stored. `floor_us` counts
the experts really touched, tokens in and out, and the intermediates, with the ceilings of the same run.
"""

import math
import statistics
import sys
import time

import torch

from bench import choice
from bench.experts.choose import parse_tiles
from bench.experts.peers import EXPERT_PEERS
from bench.peers import empty_result, import_peers
from bench.report import OURS, save
from bench.shapes import EXPERT_CASES, ExpertCase, experts_parser
from bench.timing import DATASHEET_BYTES_PER_S, DATASHEET_FLOPS, capture, ceilings, interleaved
from cutedsl_nvfp4.reference import dequantize, swiglu
from cutedsl_nvfp4.sm90.experts import run
from cutedsl_nvfp4.sm90.layout import pack_experts
from cutedsl_nvfp4.sm90.tiles import ExpertTiles

GLOBAL_SCALE = 1 / 2688
LIMIT = 10.0
REPEATS = 5
SAMPLED_TOKENS = 8
ZIPF = 1.0


def random_experts(case: ExpertCase) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """(codes, block scales) [E, N, ...] of w13 and of w2, valid and random."""

    def weights(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.randint(0, 256, (case.experts, n, k // 2), dtype=torch.uint8, device="cuda")
        scales = torch.rand(case.experts, n, k // 16, device="cuda") * 3 + 0.5
        return codes, scales.to(torch.float8_e4m3fn)

    return weights(2 * case.intermediate, case.hidden), weights(case.hidden, case.intermediate)


def routed_inputs(case: ExpertCase, m: int, routing: str) -> list[tuple[torch.Tensor, ...]]:
    """(x, weights, ids) of enough distinct calls that no call finds its weights in L2."""
    found = []
    for _ in range(4 if m <= 32 else 1):
        x = torch.randn(m, case.hidden, device="cuda").to(torch.bfloat16)
        chance = torch.arange(1, case.known + 1, device="cuda").float().pow(-ZIPF).log()
        chance = chance[torch.randperm(case.known, device="cuda")]
        gumbel = -torch.empty(m, case.known, device="cuda").exponential_().log()
        score = gumbel + chance if routing == "zipf" else gumbel
        ids = score.topk(case.topk, dim=1).indices.to(torch.int32)
        found.append((x, torch.rand(m, case.topk, device="cuda"), ids))
    return found


class Layer:
    """Random valid experts: the checkpoint's tensors, and the kernels' operands."""

    def __init__(self, case: ExpertCase):
        self.case = case
        self.w13, self.w2 = random_experts(case)
        self.packed = (
            *pack_experts(*(t.clone() for t in self.w13), gate_up=True),
            torch.full((case.experts, 2 * case.intermediate), GLOBAL_SCALE, device="cuda"),
            *pack_experts(*(t.clone() for t in self.w2), gate_up=False),
            torch.full((case.experts, case.hidden), GLOBAL_SCALE, device="cuda"),
        )
        self.expert_map = None
        if case.known > case.experts:
            self.expert_map = torch.full((case.known,), -1, dtype=torch.int32, device="cuda")
            self.expert_map[: case.experts] = torch.arange(case.experts, dtype=torch.int32, device="cuda")

    def run(self, x, weights, ids, tiles=None) -> torch.Tensor:
        case = self.case
        return run(
            x, *self.packed, weights, ids, expert_map=self.expert_map,
            hidden=case.hidden, intermediate=case.intermediate, swiglu_limit=LIMIT, tiles=tiles,
        )  # fmt: skip

    def exact(self, x, weights, ids, rounds: bool) -> torch.Tensor:
        """A few tokens in float64; with `rounds`, what a kernel stores is rounded to bf16."""

        def stored(value: torch.Tensor) -> torch.Tensor:
            return value.to(torch.bfloat16).double() if rounds else value

        out = torch.zeros(x.shape[0], self.case.hidden, dtype=torch.float64, device="cuda")
        for m, row in enumerate(ids.tolist()):
            for t, expert in enumerate(row):
                if expert < self.case.experts:
                    w13, w2 = (
                        dequantize(codes[expert], scales[expert]).double() * GLOBAL_SCALE
                        for codes, scales in (self.w13, self.w2)
                    )
                    gate, up = (w13 @ x[m].double()).chunk(2)
                    out[m] += weights[m, t].double() * stored(w2 @ stored(swiglu(gate, up, LIMIT)))
        return stored(out)


def floor_us(case: ExpertCase, ids: list[torch.Tensor], bytes_per_s: float, flops: float) -> float:
    """The least time, on average over `ids`: bytes once, or products."""
    total = 0.0
    for routing in ids:
        local = routing[routing < case.experts]
        moved = local.unique().numel() * case.expert_bytes + 4 * routing.shape[0] * case.hidden
        moved += 4 * local.numel() * case.intermediate  # written and read
        products = 6 * local.numel() * case.hidden * case.intermediate
        total += max(moved / bytes_per_s, products / flops) * 1e6
    return total / len(ids)


def errors(layer: Layer, inputs, out: torch.Tensor) -> tuple[float, float]:
    """(error of `out`, error of rounding to bf16 what must be stored) on sampled tokens, against float64."""
    x, weights, ids = inputs
    some = torch.randperm(x.shape[0], device="cuda")[:SAMPLED_TOKENS]
    some = some[(ids[some] < layer.case.experts).any(dim=1)]
    exact = layer.exact(x[some], weights[some], ids[some], rounds=False)
    rounded = layer.exact(x[some], weights[some], ids[some], rounds=True)
    size = exact.norm().clamp(min=1e-30)
    return ((out[some].double() - exact).norm() / size).item(), ((rounded - exact).norm() / size).item()


def measure(layer: Layer, prepared: dict, m: int, routing: str, limits: dict, tuned: dict) -> dict:
    case = layer.case
    inputs = routed_inputs(case, m, routing)
    ids = [i[2] for i in inputs]
    row = {
        "case": case.name,
        "m": m,
        "routing": routing,
        "touched": statistics.mean(i[i < case.experts].unique().numel() for i in ids),
        "floor_us": floor_us(case, ids, limits["bytes_per_s"], limits["flops"]),
        "datasheet_us": floor_us(case, ids, DATASHEET_BYTES_PER_S, DATASHEET_FLOPS),
        "us": {},
        "error_over_rounding": {},
    }
    config = tuned.get((case.name, m))
    error, rounding = errors(layer, inputs[0], layer.run(*inputs[0], tiles=config))
    row["error_over_rounding"][OURS] = error / rounding if rounding else 1.0
    if not error <= 1.1 * rounding:
        sys.exit(f"wrong result: {row}: error {error}, rounding alone {rounding}")
    graphs = {OURS: (capture([lambda i=i: layer.run(*i, tiles=config) for i in inputs]), len(inputs))}
    kept = []  # what the graphs read
    for name, (peer, weights) in prepared.items():
        try:
            routes = [peer.route(case, i, weights) for i in ids]
            kept.append(routes)
            out = peer.call(inputs[0][0], weights, routes[0], inputs[0][1])
            if hasattr(peer, "finish"):
                out = peer.finish(out, ids[0], inputs[0][1], case)
            error, rounding = errors(layer, inputs[0], out)
            row["error_over_rounding"][name] = error / rounding if rounding else math.nan
            calls = [
                lambda i=i, r=r, p=peer, w=weights: p.call(i[0], w, r, i[1])
                for i, r in zip(inputs, routes, strict=True)
            ]
            graphs[name] = (capture(calls), len(calls))
        except (AssertionError, ValueError, RuntimeError, TypeError, StopIteration) as failure:
            reason = f"{type(failure).__name__}: {failure}"[:300]
            print(f"{name} cannot run {case.name} M={m}: {reason}", flush=True)
    times = interleaved(graphs, REPEATS)
    row["us"] = {name: statistics.median(values) for name, values in times.items()}
    row["repeats_us"] = times
    text = "  ".join(
        f"{name} {us:.1f} (err {row['error_over_rounding'][name]:.2f})" for name, us in row["us"].items()
    )
    print(f"{case.name} M={m} {routing} floor {row['floor_us']:.1f}  {text}", flush=True)
    return row


def main() -> None:
    parser = experts_parser(__doc__)
    parser.add_argument("--routing", default="uniform,zipf")
    parser.add_argument("--peers", default=",".join(peer.name for peer in EXPERT_PEERS))
    parser.add_argument(
        "--tuned", help="rows of bench/experts/tune.py: take their best tiles, not choose_experts'"
    )
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    peers, missing = import_peers(EXPERT_PEERS, arguments.peers.split(","))
    print("missing peers:", missing or "none", flush=True)
    tuned = best_tiles(arguments.tuned) if arguments.tuned else {}
    limits = ceilings()
    result = empty_result(missing, limits)
    print(result["gpu"], limits, flush=True)
    for case in EXPERT_CASES:
        if case.name not in arguments.cases.split(","):
            continue
        layer, prepared = Layer(case), {}
        for peer in peers:
            try:
                prepared[peer.name] = (peer, peer.prepare(case, layer.w13, layer.w2, GLOBAL_SCALE))
            except (AssertionError, ValueError, RuntimeError, TypeError) as failure:
                print(f"{peer.name} cannot prepare {case.name}: {failure}"[:300], flush=True)
        for m in map(int, arguments.tokens.split(",")):
            for routing in arguments.routing.split(","):
                if time.monotonic() > deadline:
                    sys.exit(f"out of time at {case.name}, M = {m}")
                result["rows"].append(measure(layer, prepared, m, routing, limits, tuned))
                save(result, arguments.out)
        del layer, prepared
        torch.cuda.empty_cache()


def best_tiles(path: str) -> dict[tuple[str, int], ExpertTiles]:
    """{(case, m): the fastest tiles} of bench/experts/tune.py's rows."""
    best: dict[tuple[str, int], dict] = {}
    for row in choice.rows(path):
        problem = row["case"], row["m"]
        if problem not in best or row["us"] < best[problem]["us"]:
            best[problem] = row
    return {problem: parse_tiles(row) for problem, row in best.items()}


if __name__ == "__main__":
    main()
