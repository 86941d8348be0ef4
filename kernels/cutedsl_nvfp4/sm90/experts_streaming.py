"""NVFP4 W4A16 expert products for few tokens an expert on Hopper: a CTA streams panel after panel.

experts_narrow.py with one warp for a row's whole K: sums never leave their thread, so there is no exchange,
no barrier, and the producer warp fetches the next panel's weights during the epilogue. For weights whose K
is short, and wherever there are more panels than the machine holds at once.

Equations, operands and pipelines are experts_narrow.py's. Panels of a tile are the fast index.
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint32

from ..device.activation import swiglu
from ..device.ring import advance
from ..device.routing import Entry, table_counts, table_entry
from .decode import EPILOGUE_SCALE
from .experts_narrow import NarrowExpertsKernel, Results
from .tiles import PANEL_ROWS
from .views import (
    Pipeline,
    StageLayouts,
    WeightLoads,
    Weights,
    load_weights,
    partition_weights,
    pipeline_in,
)

CONSUMER_WARPS = 4  # of 16 rows each: a panel


class StreamingExpertsKernel(NarrowExpertsKernel):
    """One compiled kernel: a tile that `streams`, for w13 (`activated`) or w2."""

    def grid(self, panels: Int32, tiles: Int32, max_ctas: Int32) -> tuple:
        return cutlass.min(panels * tiles, max_ctas), 1, 1

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
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        lane = cute.arch.lane_idx()
        bid, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()

        storage = cutlass.memory.SmemAllocator().allocate(self.shared)
        pipeline = pipeline_in(storage, layouts)
        self.start(warp, weights, pipeline)

        # Share the panels of all tiles among the CTAs
        table = mTable.iterator.toint()
        tiles, _ = table_counts(table)
        panels = weights.codes.shape[2]
        items = tiles * panels
        count = cute.ceil_div(weights.codes.shape[1], t.stage_blocks)
        if warp == CONSUMER_WARPS:
            loads = partition_weights(weights, pipeline, (t.stage_blocks,), (None, None, None))
            # Fetch w2's first weights while w13 runs, which does not write them, then wait for w13
            early = Int32(0)  # stages whose weights do not wait for the previous kernel
            if cutlass.const_expr(not self.activated):
                if bid < items:
                    early = cutlass.min(count, t.stages)
                    expert = table_entry(table, bid // panels).expert
                    for stage in cutlass.range(early, unroll=1):
                        box = (stage, bid % panels, expert)
                        load_weights(loads, box, stage, pipeline.full, t.stage_weight_bytes)
                cute.arch.griddepcontrol_wait()
            self.stream(bid, ctas, items, panels, count, early, mX, mPairs, table, topk, pipeline, loads)
        else:
            # Every consumer waits, too: for `mPairs`, and because a kernel must not end before its predecessors
            if cutlass.const_expr(not self.activated):
                cute.arch.griddepcontrol_wait()
            results = Results(mRowScale, mPairs, mOut, limit)
            stage = Int32(0)
            phase = Int32(0)
            acc = cute.make_rmem_tensor((4, t.tokens // 8), Float32)
            for item in cutlass.range(bid, items, ctas, unroll=1):
                entry = table_entry(table, item // panels)
                # Read what the epilogue needs before the main loop, whose time hides the latency
                n, factor, rows = self.targets(item % panels, warp, lane, entry, results)
                acc.fill(0.0)
                where = (count, stage, phase, warp, Int32(0), lane)
                stage, phase = self.accumulate(acc, *where, pipeline, scale_bias)
                self.store(acc, n, factor, rows, results)

    @cute.jit
    def stream(
        self,
        bid: Int32,
        ctas: Int32,
        items: Int32,
        panels: Int32,
        count: Int32,
        early: Int32,
        mX: cute.Tensor,  # bf16 w13 [M, H], w2 [slots, I]
        mPairs: cute.Tensor,  # int32 [M * T]
        table: Int64,
        topk: Int32,
        pipeline: Pipeline,
        loads: WeightLoads,
    ):
        """Fill stages for every panel of this CTA; `early` of the first one's already have their weights."""
        t = self.tile
        lane = cute.arch.lane_idx()
        row, chunk = lane // 8, lane % 8
        sources = cute.make_rmem_tensor(t.tokens // 4, Int64)
        stage = Int32(0)
        phase = Int32(1)  # a fresh barrier counts as released
        for item in cutlass.range(bid, items, ctas, unroll=1):
            entry = table_entry(table, item // panels)
            self.find_rows(row, chunk, sources, mX, mPairs, topk, entry)
            for at in cutlass.range(count, unroll=1):
                # Wait for a free stage
                cute.arch.mbarrier_wait(pipeline.empty + stage, phase)
                # Issue the TMA loads of its weights, and copy its tokens
                if early <= 0:
                    box = (at, item % panels, entry.expert)
                    load_weights(loads, box, stage, pipeline.full, t.stage_weight_bytes)
                early -= 1
                self.gather(row, chunk, mX, sources, entry, at, stage, pipeline)
                stage, phase = advance(stage, phase, t.stages)

    @cute.jit
    def targets(
        self,
        panel: Int32,
        warp: Int32,
        lane: Int32,
        entry: Entry,
        results: Results,
    ):
        """-> (first column, scales of its two weight rows, row of out of each of its tokens or -1)."""
        t = self.tile
        columns = results.out.shape[1]
        n = panel * PANEL_ROWS + warp * 16 + lane // 4
        if cutlass.const_expr(self.activated):
            n = panel * (PANEL_ROWS // 2) + warp * 8 + lane // 4
        factor = cute.make_rmem_tensor(2, Float32)
        for h in cutlass.range_constexpr(2):
            factor[h] = Float32(0.0)
            if cutlass.const_expr(self.activated):
                if n < columns:
                    factor[h] = results.row_scale[entry.expert, n + h * columns] * Float32(EPILOGUE_SCALE)
            else:
                if n + 8 * h < columns:
                    factor[h] = results.row_scale[entry.expert, n + 8 * h] * Float32(EPILOGUE_SCALE)
        rows = cute.make_rmem_tensor((2, t.tokens // 8), Int32)
        for column in cutlass.range_constexpr(t.tokens // 8):
            for v in cutlass.range_constexpr(2):
                token = column * 8 + (lane % 4) * 2 + v
                rows[v, column] = Int32(-1)
                if token < entry.slots:
                    if cutlass.const_expr(self.activated):
                        rows[v, column] = entry.first_slot + token
                    else:
                        rows[v, column] = results.pairs[entry.first_slot + token]
        return n, factor, rows

    @cute.jit
    def store(
        self,
        acc: cute.Tensor,  # f32 (4, tokens / 8): {row r, row r + 8} x two tokens
        n: Int32,
        factor: cute.Tensor,  # f32 (2,), of rows r and r + 8
        rows: cute.Tensor,  # int32 (2, tokens / 8): rows of out, -1 for none
        results: Results,
    ):
        """Scale, activate, store: rows r and r + 8 are one column's gate and up (w13), or two columns (w2)."""
        columns = results.out.shape[1]
        for column in cutlass.range_constexpr(self.tile.tokens // 8):
            for v in cutlass.range_constexpr(2):
                row = rows[v, column]
                first = acc[v, column] * factor[0]
                second = acc[2 + v, column] * factor[1]
                if row >= 0:
                    target = results.out.iterator + (Int64(row) * columns + n)
                    out = cute.make_tensor(target, cute.make_layout(9))  # columns n .. n + 8
                    if cutlass.const_expr(self.activated):
                        if n < columns:
                            out[0] = swiglu(first, second, results.limit).to(BFloat16)
                    else:
                        if n < columns:
                            out[0] = first.to(BFloat16)
                        if n + 8 < columns:
                            out[8] = second.to(BFloat16)
