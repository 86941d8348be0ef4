"""NVFP4 W4A16 expert products for many tokens an expert on Hopper: wide.py, with tokens gathered by slot.

Equations, operands and the order of waits are narrow_experts.py's.

Roles per CTA (`panels` x 64 weight rows by `tokens` slots, persistent over the table's tiles)
    warpgroup p          rows of panel p, as in wide.py; swiglu where the sums are
    producer warpgroup   its first warp keeps `stages` TMA loads of weights in flight; all four gather
                         tokens with cp.async
Pipelines
    full[stage]     1 arrival + weight bytes, 128 arrivals after copies  ->  every consumer warp
    empty[stage]    every consumer warp  ->  producers
Tiles
    The row tile is the fast index: CTAs that run together share an expert's tokens, and its next token tile
    finds the weights in L2.
"""

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import BFloat16, Float32, Int32, Int64, Uint32
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup

from ..tiles import BLOCK_K, PANEL_ROWS, Wide
from .decode import EPILOGUE_SCALE
from .fragments import (
    arrive_after_copies,
    copy_async,
    expert_view,
    load_coherent,
    load_words,
    pack_bf16,
    partition_loads,
    smem_address,
    store_matrices_transposed,
    swiglu,
)
from .layout import CODE_WORDS, SCALE_WORDS
from .narrow import TOKEN_ROW_BYTES
from .wide import SWIZZLE_ATOM, WideLinear

CHUNK = 32  # slots staged through shared memory at a time
# By CTAs an SM, where there are two consumer warpgroups: 2 consumers + 1 producer fit in 3 x 168, in 3 x 80.
PRODUCER_REGISTERS = {1: 56, 2: 48}
CONSUMER_REGISTERS = {1: 224, 2: 96}


class WideExperts(WideLinear):
    """One compiled kernel: a tile configuration, for w13 (`activated`) or w2."""

    gathers = True

    def __init__(self, config: Wide, activated: bool):
        config.check()
        if config.split_k > 1 or config.multicast > 1 or config.tokens % CHUNK:
            raise ValueError(f"{config}: experts take no split_k, no multicast, and tokens in {CHUNK}s")
        self.config = config
        self.activated = activated
        self.panel_columns = PANEL_ROWS // 2 if activated else PANEL_ROWS  # results of a panel and slot
        self.threads = 128 * (config.panels + 1)

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,
        mCodes: cute.Tensor,
        mScales: cute.Tensor,
        mRowScale: cute.Tensor,
        mPairs: cute.Tensor,
        mTable: cute.Tensor,
        mOut: cute.Tensor,
        topk: Int32,
        limit: Float32,
        scale_bias: Int32,
        max_ctas: Int32,
        stream,
    ):
        c = self.config
        tokens, stages, stage_k = c.tokens, c.stages, c.blocks * BLOCK_K
        atom = warpgroup.make_smem_layout_atom(SWIZZLE_ATOM, BFloat16)
        x_layout = cute.tile_to_shape(atom, (tokens, stage_k, stages), order=(0, 1, 2))
        code_layout = cute.make_layout((CODE_WORDS, c.blocks, c.panels, stages))
        scale_layout = cute.make_layout((SCALE_WORDS, c.blocks, c.panels, stages))
        load = cpasync.CopyBulkTensorTileG2SOp()
        code_atom, tCodes = cpasync.make_tiled_tma_atom(
            load,
            expert_view(mCodes, CODE_WORDS),
            cute.slice_(code_layout, (None, None, None, 0)),
            (CODE_WORDS, c.blocks, c.panels),
        )
        scale_atom, tScales = cpasync.make_tiled_tma_atom(
            load,
            expert_view(mScales, SCALE_WORDS),
            cute.slice_(scale_layout, (None, None, None, 0)),
            (SCALE_WORDS, c.blocks, c.panels),
        )
        tiled_mma = hopper.make_trivial_tiled_mma(
            BFloat16,
            BFloat16,
            OperandMajorMode.K,
            OperandMajorMode.K,
            Float32,
            (c.panels, 1, 1),
            (PANEL_ROWS, tokens),
            warpgroup.OperandSource.RMEM,
        )
        output_bytes = 2 * c.panels * CHUNK * (self.panel_columns * 2 + 16)

        @cute.struct
        class Shared:
            full: cute.struct.MemRange[Int64, stages]
            empty: cute.struct.MemRange[Int64, stages]
            x: cute.struct.Align[cute.struct.MemRange[BFloat16, cute.cosize(x_layout)], 1024]
            codes: cute.struct.Align[cute.struct.MemRange[Int64, cute.cosize(code_layout)], 128]
            scales: cute.struct.Align[cute.struct.MemRange[Int32, cute.cosize(scale_layout)], 128]
            output: cute.struct.Align[cute.struct.MemRange[Float32, output_bytes // 4], 128]

        self.shared = Shared
        row_tiles = cute.ceil_div(mCodes.shape[1], c.panels)
        self.kernel(
            tiled_mma,
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
            min_blocks_per_mp=c.ctas_per_sm,
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self,
        tiled_mma: cute.TiledMma,
        mX: cute.Tensor,
        code_atom: cute.CopyAtom,
        tCodes: cute.Tensor,
        scale_atom: cute.CopyAtom,
        tScales: cute.Tensor,
        mRowScale: cute.Tensor,
        mPairs: cute.Tensor,
        mTable: cute.Tensor,
        mOut: cute.Tensor,
        topk: Int32,
        limit: Float32,
        scale_bias: Uint32,
        row_tiles: Int32,
        x_layout: cute.ComposedLayout,
        code_layout: cute.Layout,
        scale_layout: cute.Layout,
    ):
        c = self.config
        stages = c.stages
        consumer_warps = 4 * c.panels
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        thread, _, _ = cute.arch.thread_idx()
        bid, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()

        storage = cutlass.memory.SmemAllocator().allocate(self.shared)
        full, empty = storage.full.data_ptr(), storage.empty.data_ptr()
        sX = storage.x.get_tensor(x_layout.outer, swizzle=x_layout.inner)
        sCodes = storage.codes.get_tensor(code_layout)
        sScales = storage.scales.get_tensor(scale_layout)

        if warp == consumer_warps:
            for atom in (code_atom, scale_atom):
                cpasync.prefetch_descriptor(atom)
            with cute.arch.elect_one():
                for stage in cutlass.range_constexpr(stages):
                    cute.arch.mbarrier_init(full + stage, 1 + 128)
                    cute.arch.mbarrier_init(empty + stage, consumer_warps)
            cute.arch.mbarrier_init_fence()
        if cutlass.const_expr(self.activated):
            cute.arch.griddepcontrol_wait()  # for the routing
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.sync_threads()

        table = mTable.iterator.toint()
        tiles, _, _, _ = load_coherent(table)
        tiles = tiles * row_tiles
        count = cute.ceil_div(tCodes.shape[1], c.blocks)

        if warp >= consumer_warps:
            if cutlass.const_expr(c.panels > 1):
                cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS[c.ctas_per_sm])
            gCodes = cute.local_tile(tCodes, (CODE_WORDS, c.blocks, c.panels), (0, None, None, None))
            gScales = cute.local_tile(tScales, (SCALE_WORDS, c.blocks, c.panels), (0, None, None, None))
            tCs, tCg = partition_loads(code_atom, sCodes, gCodes, 3)
            tSs, tSg = partition_loads(scale_atom, sScales, gScales, 3)
            weights = (code_atom, tCg, tCs, scale_atom, tSg, tSs)
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
                thread - 128 * c.panels,
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
            if cutlass.const_expr(c.panels > 1):
                cute.arch.setmaxregister_increase(CONSUMER_REGISTERS[c.ctas_per_sm])
            if cutlass.const_expr(not self.activated):
                cute.arch.griddepcontrol_wait()
            panel = thread // 128
            stage = Int32(0)
            phase = Int32(0)
            for tile in cutlass.range(bid, tiles, ctas, unroll=1):
                expert, first_slot, slots, _ = load_coherent(table + Int64(tile // row_tiles + 1) * 16)
                acc, stage, phase = self.accumulate(
                    tiled_mma,
                    thread,
                    panel,
                    count,
                    stage,
                    phase,
                    full,
                    empty,
                    sX,
                    sCodes,
                    sScales,
                    scale_bias,
                )
                column = (tile % row_tiles * c.panels + panel) * self.panel_columns
                self.store_slots(
                    acc,
                    thread,
                    column,
                    expert,
                    first_slot,
                    slots,
                    smem_address(storage.output.data_ptr()),
                    mRowScale,
                    mPairs,
                    mOut,
                    limit,
                )

    @cute.jit
    def load_weights(
        self, weights: tuple, at: Int32, row_tile: Int32, expert: Int32, barrier: cute.Pointer, stage: Int32
    ):
        code_atom, tCg, tCs, scale_atom, tSg, tSs = weights
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, self.config.stage_weight_bytes)
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
        mX: cute.Tensor,
        mPairs: cute.Tensor,
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
        c = self.config
        rows = cutlass.const_expr(c.tokens // 16)
        row = thread // 8
        chunk = thread % 8
        inside = row * TOKEN_ROW_BYTES + (chunk ^ (row % 8)) * 16
        pitch = mX.stride[0] // 8  # rows of 16-byte units: offsets fit 32 bits
        sources = cute.make_rmem_tensor(rows, Int32)
        stage = Int32(0)
        phase = Int32(1)  # a fresh barrier counts as released
        for tile in cutlass.range(bid, tiles, ctas, unroll=1):
            expert, first_slot, slots, _ = load_coherent(table + Int64(tile // row_tiles + 1) * 16)
            row_tile = tile % row_tiles
            for i in cutlass.range_constexpr(rows):
                line = first_slot + cutlass.min(row + 16 * i, slots - 1)
                if cutlass.const_expr(self.activated):
                    line = mPairs[line] // topk
                sources[i] = Int32(line * pitch + chunk)
            for at in cutlass.range(count, unroll=1):
                cute.arch.mbarrier_wait(empty + stage, phase)
                if fetches_weights and early <= 0:
                    self.load_weights(weights, at, row_tile, expert, full + stage, stage)
                early -= 1
                for b in cutlass.range_constexpr(c.blocks):
                    block = at * c.blocks + b
                    size = Int32(0)
                    if block * BLOCK_K + chunk * 8 < mX.shape[1]:
                        size = Int32(16)
                    column = mX.iterator.toint() + Int64(block) * TOKEN_ROW_BYTES
                    target = shared + (stage * c.blocks + b) * (c.tokens * TOKEN_ROW_BYTES) + inside
                    for i in cutlass.range_constexpr(rows):
                        copy_async(
                            target + i * (16 * TOKEN_ROW_BYTES),
                            column + Int64(sources[i]) * 16,
                            size,
                            row + 16 * i < slots,
                        )
                arrive_after_copies(smem_address(full + stage))
                stage += 1
                if stage == c.stages:
                    stage = Int32(0)
                    phase = phase ^ 1

    @cute.jit
    def store_slots(
        self,
        acc: cute.Tensor,
        thread: Int32,
        column: Int32,
        expert: Int32,
        first_slot: Int32,
        slots: Int32,
        shared: Int32,
        mRowScale: cute.Tensor,
        mPairs: cute.Tensor,
        mOut: cute.Tensor,
        limit: Float32,
    ):
        """Scale, activate, transpose through shared memory `CHUNK` slots at a time, store rows of `out`.

        A thread's accumulators of rows r and r + 8 are one column's gate and up (w13), or two columns (w2).
        """
        c = self.config
        columns = mOut.shape[1]
        panel = thread // 128
        inside = thread % 128
        lane = thread % 32
        row_warp = inside // 32
        factor = cute.make_rmem_tensor(2, Float32)
        for h in cutlass.range_constexpr(2):
            factor[h] = Float32(0.0)
            if cutlass.const_expr(self.activated):
                n = column + row_warp * 8 + lane // 4
                if n < columns:
                    factor[h] = mRowScale[expert, n + h * columns] * Float32(EPILOGUE_SCALE)
            else:
                n = column + row_warp * 16 + lane // 4 + 8 * h
                if n < columns:
                    factor[h] = mRowScale[expert, n] * Float32(EPILOGUE_SCALE)
        row_bytes = cutlass.const_expr(self.panel_columns * 2)
        pitch = cutlass.const_expr(row_bytes + 16)  # no bank conflicts
        half_bytes = cutlass.const_expr(CHUNK * pitch)
        buffer = shared + panel * (2 * half_bytes)
        matrix = lane // 8
        if cutlass.const_expr(self.activated):  # matrices of 8 slots each
            address = (lane % 8 + matrix * 8) * pitch + row_warp * 16
        else:  # matrices of rows r and r + 8 of 8 slots, of the next 8
            address = (lane % 8 + matrix // 2 * 8) * pitch + row_warp * 32 + matrix % 2 * 16
        pieces = cutlass.const_expr(row_bytes // 16)
        slots_per_pass = cutlass.const_expr(128 // pieces)
        self.meet(panel)  # the previous tile's last pieces have been read
        for e in cutlass.range_constexpr(c.tokens // CHUNK):
            if e * CHUNK < slots:
                half = buffer + (e % 2) * half_bytes
                packed = []
                for t in cutlass.range_constexpr(CHUNK // 8):
                    first = (e * (CHUNK // 8) + t) * 4
                    v = [acc[first + i] * factor[i // 2] for i in range(4)]
                    if cutlass.const_expr(self.activated):
                        packed.append(pack_bf16(swiglu(v[0], v[2], limit), swiglu(v[1], v[3], limit)))
                    else:
                        packed += [pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3])]
                for i in cutlass.range_constexpr(len(packed) // 4):
                    store_matrices_transposed(half + address + i * 16 * pitch, *packed[4 * i : 4 * i + 4])
                self.meet(panel)
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
                            row = mPairs[row]
                        target = mOut.iterator + (Int64(row) * columns + n)
                        target = cute.recast_ptr(target.align(16), dtype=Uint32)
                        cute.autovec_copy(piece, cute.make_tensor(target, cute.make_layout(4)))

    @cute.jit
    def meet(self, panel: Int32):
        """A barrier of the panel's warpgroup; a computed barrier number would reserve all 16."""
        if panel == 0:
            cute.arch.barrier(barrier_id=1, number_of_threads=128)
        else:
            cute.arch.barrier(barrier_id=2, number_of_threads=128)
