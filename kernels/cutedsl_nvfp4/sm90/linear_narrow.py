"""NVFP4 W4A16 linear for few tokens on Hopper: out[m, n] = row_scale[n] * sum_k x[m, k] w[n, k] + bias[n].

Weights are the row operand of mma.sync m16n8k16, decoded in registers; tokens are its 8 columns. For few
tokens this beats wgmma on most shapes: no descriptors, fences or waits, 20 instructions a k16 step.

Measured on an H200: 65536 x 1536 at M = 1 in 19.0 us, 3.0 TB/s of weights; quack 28.1 us, Humming 30.4 us.

    operand    shape                dtype      layout
    x          [M, groups * K]      bf16       row-major
    codes      [P, KB, 256]         int64      sm90/layout.py
    scales     [P, KB, 64]          int32      sm90/layout.py
    row_scale  [N]                  f32
    bias       [N]                  f32        optional
    out        [M, N]               bf16, f32  row-major

Roles per CTA (one panel of 64 rows x `tokens`)
    producer warp     one elected thread keeps `stages` TMA loads in flight. Weights are fetched before
                      the previous kernel has finished (they do not depend on it), tokens after.
    4 * k_warps warps warp 4 * g + w owns rows 16 w .. 16 w + 15 and the g-th k blocks of every stage.
Pipelines
    full[stage]       producer (1 arrival + bytes)  ->  every consumer warp
    empty[stage]      every consumer warp           ->  producer
Reduction
    K is split over the k groups of a CTA and the `split_k` CTAs of a cluster. Each warp sends its partial
    sums to the CTA that owns those rows (distributed shared memory); after one cluster barrier, or with
    `signal` once barrier `reduced` has counted their bytes, the owner adds them in ascending k order. No
    workspace, no atomics: the result is deterministic, and kernels on other streams cannot meet.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint32

from ..device.cluster import address_in_cluster, signal_in_cluster, store_in_cluster
from ..device.launch import launch
from ..device.ptx import load_matrices, load_words, smem_address
from ..device.ring import advance, init_ring
from .decode import EPILOGUE_SCALE
from .layout import CODE_WORDS, SCALE_WORDS
from .ptx import mma_m16n8k16, store_output, weight_registers
from .tiles import BLOCK_CODE_BYTES, BLOCK_K, BLOCK_SCALE_BYTES, PANEL_ROWS, NarrowTile
from .views import (
    Pipeline,
    StageLayouts,
    Tokens,
    Weights,
    block_view,
    descriptor_of,
    load_tokens,
    load_weights,
    partition_tokens,
    partition_weights,
    pipeline_in,
    prefetch_descriptors,
    stage_layouts,
    tokens_by_tma,
    tokens_view,
    weights_by_tma,
)

STEPS = BLOCK_K // 16  # k16 instructions a block
TOKEN_ROW_BYTES = BLOCK_K * 2


class Results(NamedTuple):
    """What the epilogue reads and writes."""

    row_scale: cute.Tensor  # f32 [N]
    bias: cute.Tensor  # f32 [N], any tensor without has_bias
    out: cute.Tensor  # bf16 or f32 [M, N]


class Place(NamedTuple):
    """Which part of the product a CTA computes."""

    panel: Int32
    rank: Int32  # in the cluster whose CTAs share K
    token_tile: Int32


class NarrowLinearKernel:
    """One compiled kernel: a tile and the presence of a bias."""

    def __init__(self, tile: NarrowTile, has_bias: bool):
        tile.check()
        self.tile = tile
        self.has_bias = has_bias

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,  # bf16 [M, groups * K]
        mCodes: cute.Tensor,  # int64 [P, KB, 256]
        mScales: cute.Tensor,  # int32 [P, KB, 64]
        mRowScale: cute.Tensor,  # f32 [N]
        mBias: cute.Tensor,  # f32 [N], any tensor without has_bias
        mOut: cute.Tensor,  # bf16 or f32 [M, N]
        k: Int32,
        panels_per_group: Int32,
        scale_bias: Int32,
        stream,
    ):
        t = self.tile
        tokens, stages, box = t.tokens, t.stages, (t.stage_blocks,)
        layouts = stage_layouts(tokens, box, stages)
        x = tokens_by_tma(tokens_view(mX, k), t.token_step, t.box_steps, t.stage_blocks)
        weights = weights_by_tma(
            block_view(mCodes, CODE_WORDS), block_view(mScales, SCALE_WORDS), layouts, box
        )

        @cute.struct
        class Shared:
            full: cute.struct.MemRange[Int64, stages]
            empty: cute.struct.MemRange[Int64, stages + t.signal]  # and reduced
            # 1024: the swizzle is a function of address bits, and repeats every 8 rows of 128 bytes
            x: cute.struct.Align[cute.struct.MemRange[BFloat16, cute.cosize(layouts.x)], 1024]
            # 128: what TMA asks of its target
            codes: cute.struct.Align[cute.struct.MemRange[Int64, cute.cosize(layouts.codes)], 128]
            scales: cute.struct.Align[cute.struct.MemRange[Int32, cute.cosize(layouts.scales)], 128]
            partials: cute.struct.Align[cute.struct.MemRange[Float32, t.partial_bytes // 4], 128]

        self.shared = Shared
        launch(
            self.kernel(
                x,
                weights,
                Results(mRowScale, mBias, mOut),
                panels_per_group,
                Uint32(scale_bias),
                layouts,
            ),
            grid=(mCodes.shape[0] * t.split_k, cute.ceil_div(mX.shape[0], tokens), 1),
            block=(t.threads, 1, 1),
            cluster=(t.split_k, 1, 1),
            min_blocks_per_mp=1,
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        x: Tokens,
        weights: Weights,
        results: Results,
        panels_per_group: Int32,
        scale_bias: Uint32,
        layouts: StageLayouts,
    ):
        t = self.tile
        consumer_warps = 4 * t.k_warps
        # The next kernel may start now: it waits for the whole of this one before it reads `out`.
        cute.arch.griddepcontrol_launch_dependents()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        lane = cute.arch.lane_idx()
        bid, token_tile, _ = cute.arch.block_idx()
        place = Place(bid // t.split_k, bid % t.split_k, token_tile)

        storage = cutlass.memory.SmemAllocator().allocate(self.shared)
        pipeline = pipeline_in(storage, layouts)
        reduced = pipeline.empty + t.stages  # with `signal`: this CTA's partial sums are complete

        # Initialize the barriers
        if warp == consumer_warps:
            prefetch_descriptors(x, weights)
            with cute.arch.elect_one():
                init_ring(pipeline.full, pipeline.empty, t.stages, 1, consumer_warps)
                if cutlass.const_expr(t.signal):
                    # The only arrival comes now: what the barrier's one phase waits for are the bytes.
                    cute.arch.mbarrier_init(reduced, 1)
                    cute.arch.mbarrier_arrive_and_expect_tx(reduced, t.partial_bytes)
            # Publish the initial values: a relaxed arrival at the cluster's barrier orders nothing by itself.
            cute.arch.mbarrier_init_fence()
        if cutlass.const_expr(t.split_k > 1):
            # No CTA may write partial sums into, or count them in, one that has not got this far.
            cute.arch.cluster_arrive_relaxed()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()  # nobody waits on a barrier that has no value yet
        # These come in during the main loop
        row_scales = self.load_row_scales(warp * 32 + lane, place, results.row_scale)

        first, count = self.share_of_k(place.rank, weights.codes.shape[1])
        if warp == consumer_warps:
            self.produce(x, weights, pipeline, place, first, count, panels_per_group)
        else:
            self.multiply(warp, place.rank, count, storage, pipeline, scale_bias)
        self.wait_for_partials(warp, reduced)
        if warp < consumer_warps:
            self.finish(warp * 32 + lane, place, storage, row_scales, results)

    @cute.jit
    def share_of_k(self, rank: Int32, blocks: Int32):
        """The stages of K that member `rank` of a cluster takes -> (first, number of them)."""
        t = self.tile
        total = cute.ceil_div(blocks, t.stage_blocks)
        first = rank * total // t.split_k
        return first, (rank + 1) * total // t.split_k - first

    @cute.jit
    def produce(
        self,
        x: Tokens,
        weights: Weights,
        pipeline: Pipeline,
        place: Place,
        first: Int32,
        count: Int32,
        panels_per_group: Int32,
    ):
        """The producer warp: fill stages, `count` in all."""
        t = self.tile
        full = pipeline.full
        tXs, tXg = partition_tokens(x, pipeline, t.token_step, t.stage_blocks)
        first_step = place.token_tile * t.box_steps
        present = Int32(1)  # of one step, there is a token in every tile
        if cutlass.const_expr(t.box_steps > 1):
            present = cutlass.min(cute.ceil_div(x.view.shape[0], t.token_step) - first_step, t.box_steps)
        descriptor = descriptor_of(x, present)
        stage_bytes = t.stage_weight_bytes + present * (t.token_step * t.stage_blocks * BLOCK_K * 2)
        tokens = tXg[None, first_step, None, place.panel // panels_per_group]
        loads = partition_weights(weights, pipeline, (t.stage_blocks,), (None, place.panel))
        # Fetch the first weights: no kernel that may still run writes them, so they need not wait. The
        # bytes announced are the whole stage's: it is not full before its tokens have come, too.
        for stage in cutlass.range_constexpr(t.stages):
            if stage < count:
                load_weights(loads, (first + stage,), stage, full, stage_bytes)
        # Fetch the first tokens, which the previous kernel may have written. The consumers need no wait of
        # their own: they store only after tokens that were fetched after this one.
        cute.arch.griddepcontrol_wait()
        for stage in cutlass.range_constexpr(t.stages):
            if stage < count:
                load_tokens(x, tokens[None, first + stage], tXs[None, 0, stage], full + stage, descriptor)
        stage = Int32(0)
        phase = Int32(0)  # of `empty`: the ring is full, so the first wait is for a first release
        for step in cutlass.range(t.stages, count, unroll=1):
            # Wait for a free stage: every consumer warp has its part of it in registers
            cute.arch.mbarrier_wait(pipeline.empty + stage, phase)
            # Issue the TMA loads
            load_weights(loads, (first + step,), stage, full, stage_bytes)
            load_tokens(x, tokens[None, first + step], tXs[None, 0, stage], full + stage, descriptor)
            stage, phase = advance(stage, phase, t.stages)

    @cute.jit
    def multiply(
        self,
        warp: Int32,
        rank: Int32,
        count: Int32,
        storage,
        pipeline: Pipeline,
        scale_bias: Uint32,
    ):
        """A consumer warp's partial sums, each half's 8 rows sent to the CTA that owns them."""
        t = self.tile
        lane = cute.arch.lane_idx()
        row_warp = warp % 4
        k_group = warp // 4
        acc = cute.make_rmem_tensor((4, t.tokens // 8), Float32)
        acc.fill(0.0)
        self.accumulate(acc, count, Int32(0), Int32(0), row_warp, k_group, lane, pipeline, scale_bias)

        # Send the sums. A CTA owns 8 rows by `units`; lanes write 8 bytes each, 256 a column of 8 tokens.
        units = cutlass.const_expr(8 // t.split_k)
        pairs = cutlass.const_expr(units * t.tokens * 4)  # pairs of tokens of one row, a CTA owns
        source = rank * t.k_warps + k_group
        partials = smem_address(storage.partials.data_ptr())
        for half in cutlass.range_constexpr(2):
            unit = 2 * row_warp + half
            address = partials + (source * pairs + (unit % units) * (t.tokens * 4) + lane) * 8
            if cutlass.const_expr(t.split_k > 1):
                address = address_in_cluster(address, unit // units)
            if cutlass.const_expr(t.signal):
                reduced = smem_address(storage.empty.data_ptr() + t.stages)
                barrier = address_in_cluster(reduced, unit // units)
            for column in cutlass.range_constexpr(t.tokens // 8):
                values = (acc[2 * half, column], acc[2 * half + 1, column])
                if cutlass.const_expr(t.signal):
                    signal_in_cluster(address + column * 256, values, barrier)
                else:
                    store_in_cluster(address + column * 256, values)

    @cute.jit
    def wait_for_partials(self, warp: Int32, reduced: cute.Pointer):
        """Wait for the partial sums of every k group of every CTA."""
        t = self.tile
        if cutlass.const_expr(t.signal):
            if warp < 4 * t.k_warps:  # also keeps this CTA alive until the last write to it has landed
                cute.arch.mbarrier_wait(reduced, 0)
        elif cutlass.const_expr(t.split_k > 1):
            # Release and acquire: the sums have arrived. Counts all threads of the cluster, so the producer's, too.
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

    @cute.jit
    def accumulate(
        self,
        acc: cute.Tensor,  # f32 (4, tokens / 8): {row r, row r + 8} x two tokens
        count: Int32,
        stage: Int32,
        phase: Int32,
        row_warp: Int32,
        k_group: Int32,
        lane: Int32,
        pipeline: Pipeline,
        bias: Uint32,
    ):
        """acc[:, column] += this warp's 16 rows x 8 tokens a column over `count` stages -> next stage, its phase."""
        t = self.tile
        columns = cutlass.const_expr(t.tokens // 8)
        # Of a block: 16 bytes of codes a lane, 8 bytes of scales for the four lanes of a row (sm90/layout.py).
        codes = smem_address(pipeline.codes.iterator) + (row_warp * 512 + lane * 16)
        scales = smem_address(pipeline.scales.iterator) + (row_warp * 64 + (lane // 4) * 8)
        # Row lane % 8 of matrix lane // 8: 16-byte chunk lane // 8 of a token's 128 bytes, 128B-swizzled.
        token = lane % 8
        x_first = smem_address(pipeline.x.iterator) + token * TOKEN_ROW_BYTES + ((lane // 8) ^ token) * 16
        x_second = x_first ^ 64  # chunks 4 .. 7: bit 2 of a chunk's number, which the swizzle only flips
        for _ in cutlass.range(count, unroll=1):
            # Wait for a full stage
            cute.arch.mbarrier_wait(pipeline.full + stage, phase)
            # Read all of it into registers, so that the producer can refill it during the products
            first = stage * t.stage_blocks + k_group * t.blocks
            words, scale_words, tokens = [], [], []
            for b in cutlass.range_constexpr(t.blocks):
                words.append(load_words(codes + first * BLOCK_CODE_BYTES + b * BLOCK_CODE_BYTES, 4))
                scale_words.append(load_words(scales + first * BLOCK_SCALE_BYTES + b * BLOCK_SCALE_BYTES, 2))
                for column in cutlass.range_constexpr(columns):
                    offset = b * t.tokens * TOKEN_ROW_BYTES + column * 8 * TOKEN_ROW_BYTES
                    for base in (x_first, x_second):
                        tokens.append(load_matrices(base + first * (t.tokens * TOKEN_ROW_BYTES) + offset))
            # Give the stage back: one arrival a warp, once all its lanes have read
            cute.arch.sync_warp()
            if lane == 0:
                cute.arch.mbarrier_arrive(pipeline.empty + stage)
            # Decode and multiply
            for b in cutlass.range_constexpr(t.blocks):
                for step in cutlass.range_constexpr(STEPS):
                    weights = weight_registers(words[b][step], scale_words[b][step // 2], step % 2, bias)
                    for column in cutlass.range_constexpr(columns):
                        loaded = tokens[(b * columns + column) * 2 + step // 2]
                        x = loaded[2 * (step % 2) : 2 * (step % 2) + 2]
                        partial = [acc[v, column] for v in range(4)]
                        result = mma_m16n8k16(partial, weights, x)
                        for v in cutlass.range_constexpr(4):
                            acc[v, column] = result[v]
            stage, phase = advance(stage, phase, t.stages)
        return stage, phase

    @cute.jit
    def load_row_scales(
        self,
        thread: Int32,
        place: Place,
        mRowScale: cute.Tensor,  # f32 [N]
    ):
        """The row scale of every pair of results that a thread finishes."""
        t = self.tile
        threads = cutlass.const_expr(128 * t.k_warps)
        passes = cutlass.const_expr(-(-(8 // t.split_k) * t.tokens * 4 // threads))
        scales = cute.make_rmem_tensor(passes, Float32)
        for i in cutlass.range_constexpr(passes):
            unit = place.rank * (8 // t.split_k) + (thread + i * threads) // (t.tokens * 4)
            n = place.panel * PANEL_ROWS + unit * 8 + thread % 32 // 4
            scales[i] = mRowScale[cutlass.min(n, mRowScale.shape[0] - 1)]
        return scales

    def add_partials(self, sPartials: cute.Tensor, *where: Int32) -> list[Float32]:
        """Two tokens' sums of one row over sPartials[:, *where, :], in ascending k order."""
        total = [Float32(0.0), Float32(0.0)]
        for source in range(self.tile.split_k * self.tile.k_warps):
            total = [total[v] + sPartials[(v, *where, source)] for v in range(2)]
        return total

    @cute.jit
    def finish(
        self,
        thread: Int32,
        place: Place,
        storage,
        row_scales: cute.Tensor,  # f32 (pairs of results a thread,)
        results: Results,
    ):
        """Add the partial sums of the rows this CTA owns in ascending k order, scale, store."""
        t = self.tile
        units = cutlass.const_expr(8 // t.split_k)
        pairs = cutlass.const_expr(units * t.tokens * 4)
        threads = cutlass.const_expr(128 * t.k_warps)
        sPartials = storage.partials.get_tensor(cute.make_layout((2, pairs, t.split_k * t.k_warps)))
        for i in cutlass.range_constexpr(-(-pairs // threads)):
            pair = thread + i * threads
            if pair < pairs:
                unit = place.rank * units + pair // (t.tokens * 4)
                lane = pair % 32
                n = place.panel * PANEL_ROWS + unit * 8 + lane // 4
                m = place.token_tile * t.tokens + (pair % (t.tokens * 4)) // 32 * 8 + (lane % 4) * 2
                if n < results.out.shape[1]:
                    scale = row_scales[i] * Float32(EPILOGUE_SCALE)
                    total = self.add_partials(sPartials, pair)
                    for v in cutlass.range_constexpr(2):
                        value = total[v] * scale
                        if cutlass.const_expr(self.has_bias):
                            value = value + results.bias[n]
                        store_output(results.out, m + v, n, value)
