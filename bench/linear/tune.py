"""Measure every candidate tile on every linear and token count -> JSON lines, one per (shape, M, config).

    PYTHONPATH=kernels python3 -m bench.linear.tune OUT.jsonl [--shapes I:J] [--tokens 1,16,2048] [--seconds S]
        [--known ROWS.jsonl.gz... [--slack 1.06] [--most 10]] [--done ROWS.jsonl.gz...] [--without bulk=True,panels=3]

Every configuration is checked against float64 on sampled rows before it is timed; a wrong one ends the run.
A configuration 1.5 times slower than the best at one M, with smaller tiles, is not tried at the next. With `--known`
only the `--most` fastest are tried that predict.py expects, from those rows, within `--slack` times the best's time.
A problem of which the `--done` rows have all that would be tried is left out.
"""

import json
import sys
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

import torch

from bench.linear import candidates
from bench.linear.choose import by_layer, read
from bench.linear.predict import load, predict, predict_by_others
from bench.shapes import Shape, linear_parser, selected_shapes
from bench.timing import capture, copies, microseconds, warm_up
from cutedsl_nvfp4.reference import dequantize
from cutedsl_nvfp4.sm90.layout import pack_linear
from cutedsl_nvfp4.sm90.linear import run
from cutedsl_nvfp4.sm90.tiles import LinearTile, NarrowTile, WideTile

# where choose.py asks for times; between them predict.py gives them
TOKENS = (
    1, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 896, 1024, 1280, 1536, 2048, 2560, 3072,
    4096, 6144, 8192, 16384,
)  # fmt: skip
SAMPLED_ROWS = 64
Known = dict[LinearTile, dict[int, float]]  # a layer's {tile: {m: us}}
MOST_SMALL_CTAS = 264  # of tiles of few tokens: two an SM


def eligible(config: LinearTile, m: int, panels_per_group: int, groups: int) -> bool:
    if isinstance(config, NarrowTile):
        return m <= config.tokens and (config.tokens == 8 or m > config.tokens // 2)
    if not config.fits_groups(panels_per_group, groups):
        return False
    if config.tokens > 16 and config.tokens >= 2 * m + 16:
        return False
    row_tiles = -(-panels_per_group * groups // config.panels)
    ctas = row_tiles * -(-m // config.tokens) * config.split_k
    return config.tokens > 64 or m <= 8 * config.tokens or ctas <= MOST_SMALL_CTAS


def all_times(paths: Iterable[str]) -> dict[tuple[int, int, int], Known]:
    """{(n, k, groups): times} of all files; a later one's count more, but replace no other tile's."""
    layers: dict[tuple[int, int, int], Known] = {}
    for path in paths:
        for layer, tiles in by_layer(read([path])).items():
            for tile, times in tiles.items():
                layers.setdefault(layer, {}).setdefault(tile, {}).update(times)
    return layers


def expected(config: LinearTile, known: Known, panels: int, m: int) -> float | None:
    """Microseconds at m tokens by a layer's times of an earlier run; with a tail also by those of the tile without."""
    if config in known:
        return predict(config, panels, known[config], m)
    if isinstance(config, WideTile) and config.tail:
        uncut = replace(config, tail=0)
        us = expected(uncut, known, panels, m)
        return us and us * load(config, panels, m) / load(uncut, panels, m)
    return None


def worth_trying(
    configs: Iterable[LinearTile],
    known: Known,
    panels: int,
    m: int,
    slack: float,
    most: int,
) -> Collection[LinearTile]:
    """The configurations that the times of an earlier run leave a chance; all where it has none."""
    found = {config: us for config in configs if (us := expected(config, known, panels, m))}
    for config in set(configs) - found.keys():
        if us := predict_by_others(config, panels, found, m):
            found[config] = us
    if not found:
        return configs
    best = min(found.values())
    return sorted((config for config, us in found.items() if us <= slack * best), key=found.get)[:most]


def _smaller(config: LinearTile, best: LinearTile) -> bool:
    return (config.tokens, -config.split_k) < (best.tokens, -best.split_k)


def random_weights(shape: Shape, device: str = "cuda") -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, block scales) of a checkpoint, valid and random."""
    codes = torch.randint(0, 256, (shape.n, shape.k // 2), dtype=torch.uint8, device=device)
    scales = torch.rand(shape.n, shape.k // 16, device=device) * 3 + 0.5
    return codes, scales.to(torch.float8_e4m3fn)


def operands(shape: Shape, device: str = "cuda"):
    """Random valid weights: (codes, block scales) of the checkpoint, packed copies to rotate, row scales."""
    codes, scales = random_weights(shape, device)
    packed = pack_linear(codes, scales)
    rotated = [packed] + [tuple(t.clone() for t in packed) for _ in range(copies(shape.weight_bytes) - 1)]
    return codes, scales, rotated, torch.full((shape.n,), 1 / 2688, device=device)


def exact_product(shape: Shape, codes, scales, row_scale, x) -> tuple[torch.Tensor, torch.Tensor]:
    """(sampled weight rows, their product with x in float64 [M, rows])"""
    rows = torch.randperm(shape.n, device=x.device)[:SAMPLED_ROWS].sort().values
    weight = dequantize(codes[rows], scales[rows]).double() * row_scale[rows].double()[:, None]
    in_group = torch.bincount(rows // (shape.n // shape.groups), minlength=shape.groups).tolist()
    tokens = x.double().view(x.shape[0], shape.groups, shape.k)
    parts = [tokens[:, group] @ part.t() for group, part in enumerate(weight.split(in_group))]
    return rows, torch.cat(parts, dim=1)


def relative_error(out: torch.Tensor, rows: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """(error of `out`, error of rounding the exact product to bf16) on `exact_product`'s rows."""
    size = exact.norm()
    return (
        ((out[:, rows].double() - exact).norm() / size).item(),
        ((exact.to(torch.bfloat16).double() - exact).norm() / size).item(),
    )


def tune(
    shape: Shape,
    tokens: list[int],
    file,
    deadline: float,
    known: Known,
    done: Known,
    slack: float,
    most: int,
    without: Sequence[str],
) -> None:
    """`known` and `done` are the layer's times of earlier runs; `without` are parts of a tile's repr."""
    codes, scales, rotated, row_scale = operands(shape)
    panels_per_group = -(-shape.n // 64) // shape.groups
    configs = candidates.narrow() + candidates.wide()
    configs = [c for c in configs if not any(part in repr(c) for part in without)]
    warm_up()
    slow: set[LinearTile] = set()
    verified: set[LinearTile] = set()
    for m in tokens:
        x = torch.randn(m, shape.groups * shape.k, device="cuda").to(torch.bfloat16)
        times: dict[LinearTile, float] = {}
        exact = exact_product(shape, codes, scales, row_scale, x)
        rows = []  # written together: half a problem's configurations must not replace an earlier run's
        left = [c for c in configs if c not in slow and eligible(c, m, panels_per_group, shape.groups)]
        left = worth_trying(left, known, panels_per_group * shape.groups, m, slack, most)
        if all(m in done.get(config, {}) for config in left):
            continue
        for config in left:
            if time.monotonic() > deadline:
                print("out of time at", shape, m, flush=True)
                return

            def call(weights, config=config, x=x):
                return run(x, *weights, row_scale, n=shape.n, k=shape.k, groups=shape.groups, tile=config)

            if config not in verified:
                error, rounding = relative_error(call(rotated[0]), *exact)
                if not error <= 1.05 * rounding:
                    sys.exit(
                        f"{config} is wrong on {shape}, M = {m}: error {error}, rounding alone {rounding}"
                    )
                verified.add(config)
            calls = rotated[: 4 if m >= 4096 else 16 if m >= 512 else None]
            graph = capture([lambda w=w: call(w) for w in calls])
            times[config] = microseconds(graph, len(calls), repeats=3, target_us=1500.0)
            row = {"shape": shape.name, "n": shape.n, "k": shape.k, "groups": shape.groups, "m": m}
            rows.append(json.dumps(row | {"config": repr(config), "us": round(times[config], 3)}) + "\n")
        if times:
            best = min(times, key=times.get)
            slow |= {c for c, us in times.items() if us > 1.5 * times[best] and _smaller(c, best)}
            print(f"{shape.name} M={m} {times[best]:.2f} us {best}", flush=True)
        file.writelines(rows)
        file.flush()


def main() -> None:
    parser = linear_parser(__doc__)
    parser.set_defaults(tokens=",".join(map(str, TOKENS)))
    parser.add_argument("--known", nargs="*", default=[], help="rows of earlier runs")
    parser.add_argument("--done", nargs="*", default=[], help="rows that need not be measured again")
    parser.add_argument("--slack", type=float, default=1.06)
    parser.add_argument("--most", type=int, default=10)
    parser.add_argument("--without", default="", help="no configurations whose repr contains one of these")
    arguments = parser.parse_args()
    without = list(filter(None, arguments.without.split(",")))
    known, done = all_times(arguments.known), all_times(arguments.done)
    deadline = time.monotonic() + arguments.seconds
    with open(arguments.out, "w") as file:
        for shape in selected_shapes(arguments.shapes):
            layer = (shape.n, shape.k, shape.groups)
            earlier = (known.get(layer, {}), done.get(layer, {}))
            tokens = [int(m) for m in arguments.tokens.split(",")]
            tune(shape, tokens, file, deadline, *earlier, arguments.slack, arguments.most, without)


if __name__ == "__main__":
    main()
