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

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint32
from cutlass.cute.nvgpu import cpasync, warpgroup

from ..device.activation import swiglu
from ..device.cluster import address_in_cluster, store_in_cluster
from ..device.ptx import load_coherent, smem_address
from ..device.ring import advance
from ..device.views import partition_loads
from .decode import EPILOGUE_SCALE
from .layout import CODE_WORDS, SCALE_WORDS
from .linear_narrow import SWIZZLE_ATOM, TOKEN_ROW_BYTES, NarrowLinearKernel
from .ptx import arrive_after_copies, copy_async
from .tiles import BLOCK_K, PANEL_ROWS, NarrowTile
from .views import expert_view


class NarrowExpertsKernel(NarrowLinearKernel):
    """One compiled kernel: a tile configuration, for w13 (`activated`) or w2."""

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
        stages = t.stages
        atom = warpgroup.make_smem_layout_atom(SWIZZLE_ATOM, BFloat16)
        x_layout = cute.tile_to_shape(atom, (t.tokens, t.stage_blocks * BLOCK_K, stages), order=(0, 1, 2))
        code_layout = cute.make_layout((CODE_WORDS, t.stage_blocks, stages))
        scale_layout = cute.make_layout((SCALE_WORDS, t.stage_blocks, stages))
        load = cpasync.CopyBulkTensorTileG2SOp()
        stage_of = (None, None, 0)
        code_atom, tCodes = cpasync.make_tiled_tma_atom(
            load,
            expert_view(mCodes, CODE_WORDS),
            cute.slice_(code_layout, stage_of),
            (CODE_WORDS, t.stage_blocks),
        )
        scale_atom, tScales = cpasync.make_tiled_tma_atom(
            load,
            expert_view(mScales, SCALE_WORDS),
            cute.slice_(scale_layout, stage_of),
            (SCALE_WORDS, t.stage_blocks),
        )

        @cute.struct
        class Shared:
            full: cute.struct.MemRange[Int64, stages]
            empty: cute.struct.MemRange[Int64, stages]
            x: cute.struct.Align[cute.struct.MemRange[BFloat16, cute.cosize(x_layout)], 1024]
            codes: cute.struct.Align[cute.struct.MemRange[Int64, cute.cosize(code_layout)], 128]
            scales: cute.struct.Align[cute.struct.MemRange[Int32, cute.cosize(scale_layout)], 128]
            partials: cute.struct.Align[cute.struct.MemRange[Float32, t.partial_bytes // 4], 128]

        self.shared = Shared
        self.kernel(
            mX,
            code_atom,
            tCodes,
            scale_atom,
            tScales,
            mRowScale,
            mPairs,
            mTable,
            mOut,
            topk,
            limit,
            Uint32(scale_bias),
            x_layout,
            code_layout,
            scale_layout,
        ).launch(
            grid=self.grid(mCodes.shape[1], mTable.shape[0] - 1, max_ctas),
            block=(t.threads, 1, 1),
            cluster=(t.split_k, 1, 1),
            min_blocks_per_mp=1,
            stream=stream,
            use_pdl=True,
        )

    def grid(self, panels: Int32, tiles: Int32, max_ctas: Int32) -> tuple:
        return panels * self.tile.split_k, tiles, 1

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
        consumer_warps = 4 * t.k_warps
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        bid, tile, _ = cute.arch.block_idx()

        storage = cutlass.memory.SmemAllocator().allocate(self.shared)
        full, empty = storage.full.data_ptr(), storage.empty.data_ptr()
        # Initialize the barriers
        if warp == consumer_warps:
            for atom in (code_atom, scale_atom):
                cpasync.prefetch_descriptor(atom)
            with cute.arch.elect_one():
                for stage in cutlass.range_constexpr(stages):
                    # Arrivals: one with the weights' bytes, 32 lanes' copies
                    cute.arch.mbarrier_init(full + stage, 1 + 32)
                    cute.arch.mbarrier_init(empty + stage, consumer_warps)
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

        # Find this CTA's tile

        table = mTable.iterator.toint()
        tiles, _, _, _ = load_coherent(table)
        if tile < tiles:
            expert, first_slot, slots, _ = load_coherent(table + Int64(tile + 1) * 16)
            sX = storage.x.get_tensor(x_layout.outer, swizzle=x_layout.inner)
            sCodes = storage.codes.get_tensor(code_layout)
            sScales = storage.scales.get_tensor(scale_layout)
            panel = bid // t.split_k
            rank = bid % t.split_k
            steps_total = cute.ceil_div(tCodes.shape[1], t.stage_blocks)
            first = rank * steps_total // t.split_k
            count = (rank + 1) * steps_total // t.split_k - first
            if warp == consumer_warps:
                gCodes = cute.local_tile(tCodes, (CODE_WORDS, t.stage_blocks), (0, None, panel, expert))
                gScales = cute.local_tile(tScales, (SCALE_WORDS, t.stage_blocks), (0, None, panel, expert))
                tCs, tCg = partition_loads(code_atom, sCodes, gCodes, 2)
                tSs, tSg = partition_loads(scale_atom, sScales, gScales, 2)
                # Fetch the first weights: no kernel that may still run writes them, so w2 need not wait for w13
                for stage in cutlass.range_constexpr(stages):
                    if stage < count:
                        with cute.arch.elect_one():
                            cute.arch.mbarrier_arrive_and_expect_tx(full + stage, t.stage_weight_bytes)
                        at = first + stage
                        cute.copy(code_atom, tCg[None, at], tCs[None, stage], tma_bar_ptr=full + stage)
                        cute.copy(scale_atom, tSg[None, at], tSs[None, stage], tma_bar_ptr=full + stage)
                self.load_tokens(
                    mX,
                    mPairs,
                    topk,
                    first_slot,
                    slots,
                    first,
                    count,
                    full,
                    empty,
                    smem_address(sX.iterator),
                    (code_atom, tCg, tCs, scale_atom, tSg, tSs),
                )
            else:
                self.multiply(warp, rank, count, storage, full, empty, sX, sCodes, sScales, scale_bias)
            # Wait for the partial sums of every k group of every CTA. All threads of a cluster have to arrive; its
            # CTAs share a tile, so they all get here or none does.
            if cutlass.const_expr(t.split_k > 1):
                cute.arch.cluster_arrive()
                cute.arch.cluster_wait()
            else:
                cute.arch.sync_threads()
            if warp < consumer_warps:
                if cutlass.const_expr(not self.activated):
                    cute.arch.griddepcontrol_wait()  # makes what the routing wrote to `mPairs` visible here, too
                thread, _, _ = cute.arch.thread_idx()
                self.finish_slots(
                    thread, panel, rank, expert, first_slot, slots, storage, mRowScale, mPairs, mOut, limit
                )
        else:
            if cutlass.const_expr(not self.activated):
                # The next kernel waits for this one alone: this one must not end before its predecessors have.
                cute.arch.griddepcontrol_wait()

    @cute.jit
    def load_tokens(
        self,
        mX: cute.Tensor,  # bf16 w13 [M, H], w2 [slots, I]
        mPairs: cute.Tensor,  # int32 [M * T]
        topk: Int32,
        first_slot: Int32,
        slots: Int32,
        first: Int32,
        count: Int32,
        full: cute.Pointer,
        empty: cute.Pointer,
        shared: Int32,
        weights: tuple,
    ):
        """Gather the tile's rows into every stage, and refill weights beyond the first `stages` stages.

        A lane copies 16-byte chunk lane % 8 of rows lane // 8 + 4 i. Rows beyond the tile's are not written:
        what they hold stays in their own column.
        """
        code_atom, tCg, tCs, scale_atom, tSg, tSs = weights
        t = self.tile
        rows = cutlass.const_expr(t.tokens // 4)
        lane = cute.arch.lane_idx()
        row = lane // 8
        chunk = lane % 8
        # Wait for w13, which wrote w2's input; w13 itself has waited for the routing above
        if cutlass.const_expr(not self.activated):
            cute.arch.griddepcontrol_wait()
        sources = cute.make_rmem_tensor(rows, Int64)
        for i in cutlass.range_constexpr(rows):
            slot = first_slot + cutlass.min(row + 4 * i, slots - 1)
            source = slot
            if cutlass.const_expr(self.activated):
                source = mPairs[slot] // topk
            sources[i] = mX.iterator.toint() + (Int64(source) * mX.stride[0] + chunk * 8) * 2
        stage = Int32(0)
        phase = Int32(0)  # of `full`; the stage's release before it is the phase of the other parity
        for step in cutlass.range(count, unroll=1):
            if step >= t.stages:
                # Wait for a free stage and issue the TMA loads of its weights
                cute.arch.mbarrier_wait(empty + stage, phase ^ 1)
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(full + stage, t.stage_weight_bytes)
                cute.copy(code_atom, tCg[None, first + step], tCs[None, stage], tma_bar_ptr=full + stage)
                cute.copy(scale_atom, tSg[None, first + step], tSs[None, stage], tma_bar_ptr=full + stage)
            # Copy the tokens. A copy reads `size` bytes and fills the rest with zeros, as all 16 beyond K.
            for b in cutlass.range_constexpr(t.stage_blocks):
                block = (first + step) * t.stage_blocks + b
                size = Int32(0)
                if block * BLOCK_K + chunk * 8 < mX.shape[1]:
                    size = Int32(16)
                target = shared + (stage * t.stage_blocks + b) * (t.tokens * TOKEN_ROW_BYTES)
                for i in cutlass.range_constexpr(rows):
                    line = row + 4 * i
                    address = target + line * TOKEN_ROW_BYTES + (chunk ^ (line % 8)) * 16
                    copy_async(address, sources[i] + Int64(block) * TOKEN_ROW_BYTES, size, line < slots)
            # Arrive when the copies have landed, which nobody waits for here
            arrive_after_copies(smem_address(full + stage))
            stage, phase = advance(stage, phase, t.stages)

    @cute.jit
    def multiply(
        self,
        warp: Int32,
        rank: Int32,
        count: Int32,
        storage,
        full: cute.Pointer,
        empty: cute.Pointer,
        sX: cute.Tensor,  # bf16 (tokens, stage's k, stages), 128B-swizzled
        sCodes: cute.Tensor,  # int64 (256, stage's blocks, stages)
        sScales: cute.Tensor,  # int32 (64, stage's blocks, stages)
        scale_bias: Uint32,
    ):
        """A consumer warp's partial sums, sent to the CTAs that own their rows."""
        t = self.tile
        lane = cute.arch.lane_idx()
        row_warp = warp % 4
        k_group = warp // 4
        partials = smem_address(storage.partials.data_ptr())
        acc = cute.make_rmem_tensor((4, t.tokens // 8), Float32)
        acc.fill(0.0)
        start = (count, Int32(0), Int32(0), row_warp, k_group, lane)
        self.accumulate(acc, *start, full, empty, sX, sCodes, sScales, scale_bias)
        units = cutlass.const_expr(8 // t.split_k)  # of 8 rows, a CTA owns
        pairs = cutlass.const_expr(units * t.tokens * 4)  # pairs of tokens of one row, a CTA owns
        source = rank * t.k_warps + k_group
        for half in cutlass.range_constexpr(2):
            unit = 2 * row_warp + half
            address = partials + (source * pairs + (unit % units) * (t.tokens * 4) + lane) * 8
            if cutlass.const_expr(t.split_k > 1):
                address = address_in_cluster(address, unit // units)
            for column in cutlass.range_constexpr(t.tokens // 8):
                values = (acc[2 * half, column], acc[2 * half + 1, column])
                store_in_cluster(address + column * 256, values)

    @cute.jit
    def finish_slots(
        self,
        thread: Int32,
        panel: Int32,
        rank: Int32,
        expert: Int32,
        first_slot: Int32,
        slots: Int32,
        storage,
        mRowScale: cute.Tensor,  # f32 w13 [E, 2I], w2 [E, H]
        mPairs: cute.Tensor,  # int32 [M * T]
        mOut: cute.Tensor,  # bf16 w13 [slots, I], w2 [M * T, H]
        limit: Float32,
    ):
        """Add the partial sums of the rows this CTA owns in ascending k order; scale, activate, store."""
        t = self.tile
        halves = cutlass.const_expr(2 if self.activated else 1)  # rows that make one result
        units = cutlass.const_expr(8 // t.split_k)
        column_pairs = cutlass.const_expr(t.tokens * 4)  # of 8 rows
        results = cutlass.const_expr(units // halves * column_pairs)
        threads = cutlass.const_expr(128 * t.k_warps)
        panel_results = cutlass.const_expr(PANEL_ROWS // halves)
        sPartials = storage.partials.get_tensor(
            cute.make_layout((2, column_pairs, halves, units // halves, t.split_k * t.k_warps))
        )
        for i in cutlass.range_constexpr(-(-results // threads)):
            index = thread + i * threads
            if index < results:
                unit = index // column_pairs
                pair = index % column_pairs
                lane = pair % 32
                n = panel * panel_results + (rank * (units // halves) + unit) * 8 + lane // 4
                token = pair // 32 * 8 + (lane % 4) * 2
                if n < mOut.shape[1] and token < slots:
                    sums = [[Float32(0.0), Float32(0.0)] for _ in range(halves)]
                    for h in cutlass.range_constexpr(halves):
                        scale = mRowScale[expert, n + h * mOut.shape[1]] * Float32(EPILOGUE_SCALE)
                        for source in cutlass.range_constexpr(t.split_k * t.k_warps):
                            for v in cutlass.range_constexpr(2):
                                sums[h][v] = sums[h][v] + sPartials[v, pair, h, unit, source]
                        for v in cutlass.range_constexpr(2):
                            sums[h][v] = sums[h][v] * scale
                    for v in cutlass.range_constexpr(2):
                        if token + v < slots:
                            row = first_slot + token + v
                            if cutlass.const_expr(self.activated):
                                value = swiglu(sums[0][v], sums[1][v], limit)
                            else:
                                value = sums[0][v]
                                row = mPairs[row]
                            target = mOut.iterator + (Int64(row) * mOut.shape[1] + n)
                            cute.make_tensor(target, cute.make_layout(1))[0] = value.to(BFloat16)
