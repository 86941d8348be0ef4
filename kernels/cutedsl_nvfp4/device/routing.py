"""Which tokens go to which expert, and the sum of what comes back: the kernels around the experts' products.

A pair is one (token, choice): p = token * T + choice. A slot is a row of the scratch between w13 and w2;
slots are grouped by expert, for Hopper without padding. A tile is up to `tokens` consecutive slots of one expert,
whose tiles differ by less than two `step`s: a last tile of few slots would decode as many weights as a full one.

    Route     ids [M, T] -> pairs [M * T] int32, the pair of each slot
                            table [1 + tiles, 4] int32: (tiles, slots, 0, 0), then (expert, first slot, slots, 0)
    SlotRoute with tiles of `tokens` slots each, the last ones of an expert unused: slot = tile * tokens + row
                            places [M * T] int32, the slot of each pair or -1
    Combine   out[m] = sum_t weights[m, t] * y[m * T + t], in ascending t, over the pairs this rank computes

Ids below zero, beyond the experts and those `expert_map` sends to -1 take no slot. The order of an expert's
slots is not fixed: no result depends on it, each pair being one column of a tile.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint32

from .cluster import address_in_cluster, store_word_in_cluster
from .launch import launch
from .ptx import load_coherent, smem_address

MAX_EXPERTS = 1024  # local ones: one thread of Route each
ROUTE_THREADS = MAX_EXPERTS
COMBINE_THREADS = 256
VECTOR = 8  # bf16 in 16 bytes


class Entry(NamedTuple):
    """A tile in Route's table: consecutive slots of one expert."""

    expert: Int32
    first_slot: Int32
    slots: Int32


def table_counts(table: Int64) -> tuple[Int32, Int32]:
    """(tiles, slots) of the table at this address."""
    tiles, slots, _, _ = load_coherent(table)
    return tiles, slots


def table_entry(table: Int64, tile: Int32) -> Entry:
    """Entry number `tile` of the table at this address: rows of 16 bytes, of which the counts are the first."""
    expert, first_slot, slots, _ = load_coherent(table + Int64(tile + 1) * 16)
    return Entry(expert, first_slot, slots)


@cute.jit
def local_expert(mIds: cute.Tensor, mMap: cute.Tensor, pair: Int32, has_map: Int32, num_local_experts: Int32):
    """Local expert of a pair, -1 for none."""
    expert = mIds[pair]
    if has_map != 0:
        in_map = expert >= 0 and expert < mMap.shape[0]
        if in_map:
            expert = mMap[expert]
        else:
            expert = Int32(-1)
    if expert >= num_local_experts:
        expert = Int32(-1)
    return expert


class Route:
    """Count, scan, scatter: by one CTA, or by a cluster of `ctas` whose members take consecutive pairs.

    Each member of a cluster tells all others its counts, and every one scans the sums.
    """

    def __init__(self, ctas: int = 1):
        self.ctas = ctas

    @cute.jit
    def __call__(
        self,
        mIds: cute.Tensor,  # int32 [M * T]
        mMap: cute.Tensor,  # int32 [num_global_experts], any tensor without has_map
        mPairs: cute.Tensor,  # int32 [M * T]
        mTable: cute.Tensor,  # int32 [1 + tiles, 4]
        has_map: Int32,
        num_local_experts: Int32,
        tokens: Int32,
        step: Int32,
        stream,
    ):
        self.start(mIds, mMap, mPairs, None, mTable, has_map, num_local_experts, tokens, step, stream)

    @cute.jit
    def start(
        self,
        mIds: cute.Tensor,  # int32 [M * T]
        mMap: cute.Tensor,  # int32 [num_global_experts], any tensor without has_map
        mPairs: cute.Tensor,  # int32 [M * T], of SlotRoute [tiles * tokens]
        mPlaces: cute.Tensor | None,  # int32 [M * T], of SlotRoute only
        mTable: cute.Tensor,  # int32 [1 + tiles, 4]
        has_map: Int32,
        num_local_experts: Int32,
        tokens: Int32,
        step: Int32,
        stream,
    ):
        @cute.struct
        class Shared:
            counts: cute.struct.MemRange[Int32, MAX_EXPERTS]  # pairs of an expert, then its next free slot
            told: cute.struct.MemRange[Int32, MAX_EXPERTS * self.ctas if self.ctas > 1 else 1]  # by members
            sums: cute.struct.MemRange[Int32, 64]  # of each warp's experts: 32 of slots, 32 of tiles

        self.shared = Shared
        launch(
            self.kernel(mIds, mMap, mPairs, mPlaces, mTable, has_map, num_local_experts, tokens, step),
            grid=(self.ctas, 1, 1),
            block=(ROUTE_THREADS, 1, 1),
            cluster=(self.ctas, 1, 1),
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        mIds: cute.Tensor,  # int32 [M * T]
        mMap: cute.Tensor,  # int32 [num_global_experts], any tensor without has_map
        mPairs: cute.Tensor,  # int32 [M * T], of SlotRoute [tiles * tokens]
        mPlaces: cute.Tensor | None,  # int32 [M * T], of SlotRoute only
        mTable: cute.Tensor,  # int32 [1 + tiles, 4]
        has_map: Int32,
        num_local_experts: Int32,
        tokens: Int32,
        step: Int32,
    ):
        # The next kernel may start now: it waits for the whole of this one before it reads the table.
        cute.arch.griddepcontrol_launch_dependents()
        thread, _, _ = cute.arch.thread_idx()
        lane = thread % 32
        warp = thread // 32
        storage = cutlass.memory.SmemAllocator().allocate(self.shared)
        counts = storage.counts.data_ptr()
        sCounts = storage.counts.get_tensor(cute.make_layout(MAX_EXPERTS))
        sSums = storage.sums.get_tensor(cute.make_layout(64))
        pairs = mIds.shape[0]
        rank, _, _ = cute.arch.block_idx()
        first_pair, last_pair = rank * pairs // self.ctas, (rank + 1) * pairs // self.ctas

        # Count the pairs of each expert
        sCounts[thread] = Int32(0)
        if cutlass.const_expr(self.ctas > 1):
            cute.arch.cluster_arrive_relaxed()  # this member is there; nothing is published yet
        cute.arch.sync_threads()  # all counts are zero before anyone adds
        # The ids may be the previous kernel's, which may also still read what this one overwrites.
        cute.arch.griddepcontrol_wait()
        for pair in cutlass.range(first_pair + thread, last_pair, ROUTE_THREADS, unroll=4):
            expert = local_expert(mIds, mMap, pair, has_map, num_local_experts)
            if expert >= 0:
                cute.arch.atomic_add(counts + expert, Int32(1), sem="relaxed", scope="cta")
        cute.arch.sync_threads()  # all pairs are counted: a relaxed atomic orders nothing by itself

        # From here on thread e stands for expert e
        count = sCounts[thread]
        before = Int32(0)  # pairs of this thread's expert in members of lower rank
        if cutlass.const_expr(self.ctas > 1):
            count, before = self.exchange(storage.told, rank, thread, count)
        tiles = cute.ceil_div(count, tokens)
        slots_sum, tiles_sum = self.scan(sSums, lane, warp, count, tiles)
        first = slots_sum - count
        if cutlass.const_expr(mPlaces is not None):
            first = (tiles_sum - tiles) * tokens
        sCounts[thread] = first + before
        if thread == ROUTE_THREADS - 1 and rank == 0:  # the last inclusive sum is the total
            mTable[0, 0] = tiles_sum
            mTable[0, 1] = slots_sum
        cute.arch.sync_threads()  # every expert's first slot is there before anyone takes one

        # Scatter: each pair takes the next slot of its expert
        for pair in cutlass.range(first_pair + thread, last_pair, ROUTE_THREADS, unroll=4):
            expert = local_expert(mIds, mMap, pair, has_map, num_local_experts)
            if expert >= 0:
                slot = cute.arch.atomic_add(counts + expert, Int32(1), sem="relaxed", scope="cta")
                mPairs[slot] = pair
                if cutlass.const_expr(mPlaces is not None):
                    mPlaces[pair] = slot
            else:
                if cutlass.const_expr(mPlaces is not None):
                    mPlaces[pair] = Int32(-1)
        # Describe the tiles of this thread's expert, every `ctas`-th one by each member
        row = 1 + tiles_sum - tiles
        steps = cute.ceil_div(count, step)
        for i in cutlass.range(rank, tiles, self.ctas, unroll=1):
            begin = i * steps // tiles * step
            mTable[row + i, 0] = thread
            mTable[row + i, 1] = first + begin
            mTable[row + i, 2] = cutlass.min((i + 1) * steps // tiles * step, count) - begin

    @cute.jit
    def exchange(self, told, rank: Int32, thread: Int32, own_count: Int32):
        """Members tell each other their pairs of expert `thread` -> (of all members, of those of lower rank)."""
        sTold = told.get_tensor(cute.make_layout((MAX_EXPERTS, self.ctas)))
        own = smem_address(told.data_ptr()) + (rank * MAX_EXPERTS + thread) * 4
        # Every member is there: shared memory of a CTA that has not started may not be written.
        cute.arch.cluster_wait()
        for member in cutlass.range_constexpr(self.ctas):
            store_word_in_cluster(address_in_cluster(own, Int32(member)), own_count)
        # Every member's counts have arrived (release, then acquire). Nobody writes to another one after
        # this, so that a member may exit before the others.
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
        count, before = Int32(0), Int32(0)
        for member in cutlass.range_constexpr(self.ctas):
            if member < rank:
                before += sTold[thread, member]
            count += sTold[thread, member]
        return count, before

    @cute.jit
    def scan(
        self,
        sSums: cute.Tensor,  # int32 (64,): slots of each warp's experts, then tiles
        lane: Int32,
        warp: Int32,
        slots: Int32,
        tiles: Int32,
    ):
        """Inclusive sums over experts -> (slots, tiles): within warps, then over warps."""
        slots_sum, tiles_sum = slots, tiles
        for i in cutlass.range_constexpr(5):  # 2^5 lanes
            slots_below = cute.arch.shuffle_sync_up(slots_sum, 1 << i)
            tiles_below = cute.arch.shuffle_sync_up(tiles_sum, 1 << i)
            if lane >= 1 << i:
                slots_sum += slots_below
                tiles_sum += tiles_below
        if lane == 31:
            sSums[warp] = slots_sum
            sSums[32 + warp] = tiles_sum
        cute.arch.sync_threads()  # the sums of all 32 warps are there
        for w in cutlass.range_constexpr(31):  # the last warp has 31 before it
            if w < warp:
                slots_sum += sSums[w]
                tiles_sum += sSums[32 + w]
        return slots_sum, tiles_sum


class SlotRoute(Route):
    """Route with padded tiles and each pair's slot."""

    @cute.jit
    def __call__(
        self,
        mIds: cute.Tensor,  # int32 [M * T]
        mMap: cute.Tensor,  # int32 [num_global_experts], any tensor without has_map
        mPairs: cute.Tensor,  # int32 [tiles * tokens]
        mPlaces: cute.Tensor,  # int32 [M * T]
        mTable: cute.Tensor,  # int32 [1 + tiles, 4]
        has_map: Int32,
        num_local_experts: Int32,
        tokens: Int32,
        stream,
    ):
        self.start(mIds, mMap, mPairs, mPlaces, mTable, has_map, num_local_experts, tokens, tokens, stream)


class Combine:
    """A token's weighted sum; a thread holds 8 columns."""

    def __init__(self, topk: int):
        self.topk = topk

    @cute.jit
    def __call__(
        self,
        mY: cute.Tensor,  # bf16 [M * T, H]
        mIds: cute.Tensor,  # int32 [M * T]
        mMap: cute.Tensor,  # int32 [num_global_experts]
        mWeights: cute.Tensor,  # f32 [M * T]
        mOut: cute.Tensor,  # bf16 or f32 [M, H]
        has_map: Int32,
        num_local_experts: Int32,
        stream,
    ):
        vectors = mOut.shape[1] // VECTOR
        launch(
            self.kernel(mY, mIds, mMap, mWeights, mOut, has_map, num_local_experts),
            grid=(mOut.shape[0] * cute.ceil_div(vectors, COMBINE_THREADS), 1, 1),
            block=(COMBINE_THREADS, 1, 1),
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        mY: cute.Tensor,  # bf16 [M * T, H]
        mIds: cute.Tensor,  # int32 [M * T]
        mMap: cute.Tensor,  # int32 [num_global_experts]
        mWeights: cute.Tensor,  # f32 [M * T]
        mOut: cute.Tensor,  # bf16 or f32 [M, H]
        has_map: Int32,
        num_local_experts: Int32,
    ):
        # The next kernel may start now: it waits for the whole of this one before it reads `out`.
        cute.arch.griddepcontrol_launch_dependents()
        thread, _, _ = cute.arch.thread_idx()
        bid, _, _ = cute.arch.block_idx()
        hidden = mOut.shape[1]
        vectors = hidden // VECTOR
        parts = cute.ceil_div(vectors, COMBINE_THREADS)
        m = bid // parts
        vector = bid % parts * COMBINE_THREADS + thread
        # Read ids and weights without waiting: they were complete when the routing read the ids
        local = cute.make_rmem_tensor(self.topk, Int32)
        weight = cute.make_rmem_tensor(self.topk, Float32)
        for t in cutlass.range_constexpr(self.topk):
            local[t] = local_expert(mIds, mMap, m * self.topk + t, has_map, num_local_experts)
            weight[t] = mWeights[m * self.topk + t]
        # Wait for w2, which wrote `mY`
        cute.arch.griddepcontrol_wait()
        if vector < vectors:
            pieces = cute.make_rmem_tensor((4, self.topk), Uint32)
            pieces.fill(0)
            for t in cutlass.range_constexpr(self.topk):
                if local[t] >= 0:
                    source = mY.iterator + (Int64(m * self.topk + t) * hidden + vector * VECTOR)
                    source = cute.recast_ptr(source.align(16), dtype=Uint32)
                    cute.autovec_copy(cute.make_tensor(source, cute.make_layout(4)), pieces[None, t])
            values = cute.recast_tensor(pieces, BFloat16)
            # Add in ascending t, whatever slots the pairs had: the sum is the same in every run
            total = cute.make_rmem_tensor(VECTOR, Float32)
            total.fill(0.0)
            for t in cutlass.range_constexpr(self.topk):
                if local[t] >= 0:
                    for v in cutlass.range_constexpr(VECTOR):
                        total[v] = total[v] + weight[t] * values[v, t].to(Float32)
            result = cute.make_rmem_tensor(VECTOR, mOut.element_type)
            result.store(total.load().to(mOut.element_type))
            target = mOut.iterator + (Int64(m) * hidden + vector * VECTOR)
            cute.autovec_copy(result, cute.make_tensor(target.align(16), cute.make_layout(VECTOR)))
