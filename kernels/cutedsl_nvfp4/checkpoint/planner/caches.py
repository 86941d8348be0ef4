"""DeepSeek-V4's KV caches in vLLM 0.32.0: pages, groups, blocks, and how many a request takes.

Re-derived from vLLM's code so that it runs anywhere; tests/checkpoint/test_planner.py holds it to vLLM's own functions.
Every layer has a sliding-window cache; layers of ratio 4 and 128 add a compressed cache and a compressor state; those
of ratio 4 add an indexer cache and the indexer's compressor state:

| cache | block (tokens) | bytes | source |
|---|---|---|---|
| SWA | 64 | 584 a token | v1/attention/backends/mla/sparse_swa.py:80-150 |
| C4, C128 | 256 | 584 a compressed state | models/deepseek_v4/attention.py:856-883 |
| indexer | 256 | 132 (FP8) or 68 (MXFP4) a compressed state | attention.py:906-924, 1000-1018 |
| compressor state | 4 (C4), 8 (C128) | f32, 2 * (2 if C4) * head_dim a token | compressor.py:147-200, 284-289 |

Pages are rounded up to 576 bytes (fp8_ds_mla). All groups draw blocks from one pool, and a block is as large as the
widest group's pages together (v1/core/kv_cache_utils.py:1860-1994, 1520-1551).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from .model import ratios

ALIGNMENT = 576
TOKEN_BYTES = 584  # 448 e4m3 + 128 bf16 rope + 8 scale bytes
BLOCK = 256
SWA_BLOCK = 64
STATE_BLOCK = {4: 4, 128: 8}


def ceil_div(value: int, by: int) -> int:
    return -(-value // by)


def _padded(nbytes: int) -> int:
    return ceil_div(nbytes, ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Cache:
    """One layer's cache: `page` bytes hold `block` tokens; `window` None keeps every token."""

    kind: str
    block: int
    page: int
    window: int | None = None

    def blocks(self, length: int, in_flight: int) -> int:
        """Blocks a request of `length` tokens takes at most (kv_cache_interface.py:602-607, 862-890)."""
        if self.window is None:
            return ceil_div(length, self.block)
        return ceil_div(min(self.window - 1 + in_flight, length), self.block) + 1


@dataclass(frozen=True)
class Group:
    """Caches that share one block table."""

    caches: tuple[Cache, ...]

    @property
    def page(self) -> int:
        return sum(cache.page for cache in self.caches)

    def table_width(self, length: int) -> int:
        """Entries of its block table per request, in multiples of 128 tokens (v1/worker/block_table.py:29-41)."""
        block = self.caches[0].block
        step = max(1, 128 // block)
        return ceil_div(ceil_div(length, block), step) * step


def layer_caches(config: dict, indexer_fp4: bool = False) -> list[Cache]:
    """Every cache of the model, in layer order."""
    head_dim, index_dim = config["head_dim"], config["index_head_dim"]
    indexer_bytes = index_dim // 2 + index_dim // 32 if indexer_fp4 else index_dim + index_dim // 128 * 4
    found = []
    for ratio in ratios(config):
        swa = Cache("SWA", SWA_BLOCK, _padded(SWA_BLOCK * TOKEN_BYTES), config["sliding_window"])
        found.append(swa)
        if ratio <= 1:
            continue
        found.append(Cache(f"C{ratio}", BLOCK, _padded(BLOCK // ratio * TOKEN_BYTES)))
        block, overlap = STATE_BLOCK[ratio], 2 if ratio == 4 else 1
        window = overlap * ratio
        state = _padded(block * 2 * overlap * head_dim * 4)
        found.append(Cache(f"C{ratio} state", block, state, window))
        if ratio == 4:
            found.append(Cache("indexer", BLOCK, _padded(BLOCK // ratio * indexer_bytes)))
            state = _padded(block * 2 * overlap * index_dim * 4)
            found.append(Cache("indexer state", block, state, window))
    return found


def _approximate_gcd(values: list[int], lowest: int) -> int:
    """The size from `lowest` on that pads `values` least when they are rounded up to it; the largest of equals."""
    largest = max(values)
    if lowest > largest:
        return lowest
    return min(range(lowest, largest + 1), key=lambda d: (sum(-v % d for v in values), -d))


def group(caches: list[Cache]) -> list[Group]:
    """Caches -> groups with a common block table, as vLLM packs mixed page sizes (kv_cache_utils.py:1860-1994)."""
    buckets: dict[tuple[int, int | None], list[Cache]] = {}
    for cache in caches:
        buckets.setdefault((cache.block, cache.window), []).append(cache)
    if len(buckets) == 1:
        return [Group(tuple(caches))]
    pages = {key: Counter(cache.page for cache in bucket) for key, bucket in buckets.items()}
    balanced = {key for key, count in pages.items() if len(set(count.values())) == 1}
    repeats = {key: max(count.values()) for key, count in pages.items()}
    lowest = max((repeats[key] for key in balanced if len(pages[key]) > 1), default=0)
    per_group = _approximate_gcd([repeats[key] for key in balanced], lowest) if lowest else None
    parts = {
        key: ceil_div(repeats[key], per_group) if key in balanced and per_group is not None else 1
        for key in buckets
    }
    if per_group is None:  # no repeating pattern: window buckets are split down to what a block holds anyway
        windowed = {key for key in buckets if key[1] is not None}
        width = {
            key: sum(
                ceil_div(n, len(buckets[key]) if key in windowed else 1) * page
                for page, n in pages[key].items()
            )
            for key in buckets
        }
        block = max(width.values())
        for key in windowed:
            fit = max(block // buckets[key][0].page, 1)
            parts[key] = max(parts[key], ceil_div(len(buckets[key]), fit))
    groups = []
    for key, bucket in buckets.items():
        if parts[key] == 1:
            groups.append(Group(tuple(bucket)))
            continue
        by_page = [
            [cache for cache in bucket if cache.page == page]
            for page in dict.fromkeys(c.page for c in bucket)
        ]
        pattern = list(zip(*by_page))
        for part in range(parts[key]):
            groups.append(Group(tuple(cache for repeat in pattern[part :: parts[key]] for cache in repeat)))
    return groups


@dataclass(frozen=True)
class Pool:
    """The block pool of one GPU. Caches are not cut by TP: each rank holds all of them."""

    groups: tuple[Group, ...]

    @property
    def block_bytes(self) -> int:
        return max(found.page for found in self.groups)

    def request_blocks(self, length: int, in_flight: int) -> int:
        """Blocks of all groups that one request of `length` tokens takes at most."""
        return sum(max(cache.blocks(length, in_flight) for cache in found.caches) for found in self.groups)

    def capacity(self, available: int, length: int, in_flight: int) -> tuple[int, float, int]:
        """(blocks, requests of `length` at once, tokens) in `available` bytes, as vLLM logs them at start."""
        blocks = max(0, available // self.block_bytes)
        concurrency = blocks / self.request_blocks(length, in_flight)
        return blocks, concurrency, int(concurrency * length)

    def fits(self, available: int, length: int, in_flight: int) -> bool:
        """Whether one request fits; one block is the pool's null block (kv_cache_utils.py:2627-2632)."""
        return self.block_bytes * (self.request_blocks(length, in_flight) + 1) <= available

    def table_bytes(self, length: int, seqs: int) -> int:
        """Block tables, two int32 copies per group (v1/worker/gpu/block_table.py:48-75)."""
        return sum(2 * 4 * seqs * found.table_width(length) for found in self.groups)


def pool_of(config: dict, indexer_fp4: bool = False) -> Pool:
    return Pool(tuple(group(layer_caches(config, indexer_fp4))))
