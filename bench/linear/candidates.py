"""The tiles that bench/linear/tune.py measures; bench/linear/choose.py keeps the winners."""

from dataclasses import replace

from cutedsl_nvfp4.sm90.tiles import LinearTile, NarrowTile, WideTile

SPLITS = (1, 2, 4, 8)


def _legal(configs) -> list[LinearTile]:
    legal = []
    for config in configs:
        try:
            config.check()
        except ValueError:
            continue
        legal.append(config)
    return legal


def _signalled(configs: list[LinearTile]) -> list[LinearTile]:
    return [replace(config, signal=True) for config in configs if config.split_k > 1]


def narrow() -> list[LinearTile]:
    """For few tokens: K over warps and a cluster, several CTAs an SM."""
    pipelines = (
        (1, 2, 4),
        (1, 2, 8),
        (2, 1, 6),
        (2, 2, 3),
        (2, 2, 4),
        (4, 1, 3),
        (4, 1, 4),
        (4, 2, 2),
        (4, 2, 3),
        (4, 1, 7),  # all of a short K in flight before the previous kernel has finished
        (2, 2, 7),
    )
    configs = _legal(
        NarrowTile(tokens, k_warps, blocks, stages, split)
        for tokens in (8, 16)
        for k_warps, blocks, stages in pipelines
        for split in SPLITS
    ) + _legal(NarrowTile(32, k_warps, 1, 4, split) for k_warps in (2, 4) for split in SPLITS)
    return configs + _signalled(configs)


def wide() -> list[LinearTile]:
    """For many tokens: small tiles that share K over a cluster, and large ones that fill the machine."""
    small = _legal(
        WideTile(panels, tokens, 2, stages, split)
        for panels in (1, 2)
        for tokens, stages in ((16, 4), (16, 8), (32, 5), (64, 4), (96, 4), (128, 3))
        for split in SPLITS
    )
    small += _legal(
        WideTile(1, tokens, 2, stages, split) for tokens, stages in ((32, 12), (64, 8)) for split in (1, 2, 4)
    )
    small += _legal(
        WideTile(3, tokens, blocks, stages, split)
        for tokens, blocks, stages in (
            (64, 2, 6),
            (64, 2, 5),
            (96, 2, 5),
            (96, 2, 4),
            (128, 2, 4),
            (128, 1, 5),
        )
        for split in ((1,) if (tokens, stages) in ((64, 6), (96, 5), (128, 4)) else (2,))
    )
    large = _legal(
        [
            WideTile(2, 128, 2, 4),
            WideTile(2, 128, 2, 4, persistent=True),
            WideTile(2, 128, 2, 4, persistent=True, multicast=2),
            WideTile(1, 128, 2, 2, ctas_per_sm=2),
            WideTile(1, 128, 1, 4, ctas_per_sm=2, persistent=True),
            WideTile(1, 192, 1, 3, ctas_per_sm=2),
            WideTile(1, 192, 1, 3, ctas_per_sm=2, persistent=True),
            WideTile(2, 64, 2, 3, ctas_per_sm=2),
            WideTile(2, 96, 1, 5, ctas_per_sm=2),
            WideTile(2, 192, 1, 6, persistent=True),
            WideTile(2, 192, 2, 3, persistent=True),
            WideTile(2, 192, 2, 3, persistent=True, multicast=2),
            WideTile(2, 256, 1, 5),
            WideTile(2, 256, 1, 5, persistent=True),
            WideTile(2, 256, 1, 5, persistent=True, multicast=2),
            WideTile(2, 256, 1, 4, 2),
            WideTile(2, 256, 1, 4, 4),
            WideTile(2, 192, 1, 5, 2),
            WideTile(2, 160, 1, 7),
            WideTile(2, 224, 1, 5),
            WideTile(2, 160, 1, 5, 2),
            WideTile(3, 128, 2, 4, persistent=True),
            WideTile(3, 160, 1, 7),
            WideTile(3, 192, 1, 6),
            WideTile(3, 192, 1, 6, persistent=True),
            WideTile(2, 64, 2, 3, 2, ctas_per_sm=2),
            WideTile(2, 64, 1, 6, 2, ctas_per_sm=2),
            WideTile(1, 64, 2, 4, 2, ctas_per_sm=2),
            WideTile(1, 128, 1, 4, 2, ctas_per_sm=2),
            WideTile(1, 64, 4, 4, 2),
            WideTile(2, 64, 1, 8, 2),
            WideTile(2, 96, 1, 8, 2),
            WideTile(2, 128, 1, 7, 2),
            WideTile(1, 128, 1, 6, 2),
            WideTile(2, 128, 1, 6, 4),
            WideTile(2, 160, 1, 5, 4),
            WideTile(2, 192, 1, 4, 4),
            WideTile(3, 96, 1, 6, 4),
            WideTile(3, 128, 1, 5, 4),
            WideTile(2, 96, 1, 8),
            WideTile(2, 96, 2, 5, persistent=True, bulk=True),
            WideTile(3, 96, 1, 8),
            WideTile(3, 96, 2, 4, persistent=True, bulk=True),
            WideTile(2, 160, 1, 7, persistent=True, bulk=True),
            WideTile(2, 224, 1, 5, persistent=True, bulk=True),
        ]
        + [
            replace(config, bulk=True, lag=lag)
            for config, lags in (
                (WideTile(2, 128, 2, 4, persistent=True), (0, 1)),
                (WideTile(2, 192, 1, 6, persistent=True), (0, 2)),
                (WideTile(2, 256, 1, 5, persistent=True), (0, 1, 2)),
                (WideTile(2, 256, 1, 5, persistent=True, multicast=2), (0, 2)),
                (WideTile(3, 128, 2, 4, persistent=True), (0, 1)),
                (WideTile(3, 160, 1, 7, persistent=True), (0, 1)),
                (WideTile(3, 192, 1, 6, persistent=True), (0, 1)),
                (WideTile(3, 192, 1, 6, persistent=True, multicast=2), (0, 1)),
            )
            for lag in lags
        ]
        + [WideTile(2, 256, 1, 5, persistent=True, lag=2)]
        + [
            replace(config, tail=tail)
            for config, tails in (
                (WideTile(2, 128, 1, 8, persistent=True, bulk=True), (64,)),
                (WideTile(2, 192, 1, 6, persistent=True), (64,)),
                (WideTile(2, 192, 1, 6, persistent=True, bulk=True), (64, 96)),
                (WideTile(2, 256, 1, 5, persistent=True), (64, 128)),
                (WideTile(2, 256, 1, 5, persistent=True, bulk=True), (64, 128)),
                (WideTile(2, 256, 1, 5, persistent=True, lag=1, bulk=True), (64, 128)),
                (WideTile(2, 256, 1, 5, persistent=True, lag=2, bulk=True), (64, 128)),
                (WideTile(2, 256, 1, 5, persistent=True, multicast=2), (128,)),
                (WideTile(2, 256, 1, 5, persistent=True, multicast=2, bulk=True), (64, 128)),
                (WideTile(2, 256, 1, 5, persistent=True, multicast=2, lag=2, bulk=True), (128,)),
                (WideTile(2, 128, 2, 4, persistent=True, bulk=True), (64,)),
                (WideTile(2, 160, 1, 7, persistent=True, bulk=True), (32,)),
                (WideTile(2, 224, 1, 5, persistent=True, bulk=True), (32,)),
                (WideTile(3, 128, 2, 4, persistent=True, bulk=True), (64,)),
                (WideTile(3, 160, 1, 7, persistent=True, bulk=True), (32,)),
                (WideTile(3, 192, 1, 6, persistent=True, multicast=2, bulk=True), (96,)),
                (WideTile(3, 128, 1, 7, persistent=True, bulk=True), (64,)),
                (WideTile(3, 192, 1, 6, persistent=True), (64,)),
                (WideTile(3, 192, 1, 6, persistent=True, bulk=True), (64, 96)),
            )
            for tail in tails
        ]
    )
    return small + large + _signalled(small + large)
