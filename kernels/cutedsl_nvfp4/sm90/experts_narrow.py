"""NVFP4 W4A16 expert products for few tokens an expert on Hopper: linear_narrow.py, with tokens gathered by slot.

    w13  h[slot] = swiglu(w1 @ x[m], w3 @ x[m])       m = pairs[slot] // T, w1 and w3 of the slot's expert
    w2   y[pairs[slot]] = w2 @ h[slot]

    operand    shape                dtype      layout
    x          [M, H], [slots, I]   bf16       rows of w13's and of w2's input, 16-byte aligned
    codes      [E, P, KB, 256]      int64      sm90/layout.py, w13 interleaved by interleave_gate_up
    scales     [E, P, KB, 64]       int32      sm90/layout.py
    row_scale  [E, 2I], [E, H]      f32        w13: gate rows first
    pairs      [M * T]              int32      device/routing.py
    table      [1 + tiles, 4]       int32      device/routing.py
    out        [slots, I], [M*T, H] bf16       row-major

Differences from NarrowLinearKernel
    grid       every tile the routing could need; a CTA whose tile is beyond the table's has nothing to do
    tokens     the producer warp gathers rows with cp.async instead of TMA: full[stage] has 1 + 32 arrivals
    w13        waits for the routing; w2 reads the table, which w13 has seen complete, and fetches weights at
               once, and waits for w13 before tokens
    w13        a gate row and its up row are neighbours in a warp, so swiglu needs no other exchange
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint32
from cutlass.cute.nvgpu import cpasync

from ..device.activation import swiglu
from ..device.launch import launch
from ..device.ptx import smem_address
from ..device.ring import advance, init_ring
from ..device.routing import Entry, table_counts, table_entry
from .decode import EPILOGUE_SCALE
from .layout import CODE_WORDS, SCALE_WORDS
from .linear_narrow import TOKEN_ROW_BYTES, NarrowLinearKernel
from .ptx import arrive_after_copies, copy_async
from .tiles import BLOCK_K, PANEL_ROWS, NarrowTile
from .views import (
    Pipeline,
    StageLayouts,
    WeightLoads,
    Weights,
    expert_view,
    load_weights,
    partition_weights,
    pipeline_in,
    stage_layouts,
    weights_by_tma,
)


class Results(NamedTuple):
    """What the epilogue reads and writes."""

    row_scale: cute.Tensor  # f32 w13 [E, 2I], w2 [E, H]
    pairs: cute.Tensor  # int32 [M * T]
    out: cute.Tensor  # bf16 w13 [slots, I], w2 [M * T, H]
    limit: Float32


class NarrowExpertsKernel(NarrowLinearKernel):
    """One compiled kernel: a tile, for w13 (`activated`) or w2."""

    def __init__(self, tile: NarrowTile, activated: bool):
        tile.check()
        if activated and tile.split_k == 8:
            raise ValueError(f"{tile}: with split_k = 8 a gate row and its up row lie in different CTAs")
        self.tile = tile
        self.activated = activated

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,  # bf16 w13 [M, H], w2 [slots, I]
        mCodes: cute.Tensor,  # int64 [E, P, KB, 256]
        mScales: cute.Tensor,  # int32 [E, P, KB, 64]
        mRowScale: cute.Tensor,  # f32 w13 [E, 2I], w2 [E, H]
        mPairs: cute.Tensor,  # int32 [M * T]
        mTable: cute.Tensor,  # int32 [1 + tiles, 4]
        mOut: cute.Tensor,  # bf16 w13 [slots, I], w2 [M * T, H]
        topk: Int32,
        limit: Float32,
        scale_bias: Int32,
        max_ctas: Int32,
        stream,
    ):
        t = self.tile
        stages, box = t.stages, (t.stage_blocks,)
        layouts = stage_layouts(t.tokens, box, stages)
        weights = weights_by_tma(
            expert_view(mCodes, CODE_WORDS), expert_view(mScales, SCALE_WORDS), layouts, box
        )

        @cute.struct
        class Shared:
            full: cute.struct.MemRange[Int64, stages]
            empty: cute.struct.MemRange[Int64, stages]
            x: cute.struct.Align[cute.struct.MemRange[BFloat16, cute.cosize(layouts.x)], 1024]
            codes: cute.struct.Align[cute.struct.MemRange[Int64, cute.cosize(layouts.codes)], 128]
            scales: cute.struct.Align[cute.struct.MemRange[Int32, cute.cosize(layouts.scales)], 128]
            partials: cute.struct.Align[cute.struct.MemRange[Float32, t.partial_bytes // 4], 128]

        self.shared = Shared
        launch(
            self.kernel(
                mX,
                weights,
                mRowScale,
                mPairs,
                mTable,
                mOut,
                topk,
                limit,
                Uint32(scale_bias),
                layouts,
            ),
            grid=self.grid(mCodes.shape[1], mTable.shape[0] - 1, max_ctas),
            block=(t.threads, 1, 1),
            cluster=(t.split_k, 1, 1),
            min_blocks_per_mp=1,
            stream=stream,
        )

    def grid(self, panels: Int32, tiles: Int32, max_ctas: Int32) -> tuple:
        return panels * self.tile.split_k, tiles, 1

    @cute.jit
    def start(self, warp: Int32, weights: Weights, pipeline: Pipeline):
        """Initialize the barriers and let the next kernel start."""
        t = self.tile
        if warp == 4 * t.k_warps:
            for atom in (weights.code_atom, weights.scale_atom):
                cpasync.prefetch_descriptor(atom)
            with cute.arch.elect_one():
                # Arrivals at `full`: one with the weights' bytes, 32 lanes' copies
                init_ring(pipeline.full, pipeline.empty, t.stages, 1 + 32, 4 * t.k_warps)
            # Publish the initial values: a relaxed arrival at the cluster's barrier orders nothing by itself.
            cute.arch.mbarrier_init_fence()
        # Wait for the routing before w2 may start: w2 reads the table and has no wait of its own for the routing.
        if cutlass.const_expr(self.activated):
            cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        if cutlass.const_expr(t.split_k > 1):
            # No CTA may write partial sums into one that has not started.
            cute.arch.cluster_arrive_relaxed()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()  # nobody waits on a barrier that has no value yet

    @cute.kernel
    def kernel(
        self,
        mX: cute.Tensor,  # bf16 w13 [M, H], w2 [slots, I]
        weights: Weights,
        mRowScale: cute.Tensor,  # f32 w13 [E, 2I], w2 [E, H]
        mPairs: cute.Tensor,  # int32 [M * T]
        mTable: cute.Tensor,  # int32 [1 + tiles, 4]
        mOut: cute.Tensor,  # bf16 w13 [slots, I], w2 [M * T, H]
        topk: Int32,
        limit: Float32,
        scale_bias: Uint32,
        layouts: StageLayouts,
    ):
        t = self.tile
        consumer_warps = 4 * t.k_warps
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        bid, tile, _ = cute.arch.block_idx()

        storage = cutlass.memory.SmemAllocator().allocate(self.shared)
        pipeline = pipeline_in(storage, layouts)
        self.start(warp, weights, pipeline)

        # Find this CTA's tile
        table = mTable.iterator.toint()
        tiles, _ = table_counts(table)
        if tile < tiles:
            entry = table_entry(table, tile)
            panel = bid // t.split_k
            rank = bid % t.split_k
            first, count = self.share_of_k(rank, weights.codes.shape[1])
            if warp == consumer_warps:
                loads = partition_weights(weights, pipeline, (t.stage_blocks,), (None, panel, entry.expert))
                # Fetch the first weights: no kernel that may still run writes them, so w2 need not wait for w13
                for stage in cutlass.range_constexpr(t.stages):
                    if stage < count:
                        load_weights(loads, (first + stage,), stage, pipeline.full, t.stage_weight_bytes)
                self.produce(mX, mPairs, topk, entry, first, count, pipeline, loads)
            else:
                self.multiply(warp, rank, count, storage, pipeline, scale_bias)
            # All threads of a cluster have to arrive here; its CTAs share a tile, so they all do or none does.
            self.wait_for_partials(warp, pipeline.empty)
            if warp < consumer_warps:
                if cutlass.const_expr(not self.activated):
                    cute.arch.griddepcontrol_wait()  # makes what the routing wrote to `mPairs` visible here, too
                thread, _, _ = cute.arch.thread_idx()
                results = Results(mRowScale, mPairs, mOut, limit)
                self.finish_slots(thread, panel, rank, entry, storage, results)
        else:
            if cutlass.const_expr(not self.activated):
                # The next kernel waits for this one alone: this one must not end before its predecessors have.
                cute.arch.griddepcontrol_wait()

    @cute.jit
    def produce(
        self,
        mX: cute.Tensor,  # bf16 w13 [M, H], w2 [slots, I]
        mPairs: cute.Tensor,  # int32 [M * T]
        topk: Int32,
        entry: Entry,
        first: Int32,
        count: Int32,
        pipeline: Pipeline,
        loads: WeightLoads,
    ):
        """Gather the tile's rows into every stage, and refill weights beyond the first `stages` stages."""
        t = self.tile
        lane = cute.arch.lane_idx()
        row, chunk = lane // 8, lane % 8
        # Wait for w13, which wrote w2's input; w13 itself has waited for the routing above
        if cutlass.const_expr(not self.activated):
            cute.arch.griddepcontrol_wait()
        sources = cute.make_rmem_tensor(t.tokens // 4, Int64)
        self.find_rows(row, chunk, sources, mX, mPairs, topk, entry)
        stage = Int32(0)
        phase = Int32(0)  # of `full`; the stage's release before it is the phase of the other parity
        for step in cutlass.range(count, unroll=1):
            if step >= t.stages:
                # Wait for a free stage and issue the TMA loads of its weights
                cute.arch.mbarrier_wait(pipeline.empty + stage, phase ^ 1)
                load_weights(loads, (first + step,), stage, pipeline.full, t.stage_weight_bytes)
            self.gather(row, chunk, mX, sources, entry, first + step, stage, pipeline)
            stage, phase = advance(stage, phase, t.stages)

    @cute.jit
    def find_rows(
        self,
        row: Int32,
        chunk: Int32,
        sources: cute.Tensor,  # int64 (tokens / 4,), written here
        mX: cute.Tensor,  # bf16 w13 [M, H], w2 [slots, I]
        mPairs: cute.Tensor,  # int32 [M * T]
        topk: Int32,
        entry: Entry,
    ):
        """The addresses a lane copies from: 16-byte chunk `chunk` of rows `row` + 4 i of the tile, of 64 k."""
        for i in cutlass.range_constexpr(self.tile.tokens // 4):
            source = entry.first_slot + cutlass.min(row + 4 * i, entry.slots - 1)
            if cutlass.const_expr(self.activated):
                source = mPairs[source] // topk
            sources[i] = mX.iterator.toint() + (Int64(source) * mX.stride[0] + chunk * 8) * 2

    @cute.jit
    def gather(
        self,
        row: Int32,
        chunk: Int32,
        mX: cute.Tensor,  # bf16 w13 [M, H], w2 [slots, I]
        sources: cute.Tensor,  # int64 (tokens / 4,)
        entry: Entry,
        step: Int32,
        stage: Int32,
        pipeline: Pipeline,
    ):
        """Copy k step `step` of the tile's rows into a stage.

        Rows beyond the tile's are not written: what they hold stays in their own column. A copy reads `size`
        bytes and fills the rest with zeros, as all 16 beyond K.
        """
        t = self.tile
        for b in cutlass.range_constexpr(t.stage_blocks):
            block = step * t.stage_blocks + b
            size = Int32(0)
            if block * BLOCK_K + chunk * 8 < mX.shape[1]:
                size = Int32(16)
            target = smem_address(pipeline.x.iterator)
            target += (stage * t.stage_blocks + b) * (t.tokens * TOKEN_ROW_BYTES)
            for i in cutlass.range_constexpr(t.tokens // 4):
                line = row + 4 * i
                address = target + line * TOKEN_ROW_BYTES + (chunk ^ (line % 8)) * 16  # 128B-swizzled
                copy_async(address, sources[i] + Int64(block) * TOKEN_ROW_BYTES, size, line < entry.slots)
        # Arrive when the copies have landed, which nobody waits for here
        arrive_after_copies(smem_address(pipeline.full + stage))

    @cute.jit
    def finish_slots(
        self,
        thread: Int32,
        panel: Int32,
        rank: Int32,
        entry: Entry,
        storage,
        results: Results,
    ):
        """Add the partial sums of the rows this CTA owns in ascending k order; scale, activate, store."""
        t = self.tile
        halves = cutlass.const_expr(2 if self.activated else 1)  # rows that make one result
        units = cutlass.const_expr(8 // t.split_k)
        column_pairs = cutlass.const_expr(t.tokens * 4)  # of 8 rows
        values = cutlass.const_expr(units // halves * column_pairs)
        threads = cutlass.const_expr(128 * t.k_warps)
        panel_results = cutlass.const_expr(PANEL_ROWS // halves)
        sPartials = storage.partials.get_tensor(
            cute.make_layout((2, column_pairs, halves, units // halves, t.split_k * t.k_warps))
        )
        for i in cutlass.range_constexpr(-(-values // threads)):
            index = thread + i * threads
            if index < values:
                unit = index // column_pairs
                pair = index % column_pairs
                lane = pair % 32
                n = panel * panel_results + (rank * (units // halves) + unit) * 8 + lane // 4
                token = pair // 32 * 8 + (lane % 4) * 2
                if n < results.out.shape[1] and token < entry.slots:
                    sums = []
                    for h in cutlass.range_constexpr(halves):
                        factor = results.row_scale[entry.expert, n + h * results.out.shape[1]]
                        factor = factor * Float32(EPILOGUE_SCALE)
                        total = self.add_partials(sPartials, pair, h, unit)
                        sums.append([total[v] * factor for v in range(2)])
                    for v in cutlass.range_constexpr(2):
                        if token + v < entry.slots:
                            row = entry.first_slot + token + v
                            if cutlass.const_expr(self.activated):
                                value = swiglu(sums[0][v], sums[1][v], results.limit)
                            else:
                                value = sums[0][v]
                                row = results.pairs[row]
                            target = results.out.iterator + (Int64(row) * results.out.shape[1] + n)
                            cute.make_tensor(target, cute.make_layout(1))[0] = value.to(BFloat16)
