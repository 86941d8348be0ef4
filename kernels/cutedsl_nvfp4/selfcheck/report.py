"""GPU kernels prove themselves on the device they find, before they serve.

    stage one   every kernel the server will use, on small synthetic operands, in a child process with a time limit
                (child.py, synthetic.py)
    stage two   the layers' own operands, in the serving process, at every tile the server will use

What is compared, and with what: products.py. A failure names layer, shape, kernel and error. Nothing stays allocated.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from . import child
from .products import ExpertsLayer, Layer, Multiply, SelfCheckFailed, check_experts, check_product, multiply


@dataclass
class Report:
    """What was checked, for the log and for GET /kernels."""

    kernels: int = 0
    layers: int = 0
    products: int = 0
    worst_error: float = 0.0  # over the limit
    seconds: float = 0.0

    def add(self, error: float) -> None:
        self.products += 1
        self.worst_error = max(self.worst_error, error)

    def as_dict(self) -> dict:
        return {
            "verdict": "passed",
            "kernels": self.kernels,
            "layers": self.layers,
            "products": self.products,
            "worst_error_over_limit": round(self.worst_error, 4),
            "seconds": round(self.seconds, 2),
        }


def products(layers: list[Layer], max_tokens: int, batch_invariant: bool) -> Iterator[tuple[Layer, Any, int]]:
    """(layer, tile, tokens): every tile on the first layer of a problem, two on each of the others, in turn."""
    seen: dict[Any, int] = {}
    for layer in layers:
        tiles = list(layer.tiles(max_tokens, batch_invariant).items())
        turn = seen.get(layer.problem, 0)
        seen[layer.problem] = turn + 1
        if turn:
            tiles = [tiles[(2 * turn + i) % len(tiles)] for i in range(min(2, len(tiles)))]
        for tile, m in tiles:
            yield layer, tile, m


def check_layers(
    layers: list[Layer],
    max_tokens: int,
    batch_invariant: bool,
    report: Report,
    multiply: Multiply = multiply,
) -> None:
    """Stage two, noted in `report`. Raises SelfCheckFailed naming layer, shape, tile and error."""
    generator = torch.Generator().manual_seed(time.time_ns() % (1 << 31))
    for layer, tile, m in products(layers, max_tokens, batch_invariant):
        check_one = check_experts if isinstance(layer, ExpertsLayer) else check_product
        try:
            report.add(check_one(layer, m, tile, generator, multiply))
        except SelfCheckFailed as failure:
            raise SelfCheckFailed(f"{layer.name} ({layer}, M = {m}, {tile}): {failure}") from None
        except Exception as failure:
            raise SelfCheckFailed(
                f"{layer.name} ({layer}, M = {m}, {tile}): {type(failure).__name__}: {failure}"
            ) from failure
    report.layers += len(layers)


def check(
    layers: list[Layer],
    device: torch.device,
    max_tokens: int,
    batch_invariant: bool,
    multiply: Multiply = multiply,
    check_in_child: Callable[..., list[float]] = child.check_in_child,
) -> Report:
    """Both stages for the layers of one rank -> what was checked. Raises SelfCheckFailed.

    `multiply` is what stage two checks, `check_in_child` what stage one is.
    """
    report, started = Report(), time.monotonic()
    if layers:
        found = (variant for layer in layers for variant in layer.variants(max_tokens, batch_invariant))
        variants = list(dict.fromkeys(found))
        topk = next((layer.topk for layer in layers if isinstance(layer, ExpertsLayer)), child.TOPK)
        for error in check_in_child(variants, str(device), topk):
            report.add(error)
        report.kernels = len(variants)
        check_layers(layers, max_tokens, batch_invariant, report, multiply)
    report.seconds = time.monotonic() - started
    return report
