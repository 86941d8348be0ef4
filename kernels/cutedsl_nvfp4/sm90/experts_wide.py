"""NVFP4 W4A16 expert products for many tokens an expert on Hopper: linear_wide.py, with tokens gathered by slot.

Equations, operands and the order of waits are experts_narrow.py's.

Roles per CTA (`panels` x 64 weight rows by `tokens` slots, persistent over the table's tiles)
    warpgroup p          rows of panel p, or of two panels, as in linear_wide.py; swiglu where the sums are
    producer warpgroup   its first warp keeps `stages` TMA loads of weights in flight; all four gather
                         tokens with cp.async
Pipelines
    full[stage]     1 arrival + weight bytes, 128 arrivals after copies  ->  every consumer warp
    empty[stage]    every consumer warp  ->  producers
Tiles
    A tile with fewer slots than tokens is multiplied as the next of `widths`.
    The row tile is the fast index: CTAs that run together share an expert's tokens, and its next token tile
    finds the weights in L2.
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint32
from cutlass.cute.nvgpu import cpasync, warpgroup

from ..device.activation import swiglu
from ..device.ptx import load_coherent, load_words, pack_bf16, settle, smem_address
from ..device.ring import advance
from ..device.views import partition_loads
from .decode import EPILOGUE_SCALE
from .layout import CODE_WORDS, SCALE_WORDS
from .linear_narrow import TOKEN_ROW_BYTES
from .linear_wide import STEPS, WideLinearKernel, panels_by_tokens
from .ptx import arrive_after_copies, copy_async, store_matrices_transposed, weight_registers
from .tiles import (
    BLOCK_CODE_BYTES,
    BLOCK_K,
    BLOCK_SCALE_BYTES,
    PANEL_ROWS,
    WideTile,
    check_for_experts,
    expert_widths,
)
from .views import SWIZZLE_ATOM, expert_view

CHUNK = 32  # slots staged through shared memory at a time
# (producer's, consumers') by CTAs an SM, where two warpgroups consume: within 3 x 168, within 3 x 80.
REGISTERS = {1: (40, 232), 2: (48, 96)}


class WideExpertsKernel(WideLinearKernel):
    """One compiled kernel: a tile configuration, for w13 (`activated`) or w2."""

    def __init__(self, tile: WideTile, activated: bool):
        check_for_experts(tile)
        self.tile = tile
        self.activated = activated
        self.panel_columns = PANEL_ROWS // 2 if activated else PANEL_ROWS  # results of a panel and slot
        self.warpgroups = min(tile.panels, 2)
        self.group_panels = tile.panels // self.warpgroups
        self.threads = 128 * (self.warpgroups + 1)
        self.widths = expert_widths(tile)

    @property
    def part(self) -> int:
        """k16 steps that a warpgroup decodes while those before them are multiplied: as many as registers hold.

        With more than two in tiles of 128 tokens by four panels ptxas serializes the wgmmas.
        """
        steps = self.group_panels * self.tile.blocks * STEPS
        crowded = self.group_panels > 1 and self.tile.tokens > 96
        return min(steps // 2, 2 if crowded else 4)

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
        tokens, stages, stage_k = t.tokens, t.stages, t.blocks * BLOCK_K
        atom = warpgroup.make_smem_layout_atom(SWIZZLE_ATOM, BFloat16)
        x_layout = cute.tile_to_shape(atom, (tokens, stage_k, stages), order=(0, 1, 2))
        code_layout = cute.make_layout((CODE_WORDS, t.blocks, t.panels, stages))
        scale_layout = cute.make_layout((SCALE_WORDS, t.blocks, t.panels, stages))
        load = cpasync.CopyBulkTensorTileG2SOp()
        code_atom, tCodes = cpasync.make_tiled_tma_atom(
            load,
            expert_view(mCodes, CODE_WORDS),
            cute.slice_(code_layout, (None, None, None, 0)),
            (CODE_WORDS, t.blocks, t.panels),
        )
        scale_atom, tScales = cpasync.make_tiled_tma_atom(
            load,
            expert_view(mScales, SCALE_WORDS),
            cute.slice_(scale_layout, (None, None, None, 0)),
            (SCALE_WORDS, t.blocks, t.panels),
        )
        # Two buffers a warpgroup; 16 bytes between rows avoid bank conflicts.
        output_bytes = 2 * self.warpgroups * CHUNK * (self.panel_columns * 2 + 16)

        @cute.struct
        class Shared:
            full: cute.struct.MemRange[Int64, stages]
            empty: cute.struct.MemRange[Int64, stages]
            x: cute.struct.Align[cute.struct.MemRange[BFloat16, cute.cosize(x_layout)], 1024]
            codes: cute.struct.Align[cute.struct.MemRange[Int64, cute.cosize(code_layout)], 128]
            scales: cute.struct.Align[cute.struct.MemRange[Int32, cute.cosize(scale_layout)], 128]
            output: cute.struct.Align[cute.struct.MemRange[Float32, output_bytes // 4], 128]
            rows: cute.struct.MemRange[Int32, t.tokens * self.warpgroups]  # of `out`, by slot

        self.shared = Shared
        row_tiles = cute.ceil_div(mCodes.shape[1], t.panels)
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
            row_tiles,
            x_layout,
            code_layout,
            scale_layout,
        ).launch(
            grid=(cutlass.min((mTable.shape[0] - 1) * row_tiles, max_ctas), 1, 1),
            block=(self.threads, 1, 1),
            preferred_smem_carveout=100,
            min_blocks_per_mp=t.ctas_per_sm,
            stream=stream,
            use_pdl=True,
        )

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
        row_tiles: Int32,
        x_layout: cute.ComposedLayout,  # (tokens, stage's k, stages)
        code_layout: cute.Layout,  # (256, blocks, panels, stages)
        scale_layout: cute.Layout,  # (64, blocks, panels, stages)
    ):
        t = self.tile
        stages = t.stages
        consumer_warps = 4 * self.warpgroups
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        thread, _, _ = cute.arch.thread_idx()
        bid, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()

        storage = cutlass.memory.SmemAllocator().allocate(self.shared)
        full, empty = storage.full.data_ptr(), storage.empty.data_ptr()
        sX = storage.x.get_tensor(x_layout.outer, swizzle=x_layout.inner)
        sCodes = storage.codes.get_tensor(code_layout)
        sScales = storage.scales.get_tensor(scale_layout)

        # Initialize the barriers
        if warp == consumer_warps:
            for atom in (code_atom, scale_atom):
                cpasync.prefetch_descriptor(atom)
            with cute.arch.elect_one():
                for stage in cutlass.range_constexpr(stages):
                    # Arrivals: one with the weights' bytes, 128 threads' copies
                    cute.arch.mbarrier_init(full + stage, 1 + 128)
                    cute.arch.mbarrier_init(empty + stage, consumer_warps)
            cute.arch.mbarrier_init_fence()
        # Wait for the routing before w2 may start: w2 reads the table and has no wait of its own for the routing.
        if cutlass.const_expr(self.activated):
            cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.sync_threads()  # nobody waits on a barrier that has no value yet

        # Share the row tiles of all token tiles among the CTAs

        table = mTable.iterator.toint()
        tiles, _, _, _ = load_coherent(table)
        tiles = tiles * row_tiles
        count = cute.ceil_div(tCodes.shape[1], t.blocks)

        if warp >= consumer_warps:
            if cutlass.const_expr(t.panels > 1):  # one consumer warpgroup has enough registers
                cute.arch.setmaxregister_decrease(REGISTERS[t.ctas_per_sm][0])
            gCodes = cute.local_tile(tCodes, (CODE_WORDS, t.blocks, t.panels), (0, None, None, None))
            gScales = cute.local_tile(tScales, (SCALE_WORDS, t.blocks, t.panels), (0, None, None, None))
            tCs, tCg = partition_loads(code_atom, sCodes, gCodes, 3)
            tSs, tSg = partition_loads(scale_atom, sScales, gScales, 3)
            weights = (code_atom, tCg, tCs, scale_atom, tSg, tSs)
            # Fetch w2's first weights while w13 runs, which does not write them, then wait for w13
            early = Int32(0)  # stages whose weights do not wait for the previous kernel
            if cutlass.const_expr(not self.activated):
                if bid < tiles:
                    early = cutlass.min(count, stages)
                    if warp == consumer_warps:
                        expert, _, _, _ = load_coherent(table + Int64(bid // row_tiles + 1) * 16)
                        for stage in cutlass.range(early, unroll=1):
                            self.load_weights(weights, stage, bid % row_tiles, expert, full + stage, stage)
                cute.arch.griddepcontrol_wait()
            self.produce(
                thread - 128 * self.warpgroups,
                warp == consumer_warps,
                bid,
                ctas,
                tiles,
                row_tiles,
                count,
                early,
                mX,
                mPairs,
                table,
                topk,
                full,
                empty,
                smem_address(sX.iterator),
                weights,
            )
        else:
            if cutlass.const_expr(t.panels > 1):
                cute.arch.setmaxregister_increase(REGISTERS[t.ctas_per_sm][1])
            # Every consumer waits, too: for `mPairs`, and because a kernel must not end before its predecessors
            if cutlass.const_expr(not self.activated):
                cute.arch.griddepcontrol_wait()
            group = thread // 128
            stage = Int32(0)
            phase = Int32(0)
            sRows = storage.rows.get_tensor(cute.make_layout((t.tokens, self.warpgroups)))
            expert, first_slot, slots, _ = load_coherent(table + Int64(bid // row_tiles + 1) * 16)
            for tile in cutlass.range(bid, tiles, ctas, unroll=1):
                # Read the next tile's entry of the table now: this tile's time hides the latency
                following = cutlass.min(tile + ctas, tiles - 1)
                next_entry = load_coherent(table + Int64(following // row_tiles + 1) * 16)
                first_panel = tile % row_tiles * t.panels + group * self.group_panels
                stage, phase = self.compute_tile(
                    0,
                    thread,
                    first_panel,
                    expert,
                    first_slot,
                    slots,
                    count,
                    stage,
                    phase,
                    full,
                    empty,
                    sX,
                    sCodes,
                    sScales,
                    scale_bias,
                    smem_address(storage.output.data_ptr()),
                    sRows,
                    mRowScale,
                    mPairs,
                    mOut,
                    limit,
                )
                expert, first_slot, slots, _ = next_entry

    @cute.jit
    def compute_tile(
        self,
        width: cutlass.Constexpr[int],
        thread: Int32,
        first_panel: Int32,
        expert: Int32,
        first_slot: Int32,
        slots: Int32,
        count: Int32,
        stage: Int32,
        phase: Int32,
        full: cute.Pointer,
        empty: cute.Pointer,
        sX: cute.Tensor,  # bf16 (tokens, stage's k, stages), 128B-swizzled
        sCodes: cute.Tensor,  # int64 (256, blocks, panels, stages)
        sScales: cute.Tensor,  # int32 (64, blocks, panels, stages)
        bias: Uint32,
        shared: Int32,
        sRows: cute.Tensor,  # int32 (tokens, warpgroups)
        mRowScale: cute.Tensor,  # f32 w13 [E, 2I], w2 [E, H]
        mPairs: cute.Tensor,  # int32 [M * T]
        mOut: cute.Tensor,  # bf16 w13 [slots, I], w2 [M * T, H]
        limit: Float32,
    ):
        """One tile with the least of `widths` from number `width` on that holds it -> (next stage, its phase)."""
        last = cutlass.const_expr(width + 1 == len(self.widths))
        pipeline = (count, stage, phase, full, empty, sX, sCodes, sScales, bias)
        place = (first_panel, expert, first_slot, slots, mRowScale, mPairs, mOut.shape[1])
        target = (thread, first_panel, first_slot, slots, shared, sRows, mOut, limit)
        if cutlass.const_expr(last):
            sums, factors, rows, stage, phase = self.multiply(self.widths[width], thread, *pipeline, *place)
            self.store_panels(sums, factors, rows, self.widths[width], *target)
        else:
            if slots <= self.widths[width]:
                sums, factors, rows, stage, phase = self.multiply(
                    self.widths[width], thread, *pipeline, *place
                )
                self.store_panels(sums, factors, rows, self.widths[width], *target)
            else:
                stage, phase = self.compute_tile(
                    width + 1,
                    thread,
                    first_panel,
                    expert,
                    first_slot,
                    slots,
                    count,
                    stage,
                    phase,
                    full,
                    empty,
                    sX,
                    sCodes,
                    sScales,
                    bias,
                    shared,
                    sRows,
                    mRowScale,
                    mPairs,
                    mOut,
                    limit,
                )
        return stage, phase

    @cute.jit
    def store_panels(
        self,
        sums: tuple,
        factors: tuple,
        rows: cute.Tensor,  # int32 (tokens / 128,): rows of out of every 128th slot
        tokens: cutlass.Constexpr[int],
        thread: Int32,
        first_panel: Int32,
        first_slot: Int32,
        slots: Int32,
        shared: Int32,
        sRows: cute.Tensor,  # int32 (tokens, warpgroups)
        mOut: cute.Tensor,  # bf16 w13 [slots, I], w2 [M * T, H]
        limit: Float32,
    ):
        """Store this warpgroup's panels, one after the other, through the same two buffers."""
        for q in cutlass.range_constexpr(self.group_panels):
            self.meet(thread // 128)  # what was staged before has been read
            # Share the rows of `out` in the warpgroup; the barrier in `store_slots` comes before they are read
            if cutlass.const_expr(q == 0 and not self.activated):
                for i in cutlass.range_constexpr(cute.size(rows)):
                    line = thread % 128 + 128 * i
                    if line < tokens:
                        sRows[line, thread // 128] = rows[i]
            column = (first_panel + q) * self.panel_columns
            self.store_slots(
                sums[q], factors[q], tokens, thread, column, first_slot, slots, shared, sRows, mOut, limit
            )

    @cute.jit
    def multiply(
        self,
        tokens: cutlass.Constexpr[int],
        thread: Int32,
        count: Int32,
        stage: Int32,
        phase: Int32,
        full: cute.Pointer,
        empty: cute.Pointer,
        sX: cute.Tensor,  # bf16 (tokens, stage's k, stages), 128B-swizzled
        sCodes: cute.Tensor,  # int64 (256, blocks, panels, stages)
        sScales: cute.Tensor,  # int32 (64, blocks, panels, stages)
        bias: Uint32,
        panel: Int32,
        expert: Int32,
        first_slot: Int32,
        slots: Int32,
        mRowScale: cute.Tensor,  # f32 w13 [E, 2I], w2 [E, H]
        mPairs: cute.Tensor,  # int32 [M * T]
        columns: Int32,
    ):
        """WideLinear.accumulate for the first `tokens` slots -> (sums of each panel, scales of a thread's weight
        rows in each panel, rows of `out` of every 128th slot, next stage, its phase).

        A warpgroup decodes `part` steps while the wgmmas of those before run. What the epilogue reads from memory
        is fetched while the last ones run.
        """
        t = self.tile
        panels = cutlass.const_expr(self.group_panels)
        lane = thread % 32
        row_warp = (thread % 128) // 32
        rows = PANEL_ROWS * self.warpgroups
        stage_k = t.blocks * BLOCK_K
        tiled_mma = panels_by_tokens(self.warpgroups, tokens)
        thr_mma = tiled_mma.get_slice(thread)
        sFirst = cute.local_tile(sX, (tokens, stage_k, t.stages), (0, 0, 0))
        tCrX = tiled_mma.make_fragment_B(thr_mma.partition_B(sFirst))
        part = cutlass.const_expr(self.part)
        weights = cute.make_rmem_tensor(thr_mma.partition_shape_A((rows, 2 * part * 16)), BFloat16)
        weight_words = cute.recast_tensor(weights, Uint32)
        sums_shape = thr_mma.partition_shape_C((rows, tokens))
        sums = tuple(cute.make_rmem_tensor(sums_shape, Float32) for _ in range(panels))
        for q in cutlass.range_constexpr(panels):
            sums[q].fill(0.0)
        tiled_mma.set(warpgroup.Field.ACCUMULATE, True)
        panel_codes = t.blocks * BLOCK_CODE_BYTES
        panel_scales = t.blocks * BLOCK_SCALE_BYTES
        first_panel = thread // 128 * panels
        codes = smem_address(sCodes.iterator) + (first_panel * panel_codes + row_warp * 512 + lane * 16)
        scales = smem_address(sScales.iterator) + (
            first_panel * panel_scales + row_warp * 64 + (lane // 4) * 8
        )
        steps = cutlass.const_expr(t.blocks * STEPS)
        previous = stage
        # No branch may stand between a wait_group and the wgmmas after it, and no decode may sink between
        # wgmmas: either makes ptxas serialize them (C7513).
        for i in cutlass.range(count, unroll=1):
            # Wait for a full stage and read its weights
            cute.arch.mbarrier_wait(full + stage, phase)
            words, scale_words = [], []
            for q in cutlass.range_constexpr(panels):
                for b in cutlass.range_constexpr(t.blocks):
                    at = stage * t.panels + q
                    words.append(load_words(codes + at * panel_codes + b * BLOCK_CODE_BYTES, 4))
                    scale_words.append(load_words(scales + at * panel_scales + b * BLOCK_SCALE_BYTES, 2))
            # cp.async wrote the tokens through the generic proxy, wgmma reads them through the async one.
            cute.arch.fence_view_async_shared()
            for turn in cutlass.range_constexpr(panels * steps // part):
                warpgroup.wait_group(part)  # the wgmmas that read this part of `weights` are done
                for step in cutlass.range_constexpr(turn * part, (turn + 1) * part):
                    word = words[step // STEPS][step % STEPS]
                    scale_word = scale_words[step // STEPS][step % STEPS // 2]
                    decoded = weight_registers(word, scale_word, step % 2, bias)
                    for r in cutlass.range_constexpr(4):
                        weight_words[step % (2 * part) * 4 + r] = settle(decoded[r])
                # Issue the wgmmas; the fence orders the registers just written before they read them
                warpgroup.fence()
                for step in cutlass.range_constexpr(turn * part, (turn + 1) * part):
                    x = tCrX[None, None, step % steps, stage]
                    q = cutlass.const_expr(step // steps)
                    cute.gemm(tiled_mma, sums[q], weights[None, None, step % (2 * part)], x, sums[q])
                    warpgroup.commit_group()
            # Give the previous stage back: the waits above have seen its last wgmmas end
            if i > 0:
                self.release(empty, previous, lane)
            previous = stage
            stage, phase = advance(stage, phase, t.stages)
        # Read what the epilogue needs while the last wgmmas run
        factors = tuple(cute.make_rmem_tensor(2, Float32) for _ in range(panels))
        for q in cutlass.range_constexpr(panels):
            column = (panel + q) * self.panel_columns
            for h in cutlass.range_constexpr(2):
                if cutlass.const_expr(self.activated):
                    n = cutlass.min(column + row_warp * 8 + lane // 4, columns - 1) + h * columns
                else:
                    n = cutlass.min(column + row_warp * 16 + lane // 4 + 8 * h, columns - 1)
                factors[q][h] = mRowScale[expert, n] * Float32(EPILOGUE_SCALE)
        out_rows = cute.make_rmem_tensor(-(-tokens // 128), Int32)
        if cutlass.const_expr(not self.activated):
            for i in cutlass.range_constexpr(-(-tokens // 128)):
                slot = cutlass.min(thread % 128 + 128 * i, slots - 1)
                out_rows[i] = mPairs[first_slot + slot]
        # Wait for the sums and give the last stage back
        warpgroup.wait_group(0)
        if count > 0:
            self.release(empty, previous, lane)
        return sums, factors, out_rows, stage, phase

    @cute.jit
    def load_weights(
        self, weights: tuple, at: Int32, row_tile: Int32, expert: Int32, barrier: cute.Pointer, stage: Int32
    ):
        """TMA of one stage's weights, which `barrier` is told to expect."""
        code_atom, tCg, tCs, scale_atom, tSg, tSs = weights
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, self.tile.stage_weight_bytes)
        cute.copy(code_atom, tCg[None, at, row_tile, expert], tCs[None, stage], tma_bar_ptr=barrier)
        cute.copy(scale_atom, tSg[None, at, row_tile, expert], tSs[None, stage], tma_bar_ptr=barrier)

    @cute.jit
    def produce(
        self,
        thread: Int32,
        fetches_weights: cutlass.Boolean,
        bid: Int32,
        ctas: Int32,
        tiles: Int32,
        row_tiles: Int32,
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
        """Fill stages for every tile of this CTA; `early` of the first tile's already have their weights.

        A thread copies 16-byte chunk thread % 8 of rows thread // 8 + 16 i. Rows beyond the tile's are not
        written: what they hold stays in their own column.
        """
        t = self.tile
        rows = cutlass.const_expr(t.tokens // 16)
        row = thread // 8
        chunk = thread % 8
        inside = row * TOKEN_ROW_BYTES + (chunk ^ (row % 8)) * 16
        pitch = mX.stride[0] // 8  # of rows, in units of 16 bytes: offsets fit 32 bits
        sources = cute.make_rmem_tensor(rows if self.activated else 1, Int32)
        stage = Int32(0)
        phase = Int32(1)  # a fresh barrier counts as released
        expert, first_slot, slots, _ = load_coherent(table + Int64(bid // row_tiles + 1) * 16)
        for tile in cutlass.range(bid, tiles, ctas, unroll=1):
            following = cutlass.min(tile + ctas, tiles - 1)
            next_entry = load_coherent(table + Int64(following // row_tiles + 1) * 16)
            row_tile = tile % row_tiles
            # Find the rows of this tile's tokens; w2's are consecutive
            if cutlass.const_expr(self.activated):
                for i in cutlass.range_constexpr(rows):
                    slot = first_slot + cutlass.min(row + 16 * i, slots - 1)
                    sources[i] = Int32(mPairs[slot] // topk * pitch + chunk)
            else:
                sources[0] = Int32((first_slot + row) * pitch + chunk)
            for at in cutlass.range(count, unroll=1):
                # Wait for a free stage: every thread that writes it waits
                cute.arch.mbarrier_wait(empty + stage, phase)
                # Issue the TMA loads of its weights
                if fetches_weights and early <= 0:
                    self.load_weights(weights, at, row_tile, expert, full + stage, stage)
                early -= 1
                # Copy its tokens; beyond K there are zeros
                for b in cutlass.range_constexpr(t.blocks):
                    block = at * t.blocks + b
                    size = Int32(0)
                    if block * BLOCK_K + chunk * 8 < mX.shape[1]:
                        size = Int32(16)
                    column = mX.iterator.toint() + Int64(block) * TOKEN_ROW_BYTES
                    target = shared + (stage * t.blocks + b) * (t.tokens * TOKEN_ROW_BYTES) + inside
                    for i in cutlass.range_constexpr(rows):
                        source = sources[i] if self.activated else sources[0] + Int32(i * 16 * pitch)
                        copy_async(
                            target + i * (16 * TOKEN_ROW_BYTES),
                            column + Int64(source) * 16,
                            size,
                            row + 16 * i < slots,
                        )
                # Arrive when the copies have landed, which nobody waits for here
                arrive_after_copies(smem_address(full + stage))
                stage, phase = advance(stage, phase, t.stages)
            expert, first_slot, slots, _ = next_entry

    @cute.jit
    def store_slots(
        self,
        acc: cute.Tensor,  # f32 wgmma accumulator of 64 rows x tokens
        factor: cute.Tensor,  # f32 (2,), of rows r and r + 8
        tokens: cutlass.Constexpr[int],
        thread: Int32,
        column: Int32,
        first_slot: Int32,
        slots: Int32,
        shared: Int32,
        sRows: cute.Tensor,  # int32 (tokens, warpgroups)
        mOut: cute.Tensor,  # bf16 w13 [slots, I], w2 [M * T, H]
        limit: Float32,
    ):
        """Scale, activate, transpose through shared memory `CHUNK` slots at a time, store rows of `out`.

        A thread's accumulators of rows r and r + 8 are one column's gate and up (w13), or two columns (w2).
        """
        columns = mOut.shape[1]
        thread = Int32(settle(Uint32(thread)))  # addresses below take no registers in the main loop
        group = thread // 128
        inside = thread % 128
        lane = thread % 32
        row_warp = inside // 32
        row_bytes = cutlass.const_expr(self.panel_columns * 2)
        pitch = cutlass.const_expr(row_bytes + 16)  # no bank conflicts
        half_bytes = cutlass.const_expr(CHUNK * pitch)
        buffer = shared + group * (2 * half_bytes)
        matrix = lane // 8
        if cutlass.const_expr(self.activated):  # matrices of 8 slots each
            address = (lane % 8 + matrix * 8) * pitch + row_warp * 16
        else:  # matrices of rows r and r + 8 of 8 slots, of the next 8
            address = (lane % 8 + matrix // 2 * 8) * pitch + row_warp * 32 + matrix % 2 * 16
        pieces = cutlass.const_expr(row_bytes // 16)
        slots_per_pass = cutlass.const_expr(128 // pieces)
        for e in cutlass.range_constexpr(tokens // CHUNK):
            if e * CHUNK < slots:
                half = buffer + (e % 2) * half_bytes
                packed = []
                for octet in cutlass.range_constexpr(CHUNK // 8):
                    first = (e * (CHUNK // 8) + octet) * 4
                    v = [acc[first + i] * factor[i // 2] for i in range(4)]
                    if cutlass.const_expr(self.activated):
                        packed.append(pack_bf16(swiglu(v[0], v[2], limit), swiglu(v[1], v[3], limit)))
                    else:
                        packed += [pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3])]
                for i in cutlass.range_constexpr(len(packed) // 4):
                    store_matrices_transposed(half + address + i * 16 * pitch, *packed[4 * i : 4 * i + 4])
                # Wait for the whole chunk. One barrier a chunk is enough: the other buffer is written next, and
                # whoever writes this one again has met everybody after their reads.
                self.meet(group)
                for j in cutlass.range_constexpr(CHUNK // slots_per_pass):
                    line = inside // pieces + j * slots_per_pass
                    slot = e * CHUNK + line
                    n = column + inside % pieces * 8
                    if slot < slots and n < columns:
                        words = load_words(half + line * pitch + inside % pieces * 16, 4)
                        piece = cute.make_rmem_tensor(4, Uint32)
                        for i in cutlass.range_constexpr(4):
                            piece[i] = words[i]
                        row = first_slot + slot
                        if cutlass.const_expr(not self.activated):
                            row = sRows[slot, group]
                        target = mOut.iterator + (Int64(row) * columns + n)
                        target = cute.recast_ptr(target.align(16), dtype=Uint32)
                        cute.autovec_copy(piece, cute.make_tensor(target, cute.make_layout(4)))
