"""From tuning rows to the shipped tiles: what bench/linear/choose.py and bench/experts/choose.py share.

A row names its tiles by their repr. The file of shipped tiles is JSON: every tile once, a dict of its class and of the
fields that differ from the class's default, and for every measured layer the index of its tile by size.
"""

import argparse
import ast
import gzip
import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

from cutedsl_nvfp4.sm90.tiles import LinearTile, NarrowTile, WideTile

SM90 = Path(__file__).parent.parent / "kernels" / "cutedsl_nvfp4" / "sm90"
# a repr's name -> the class; the committed rows have the short names, from before the classes had their present ones
CLASSES = {"Narrow": NarrowTile, "Wide": WideTile, "NarrowTile": NarrowTile, "WideTile": WideTile}

Times = dict[tuple, dict[Hashable, float]]  # {problem: {tiles: microseconds}}


@cache
def parse_tile(text: str) -> LinearTile:
    """The tile whose repr is `text`; ValueError for whatever else it is."""
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError("it is no class with keyword arguments")
        if call.func.id not in CLASSES:
            raise ValueError(f"no class of tiles is called {call.func.id}")
        kind = CLASSES[call.func.id]
        types = {field.name: type(field.default) for field in fields(kind)}
        values: dict[str, int | bool] = {}
        for keyword in call.keywords:
            if keyword.arg not in types or keyword.arg in values:
                raise ValueError(f"{keyword.arg} is no field, or there twice")
            values[keyword.arg] = ast.literal_eval(keyword.value)
            if type(values[keyword.arg]) is not types[keyword.arg]:
                raise ValueError(f"{keyword.arg} is no {types[keyword.arg].__name__}")
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"not the repr of a tile: {text!r}: {error}") from error
    return kind(**values)


def tile_fields(tile: LinearTile) -> dict[str, str | int | bool]:
    """The tile as the file of shipped tiles has it, which sm90/tiles.py reads."""
    changed = {f.name: getattr(tile, f.name) for f in fields(tile) if getattr(tile, f.name) != f.default}
    return {"class": "narrow" if isinstance(tile, NarrowTile) else "wide", **changed}


def rows(path: str | Path) -> Iterator[dict]:
    """The rows of a file of JSON lines, compressed where its name ends in .gz."""
    content = Path(path).read_bytes()
    text = gzip.decompress(content) if str(path).endswith(".gz") else content
    yield from map(json.loads, text.decode().splitlines())


def read(
    paths: Iterable[str | Path], problem: Callable[[dict], tuple], tiles: Callable[[dict], Hashable]
) -> Times:
    """{problem: {tiles: us}} of rows; a later file replaces every row of a problem that it measured again."""
    times: Times = {}
    for path in paths:
        measured: Times = defaultdict(dict)
        for row in rows(path):
            measured[problem(row)][tiles(row)] = row["us"]
        times |= measured
    return times


def cover(times: Times, loss: float) -> list:
    """Few tiles for all problems, the one that saves most time first, until none is `loss` slower than its own best."""
    chosen: list = []
    best = {key: min(found.values()) for key, found in times.items()}
    current = {key: 10 * best[key] for key in times}
    by_tile: dict[Hashable, list[tuple]] = defaultdict(list)
    for key, found in times.items():
        for tile, us in found.items():
            by_tile[tile].append((key, max(us, (1 + loss) * best[key])))
    while any(current[key] > (1 + loss) * best[key] for key in times):

        def gain(tile):
            return sum(max(0.0, current[key] - us) / best[key] for key, us in by_tile[tile])

        pick = max(by_tile.keys() - set(chosen), key=lambda tile: (gain(tile), repr(tile)))
        chosen.append(pick)
        for key, found in times.items():
            current[key] = min(current[key], found.get(pick, float("inf")))
    return chosen


def fastest(times: Times, tiles: list, loss: float = 0.0) -> dict[tuple, Hashable]:
    """{problem: the fastest of `tiles` on it}"""
    return {key: min((t for t in tiles if t in found), key=found.get) for key, found in times.items()}


def lines(content: dict) -> str:
    """JSON with a line for every tile and for every layer."""
    parts = []
    for name, value in content.items():
        if isinstance(value, list):
            entries = (json.dumps(entry, separators=(",", ":")) for entry in value)
            value = "[\n" + ",\n".join(entries) + "\n]"
        else:
            value = json.dumps(value)
        parts.append(f"{json.dumps(name)}: {value}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


@dataclass(frozen=True)
class Product:
    """What the two programs differ in."""

    output: Path
    loss: float
    read: Callable[[Iterable[str]], Times]  # problems are (*layer, size)
    layer: tuple[str, ...]  # the names of a layer's sizes
    size: str  # what the tiles of a layer are chosen by
    fields: Callable[[Hashable], dict]  # tiles as JSON
    select: Callable[[Times, float], list]  # few tiles for all problems
    assign: Callable[[Times, list, float], dict[tuple, Hashable]]  # {problem of the file: its tile of these}


def table(product: Product, times: Times, loss: float, gpu: str) -> dict:
    """The content of a file of shipped tiles."""
    chosen = product.select(times, loss)
    used = product.assign(times, chosen, loss)
    tiles = [t for t in chosen if t in set(used.values())]
    layers: dict[tuple, dict] = defaultdict(dict)
    for (*layer, size), best in sorted(used.items(), key=lambda item: item[0]):
        layers[tuple(layer)][size] = tiles.index(best)
    return {
        "measured_on": gpu,
        "tiles": [product.fields(t) for t in tiles],
        "layers": [
            {**dict(zip(product.layer, layer, strict=True)), product.size: by_size}
            for layer, by_size in layers.items()
        ],
    }


def main(product: Product, doc: str, argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "rows", nargs="+", help="files of JSON lines, compressed or not; a later one counts more"
    )
    parser.add_argument("--gpu", required=True, help="its name, as the rows' run printed it")
    parser.add_argument(
        "--loss", type=float, default=product.loss, help=f"a share: {product.loss} where left out"
    )
    parser.add_argument("--out", type=Path, default=product.output, help="the shipped file where left out")
    arguments = parser.parse_args(argv)
    content = table(product, product.read(arguments.rows), arguments.loss, arguments.gpu)
    arguments.out.write_text(lines(content))
    problems = sum(len(layer[product.size]) for layer in content["layers"])
    print(f"{len(content['tiles'])} tiles for {problems} problems -> {arguments.out}")
