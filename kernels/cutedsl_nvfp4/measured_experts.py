"""Measured on one NVIDIA H200 by bench/tune_experts.py; bench/choose_expert_tiles.py wrote this.

TABLE[experts, hidden, intermediate] lists (tokens an expert gets on average, index into TILES,
microseconds then), ascending. Do not edit.
"""

from .tiles import ExpertTiles, Narrow, Wide

TILES = (
    ExpertTiles(
        w13=Narrow(tokens=8, k_warps=2, blocks=2, stages=3, split_k=1),
        w2=Narrow(tokens=8, k_warps=2, blocks=2, stages=3, split_k=1),
    ),
    ExpertTiles(
        w13=Wide(
            panels=4, tokens=96, blocks=1, stages=8, split_k=1, ctas_per_sm=1, persistent=True, multicast=1
        ),
        w2=Wide(
            panels=4, tokens=96, blocks=1, stages=8, split_k=1, ctas_per_sm=1, persistent=True, multicast=1
        ),
    ),
    ExpertTiles(
        w13=Wide(
            panels=4, tokens=32, blocks=2, stages=6, split_k=1, ctas_per_sm=1, persistent=True, multicast=1
        ),
        w2=Wide(
            panels=4, tokens=32, blocks=2, stages=6, split_k=1, ctas_per_sm=1, persistent=True, multicast=1
        ),
    ),
    ExpertTiles(
        w13=Narrow(tokens=8, k_warps=2, blocks=2, stages=3, split_k=1),
        w2=Narrow(tokens=8, k_warps=1, blocks=2, stages=6, split_k=1),
    ),
    ExpertTiles(
        w13=Narrow(tokens=8, k_warps=2, blocks=2, stages=4, split_k=2),
        w2=Narrow(tokens=8, k_warps=1, blocks=2, stages=6, split_k=1),
    ),
    ExpertTiles(
        w13=Narrow(tokens=8, k_warps=2, blocks=2, stages=4, split_k=1),
        w2=Narrow(tokens=8, k_warps=2, blocks=2, stages=3, split_k=1),
    ),
    ExpertTiles(
        w13=Wide(
            panels=4, tokens=128, blocks=1, stages=7, split_k=1, ctas_per_sm=1, persistent=True, multicast=1
        ),
        w2=Wide(
            panels=4, tokens=128, blocks=1, stages=7, split_k=1, ctas_per_sm=1, persistent=True, multicast=1
        ),
    ),
    ExpertTiles(
        w13=Narrow(tokens=16, k_warps=2, blocks=2, stages=3, split_k=1),
        w2=Narrow(tokens=16, k_warps=2, blocks=2, stages=3, split_k=1),
    ),
    ExpertTiles(
        w13=Narrow(tokens=8, k_warps=2, blocks=2, stages=4, split_k=1),
        w2=Narrow(tokens=8, k_warps=2, blocks=2, stages=4, split_k=1),
    ),
    ExpertTiles(
        w13=Narrow(tokens=8, k_warps=2, blocks=2, stages=4, split_k=4),
        w2=Narrow(tokens=8, k_warps=1, blocks=2, stages=6, split_k=1),
    ),
    ExpertTiles(
        w13=Narrow(tokens=8, k_warps=2, blocks=2, stages=4, split_k=2),
        w2=Narrow(tokens=8, k_warps=2, blocks=2, stages=4, split_k=2),
    ),
    ExpertTiles(
        w13=Wide(
            panels=4, tokens=32, blocks=2, stages=6, split_k=1, ctas_per_sm=1, persistent=True, multicast=1
        ),
        w2=Wide(
            panels=4, tokens=32, blocks=1, stages=5, split_k=1, ctas_per_sm=2, persistent=True, multicast=1
        ),
    ),
)

TABLE = {
    (48, 7168, 3072): (
        (0.01562, 10, 20.7),
        (0.0625, 8, 46.2),
        (0.125, 5, 73.5),
        (0.25, 3, 129.3),
        (0.5, 0, 203.4),
        (1.0, 3, 331.8),
        (2.0, 8, 396.8),
        (4.0, 3, 499.9),
        (8.0, 7, 538.4),
        (16.0, 2, 613.6),
        (32.0, 1, 759.3),
        (64.0, 1, 1006.6),
        (128.0, 6, 2055.9),
        (256.0, 1, 3191.1),
        (512.0, 6, 5966.4),
        (2048.0, 6, 22400.4),
    ),
    (256, 4096, 512): (
        (0.02344, 5, 17.6),
        (0.09375, 5, 35.9),
        (0.375, 3, 90.5),
        (0.75, 3, 142.7),
        (1.5, 3, 211.3),
        (6.0, 3, 301.4),
        (24.0, 11, 390.4),
        (96.0, 6, 720.6),
        (384.0, 1, 2569.7),
    ),
    (256, 4096, 2048): (
        (0.02344, 8, 33.5),
        (0.09375, 5, 96.5),
        (0.375, 0, 290.3),
        (0.75, 0, 478.3),
        (1.5, 0, 717.4),
        (6.0, 0, 1057.4),
        (24.0, 2, 1309.2),
        (96.0, 6, 2617.2),
        (384.0, 6, 9600.2),
    ),
    (384, 7168, 384): (
        (0.01562, 9, 21.0),
        (0.0625, 4, 46.1),
        (0.25, 3, 125.1),
        (0.5, 3, 216.8),
        (1.0, 3, 344.1),
        (4.0, 3, 521.6),
        (16.0, 11, 683.1),
        (64.0, 1, 1143.4),
        (256.0, 1, 3708.8),
    ),
    (384, 7168, 768): (
        (0.01562, 9, 31.6),
        (0.0625, 5, 73.2),
        (0.25, 5, 227.8),
        (0.5, 3, 379.0),
        (1.0, 3, 603.6),
        (4.0, 3, 971.4),
        (16.0, 11, 1286.8),
        (64.0, 1, 2051.4),
        (256.0, 1, 7266.6),
    ),
}
