"""The time of a tile at any number of tokens, from its times at others.

Between two measured numbers of tokens a tile's time is a staircase: it rises where the SM with most to do gets more.
How much that one does is known for every number of tokens (`load`). So the time is that of the measured number of
tokens with the same load, or lies between those of the next smaller and the next larger one.
"""

from collections.abc import Mapping

from cutedsl_nvfp4.sm90.tiles import LinearTile, NarrowTile

SMS = 132  # of the GPU that the rows are from
REACH = 4  # a time says something about up to so many times more or fewer tokens
PART = 1.15  # a part of a tile takes so much more than its share: weights are decoded for fewer tokens


def load(tile: LinearTile, panels: int, m: int, sms: int = SMS) -> float:
    """What the SM with most to do computes of out [m, 64 * panels], in tiles."""
    if isinstance(tile, NarrowTile) or not tile.tail:
        rows = 1 if isinstance(tile, NarrowTile) else tile.panels * tile.multicast
        tiles = -(-panels // rows) * (rows // getattr(tile, "panels", 1)) * -(-m // tile.tokens)
        return -(-tiles * tile.split_k // sms)
    return _load_with_tail(tile, -(-panels // (tile.panels * tile.multicast)) * tile.multicast, m, sms)


def _load_with_tail(tile, row_tiles: int, m: int, sms: int) -> float:
    """As WideLinearKernel.share_tiles deals the items out."""
    parts = tile.tokens // tile.tail
    token_tiles = -(-m // tile.tokens)
    last_parts = -(-(m - (token_tiles - 1) * tile.tokens) // tile.tail)
    if last_parts == parts:
        last_parts = 0
    else:
        token_tiles -= 1
    ctas = sms * tile.ctas_per_sm
    waves, rest = divmod(token_tiles * row_tiles, ctas)
    uncut = parts + -(-max(last_parts * row_tiles - (ctas - rest), 0) // ctas)
    cut = -(-(rest * parts + last_parts * row_tiles) // ctas)
    part = PART / parts
    if cut < uncut:
        return waves + cut * part
    return waves + 1 + (uncut - parts) * part


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
