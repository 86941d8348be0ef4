"""NVFP4 W4A16 expert products for few tokens an expert on Hopper: a CTA streams panel after panel.

experts_narrow.py with one warp for a row's whole K: sums never leave their thread, so there is no exchange,
no barrier, and the producer warp fetches the next panel's weights during the epilogue. For weights whose K
is short, and wherever there are more panels than the machine holds at once.

Equations, operands and pipelines are experts_narrow.py's. Panels of a tile are the fast index.
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint32
from cutlass.cute.nvgpu import cpasync

from ..device.activation import swiglu
from ..device.ptx import load_coherent, smem_address
from ..device.ring import advance
from ..device.views import partition_loads
from .decode import EPILOGUE_SCALE
from .experts_narrow import NarrowExpertsKernel
from .layout import CODE_WORDS, SCALE_WORDS
from .linear_narrow import TOKEN_ROW_BYTES
from .ptx import arrive_after_copies, copy_async
from .tiles import BLOCK_K, PANEL_ROWS

CONSUMER_WARPS = 4  # of 16 rows each: a panel


class StreamingExpertsKernel(NarrowExpertsKernel):
    """One compiled kernel: a tile configuration that `streams`, for w13 (`activated`) or w2."""

    def grid(self, panels: Int32, tiles: Int32, max_ctas: Int32) -> tuple:
        return cutlass.min(panels * tiles, max_ctas), 1, 1

    @cute.kernel
    def kernel(
        self,
        mX: cute.Tensor,  # bf16 w13 [M, H], w2 [slots, I]
        code_atom: cute.CopyAtom,
        tCodes: cute.Tensor,  # int64 (256, KB, P, E)
        scale_atom: cute.CopyAtom,
        tScales: cute.Tensor,  # int32 (64, KB, P, E)
        mRowScale: cute.Tensor,  # f32 w13 [E, 2I], w2 [E, H]
        mPairs: cute.Tensor,  # int32 [M * T]
        mTable: cute.Tensor,  # int32 [1 + tiles, 4]
        mOut: cute.Tensor,  # bf16 w13 [slots, I], w2 [M * T, H]
        topk: Int32,
        limit: Float32,
        scale_bias: Uint32,
        x_layout: cute.ComposedLayout,  # (tokens, stage's k, stages)
        code_layout: cute.Layout,  # (256, stage's blocks, stages)
        scale_layout: cute.Layout,  # (64, stage's blocks, stages)
    ):
        t = self.tile
        stages = t.stages
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        lane = cute.arch.lane_idx()
        bid, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()

        storage = cutlass.memory.SmemAllocator().allocate(self.shared)
        full, empty = storage.full.data_ptr(), storage.empty.data_ptr()
        sX = storage.x.get_tensor(x_layout.outer, swizzle=x_layout.inner)
        sCodes = storage.codes.get_tensor(code_layout)
        sScales = storage.scales.get_tensor(scale_layout)
        # Initialize the barriers
        if warp == CONSUMER_WARPS:
            for atom in (code_atom, scale_atom):
                cpasync.prefetch_descriptor(atom)
            with cute.arch.elect_one():
                for stage in cutlass.range_constexpr(stages):
                    # Arrivals: one with the weights' bytes, 32 lanes' copies
                    cute.arch.mbarrier_init(full + stage, 1 + 32)
                    cute.arch.mbarrier_init(empty + stage, CONSUMER_WARPS)
            cute.arch.mbarrier_init_fence()
        # Wait for the routing before w2 may start: w2 reads the table and has no wait of its own for the routing.
        if cutlass.const_expr(self.activated):
            cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.sync_threads()  # nobody waits on a barrier that has no value yet

        # Share the panels of all tiles among the CTAs

        table = mTable.iterator.toint()
        tiles, _, _, _ = load_coherent(table)
        panels = tCodes.shape[2]
        items = tiles * panels
        count = cute.ceil_div(tCodes.shape[1], t.stage_blocks)
        if warp == CONSUMER_WARPS:
            gCodes = cute.local_tile(tCodes, (CODE_WORDS, t.stage_blocks), (0, None, None, None))
            gScales = cute.local_tile(tScales, (SCALE_WORDS, t.stage_blocks), (0, None, None, None))
            tCs, tCg = partition_loads(code_atom, sCodes, gCodes, 2)
            tSs, tSg = partition_loads(scale_atom, sScales, gScales, 2)
            weights = (code_atom, tCg, tCs, scale_atom, tSg, tSs)
            # Fetch w2's first weights while w13 runs, which does not write them, then wait for w13
            early = Int32(0)  # stages whose weights do not wait for the previous kernel
            if cutlass.const_expr(not self.activated):
                if bid < items:
                    early = cutlass.min(count, stages)
                    expert, _, _, _ = load_coherent(table + Int64(bid // panels + 1) * 16)
                    for stage in cutlass.range(early, unroll=1):
                        self.load_weights(weights, stage, bid % panels, expert, full + stage, stage)
                cute.arch.griddepcontrol_wait()
            shared = smem_address(sX.iterator)
            self.produce(
                bid, ctas, items, panels, count, early, mX, mPairs, table, topk, full, empty, shared, weights
            )
        else:
            # Every consumer waits, too: for `mPairs`, and because a kernel must not end before its predecessors
            if cutlass.const_expr(not self.activated):
                cute.arch.griddepcontrol_wait()
            stage = Int32(0)
            phase = Int32(0)
            acc = cute.make_rmem_tensor((4, t.tokens // 8), Float32)
            for item in cutlass.range(bid, items, ctas, unroll=1):
                expert, first_slot, slots, _ = load_coherent(table + Int64(item // panels + 1) * 16)
                # Read what the epilogue needs before the main loop, whose time hides the latency
                n, factor, rows = self.targets(
                    item % panels, warp, lane, expert, first_slot, slots, mRowScale, mPairs, mOut
                )
                acc.fill(0.0)
                where = (count, stage, phase, warp, Int32(0), lane)
                stage, phase = self.accumulate(acc, *where, full, empty, sX, sCodes, sScales, scale_bias)
                self.store(acc, n, factor, rows, mOut, limit)

    @cute.jit
    def load_weights(
        self, weights: tuple, at: Int32, panel: Int32, expert: Int32, barrier: cute.Pointer, stage: Int32
    ):
        """TMA of one stage's weights, which `barrier` is told to expect."""
        code_atom, tCg, tCs, scale_atom, tSg, tSs = weights
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, self.tile.stage_weight_bytes)
        cute.copy(code_atom, tCg[None, at, panel, expert], tCs[None, stage], tma_bar_ptr=barrier)
        cute.copy(scale_atom, tSg[None, at, panel, expert], tSs[None, stage], tma_bar_ptr=barrier)

    @cute.jit
    def produce(
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
        full: cute.Pointer,
        empty: cute.Pointer,
        shared: Int32,
        weights: tuple,
    ):
        """Fill stages for every panel of this CTA; `early` of the first one's already have their weights."""
        t = self.tile
        rows = cutlass.const_expr(t.tokens // 4)
        lane = cute.arch.lane_idx()
        row = lane // 8
        chunk = lane % 8
        sources = cute.make_rmem_tensor(rows, Int64)
        stage = Int32(0)
        phase = Int32(1)  # a fresh barrier counts as released
        for item in cutlass.range(bid, items, ctas, unroll=1):
            expert, first_slot, slots, _ = load_coherent(table + Int64(item // panels + 1) * 16)
            # Find the rows of this tile's tokens
            for i in cutlass.range_constexpr(rows):
                line = first_slot + cutlass.min(row + 4 * i, slots - 1)
                if cutlass.const_expr(self.activated):
                    line = mPairs[line] // topk
                sources[i] = mX.iterator.toint() + (Int64(line) * mX.stride[0] + chunk * 8) * 2
            for at in cutlass.range(count, unroll=1):
                # Wait for a free stage
                cute.arch.mbarrier_wait(empty + stage, phase)
                # Issue the TMA loads of its weights
                if early <= 0:
                    self.load_weights(weights, at, item % panels, expert, full + stage, stage)
                early -= 1
                # Copy its tokens; beyond K there are zeros
                for b in cutlass.range_constexpr(t.stage_blocks):
                    block = at * t.stage_blocks + b
                    size = Int32(0)
                    if block * BLOCK_K + chunk * 8 < mX.shape[1]:
                        size = Int32(16)
                    target = shared + (stage * t.stage_blocks + b) * (t.tokens * TOKEN_ROW_BYTES)
                    for i in cutlass.range_constexpr(rows):
                        address = target + (row + 4 * i) * TOKEN_ROW_BYTES
                        address = address + (chunk ^ ((row + 4 * i) % 8)) * 16
                        offset = Int64(block) * TOKEN_ROW_BYTES
                        copy_async(address, sources[i] + offset, size, row + 4 * i < slots)
                # Arrive when the copies have landed, which nobody waits for here
                arrive_after_copies(smem_address(full + stage))
                stage, phase = advance(stage, phase, t.stages)

    @cute.jit
    def targets(
        self,
        panel: Int32,
        warp: Int32,
        lane: Int32,
        expert: Int32,
        first_slot: Int32,
        slots: Int32,
        mRowScale: cute.Tensor,  # f32 w13 [E, 2I], w2 [E, H]
        mPairs: cute.Tensor,  # int32 [M * T]
        mOut: cute.Tensor,  # bf16 w13 [slots, I], w2 [M * T, H]
    ):
        """-> (first column, scales of its two weight rows, row of out of each of its tokens or -1)."""
        t = self.tile
        columns = mOut.shape[1]
        n = panel * PANEL_ROWS + warp * 16 + lane // 4
        if cutlass.const_expr(self.activated):
            n = panel * (PANEL_ROWS // 2) + warp * 8 + lane // 4
        factor = cute.make_rmem_tensor(2, Float32)
        for h in cutlass.range_constexpr(2):
            factor[h] = Float32(0.0)
            if cutlass.const_expr(self.activated):
                if n < columns:
                    factor[h] = mRowScale[expert, n + h * columns] * Float32(EPILOGUE_SCALE)
            else:
                if n + 8 * h < columns:
                    factor[h] = mRowScale[expert, n + 8 * h] * Float32(EPILOGUE_SCALE)
        rows = cute.make_rmem_tensor((2, t.tokens // 8), Int32)
        for column in cutlass.range_constexpr(t.tokens // 8):
            for v in cutlass.range_constexpr(2):
                token = column * 8 + (lane % 4) * 2 + v
                rows[v, column] = Int32(-1)
                if token < slots:
                    if cutlass.const_expr(self.activated):
                        rows[v, column] = first_slot + token
                    else:
                        rows[v, column] = mPairs[first_slot + token]
        return n, factor, rows

    @cute.jit
    def store(
        self,
        acc: cute.Tensor,  # f32 (4, tokens / 8): {row r, row r + 8} x two tokens
        n: Int32,
        factor: cute.Tensor,  # f32 (2,), of rows r and r + 8
        rows: cute.Tensor,  # int32 (2, tokens / 8): rows of out, -1 for none
        mOut: cute.Tensor,  # bf16 w13 [slots, I], w2 [M * T, H]
        limit: Float32,
    ):
        """Scale, activate, store: rows r and r + 8 are one column's gate and up (w13), or two columns (w2)."""
        columns = mOut.shape[1]
        for column in cutlass.range_constexpr(self.tile.tokens // 8):
            for v in cutlass.range_constexpr(2):
                row = rows[v, column]
                first = acc[v, column] * factor[0]
                second = acc[2 + v, column] * factor[1]
                if row >= 0:
                    target = mOut.iterator + (Int64(row) * columns + n)
                    out = cute.make_tensor(target, cute.make_layout(9))  # columns n .. n + 8
                    if cutlass.const_expr(self.activated):
                        if n < columns:
                            out[0] = swiglu(first, second, limit).to(BFloat16)
                    else:
                        if n < columns:
                            out[0] = first.to(BFloat16)
                        if n + 8 < columns:
                            out[8] = second.to(BFloat16)
