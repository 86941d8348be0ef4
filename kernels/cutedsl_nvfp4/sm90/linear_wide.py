"""NVFP4 W4A16 linear for many tokens on Hopper: out[m, n] = row_scale[n] * sum_k x[m, k] w[n, k] + bias[n].

Swapped operands: weights are wgmma's A operand, decoded from shared memory into registers; tokens are its B
operand in shared memory. One m64nNk16 wgmma consumes one NVFP4 group, so a weight row has one scale per wgmma.

    operand    shape                dtype      layout
    x          [M, groups * K]      bf16       row-major
    codes      [P, KB, 256]         int64      sm90/layout.py
    scales     [P, KB, 64]          int32      sm90/layout.py
    row_scale  [N]                  f32
    bias       [N]                  f32        optional
    out        [M, N]               bf16, f32  row-major

Measured on an H200: 731 TFLOP/s at 7168 x 16384, M = 2048, where a large cuBLAS bf16 product ran at 720 to
794 in the same hours. Main loop: 22 to 24 instructions a wgmma up to 128 tokens, 31 at 256.

Roles per CTA (`panels` x 64 rows by `tokens`)
    warpgroup p     rows of panel p: decodes half a stage of weights while the wgmmas of the other half run
    producer warp   the last warp; keeps `stages` TMA loads in flight, the first weights before the
                    previous kernel has finished
Pipelines
    full[stage]     producer (1 arrival + bytes)  ->  every consumer warp
    empty[stage]    every consumer warp of every CTA that shares the tokens  ->  producer
Tiles
    Token tiles are the fast index within groups of `token_group` tiles: a weight tile is read from memory
    once, by CTAs that run together. `persistent` walks tiles with the grid's stride, so that the producer
    fills the next tile's stages during the epilogue; `ctas_per_sm` = 2 overlaps epilogues instead. With
    `lag` warpgroup p + 1 starts a tile that many stages after p, so that their epilogues do not coincide;
    with `bulk` TMA stores the results and the warpgroup goes on. With `tail` the tiles that fill no whole wave
    are cut into parts of so many tokens, and the last tokens are parts of their own, where the last CTA is then
    done earlier.
Absent tokens
    A last tile that is not full loads boxes as high as it has tokens, to a quarter of a tile; what the stage has
    in their place is multiplied, but neither exchanged nor stored. A product's columns do not mix.
Reduction
    `split_k` CTAs of a cluster share a tile's K and exchange partial sums as linear_narrow.py does: each owns a
    slice of the tokens, adds in ascending k order and stores. Deterministic, no workspace.
"""

from enum import IntEnum
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import BFloat16, Float32, Int32, Int64, Uint32
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup

from ..device.cluster import address_in_cluster, signal_in_cluster, store_in_cluster
from ..device.launch import launch
from ..device.ptx import load_words, pack_bf16, settle, smem_address
from ..device.ring import advance, init_ring
from ..device.store import store_words
from ..device.views import partition_loads
from .decode import EPILOGUE_SCALE
from .layout import CODE_WORDS, SCALE_WORDS
from .ptx import store_matrices_transposed, store_shared, weight_registers
from .tiles import BLOCK_CODE_BYTES, BLOCK_K, BLOCK_SCALE_BYTES, BULK_BUFFERS, PANEL_ROWS, WideTile
from .views import (
    Pipeline,
    StageLayouts,
    Tokens,
    Weights,
    block_view,
    copy_weights,
    descriptor_of,
    one_stage,
    partition_tokens,
    partition_weights,
    pipeline_in,
    prefetch_descriptors,
    results_view,
    stage_layouts,
    token_layout,
    tokens_by_tma,
    tokens_view,
    weights_by_tma,
)

STEPS = BLOCK_K // 16  # wgmmas of a block: k16 each
PRODUCER_REGISTERS = 24  # the least that setmaxnreg takes


class Barrier(IntEnum):
    """Named barriers of a CTA; 0 is reserved for sync_threads."""

    WARPGROUP_0 = 1  # its 128 threads meet
    WARPGROUP_1 = 2
    WARPGROUP_2 = 3
    LAG_0 = 4  # warpgroup 0 arrives, 1 waits
    LAG_1 = 5  # warpgroup 1 arrives, 2 waits


class Grid(NamedTuple):
    """The problem's tiles, and the items that CTAs take: whole tiles, parts of the last of them, then the last tokens'.

    Tokens are counted in steps of `token_step`.
    """

    token_group: Int32  # token tiles that are the fast index together
    steps: Int32  # tokens
    token_tiles: Int32  # without tokens that are only in parts
    row_tiles: Int32
    last_parts: Int32  # parts of the tokens beyond token_tiles, for a row tile
    whole: Int32  # items that are tiles
    cut: Int32  # items that are parts of a tile
    items: Int32


class Results(NamedTuple):
    """What the epilogue reads and writes."""

    row_scale: cute.Tensor  # f32 [N]
    bias: cute.Tensor  # f32 [N], any tensor without has_bias
    out: cute.Tensor  # bf16 or f32 [M, N]


class BulkStore(NamedTuple):
    """TMA of results, with `bulk`."""

    atom: cute.CopyAtom
    out: cute.Tensor  # bf16 (M, N)
    layout: cute.ComposedLayout  # shared memory: (output tokens, 64 rows, buffers)


class Item(NamedTuple):
    """A tile, or a part of one; tokens in steps."""

    first: Int32
    present: Int32  # up to the last token
    steps: Int32  # with absent ones
    row_tile: Int32


class Box(NamedTuple):
    """What a CTA loads of an item's tokens at a time, in steps."""

    source: Int32  # its first tokens
    target: Int32  # where the stage takes them
    height: Int32
    descriptor: cute.Pointer  # of that height


class Place(NamedTuple):
    """Where a tile, or a part of one, lies."""

    first_token: Int32
    row_tile: Int32
    rank: Int32  # in the cluster


def panels_by_tokens(warpgroups: int, tokens: int) -> cute.TiledMma:
    """wgmma of a panel a warpgroup, weights in registers, with `tokens` in shared memory."""
    return hopper.make_trivial_tiled_mma(
        BFloat16,
        BFloat16,
        OperandMajorMode.K,
        OperandMajorMode.K,
        Float32,
        (warpgroups, 1, 1),
        (PANEL_ROWS, tokens),
        warpgroup.OperandSource.RMEM,
    )


def decode(registers: cute.Tensor, words: list, scale_words: list, steps: range, bias: Uint32) -> None:
    """Decode the weights of k16 steps `steps` of a stage into `registers`, a ring of four for each step."""
    ring = cute.size(registers)
    for step in steps:
        word = words[step // STEPS][step % STEPS]
        scale_word = scale_words[step // STEPS][step % STEPS // 2]
        for r, register in enumerate(weight_registers(word, scale_word, step % 2, bias)):
            registers[(step * 4 + r) % ring] = settle(register)


class WideLinearKernel:
    """One compiled kernel: a tile, the presence of a bias, whether rows of out are 16-byte aligned."""

    def __init__(self, tile: WideTile, has_bias: bool, aligned_rows: bool):
        tile.check()
        if (
            tile.persistent
            and not (tile.bulk and aligned_rows)
            and (tile.tokens // tile.output_tokens % 2 or tile.tail // tile.output_tokens % 2)
        ):
            # the next tile's first piece would use the buffer that this tile's last one may still be read from
            raise ValueError(
                f"{tile}: a persistent tile is stored in an even number of pieces of {tile.output_tokens} tokens"
            )
        if tile.panels > 3:
            raise ValueError(f"{tile}: the linear kernel has a warpgroup for each of at most three panels")
        self.tile = tile
        self.has_bias = has_bias
        self.aligned_rows = aligned_rows

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
        token_group: Int32,
        max_ctas: Int32,
        stream,
    ):
        t = self.tile
        tokens, stages, box = t.tokens, t.stages, (t.blocks, t.panels)
        panels = mCodes.shape[0]
        layouts = stage_layouts(tokens, box, stages)
        x = tokens_by_tma(tokens_view(mX, k), t.token_step, t.box_steps, t.blocks, t.multicast > 1)
        weights = weights_by_tma(
            block_view(mCodes, CODE_WORDS), block_view(mScales, SCALE_WORDS), layouts, box
        )
        bulk = None
        if cutlass.const_expr(t.bulk and self.aligned_rows and mOut.element_type.width == 16):
            out_box = (t.output_tokens, PANEL_ROWS)
            out_layout = token_layout(t.output_tokens, PANEL_ROWS // BLOCK_K, BULK_BUFFERS * t.panels)
            out_by_tma = cpasync.make_tiled_tma_atom(
                cpasync.CopyBulkTensorTileS2GOp(), results_view(mOut), one_stage(out_layout), out_box
            )
            bulk = BulkStore(*out_by_tma, out_layout)

        @cute.struct
        class Shared:
            full: cute.struct.MemRange[Int64, stages]
            empty: cute.struct.MemRange[Int64, stages + t.signal]  # and reduced
            # 1024: the swizzle is a function of address bits, and repeats every 8 rows of 128 bytes
            x: cute.struct.Align[cute.struct.MemRange[BFloat16, cute.cosize(layouts.x)], 1024]
            # 128: what TMA asks of its target
            codes: cute.struct.Align[cute.struct.MemRange[Int64, cute.cosize(layouts.codes)], 128]
            scales: cute.struct.Align[cute.struct.MemRange[Int32, cute.cosize(layouts.scales)], 128]
            output: cute.struct.Align[
                cute.struct.MemRange[Float32, t.output_bytes // 4], 128 if bulk is None else 1024
            ]

        self.shared = Shared
        row_tiles = cute.round_up(cute.ceil_div(panels, t.panels), t.multicast)
        grid, ctas = self.share_tiles(mX.shape[0], row_tiles, token_group, max_ctas)
        launch(
            self.kernel(
                x,
                weights,
                Results(mRowScale, mBias, mOut),
                panels_per_group,
                Uint32(scale_bias),
                grid,
                layouts,
                bulk,
            ),
            grid=(ctas, 1, 1),
            block=(t.threads, 1, 1),
            preferred_smem_carveout=100,  # per cent: ctas_per_sm counts on all of it
            cluster=(t.split_k * t.multicast, 1, 1),
            min_blocks_per_mp=t.ctas_per_sm,
            stream=stream,
        )

    @cute.jit
    def share_tiles(self, m: Int32, row_tiles: Int32, token_group: Int32, max_ctas: Int32):
        """-> (the items, CTAs): with a tail as `dealt` finds the last CTA done first."""
        t = self.tile
        steps = cute.ceil_div(m, t.token_step)
        token_tiles = cute.ceil_div(m, t.tokens)
        last_parts, cut = Int32(0), Int32(0)
        if cutlass.const_expr(t.tail > 0):
            parts = cutlass.const_expr(t.tokens // t.tail)
            rest, cost = self.dealt(token_tiles, last_parts, row_tiles, max_ctas)
            present = cute.ceil_div(m - (token_tiles - 1) * t.tokens, t.tail)
            rest_beside, cost_of_parts = self.dealt(token_tiles - 1, present, row_tiles, max_ctas)
            if present < parts and cost_of_parts <= cost:
                token_tiles -= 1
                last_parts = present
                rest = rest_beside
            cut = rest * parts
            items = token_tiles * row_tiles - rest + cut + last_parts * row_tiles
            whole = token_tiles * row_tiles - rest
        else:
            whole = token_tiles * row_tiles
            items = whole
        ctas = items * t.split_k
        if cutlass.const_expr(t.persistent):
            ctas = cutlass.min(items, max_ctas)
        return Grid(token_group, steps, token_tiles, row_tiles, last_parts, whole, cut, items), ctas

    @cute.jit
    def dealt(self, token_tiles: Int32, last_parts: Int32, row_tiles: Int32, max_ctas: Int32):
        """-> (tiles to cut into parts, the time until the last CTA is done), in hundredths of a tile's.

        The tiles that fill no whole wave are cut where that is done earlier than they are and, on the CTAs that have
        none of them, the parts of the last tokens.
        """
        t = self.tile
        parts, part = cutlass.const_expr(t.tokens // t.tail), cutlass.const_expr(t.part_percent)
        waves = token_tiles * row_tiles // max_ctas
        rest = token_tiles * row_tiles % max_ctas
        beside = last_parts * row_tiles
        cut_cost = waves * 100 + cute.ceil_div(rest * parts + beside, max_ctas) * part
        cost = (waves + 1) * 100 + cute.ceil_div(cutlass.max(beside - (max_ctas - rest), 0), max_ctas) * part
        if cut_cost < cost:
            cost = cut_cost
        else:
            rest = Int32(0)
        return rest, cost

    @cute.kernel
    def kernel(
        self,
        x: Tokens,
        weights: Weights,
        results: Results,
        panels_per_group: Int32,
        scale_bias: Uint32,
        grid: Grid,
        layouts: StageLayouts,
        bulk: BulkStore | None,
    ):
        t = self.tile
        consumer_warps = 4 * t.panels
        cluster = t.split_k * t.multicast
        # The next kernel may start now: it waits for the whole of this one before it reads `out`.
        cute.arch.griddepcontrol_launch_dependents()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        bid, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        rank = bid % cluster

        storage = cutlass.memory.SmemAllocator().allocate(self.shared)
        pipeline = pipeline_in(storage, layouts)
        self.start(warp, x, weights, pipeline)

        thread, _, _ = cute.arch.thread_idx()

        # Take this CTA's share of K, in stages
        first = Int32(0)
        count = cute.ceil_div(weights.codes.shape[1], t.blocks)
        if cutlass.const_expr(t.split_k > 1):
            steps_total = count
            first = rank * steps_total // t.split_k
            count = (rank + 1) * steps_total // t.split_k - first

        if warp >= consumer_warps:
            # setmaxnreg is for whole warpgroups; the producer of one panel is a warp alone.
            if cutlass.const_expr(t.panels > 1):
                cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            if warp == consumer_warps:
                self.produce(x, weights, pipeline, grid, bid, ctas, rank, first, count, panels_per_group)
            if cutlass.const_expr(cluster > 1 and not t.signal):
                # The other CTA may still write into this one's stages and arrive on its barriers, or wait for
                # partial sums. The barrier counts all threads of the cluster, so these must come, too.
                cute.arch.cluster_arrive()
                cute.arch.cluster_wait()
        else:
            if cutlass.const_expr(t.panels > 1):
                cute.arch.setmaxregister_increase(t.consumer_registers)
            self.consume(thread, bid, ctas, rank, count, grid, storage, pipeline, scale_bias, results, bulk)
            if cutlass.const_expr(t.multicast > 1):
                # As the producer above: the other CTA's warps still release this one's stages.
                cute.arch.cluster_arrive()
                cute.arch.cluster_wait()

    @cute.jit
    def start(self, warp: Int32, x: Tokens, weights: Weights, pipeline: Pipeline):
        """Initialize the barriers."""
        t = self.tile
        consumer_warps = cutlass.const_expr(4 * t.panels)
        reduced = pipeline.empty + t.stages  # with `signal`: this CTA's partial sums are complete
        if warp == consumer_warps:
            prefetch_descriptors(x, weights)
            with cute.arch.elect_one():
                # A multicast writes a stage of both CTAs, so that the warps of both have to be done with it.
                init_ring(pipeline.full, pipeline.empty, t.stages, 1, consumer_warps * t.multicast)
                if cutlass.const_expr(t.signal):
                    cute.arch.mbarrier_init(reduced, 1)
            # Publish the initial values: a relaxed arrival at the cluster's barrier orders nothing by itself.
            cute.arch.mbarrier_init_fence()
        if cutlass.const_expr(t.split_k * t.multicast > 1):
            # No CTA may write into another one, or arrive on its barriers, before that one has got this far.
            cute.arch.cluster_arrive_relaxed()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()  # nobody waits on a barrier that has no value yet

    @cute.jit
    def produce(
        self,
        x: Tokens,
        weights: Weights,
        pipeline: Pipeline,
        grid: Grid,
        bid: Int32,
        ctas: Int32,
        rank: Int32,
        first: Int32,
        count: Int32,
        panels_per_group: Int32,
    ):
        """The producer warp: fill `count` stages for every item of this CTA.

        Weights first, then tokens once the previous kernel's results are visible. The consumers need no wait of
        their own: they store only after tokens that were fetched after this one.
        """
        t = self.tile
        stages = t.stages
        full, empty = pipeline.full, pipeline.empty
        tXs, tXg = partition_tokens(x, pipeline, t.token_step, t.blocks)
        loads = partition_weights(weights, pipeline, (t.blocks, t.panels), (None, None))

        # A pair's spare CTA beyond the last row tile still fetches its half of the tokens.
        groups = x.view.shape[2]
        item = self.item(bid // t.split_k, grid)
        group = cutlass.min(item.row_tile * t.panels // panels_per_group, groups - 1)
        box = self.box(item, x, rank)
        # Fetch the first weights. The bytes announced are the whole stage's: it is not full before its tokens
        # have come, too. With multicast half of those come from the other CTA, perhaps before this arrival,
        # without which the stage is not full either.
        for stage in cutlass.range_constexpr(stages):
            if stage < count:
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(full + stage, self.load_bytes(item))
                copy_weights(loads, (first + stage, item.row_tile), stage, full)
        # Fetch the first tokens
        cute.arch.griddepcontrol_wait()
        for stage in cutlass.range_constexpr(stages):
            if stage < count:
                source = tXg[None, None, first + stage, group]
                self.load_tokens(x, source, tXs, box, Int32(stage), full + stage)
        stage = cutlass.min(count, stages) % stages
        phase = Int32(0)  # of `empty`: a stage is refilled first after its first release
        if count < stages:
            phase = Int32(1)  # and the rest of the ring is free
        step = cutlass.min(count, stages)
        for index in cutlass.range(bid // t.split_k, grid.items, ctas, unroll=1):
            item = self.item(index, grid)
            box = self.box(item, x, rank)
            group = cutlass.min(item.row_tile * t.panels // panels_per_group, groups - 1)
            for at in cutlass.range(first + step, first + count, unroll=1):
                # Wait for a free stage
                cute.arch.mbarrier_wait(empty + stage, phase)
                # Issue the TMA loads
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(full + stage, self.load_bytes(item))
                copy_weights(loads, (at, item.row_tile), stage, full)
                self.load_tokens(x, tXg[None, None, at, group], tXs, box, stage, full + stage)
                stage, phase = advance(stage, phase, stages)
            step = Int32(0)

    @cute.jit
    def consume(
        self,
        thread: Int32,
        bid: Int32,
        ctas: Int32,
        rank: Int32,
        count: Int32,
        grid: Grid,
        storage,
        pipeline: Pipeline,
        scale_bias: Uint32,
        results: Results,
        bulk: BulkStore | None,
    ):
        """A consumer warpgroup: compute every item of this CTA, tiles first."""
        t = self.tile
        stage = Int32(0)
        phase = Int32(0)
        operands = (storage, pipeline, scale_bias, results, bulk)
        for index in cutlass.range(bid // t.split_k, grid.whole, ctas, unroll=1):
            item = self.item(index, grid)
            at = (thread, count, stage, phase, Place(item.first * t.token_step, item.row_tile, rank))
            stage, phase = self.compute(t.tokens, *at, *operands)
        if cutlass.const_expr(t.tail > 0):
            first_part = grid.whole + (bid + ctas - grid.whole % ctas) % ctas
            for index in cutlass.range(first_part, grid.items, ctas, unroll=1):
                item = self.item(index, grid)
                at = (thread, count, stage, phase, Place(item.first * t.token_step, item.row_tile, rank))
                stage, phase = self.compute(t.tail, *at, *operands)
        if cutlass.const_expr(bulk is not None):
            cute.arch.cp_async_bulk_wait_group(0, read=True)  # shared memory goes with the CTA

    @cute.jit
    def tile_at(self, index: Int32, grid: Grid):
        """Linear tile index -> (token tile, row tile); CTAs of a multicast pair take neighbouring rows."""
        t = self.tile
        pair = index // t.multicast
        row_groups = grid.row_tiles // t.multicast
        group = pair // (grid.token_group * row_groups)
        width = cutlass.min(grid.token_group, grid.token_tiles - group * grid.token_group)
        inside = pair - group * grid.token_group * row_groups
        row_tile = (inside // width) * t.multicast + index % t.multicast
        return group * grid.token_group + inside % width, row_tile

    @cute.jit
    def item(self, index: Int32, grid: Grid) -> Item:
        """Number of a tile, or of a part of one -> where it lies."""
        t = self.tile
        tile_steps = cutlass.const_expr(t.tokens // t.token_step)
        if cutlass.const_expr(t.tail == 0):
            token_tile, row_tile = self.tile_at(index, grid)
            first, steps = token_tile * tile_steps, Int32(tile_steps)
        else:
            parts = cutlass.const_expr(t.tokens // t.tail)
            part_steps = cutlass.const_expr(t.tail // t.token_step)
            first, row_tile, steps = Int32(0), Int32(0), Int32(part_steps)
            in_cut = index - grid.whole
            if in_cut < grid.cut:
                tile, part = index, Int32(0)
                if in_cut >= 0:
                    pair = in_cut // t.multicast
                    tile = grid.whole + pair // parts * t.multicast + in_cut % t.multicast
                    part = pair % parts
                else:
                    steps = Int32(tile_steps)
                token_tile, row_tile = self.tile_at(tile, grid)
                # A part without a token is the last one that has some, once more: equal results are stored twice
                last = (grid.steps - 1) // part_steps * part_steps
                first = cutlass.min(token_tile * tile_steps + part * part_steps, last)
            else:
                in_last = in_cut - grid.cut
                pair = in_last // t.multicast
                row_tile = pair // grid.last_parts * t.multicast + in_last % t.multicast
                first = grid.token_tiles * tile_steps + pair % grid.last_parts * part_steps
        return Item(first, cutlass.min(grid.steps - first, steps), steps, row_tile)

    def load_bytes(self, item: Item):
        """Bytes of a stage of an item: its weights, and the boxes of tokens of every CTA that loads some."""
        t = self.tile
        return t.stage_weight_bytes + item.present * (t.token_step * t.blocks * BLOCK_K * 2)

    @cute.jit
    def box(self, item: Item, x: Tokens, rank: Int32) -> Box:
        """What this CTA loads of an item's tokens: with multicast its share of them, which may be nothing."""
        t = self.tile
        first, height = Int32(0), item.present
        if cutlass.const_expr(t.multicast > 1):
            share = item.steps // t.multicast
            first = rank * share
            height = cutlass.min(cutlass.max(item.present - first, 0), share)
        return Box(item.first + first, first, height, descriptor_of(x, height))

    @cute.jit
    def load_row_scales(
        self,
        row_tile: Int32,
        thread: Int32,
        mRowScale: cute.Tensor,  # f32 [N]
    ):
        """The scales of a consumer thread's rows r and r + 8."""
        scales = cute.make_rmem_tensor(2, Float32)
        for h in cutlass.range_constexpr(2):
            n = row_tile * self.tile.rows + thread // 32 * 16 + thread % 32 // 4 + 8 * h
            scales[h] = mRowScale[cutlass.min(n, mRowScale.shape[0] - 1)]
        return scales

    @cute.jit
    def load_tokens(
        self,
        x: Tokens,
        source: cute.Tensor,  # [box, steps of tokens]
        target: cute.Tensor,  # [box, steps of a tile, stages]
        box: Box,
        stage: Int32,
        barrier: cute.Pointer,
    ):
        """TMA of one stage's tokens. With multicast this CTA loads its share into every CTA, and signals all."""
        part = (source[None, box.source], target[None, box.target, stage])
        if cutlass.const_expr(self.tile.multicast > 1):
            mask = cutlass.Int16((1 << self.tile.multicast) - 1)
            if box.height > 0:
                cute.copy(
                    x.atoms[0], *part, tma_bar_ptr=barrier, tma_desc_ptr=box.descriptor, mcast_mask=mask
                )
        else:
            cute.copy(x.atoms[0], *part, tma_bar_ptr=barrier, tma_desc_ptr=box.descriptor)

    @cute.jit
    def release(self, empty: cute.Pointer, stage: Int32, lane: Int32):
        """Tell every producer that writes this stage that the warp is done with it."""
        # No sync_warp: wgmma waits for the warp, and every lane decoded its words of the stage before that.
        if cutlass.const_expr(self.tile.multicast > 1):
            if lane < self.tile.multicast:
                cute.arch.mbarrier_arrive(empty + stage, lane)  # of the cluster's CTA `lane`
        else:
            if lane == 0:
                cute.arch.mbarrier_arrive(empty + stage)

    @cute.jit
    def compute(
        self,
        tokens: cutlass.Constexpr[int],
        thread: Int32,
        count: Int32,
        stage: Int32,
        phase: Int32,
        place: Place,
        storage,
        pipeline: Pipeline,
        scale_bias: Uint32,
        results: Results,
        bulk: BulkStore | None,
    ):
        """One tile, or a part of one, of so many tokens: multiply and store -> (next stage, its phase)."""
        t = self.tile
        # Read the row scales before the main loop, whose time hides the latency
        if cutlass.const_expr(t.split_k > 1):
            row_scales = self.load_reduced_scales(place.row_tile, thread, results.row_scale)
        else:
            row_scales = self.load_row_scales(place.row_tile, thread, results.row_scale)
        left = results.out.shape[0] - place.first_token  # of all tokens
        if cutlass.const_expr(t.signal):
            # With `signal`, this CTA's partial sums are complete: the one phase waits for this arrival and the bytes.
            reduced = storage.empty.data_ptr() + t.stages
            if thread == 0:
                slices = cutlass.min(cute.ceil_div(left, 8), t.tokens // 8)
                owned = (slices - place.rank + t.split_k - 1) // t.split_k
                cute.arch.mbarrier_arrive_and_expect_tx(reduced, owned * (t.split_k * t.panels * 128 * 16))
        acc, stage, phase = self.accumulate(tokens, thread, count, stage, phase, pipeline, scale_bias)
        target = (place, storage, row_scales, results)
        if cutlass.const_expr(t.split_k > 1):  # one tile
            self.send_partials(acc, thread, left, place.rank, storage)
            # Wait for the partial sums of every CTA
            if cutlass.const_expr(t.signal):
                cute.arch.mbarrier_wait(
                    reduced, 0
                )  # also keeps this CTA alive until the last of them has landed
            else:
                # Release and acquire: the sums have arrived. The producer's threads arrive at the kernel's end.
                cute.arch.cluster_arrive()
                cute.arch.cluster_wait()
            self.reduce_partials(thread, *target)
        elif cutlass.const_expr(bulk is not None):
            self.store_tile_bulk(acc, tokens, thread, *target, bulk)
        else:
            self.store_tile(acc, tokens, thread, *target)
        return stage, phase

    def weight_addresses(self, pipeline: Pipeline, panel: Int32, row_warp: Int32, lane: Int32):
        """-> where a thread reads codes and scales of a panel's first block in the first stage (sm90/layout.py)."""
        panel_codes = self.tile.blocks * BLOCK_CODE_BYTES
        panel_scales = self.tile.blocks * BLOCK_SCALE_BYTES
        # 16 bytes of codes a lane, 8 bytes of scales for the four lanes of a row
        codes = smem_address(pipeline.codes.iterator) + (panel * panel_codes + row_warp * 512 + lane * 16)
        scales = smem_address(pipeline.scales.iterator) + (
            panel * panel_scales + row_warp * 64 + (lane // 4) * 8
        )
        return codes, scales

    @cute.jit
    def accumulate(
        self,
        tokens: cutlass.Constexpr[int],
        thread: Int32,
        count: Int32,
        stage: Int32,
        phase: Int32,
        pipeline: Pipeline,
        bias: Uint32,
    ):
        """The main loop -> (accumulator [64 rows, tokens] of this warpgroup, next stage, its phase)."""
        t = self.tile
        panel = thread // 128
        lane = thread % 32
        row_warp = (thread % 128) // 32
        tiled_mma = panels_by_tokens(t.panels, tokens)
        thr_mma = tiled_mma.get_slice(thread)
        sFirst = cute.local_tile(pipeline.x, (tokens, t.blocks * BLOCK_K, t.stages), (0, 0, 0))
        tCrX = tiled_mma.make_fragment_B(thr_mma.partition_B(sFirst))
        if cutlass.const_expr(t.lag > 0):
            self.follow(panel, count)
        weights = cute.make_rmem_tensor(thr_mma.partition_shape_A((t.rows, t.blocks * BLOCK_K)), BFloat16)
        weight_words = cute.recast_tensor(weights, Uint32)
        acc = cute.make_rmem_tensor(thr_mma.partition_shape_C((t.rows, tokens)), Float32)
        acc.fill(0.0)
        tiled_mma.set(warpgroup.Field.ACCUMULATE, True)
        codes, scales = self.weight_addresses(pipeline, panel, row_warp, lane)
        stage_codes, stage_scales = (
            t.panels * t.blocks * BLOCK_CODE_BYTES,
            t.panels * t.blocks * BLOCK_SCALE_BYTES,
        )
        # Half a stage of weights is decoded while the wgmmas of the other half run. No branch may stand between
        # a wait_group and the wgmmas after it, and no decode may sink between wgmmas: either makes ptxas
        # serialize them (C7513).
        steps = cutlass.const_expr(t.blocks * STEPS // 2)
        previous = stage
        for i in cutlass.range(count, unroll=1):
            # Wait for a full stage and read its weights
            cute.arch.mbarrier_wait(pipeline.full + stage, phase)
            words, scale_words = [], []
            for b in cutlass.range_constexpr(t.blocks):
                words.append(load_words(codes + stage * stage_codes + b * BLOCK_CODE_BYTES, 4))
                scale_words.append(load_words(scales + stage * stage_scales + b * BLOCK_SCALE_BYTES, 2))
            for half in cutlass.range_constexpr(2):
                warpgroup.wait_group(steps)  # the wgmmas that read this half of `weights` are done
                decode(weight_words, words, scale_words, range(half * steps, (half + 1) * steps), bias)
                # Issue the wgmmas; the fence orders the registers just written before they read them
                warpgroup.fence()
                for step in cutlass.range_constexpr(half * steps, (half + 1) * steps):
                    cute.gemm(tiled_mma, acc, weights[None, None, step], tCrX[None, None, step, stage], acc)
                    warpgroup.commit_group()
            # Give the previous stage back: the waits above have seen its last wgmmas end
            if i > 0:
                self.release(pipeline.empty, previous, lane)
            if cutlass.const_expr(t.lag > 0):
                self.lead(panel, i, count)
            previous = stage
            stage, phase = advance(stage, phase, t.stages)
        # Wait for the sums and give the last stage back
        warpgroup.wait_group(0)
        if count > 0:
            self.release(pipeline.empty, previous, lane)
        return acc, stage, phase

    @cute.jit
    def lead(self, panel: Int32, step: Int32, count: Int32):
        """After `lag` steps let the next panel's warpgroup start this tile: `follow` waits at Barrier.LAG_0 + panel.

        Tiles of fewer steps than stages do without: a warpgroup could be a whole tile ahead and signal twice.
        """
        if step == self.tile.lag and count >= self.tile.stages:
            for p in cutlass.range_constexpr(self.tile.panels - 1):
                if panel == p:
                    cute.arch.barrier_arrive(barrier_id=Barrier.LAG_0 + p, number_of_threads=256)

    @cute.jit
    def follow(self, panel: Int32, count: Int32):
        """Wait for `lead` of the panel before: 128 threads arrive there, 128 wait here."""
        if count >= self.tile.stages:
            for p in cutlass.range_constexpr(self.tile.panels - 1):
                if panel == p + 1:
                    cute.arch.barrier(barrier_id=Barrier.LAG_0 + p, number_of_threads=256)

    @cute.jit
    def meet(self, group: Int32):
        """A barrier of one warpgroup; a computed barrier number would reserve all 16."""
        if group == 0:
            cute.arch.barrier(barrier_id=Barrier.WARPGROUP_0, number_of_threads=128)
        else:
            if cutlass.const_expr(self.tile.panels == 3):
                if group == 1:
                    cute.arch.barrier(barrier_id=Barrier.WARPGROUP_1, number_of_threads=128)
                else:
                    cute.arch.barrier(barrier_id=Barrier.WARPGROUP_2, number_of_threads=128)
            else:
                cute.arch.barrier(barrier_id=Barrier.WARPGROUP_1, number_of_threads=128)

    @cute.jit
    def factors(
        self,
        row: Int32,
        row_scales: cute.Tensor,  # f32 (2,), of rows r and r + 8
        results: Results,
    ):
        """What a thread multiplies its rows r = `row` and r + 8 by, and what it adds."""
        factor = cute.make_rmem_tensor(2, Float32)
        offset = cute.make_rmem_tensor(2, Float32)
        for h in cutlass.range_constexpr(2):
            factor[h] = row_scales[h] * Float32(EPILOGUE_SCALE)
            if cutlass.const_expr(self.has_bias):
                offset[h] = results.bias[cutlass.min(row + 8 * h, results.out.shape[1] - 1)]
        return factor, offset

    def scaled(self, acc: cute.Tensor, octet: int, factor: cute.Tensor, offset: cute.Tensor) -> list[Float32]:
        """A thread's results of 8 tokens: two tokens of row r, then of row r + 8."""
        v = [acc[octet * 4 + i] * factor[i // 2] for i in range(4)]
        return [v[i] + offset[i // 2] for i in range(4)] if self.has_bias else v

    def stage_bf16(self, acc, chunk: int, octets: int, factor, offset, address: Int32, pitch: int) -> None:
        """Write chunk number `chunk`, of so many octets of tokens, transposed to rows of tokens `pitch` bytes apart."""
        for octet in range(octets):
            v = self.scaled(acc, chunk * octets + octet, factor, offset)
            packed = (pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]))
            if octet % 2 == 0:
                waiting = packed
            else:
                store_matrices_transposed(address + (octet - 1) * 8 * pitch, *waiting, *packed)

    @cute.jit
    def store_tile(
        self,
        acc: cute.Tensor,  # f32 wgmma accumulator of 64 rows x tokens
        tokens: cutlass.Constexpr[int],
        thread: Int32,
        place: Place,
        storage,
        row_scales: cute.Tensor,  # f32 (2,), of rows r and r + 8
        results: Results,
    ):
        """Scale, transpose through shared memory a few tokens at a time, store rows of `out`.

        Each warpgroup stores its own panel without meeting the others: one stores while another multiplies.
        """
        t = self.tile
        mOut = results.out
        wide_out = cutlass.const_expr(mOut.element_type.width == 32)
        chunk = cutlass.const_expr(t.output_tokens // 2 if wide_out else t.output_tokens)
        pitch = cutlass.const_expr(
            (PANEL_ROWS + 4) * 4 if wide_out else (PANEL_ROWS + 8) * 2
        )  # no bank conflicts
        panel_bytes = cutlass.const_expr(t.output_bytes // t.panels)
        panel = thread // 128
        inside = thread % 128
        lane = thread % 32
        row = inside // 32 * 16 + lane // 4
        first_n = place.row_tile * t.rows + panel * PANEL_ROWS
        factor, offset = self.factors(first_n + row, row_scales, results)
        buffer = smem_address(storage.output.data_ptr()) + panel * panel_bytes
        matrix = lane // 8
        matrix_address = (lane % 8 + matrix // 2 * 8) * pitch + (inside // 32 * 16 + matrix % 2 * 8) * 2
        for e in cutlass.range_constexpr(tokens // chunk):
            half_buffer = buffer + (e % 2) * (panel_bytes // 2)
            first_m = place.first_token + e * chunk
            # Absent tokens are left out by pairs of chunks, so that a next tile begins with the other buffer
            if first_m - e % 2 * chunk < mOut.shape[0]:
                if cutlass.const_expr(wide_out):
                    for octet in cutlass.range_constexpr(chunk // 8):
                        v = self.scaled(acc, e * (chunk // 8) + octet, factor, offset)
                        for i in cutlass.range_constexpr(4):
                            token = octet * 8 + (lane % 4) * 2 + i % 2
                            store_shared(half_buffer + token * pitch + (row + 8 * (i // 2)) * 4, v[i])
                else:
                    self.stage_bf16(acc, e, chunk // 8, factor, offset, half_buffer + matrix_address, pitch)
                # Wait for the whole chunk. One barrier a chunk is enough: the other buffer is written next, and
                # whoever writes this one again has met everybody after their reads.
                self.meet(panel)
                self.store_chunk(half_buffer, chunk, pitch, inside, first_m, first_n, mOut)

    @cute.jit
    def store_chunk(
        self,
        buffer: Int32,
        chunk: cutlass.Constexpr[int],
        pitch: cutlass.Constexpr[int],
        inside: Int32,
        first_m: Int32,
        first_n: Int32,
        mOut: cute.Tensor,  # bf16 or f32 [M, N]
    ):
        """A warpgroup copies `chunk` rows of `out`, 64 columns of each, from shared memory, 16 bytes a thread."""
        per_row = cutlass.const_expr(PANEL_ROWS * mOut.element_type.width // 128)  # 16-byte pieces
        elements = cutlass.const_expr(128 // mOut.element_type.width)
        rows_per_pass = cutlass.const_expr(128 // per_row)
        for j in cutlass.range_constexpr(-(-chunk // rows_per_pass)):
            token = inside // per_row + j * rows_per_pass
            m = first_m + token
            n = first_n + inside % per_row * elements
            if m < mOut.shape[0] and token < chunk:
                words = load_words(buffer + token * pitch + inside % per_row * 16, 4)
                if cutlass.const_expr(self.aligned_rows):
                    if n < mOut.shape[1]:
                        store_words(mOut.iterator + (Int64(m) * mOut.shape[1] + n), words)
                else:
                    piece = cute.make_rmem_tensor(4, Uint32)
                    for i in cutlass.range_constexpr(4):
                        piece[i] = words[i]
                    values = cute.recast_tensor(piece, mOut.element_type)
                    for i in cutlass.range_constexpr(elements):
                        if n + i < mOut.shape[1]:
                            mOut[m, n + i] = values[i]

    @cute.jit
    def store_tile_bulk(
        self,
        acc: cute.Tensor,  # f32 wgmma accumulator of 64 rows x tokens
        tokens: cutlass.Constexpr[int],
        thread: Int32,
        place: Place,
        storage,
        row_scales: cute.Tensor,  # f32 (2,), of rows r and r + 8
        results: Results,
        bulk: BulkStore,
    ):
        """store_tile with TMA for the last step: a warpgroup's first warp sends each piece, and nobody waits for it.

        Piece e uses buffer e % 3. Before its barrier the pieces up to e - 2 have been read, so that everyone may
        write piece e + 1 after it.
        """
        t = self.tile
        chunk = cutlass.const_expr(t.output_tokens)
        piece_bytes = cutlass.const_expr(chunk * PANEL_ROWS * 2)
        panel = thread // 128
        inside = thread % 128
        lane = thread % 32
        sends = cute.arch.make_warp_uniform(inside // 32) == 0
        row = place.row_tile * t.rows + thread // 32 * 16 + lane // 4
        factor, offset = self.factors(row, row_scales, results)
        output = cute.recast_ptr(storage.output.data_ptr(), bulk.layout.inner, dtype=BFloat16)
        sOut = cute.make_tensor(output, bulk.layout.outer)
        gOut = cute.local_tile(bulk.out, (chunk, PANEL_ROWS), (None, None))
        tOs, tOg = partition_loads(bulk.atom, sOut, gOut, 2)
        # Row lane % 8 of matrix lane // 8: a token's 128 bytes of a panel's results, 128B-swizzled.
        matrix = lane // 8
        column = inside // 32 * 2 + matrix % 2
        address = (lane % 8 + matrix // 2 * 8) * (PANEL_ROWS * 2) + (column ^ (lane % 8)) * 16
        address += smem_address(storage.output.data_ptr()) + panel * (BULK_BUFFERS * piece_bytes)
        # Wait until TMA has read the tile before: bulk groups belong to the thread that committed them, so its
        # warp waits, and the others wait for it
        if sends:
            cute.arch.cp_async_bulk_wait_group(0, read=True)
        self.meet(panel)
        for e in cutlass.range_constexpr(tokens // chunk):
            buffer = cutlass.const_expr(e % BULK_BUFFERS)
            target = address + buffer * piece_bytes
            if place.first_token + e * chunk < results.out.shape[0]:  # not for absent tokens
                self.stage_bf16(acc, e, chunk // 8, factor, offset, target, PANEL_ROWS * 2)
                # Hand the piece over: each thread makes its own writes visible to TMA's proxy, then all meet
                cute.arch.fence_view_async_shared()
                if sends:
                    cute.arch.cp_async_bulk_wait_group(1, read=True)
                self.meet(panel)
                # Issue the TMA store
                if sends:
                    piece = (place.first_token // chunk + e, place.row_tile * t.panels + panel)
                    cute.copy(bulk.atom, tOs[None, panel * BULK_BUFFERS + buffer], tOg[None, *piece])
                    cute.arch.cp_async_bulk_commit_group()

    @cute.jit
    def send_partials(
        self,
        acc: cute.Tensor,  # f32 wgmma accumulator of 64 rows x tokens
        thread: Int32,
        left: Int32,
        rank: Int32,
        storage,
    ):
        """Partial sums of token slice `octet` go to the cluster's CTA octet % split_k, of absent tokens nowhere."""
        t = self.tile
        reduced = smem_address(storage.empty.data_ptr() + t.stages)
        slices = cutlass.const_expr(-(-t.tokens // 8 // t.split_k))
        buffer = smem_address(storage.output.data_ptr()) + (rank * slices * (128 * t.panels) + thread) * 16
        for octet in cutlass.range_constexpr(t.tokens // 8):
            if octet * 8 < left:
                target = address_in_cluster(buffer, Int32(octet % t.split_k))
                target += (octet // t.split_k) * (128 * t.panels * 16)
                values = tuple(acc[octet * 4 + i] for i in range(4))
                if cutlass.const_expr(t.signal):
                    signal_in_cluster(target, values, address_in_cluster(reduced, Int32(octet % t.split_k)))
                else:
                    store_in_cluster(target, values)

    @cute.jit
    def load_reduced_scales(
        self,
        row_tile: Int32,
        thread: Int32,
        mRowScale: cute.Tensor,  # f32 [N]
    ):
        """The scales of the 8 rows that a thread adds in `reduce_partials`."""
        scales = cute.make_rmem_tensor(8, Float32)
        first_n = self.reduced_row(row_tile, thread)
        for r in cutlass.range_constexpr(8):
            scales[r] = mRowScale[cutlass.min(first_n + r, mRowScale.shape[0] - 1)]
        return scales

    @cute.jit
    def reduced_row(self, row_tile: Int32, thread: Int32):
        """The first of the 8 rows that a thread adds."""
        line = thread % (PANEL_ROWS * self.tile.panels)
        return row_tile * self.tile.rows + line // 16 * 16 + line // 2 % 2 * 8

    @cute.jit
    def reduce_partials(
        self,
        thread: Int32,
        place: Place,
        storage,
        row_scales: cute.Tensor,  # f32 (8,), of this thread's rows
        results: Results,
    ):
        """Add the token slices this CTA owns in ascending k order, scale, store.

        A line is 8 rows of one token: words 64 bytes apart in what `send_partials` left, f32 [4, thread] by slice
        and source. Sixteen lines of a slice read neighbouring words; the next sixteen read rows r ^ 1, or they
        would meet in the same banks.
        """
        t = self.tile
        mOut = results.out
        slices = cutlass.const_expr(-(-t.tokens // 8 // t.split_k))
        lines = cutlass.const_expr(PANEL_ROWS * t.panels)  # of a slice: half as many as threads
        slice_words = cutlass.const_expr(128 * t.panels * 4)
        sPartials = storage.output.get_tensor(cute.make_layout(slice_words * slices * t.split_k))
        line = thread % lines
        odd = line // 16 % 2
        word = line // 16 * 128 + line % 16
        first_n = self.reduced_row(place.row_tile, thread)
        for i in cutlass.range_constexpr(-(-slices // 2)):
            s = thread // lines + 2 * i
            octet = s * t.split_k + place.rank
            m = place.first_token + octet * 8 + line // 4 % 4 * 2 + line % 2
            if s < slices and octet < t.tokens // 8 and m < mOut.shape[0]:
                total = [Float32(0.0) for _ in range(8)]
                for source in cutlass.range_constexpr(t.split_k):
                    base = word + (source * slices + s) * slice_words
                    bases = (base + odd * 16, base - odd * 16)
                    for r in cutlass.range_constexpr(8):
                        total[r] = total[r] + sPartials[bases[r % 2] + r * 16]
                values = cute.make_rmem_tensor(8, mOut.element_type)
                for r in cutlass.range_constexpr(8):
                    value = total[r] if odd == 0 else total[r ^ 1]
                    value = value * (row_scales[r] * Float32(EPILOGUE_SCALE))
                    if cutlass.const_expr(self.has_bias):
                        value = value + results.bias[cutlass.min(first_n + r, mOut.shape[1] - 1)]
                    values[r] = value.to(mOut.element_type)
                self.store_values(values, m, first_n, mOut)

    @cute.jit
    def store_values(
        self,
        values: cute.Tensor,  # of out's type (8,)
        m: Int32,
        first_n: Int32,
        mOut: cute.Tensor,  # bf16 or f32 [M, N]
    ):
        """Eight columns of a row of `out` from registers, 16 bytes at a time."""
        elements = cutlass.const_expr(128 // mOut.element_type.width)  # in 16 bytes
        words = cute.recast_tensor(values, Uint32)
        for q in cutlass.range_constexpr(8 // elements):
            n = first_n + q * elements
            if cutlass.const_expr(self.aligned_rows):
                if n < mOut.shape[1]:
                    piece = [words[4 * q + j] for j in range(4)]
                    store_words(mOut.iterator + (Int64(m) * mOut.shape[1] + n), piece)
            else:
                for j in cutlass.range_constexpr(elements):
                    if n + j < mOut.shape[1]:
                        mOut[m, n + j] = values[q * elements + j]
