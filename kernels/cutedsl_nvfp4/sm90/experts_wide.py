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

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint32
from cutlass.cute.nvgpu import cpasync, warpgroup

from ..device.activation import swiglu
from ..device.launch import launch
from ..device.ptx import load_words, pack_bf16, settle, smem_address
from ..device.ring import advance, init_ring
from ..device.routing import Entry, table_counts, table_entry
from ..device.store import store_words
from .decode import EPILOGUE_SCALE
from .experts_narrow import Results
from .layout import CODE_WORDS, SCALE_WORDS
from .linear_narrow import TOKEN_ROW_BYTES
from .linear_wide import STEPS, WideLinearKernel, decode, panels_by_tokens
from .ptx import arrive_after_copies, copy_async, store_matrices_transposed
from .tiles import (
    BLOCK_CODE_BYTES,
    BLOCK_K,
    BLOCK_SCALE_BYTES,
    PANEL_ROWS,
    WideTile,
    check_for_experts,
    expert_widths,
)
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

CHUNK = 32  # slots staged through shared memory at a time
# (producer's, consumers') by CTAs an SM, where two warpgroups consume: within 3 x 168, within 3 x 80.
REGISTERS = {1: (40, 232), 2: (48, 96)}


class Staging(NamedTuple):
    """Shared memory of the epilogue."""

    address: Int32  # two buffers a warpgroup
    rows: cute.Tensor  # int32 (tokens, warpgroups): rows of out, for w2


class WideExpertsKernel(WideLinearKernel):
    """One compiled kernel: a tile, for w13 (`activated`) or w2."""

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
        stages, box = t.stages, (t.blocks, t.panels)
        layouts = stage_layouts(t.tokens, box, stages)
        weights = weights_by_tma(
            expert_view(mCodes, CODE_WORDS), expert_view(mScales, SCALE_WORDS), layouts, box
        )
        # Two buffers a warpgroup; 16 bytes between rows avoid bank conflicts.
        output_bytes = 2 * self.warpgroups * CHUNK * (self.panel_columns * 2 + 16)

        @cute.struct
        class Shared:
            full: cute.struct.MemRange[Int64, stages]
            empty: cute.struct.MemRange[Int64, stages]
            x: cute.struct.Align[cute.struct.MemRange[BFloat16, cute.cosize(layouts.x)], 1024]
            codes: cute.struct.Align[cute.struct.MemRange[Int64, cute.cosize(layouts.codes)], 128]
            scales: cute.struct.Align[cute.struct.MemRange[Int32, cute.cosize(layouts.scales)], 128]
            output: cute.struct.Align[cute.struct.MemRange[Float32, output_bytes // 4], 128]
            rows: cute.struct.MemRange[Int32, t.tokens * self.warpgroups]  # of `out`, by slot

        self.shared = Shared
        row_tiles = cute.ceil_div(mCodes.shape[1], t.panels)
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
                row_tiles,
                layouts,
            ),
            grid=(cutlass.min((mTable.shape[0] - 1) * row_tiles, max_ctas), 1, 1),
            block=(self.threads, 1, 1),
            preferred_smem_carveout=100,  # per cent: ctas_per_sm counts on all of it
            min_blocks_per_mp=t.ctas_per_sm,
            stream=stream,
        )

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
        row_tiles: Int32,
        layouts: StageLayouts,
    ):
        t = self.tile
        consumer_warps = 4 * self.warpgroups
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        thread, _, _ = cute.arch.thread_idx()
        bid, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()

        storage = cutlass.memory.SmemAllocator().allocate(self.shared)
        pipeline = pipeline_in(storage, layouts)
        self.start(warp, weights, pipeline)

        # Share the row tiles of all token tiles among the CTAs
        table = mTable.iterator.toint()
        tiles, _ = table_counts(table)
        items = tiles * row_tiles
        count = cute.ceil_div(weights.codes.shape[1], t.blocks)

        if warp >= consumer_warps:
            if cutlass.const_expr(t.panels > 1):  # one consumer warpgroup has enough registers
                cute.arch.setmaxregister_decrease(REGISTERS[t.ctas_per_sm][0])
            loads = partition_weights(weights, pipeline, (t.blocks, t.panels), (None, None, None))
            early = self.fetch_early(
                warp == consumer_warps, bid, items, row_tiles, count, table, pipeline, loads
            )
            producer = (thread - 128 * self.warpgroups, warp == consumer_warps)
            share = (bid, ctas, items, row_tiles, count, early)
            self.produce(*producer, *share, mX, mPairs, table, topk, pipeline, loads)
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
            results = Results(mRowScale, mPairs, mOut, limit)
            entry = table_entry(table, bid // row_tiles)
            for item in cutlass.range(bid, items, ctas, unroll=1):
                # Read the next tile's entry of the table now: this tile's time hides the latency
                next_entry = table_entry(table, cutlass.min(item + ctas, items - 1) // row_tiles)
                first_panel = item % row_tiles * t.panels + group * self.group_panels
                staging = Staging(smem_address(storage.output.data_ptr()), sRows)
                at = (thread, first_panel, count, stage, phase)
                stage, phase = self.compute_tile(0, *at, entry, pipeline, scale_bias, staging, results)
                entry = next_entry

    @cute.jit
    def start(self, warp: Int32, weights: Weights, pipeline: Pipeline):
        """Initialize the barriers and let the next kernel start."""
        consumer_warps = cutlass.const_expr(4 * self.warpgroups)
        if warp == consumer_warps:
            for atom in (weights.code_atom, weights.scale_atom):
                cpasync.prefetch_descriptor(atom)
            with cute.arch.elect_one():
                # Arrivals at `full`: one with the weights' bytes, 128 threads' copies
                init_ring(pipeline.full, pipeline.empty, self.tile.stages, 1 + 128, consumer_warps)
            # Publish the initial values: TMA arrives on these barriers, too.
            cute.arch.mbarrier_init_fence()
        # Wait for the routing before w2 may start: w2 reads the table and has no wait of its own for the routing.
        if cutlass.const_expr(self.activated):
            cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.sync_threads()  # nobody waits on a barrier that has no value yet

    @cute.jit
    def compute_tile(
        self,
        width: cutlass.Constexpr[int],
        thread: Int32,
        first_panel: Int32,
        count: Int32,
        stage: Int32,
        phase: Int32,
        entry: Entry,
        pipeline: Pipeline,
        bias: Uint32,
        staging: Staging,
        results: Results,
    ):
        """One tile with the least of `widths` from number `width` on that holds it -> (next stage, its phase)."""
        last = cutlass.const_expr(width + 1 == len(self.widths))
        at = (thread, first_panel, count, stage, phase)
        operands = (entry, pipeline, bias, staging, results)
        if cutlass.const_expr(last):
            stage, phase = self.compute_width(self.widths[width], *at, *operands)
        else:
            if entry.slots <= self.widths[width]:
                stage, phase = self.compute_width(self.widths[width], *at, *operands)
            else:
                stage, phase = self.compute_tile(width + 1, *at, *operands)
        return stage, phase

    @cute.jit
    def compute_width(
        self,
        tokens: cutlass.Constexpr[int],
        thread: Int32,
        first_panel: Int32,
        count: Int32,
        stage: Int32,
        phase: Int32,
        entry: Entry,
        pipeline: Pipeline,
        bias: Uint32,
        staging: Staging,
        results: Results,
    ):
        """One tile as one of `tokens` slots -> (next stage, its phase)."""
        at = (thread, first_panel, count, stage, phase)
        sums, factors, rows, stage, phase = self.multiply(tokens, *at, entry, pipeline, bias, results)
        # Store this warpgroup's panels, one after the other, through the same two buffers
        for q in cutlass.range_constexpr(self.group_panels):
            self.meet(thread // 128)  # what was staged before has been read
            # Share the rows of `out` in the warpgroup; the barrier in `store_slots` comes before they are read
            if cutlass.const_expr(q == 0 and not self.activated):
                for i in cutlass.range_constexpr(cute.size(rows)):
                    line = thread % 128 + 128 * i
                    if line < tokens:
                        staging.rows[line, thread // 128] = rows[i]
            column = (first_panel + q) * self.panel_columns
            self.store_slots(sums[q], factors[q], tokens, thread, column, entry, staging, results)
        return stage, phase

    @cute.jit
    def multiply(
        self,
        tokens: cutlass.Constexpr[int],
        thread: Int32,
        panel: Int32,
        count: Int32,
        stage: Int32,
        phase: Int32,
        entry: Entry,
        pipeline: Pipeline,
        bias: Uint32,
        results: Results,
    ):
        """WideLinearKernel.accumulate for the first `tokens` slots -> (sums of each panel, scales of a thread's weight
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
        sFirst = cute.local_tile(pipeline.x, (tokens, stage_k, t.stages), (0, 0, 0))
        tCrX = tiled_mma.make_fragment_B(thr_mma.partition_B(sFirst))
        part = cutlass.const_expr(self.part)
        weights = cute.make_rmem_tensor(thr_mma.partition_shape_A((rows, 2 * part * 16)), BFloat16)
        weight_words = cute.recast_tensor(weights, Uint32)
        sums_shape = thr_mma.partition_shape_C((rows, tokens))
        sums = tuple(cute.make_rmem_tensor(sums_shape, Float32) for _ in range(panels))
        for q in cutlass.range_constexpr(panels):
            sums[q].fill(0.0)
        tiled_mma.set(warpgroup.Field.ACCUMULATE, True)
        panel_codes, panel_scales = t.blocks * BLOCK_CODE_BYTES, t.blocks * BLOCK_SCALE_BYTES
        codes, scales = self.weight_addresses(pipeline, thread // 128 * panels, row_warp, lane)
        steps = cutlass.const_expr(t.blocks * STEPS)
        previous = stage
        # No branch may stand between a wait_group and the wgmmas after it, and no decode may sink between
        # wgmmas: either makes ptxas serialize them (C7513).
        for i in cutlass.range(count, unroll=1):
            # Wait for a full stage and read its weights
            cute.arch.mbarrier_wait(pipeline.full + stage, phase)
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
                decode(weight_words, words, scale_words, range(turn * part, (turn + 1) * part), bias)
                # Issue the wgmmas; the fence orders the registers just written before they read them
                warpgroup.fence()
                for step in cutlass.range_constexpr(turn * part, (turn + 1) * part):
                    x = tCrX[None, None, step % steps, stage]
                    q = cutlass.const_expr(step // steps)
                    cute.gemm(tiled_mma, sums[q], weights[None, None, step % (2 * part)], x, sums[q])
                    warpgroup.commit_group()
            # Give the previous stage back: the waits above have seen its last wgmmas end
            if i > 0:
                self.release(pipeline.empty, previous, lane)
            previous = stage
            stage, phase = advance(stage, phase, t.stages)
        # Read what the epilogue needs while the last wgmmas run
        factors = tuple(
            self.row_factors(panel + q, row_warp, lane, entry.expert, results) for q in range(panels)
        )
        out_rows = cute.make_rmem_tensor(-(-tokens // 128), Int32)
        if cutlass.const_expr(not self.activated):
            for i in cutlass.range_constexpr(-(-tokens // 128)):
                slot = cutlass.min(thread % 128 + 128 * i, entry.slots - 1)
                out_rows[i] = results.pairs[entry.first_slot + slot]
        # Wait for the sums and give the last stage back
        warpgroup.wait_group(0)
        if count > 0:
            self.release(pipeline.empty, previous, lane)
        return sums, factors, out_rows, stage, phase

    @cute.jit
    def row_factors(self, panel: Int32, row_warp: Int32, lane: Int32, expert: Int32, results: Results):
        """What a thread multiplies its rows r and r + 8 of a panel by."""
        columns = results.out.shape[1]
        column = panel * self.panel_columns
        factor = cute.make_rmem_tensor(2, Float32)
        for h in cutlass.range_constexpr(2):
            if cutlass.const_expr(self.activated):
                n = cutlass.min(column + row_warp * 8 + lane // 4, columns - 1) + h * columns
            else:
                n = cutlass.min(column + row_warp * 16 + lane // 4 + 8 * h, columns - 1)
            factor[h] = results.row_scale[expert, n] * Float32(EPILOGUE_SCALE)
        return factor

    @cute.jit
    def fetch_early(
        self,
        fetches_weights: cutlass.Boolean,
        bid: Int32,
        items: Int32,
        row_tiles: Int32,
        count: Int32,
        table: Int64,
        pipeline: Pipeline,
        loads: WeightLoads,
    ):
        """Fetch w2's first weights while w13 runs, which does not write them, and wait for w13 -> stages fetched."""
        early = Int32(0)
        if cutlass.const_expr(not self.activated):
            if bid < items:
                early = cutlass.min(count, self.tile.stages)
                if fetches_weights:
                    expert = table_entry(table, bid // row_tiles).expert
                    for stage in cutlass.range(early, unroll=1):
                        box = (stage, bid % row_tiles, expert)
                        load_weights(loads, box, stage, pipeline.full, self.tile.stage_weight_bytes)
            cute.arch.griddepcontrol_wait()
        return early

    @cute.jit
    def produce(
        self,
        thread: Int32,
        fetches_weights: cutlass.Boolean,
        bid: Int32,
        ctas: Int32,
        items: Int32,
        row_tiles: Int32,
        count: Int32,
        early: Int32,
        mX: cute.Tensor,  # bf16 w13 [M, H], w2 [slots, I]
        mPairs: cute.Tensor,  # int32 [M * T]
        table: Int64,
        topk: Int32,
        pipeline: Pipeline,
        loads: WeightLoads,
    ):
        """Fill stages for every tile of this CTA; `early` of the first tile's already have their weights.

        A thread copies 16-byte chunk thread % 8 of rows thread // 8 + 16 i. Rows beyond the tile's are not
        written: what they hold stays in their own column.
        """
        t = self.tile
        rows = cutlass.const_expr(t.tokens // 16)
        row = thread // 8
        chunk = thread % 8
        inside = (
            row * TOKEN_ROW_BYTES + (chunk ^ (row % 8)) * 16
        )  # of a block in shared memory, 128B-swizzled
        pitch = mX.stride[0] // 8  # of rows, in units of 16 bytes: offsets fit 32 bits
        sources = cute.make_rmem_tensor(rows if self.activated else 1, Int32)
        stage = Int32(0)
        phase = Int32(1)  # a fresh barrier counts as released
        entry = table_entry(table, bid // row_tiles)
        for item in cutlass.range(bid, items, ctas, unroll=1):
            # Read the next tile's entry of the table now: this tile's time hides the latency
            next_entry = table_entry(table, cutlass.min(item + ctas, items - 1) // row_tiles)
            row_tile = item % row_tiles
            # Find the rows of this tile's tokens; w2's are consecutive
            if cutlass.const_expr(self.activated):
                for i in cutlass.range_constexpr(rows):
                    slot = entry.first_slot + cutlass.min(row + 16 * i, entry.slots - 1)
                    sources[i] = Int32(mPairs[slot] // topk * pitch + chunk)
            else:
                sources[0] = Int32((entry.first_slot + row) * pitch + chunk)
            for at in cutlass.range(count, unroll=1):
                # Wait for a free stage: every thread that writes it waits
                cute.arch.mbarrier_wait(pipeline.empty + stage, phase)
                # Issue the TMA loads of its weights
                if fetches_weights and early <= 0:
                    box = (at, row_tile, entry.expert)
                    load_weights(loads, box, stage, pipeline.full, t.stage_weight_bytes)
                early -= 1
                # Copy its tokens
                self.gather(row, chunk, inside, pitch, mX, sources, entry, at, stage, pipeline)
                stage, phase = advance(stage, phase, t.stages)
            entry = next_entry

    @cute.jit
    def gather(
        self,
        row: Int32,
        chunk: Int32,
        inside: Int32,
        pitch: Int32,
        mX: cute.Tensor,  # bf16 w13 [M, H], w2 [slots, I]
        sources: cute.Tensor,  # int32 (tokens / 16,), or the first alone
        entry: Entry,
        step: Int32,
        stage: Int32,
        pipeline: Pipeline,
    ):
        """Copy k step `step` of the tile's rows into a stage; beyond K there are zeros."""
        t = self.tile
        rows = cutlass.const_expr(t.tokens // 16)
        for b in cutlass.range_constexpr(t.blocks):
            block = step * t.blocks + b
            size = Int32(0)
            if block * BLOCK_K + chunk * 8 < mX.shape[1]:
                size = Int32(16)
            column = mX.iterator.toint() + Int64(block) * TOKEN_ROW_BYTES
            target = smem_address(pipeline.x.iterator)
            target = target + (stage * t.blocks + b) * (t.tokens * TOKEN_ROW_BYTES) + inside
            for i in cutlass.range_constexpr(rows):
                source = sources[i] if self.activated else sources[0] + Int32(i * 16 * pitch)
                copy_async(
                    target + i * (16 * TOKEN_ROW_BYTES),
                    column + Int64(source) * 16,
                    size,
                    row + 16 * i < entry.slots,
                )
        # Arrive when the copies have landed, which nobody waits for here
        arrive_after_copies(smem_address(pipeline.full + stage))

    @cute.jit
    def store_slots(
        self,
        acc: cute.Tensor,  # f32 wgmma accumulator of 64 rows x tokens
        factor: cute.Tensor,  # f32 (2,), of rows r and r + 8
        tokens: cutlass.Constexpr[int],
        thread: Int32,
        column: Int32,
        entry: Entry,
        staging: Staging,
        results: Results,
    ):
        """Scale, activate, transpose through shared memory `CHUNK` slots at a time, store rows of `out`.

        A thread's accumulators of rows r and r + 8 are one column's gate and up (w13), or two columns (w2).
        """
        columns = results.out.shape[1]
        thread = Int32(settle(Uint32(thread)))  # addresses below take no registers in the main loop
        group = thread // 128
        inside = thread % 128
        lane = thread % 32
        row_warp = inside // 32
        row_bytes = cutlass.const_expr(self.panel_columns * 2)
        pitch = cutlass.const_expr(row_bytes + 16)  # no bank conflicts
        half_bytes = cutlass.const_expr(CHUNK * pitch)
        buffer = staging.address + group * (2 * half_bytes)
        matrix = lane // 8
        if cutlass.const_expr(self.activated):  # matrices of 8 slots each
            address = (lane % 8 + matrix * 8) * pitch + row_warp * 16
        else:  # matrices of rows r and r + 8 of 8 slots, of the next 8
            address = (lane % 8 + matrix // 2 * 8) * pitch + row_warp * 32 + matrix % 2 * 16
        pieces = cutlass.const_expr(row_bytes // 16)
        slots_per_pass = cutlass.const_expr(128 // pieces)
        for e in cutlass.range_constexpr(tokens // CHUNK):
            if e * CHUNK < entry.slots:
                half = buffer + (e % 2) * half_bytes
                packed = []
                for octet in cutlass.range_constexpr(CHUNK // 8):
                    first = (e * (CHUNK // 8) + octet) * 4
                    v = [acc[first + i] * factor[i // 2] for i in range(4)]
                    if cutlass.const_expr(self.activated):
                        values = swiglu(v[0], v[2], results.limit), swiglu(v[1], v[3], results.limit)
                        packed.append(pack_bf16(*values))
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
                    if slot < entry.slots and n < columns:
                        words = load_words(half + line * pitch + inside % pieces * 16, 4)
                        row = entry.first_slot + slot
                        if cutlass.const_expr(not self.activated):
                            row = staging.rows[slot, group]
                        store_words(results.out.iterator + (Int64(row) * columns + n), words)
