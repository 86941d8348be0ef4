"""The time of a tile at any number of tokens, from its times at others.

Between two measured numbers of tokens a tile's time is a staircase: it rises where the SM with most to do gets more.
How much that one does is known for every number of tokens (`load`). So the time is that of the measured number of
tokens with the same load, or lies between those of the next smaller and the next larger one.
"""

from collections.abc import Mapping
from statistics import median

from cutedsl_nvfp4.sm90.tiles import LEAST_BLOCK_CLOCKS, PANEL_CLOCKS, LinearTile, NarrowTile, WideTile

SMS = 132  # of the GPU that the rows are from
OUTSIDE = 3.0  # microseconds of a kernel outside its main loop
REACH = 4  # a time says something about up to so many times more or fewer tokens


def load(tile: LinearTile, panels: int, m: int, sms: int = SMS) -> float:
    """What the SM with most to do computes of out [m, 64 * panels], in tiles."""
    rows = 1 if isinstance(tile, NarrowTile) else tile.panels
    pairs = getattr(tile, "multicast", 1)
    row_tiles = -(-panels // (rows * pairs)) * pairs
    token_tiles = -(-m // tile.tokens)
    if getattr(tile, "tail", 0):
        return _load_with_tail(tile, row_tiles, token_tiles, m, sms * tile.ctas_per_sm)
    # clusters of four and more leave SMs of a GPC over
    slots = sms if tile.split_k < 4 else sms * 9 // 10 // tile.split_k * tile.split_k
    return -(-row_tiles * token_tiles * tile.split_k // slots)


def _load_with_tail(tile: WideTile, row_tiles: int, token_tiles: int, m: int, ctas: int) -> float:
    """As WideLinearKernel.share_tiles deals the items out."""
    parts, part = tile.tokens // tile.tail, tile.part_percent / 100

    def dealt(token_tiles: int, last_parts: int) -> float:
        waves, rest = divmod(token_tiles * row_tiles, ctas)
        beside = last_parts * row_tiles
        uncut = waves + 1 + -(-max(beside - (ctas - rest), 0) // ctas) * part
        return min(uncut, waves + -(-(rest * parts + beside) // ctas) * part)

    present = -(-(m - (token_tiles - 1) * tile.tokens) // tile.tail)
    whole = dealt(token_tiles, 0)
    return whole if present == parts else min(whole, dealt(token_tiles - 1, present))


def predict(tile: LinearTile, panels: int, times: Mapping[int, float], m: int) -> float | None:
    """Microseconds at m tokens, from {tokens: microseconds}; None where no time is near enough."""
    points = sorted(
        (load(tile, panels, tokens), tokens, us)
        for tokens, us in times.items()
        if tokens <= REACH * m and m <= REACH * tokens
    )
    wanted = load(tile, panels, m)
    same = [(tokens, us) for at, tokens, us in points if at == wanted]
    if same:
        return _between(same, m)
    below = [(at, us) for at, _, us in points if at < wanted]
    above = [(at, us) for at, _, us in points if at > wanted]
    if below and above:
        return _between([below[-1], above[0]], wanted)
    if below:
        return below[-1][1] * wanted / below[-1][0]
    return above[0][1] if above else None


def clocks(tile: LinearTile, panels: int, m: int) -> float | None:
    """What `load` takes of a wide tile with whole SMs and whole sums, for each k block; None for the others."""
    if (
        isinstance(tile, NarrowTile)
        or tile.panels * tile.ctas_per_sm == 1
        or tile.ctas_per_sm > 1
        or tile.split_k > 1
    ):
        return None
    return load(tile, panels, m) * max(PANEL_CLOCKS * tile.panels * tile.tokens, LEAST_BLOCK_CLOCKS)


def predict_by_others(
    tile: LinearTile, panels: int, times: Mapping[LinearTile, float], m: int
) -> float | None:
    """Microseconds of a tile that was never measured on a layer, from {tile: microseconds} of others at m tokens.

    Half of the rows at M >= 128 are within 6% of it, 9 of 10 within 17%: good for trying a tile, not for choosing it.
    None where `clocks` knows too little.
    """
    wanted = clocks(tile, panels, m)
    others = [(us, spent) for other, us in times.items() if (spent := clocks(other, panels, m))]
    if wanted is None or not others:
        return None
    return median(OUTSIDE + (us - OUTSIDE) * wanted / spent for us, spent in sorted(others)[:3])


def _between(points: list[tuple[float, float]], x: float) -> float:
    """Linear interpolation in points that ascend; beyond them, the nearest point's value."""
    (x0, y0) = points[0]
    if x <= x0:
        return y0
    for x1, y1 in points[1:]:
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
        x0, y0 = x1, y1
    return y0
