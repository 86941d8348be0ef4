"""Products of NVFP4 experts and NVFP4 tokens on tcgen05: w13 with SwiGLU, and w2.

    acc[p, n, s] = sum_k weight[e, p, n, k] * token[s, k]     panels p, weight rows n, slots s of one expert e
    w13   h[s, n] = swiglu(acc[0] * g, acc[1] * u)            g, u = act_scale * row_scale of gate and up rows
    w2    y[pair of s, n] = acc * act_scale * row_scale

A slot is a row of the scratch: tile i of the table holds slots tokens * i and following. Weights are the
instruction's M, tokens its N, so that a few tokens take a small tile. A panel is here an accumulator of 128 weight
rows (256 of two CTAs), not the 64 packed rows of Hopper's weights; w13's two are gate and up.

    weights       e2m1 [E, N, K], the checkpoint's; their scales e4m3 [E, P, KB, 32, 16], 128x4 atoms
    tokens        e2m1 [R, K] by slot; their scales e4m3 [tiles * atoms, KB, 32, 16], atoms of each tile its own
    h, NVFP4      as tokens; h or y, bf16: [R, I], [M * T, H]
"""

from enum import IntEnum
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.utils.blackwell_helpers as blackwell
import cutlass.utils.blockscaled_layout as blockscaled
from cutlass import (
    BFloat16,
    Float4E2M1FN,
    Float8E4M3FN,
    Float32,
    Int16,
    Int32,
    Int64,
    Uint8,
    Uint32,
    pipeline,
)
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, tcgen05

from ..blackwell.output import Output, store_words
from ..blackwell.rounding import round_group, scale_offset
from ..blackwell.variants import Result
from ..device.activation import swiglu
from ..device.launch import launch
from ..device.ptx import load_coherent, load_words, smem_address
from ..format import GROUP_SIZE
from .ptx import fence_after_wait, fence_before_arrive, store_bf16
from .tiles import GROUPS_PER_ATOM, ROWS, TENSOR_COLUMNS, TILE_K, GroupedTile
from .views import Load, Operand, Operands, Stages

PITCH = ROWS * 2 + 16  # bytes of a slot in the staged output; 16 more than its rows: no bank conflicts


class Barrier(IntEnum):
    """Named barriers of a CTA; 0 is sync_threads'."""

    TENSOR_MEMORY = 1  # epilogue and MMA warps: its address is in shared memory
    FIRST_GROUP = 2  # the four warps of an epilogue group
    SECOND_GROUP = 3
    EPILOGUE = 4  # all epilogue warps: they have read tensor memory


class Layouts(NamedTuple):
    """What a tile's instructions, loads and shared memory look like."""

    mma: cute.TiledMma
    scale_mma: cute.TiledMma  # of one CTA, for loads of the tokens' scales
    weights: cute.ComposedLayout  # shared memory; stage * panels + panel is the last mode
    tokens: cute.ComposedLayout
    weight_scales: cute.Layout
    token_scales: cute.Layout
    cluster: cute.Layout
    scale_cluster: cute.Layout


class Units(NamedTuple):
    """The table's tiles times the tiles of weight rows: a CTA takes `first` and every `step`-th from there on."""

    table: Int64  # address of int32 [1 + tiles, 4]
    row_tiles: Int32
    number: Int32
    first: Int32
    step: Int32


class ScaleCopy(NamedTuple):
    """A copy of block scales into tensor memory."""

    copy: cute.TiledCopy
    source: cute.Tensor  # by stage, of weights by stage * panels + panel
    target: cute.Tensor


class SumsLoad(NamedTuple):
    """A thread's load of its lane of the accumulators."""

    copy: cute.TiledCopy
    source: cute.Tensor  # f32 (values, 1, 1, 1, chunk, tile * panels + panel), in tensor memory
    values: cute.Tensor  # (lane, column) of each value


class ExpertsKernel:
    """One compiled kernel: a tile and a result.

    Roles per CTA (persistent over tiles of the table x tiles of weight rows)
        warps 0..3 (7)   epilogue: accumulators to registers, through shared memory, to global memory
        next warp        tcgen05: block scales to tensor memory, MMA of each panel
        last warp        TMA of both operands and their scales; weights of the first tile before the tokens exist
    Pipelines
        stages           TMA -> MMA, `tile.stages` of 256 k
        accumulators     MMA -> epilogue, one or two tiles
        Both are cutlass.pipeline's: an accumulator's index names its barriers and its columns, which linear_kernel.py's
        overlapping accumulators do not have in common.
    With two CTAs a panel is 256 rows; a CTA loads and stores its 128 of them and loads half of the tokens.
    """

    def __init__(self, tile: GroupedTile, result: str):
        tile.check()
        self.tile = tile
        self.result = Result(result)
        self.activated = self.result is not Result.ROWS
        if self.activated and tile.panels != 2:
            raise ValueError(f"{tile}: w13 takes two panels, gate and up")
        self.mma_warp = 4 * tile.epilogue_groups
        self.tma_warp = self.mma_warp + 1
        self.cluster = (tile.ctas_per_mma, 1, 1)
        self.mma_tile = (tile.rows, tile.tokens, TILE_K)  # of all CTAs that share the instruction
        self.scale_tile = (ROWS, tile.scale_atoms * ROWS, TILE_K)

    def layouts(self) -> Layouts:
        """Host code that kernel and tests share; static, so the kernel calls it again."""
        t = self.tile
        group = tcgen05.CtaGroup.TWO if t.ctas_per_mma == 2 else tcgen05.CtaGroup.ONE
        major = OperandMajorMode.K
        operands = (Float4E2M1FN, Float4E2M1FN, major, major, Float8E4M3FN, GROUP_SIZE)
        mma = blackwell.make_blockscaled_trivial_tiled_mma(*operands, group, self.mma_tile[:2])
        # Every CTA of an instruction reads the scales of all tokens, whole 128-row atoms of them.
        scale_mma = blackwell.make_blockscaled_trivial_tiled_mma(
            *operands, tcgen05.CtaGroup.ONE, self.scale_tile[:2]
        )
        panels = t.panels * t.stages
        cluster = cute.make_layout(self.cluster)
        return Layouts(
            mma=mma,
            scale_mma=scale_mma,
            weights=blackwell.make_smem_layout_a(mma, self.mma_tile, Float4E2M1FN, panels),
            tokens=blackwell.make_smem_layout_b(mma, self.mma_tile, Float4E2M1FN, t.stages),
            weight_scales=blockscaled.make_smem_layout_sfa(mma, self.mma_tile, GROUP_SIZE, panels),
            token_scales=blockscaled.make_smem_layout_sfb(mma, self.mma_tile, GROUP_SIZE, t.stages),
            cluster=cute.tiled_divide(cluster, (mma.thr_id.shape,)),
            scale_cluster=cute.tiled_divide(cluster, (scale_mma.thr_id.shape,)),
        )

    def operand_layouts(self, weights, weight_scales, tokens, token_scales) -> tuple[cute.Layout, ...]:
        """Shapes of the operands -> layouts of (weights, tokens, weight scales, token scales) as TMA reads them.

        Codes are (rows, K, matrices), scales (((32, 4), atoms), ((16, 4), atoms), matrices); the matrices of w13
        are each expert's gate and up rows.
        """
        segments = 2 if self.activated else 1
        matrices, rows = weights[0] * segments, weights[1] // segments
        k = cute.assume(weights[2] * 2, divby=32)
        pitch = cute.assume(rows * k, divby=32)
        scale_k = weight_scales[2] * GROUPS_PER_ATOM * GROUP_SIZE
        return (
            cute.make_layout((rows, k, matrices), stride=(k, 1, pitch)),
            cute.make_layout((tokens[0], k, 1), stride=(k, 1, 0)),
            blockscaled.tile_atom_to_shape_SF(
                (weight_scales[1] // segments * ROWS, scale_k, matrices), GROUP_SIZE
            ),
            blockscaled.tile_atom_to_shape_SF((token_scales[0] * ROWS, scale_k, 1), GROUP_SIZE),
        )

    def shared_storage(self, layouts: Layouts):
        """The struct of shared memory."""
        t = self.tile

        @cute.struct
        class Shared:
            loads: cute.struct.MemRange[Int64, 2 * t.stages]
            sums: cute.struct.MemRange[Int64, 2 * t.accumulator_stages]
            tmem_freed: Int64
            tmem: Int32
            weights: cute.struct.Align[
                cute.struct.MemRange[Float4E2M1FN, cute.cosize(layouts.weights.outer)], 1024
            ]
            tokens: cute.struct.Align[
                cute.struct.MemRange[Float4E2M1FN, cute.cosize(layouts.tokens.outer)], 1024
            ]
            weight_scales: cute.struct.Align[
                cute.struct.MemRange[Float8E4M3FN, cute.cosize(layouts.weight_scales)], 1024
            ]
            token_scales: cute.struct.Align[
                cute.struct.MemRange[Float8E4M3FN, cute.cosize(layouts.token_scales)], 1024
            ]
            output: cute.struct.Align[cute.struct.MemRange[Uint8, t.output_bytes], 128]
            act_scales: cute.struct.Align[cute.struct.MemRange[Float32, t.tokens * t.epilogue_groups], 16]
            pairs: cute.struct.MemRange[Int32, t.tokens * t.epilogue_groups]

        return Shared

    @cute.jit
    def __call__(
        self,
        mWeights: cute.Tensor,  # uint8 [E, N, K/2]
        mWeightScales: cute.Tensor,  # uint8 [E, P, KB, 32, 16]
        mRowScale: cute.Tensor,  # f32 [E, N]
        mTokens: cute.Tensor,  # uint8 [R, K/2]
        mTokenScales: cute.Tensor,  # uint8 [tiles * atoms, KB, 32, 16]
        mActScale: cute.Tensor,  # f32 [1], [E] or [R]
        mTable: cute.Tensor,  # int32 [1 + tiles, 4]
        mPairs: cute.Tensor,  # int32 [R], the pair of each slot
        mOut: cute.Tensor,  # uint8 [R, I/2], bf16 [R, I] or bf16 [M * T, H]
        mOutScales: cute.Tensor,  # uint8 [tiles * atoms, ceil(I/64), 32, 16]; any without NVFP4
        mOutActScale: cute.Tensor,  # f32 [1] or [E], the scale h is rounded with; any without NVFP4
        by_slot: Int32,  # 1 for an act_scale of every slot
        by_expert: Int32,  # 1 for an act_scale of every expert
        out_by_expert: Int32,  # the same of mOutActScale
        limit: Float32,
        max_ctas: Int32,
        stream,
    ):
        t = self.tile
        layouts = self.layouts()
        operands = (mWeights, mTokens, mWeightScales, mTokenScales)
        elements = (Float4E2M1FN, Float4E2M1FN, Float8E4M3FN, Float8E4M3FN)
        operand_layouts = self.operand_layouts(
            mWeights.shape, mWeightScales.shape, mTokens.shape, mTokenScales.shape
        )
        weights, tokens, weight_scales, token_scales = (
            cute.make_tensor(cute.recast_ptr(operand.iterator, dtype=element), layout)
            for operand, element, layout in zip(operands, elements, operand_layouts, strict=True)
        )
        weight_atom, tWeights = cute.nvgpu.make_tiled_tma_atom_A(
            blackwell.cluster_shape_to_tma_atom_A(self.cluster, layouts.mma.thr_id),
            weights,
            cute.slice_(layouts.weights, (None, None, None, 0)),
            self.mma_tile,
            layouts.mma,
            layouts.cluster.shape,
        )
        token_atom, tTokens = cute.nvgpu.make_tiled_tma_atom_B(
            blackwell.cluster_shape_to_tma_atom_B(self.cluster, layouts.mma.thr_id),
            tokens,
            cute.slice_(layouts.tokens, (None, None, None, 0)),
            self.mma_tile,
            layouts.mma,
            layouts.cluster.shape,
        )
        weight_scale_atom, tWeightScales = cute.nvgpu.make_tiled_tma_atom_A(
            blackwell.cluster_shape_to_tma_atom_A(self.cluster, layouts.mma.thr_id),
            weight_scales,
            cute.slice_(layouts.weight_scales, (None, None, None, 0)),
            self.mma_tile,
            layouts.mma,
            layouts.cluster.shape,
            internal_type=Int16,
        )
        token_scale_atom, tTokenScales = cute.nvgpu.make_tiled_tma_atom_B(
            blackwell.cluster_shape_to_tma_atom_SFB(self.cluster, layouts.mma.thr_id),
            token_scales,
            cute.slice_(layouts.token_scales, (None, None, None, 0)),
            self.scale_tile,
            layouts.scale_mma,
            layouts.scale_cluster.shape,
            internal_type=Int16,
        )

        self.shared = self.shared_storage(layouts)
        row_tiles = cute.ceil_div(weights.shape[0], t.rows if self.activated else t.rows * t.panels)
        launch(
            self.kernel(
                Operands(
                    Operand(weight_atom, tWeights),
                    Operand(token_atom, tTokens),
                    Operand(weight_scale_atom, tWeightScales),
                    Operand(token_scale_atom, tTokenScales),
                ),
                mRowScale,
                mActScale,
                mTable,
                mPairs,
                mOut,
                mOutScales,
                mOutActScale,
                by_slot,
                by_expert,
                out_by_expert,
                limit,
                row_tiles,
            ),
            grid=(
                cutlass.min((mTable.shape[0] - 1) * row_tiles, max_ctas // t.ctas_per_mma) * t.ctas_per_mma,
                1,
                1,
            ),
            block=(t.threads, 1, 1),
            cluster=self.cluster,
            min_blocks_per_mp=1,
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        operands: Operands,  # e2m1 (rows, K, matrices), scales e4m3 (((32, 4), atoms), ((16, 4), atoms), matrices)
        mRowScale: cute.Tensor,  # f32 [E, N]
        mActScale: cute.Tensor,  # f32 [1], [E] or [R]
        mTable: cute.Tensor,  # int32 [1 + tiles, 4]
        mPairs: cute.Tensor,  # int32 [R]
        mOut: cute.Tensor,  # uint8 [R, I/2], bf16 [R, I] or bf16 [M * T, H]
        mOutScales: cute.Tensor,  # uint8 [tiles * atoms, ceil(I/64), 32, 16]
        mOutActScale: cute.Tensor,  # f32 [1] or [E]
        by_slot: Int32,
        by_expert: Int32,
        out_by_expert: Int32,
        limit: Float32,
        row_tiles: Int32,
    ):
        t = self.tile
        layouts = self.layouts()
        mma = layouts.mma
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        thread, _, _ = cute.arch.thread_idx()
        bid, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        member = bid % t.ctas_per_mma
        rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
        coordinate = layouts.cluster.get_flat_coord(rank)
        scale_coordinate = layouts.scale_cluster.get_flat_coord(rank)
        storage = cutlass.memory.SmemAllocator().allocate(self.shared)

        if warp == self.tma_warp:
            for operand in operands:
                cpasync.prefetch_descriptor(operand.atom)
        # Initialize the barriers. Of a pair, no CTA may signal the other's before they are there: it waits below, and
        # makes its views meanwhile. The inits are fenced, so the arrival may be relaxed.
        loads, sums, tmem = self.synchronization(storage, layouts)
        pipeline.pipeline_init_arrive(cluster_shape_mn=self.cluster, is_relaxed=True)

        shared = Stages(
            storage.weights.get_tensor(layouts.weights.outer, swizzle=layouts.weights.inner),
            storage.tokens.get_tensor(layouts.tokens.outer, swizzle=layouts.tokens.inner),
            storage.weight_scales.get_tensor(layouts.weight_scales),
            storage.token_scales.get_tensor(layouts.token_scales),
        )
        sums_shape = cute.append(mma.partition_shape_C(self.mma_tile[:2]), t.panels * t.accumulator_stages)
        sums_layout = mma.make_fragment_C(sums_shape).layout
        count = cute.ceil_div(operands.weights.tensor.shape[1], TILE_K)
        pipeline.pipeline_init_wait(cluster_shape_mn=self.cluster)

        # What came before the previous kernel, the table among it, is complete: every kernel here lets its
        # successor start after its own wait.
        table = mTable.iterator.toint()
        tiles, _, _, _ = load_coherent(table)
        units = Units(table, row_tiles, tiles * row_tiles, bid // t.ctas_per_mma, ctas // t.ctas_per_mma)

        if warp == self.tma_warp:
            self.load(
                operands,
                shared,
                loads,
                units,
                count,
                member,
                coordinate,
                scale_coordinate,
            )

        if warp == self.mma_warp:
            # Wait for tensor memory, whose address the first epilogue warp leaves in shared memory
            tmem.wait_for_alloc()
            self.multiply(
                mma,
                tmem.retrieve_ptr(Float32),
                sums_layout,
                shared,
                loads,
                sums,
                member == 0,
                units,
                count,
            )

        if warp < self.mma_warp:
            # Allocate tensor memory
            tmem.allocate(TENSOR_COLUMNS)
            tmem.wait_for_alloc()
            columns = tmem.retrieve_ptr(Float32)
            # act_scale by slot is the previous kernel's result, and what is overwritten here it may still read.
            cute.arch.griddepcontrol_wait()
            # Not before tensor memory is this kernel's: a successor could take it and wait for this one.
            # Not before the wait either: so the next kernel finds complete, without waiting, what came before this one.
            cute.arch.griddepcontrol_launch_dependents()
            self.store(
                cute.make_tensor(columns, sums_layout),
                thread,
                storage,
                sums,
                Output(
                    mRowScale,
                    mActScale,
                    by_slot,
                    by_expert,
                    mPairs,
                    mOut,
                    mOutScales,
                    mOutActScale,
                    out_by_expert,
                    limit,
                ),
                units,
                member,
            )
            # Free tensor memory: all epilogue warps have read it after the barrier. Of a pair, `free` waits for the
            # other CTA, because both free theirs together.
            tmem.relinquish_alloc_permit()
            pipeline.NamedBarrier(
                barrier_id=Barrier.EPILOGUE, num_threads=128 * t.epilogue_groups
            ).arrive_and_wait()
            tmem.free(columns)

    def synchronization(self, storage, layouts: Layouts):
        """(pipeline of stages, pipeline of accumulators, allocator of tensor memory).

        `defer_sync`: the kernel itself waits for the inits, once for all of them.
        """
        t = self.tile
        loads = pipeline.PipelineTmaUmma.create(
            barrier_storage=storage.loads.data_ptr(),
            num_stages=t.stages,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 1),  # the MMA warp's commit
            tx_count=t.stage_bytes * t.ctas_per_mma,
            cta_layout_vmnk=layouts.cluster,
            defer_sync=True,
        )
        sums = pipeline.PipelineUmmaAsync.create(
            barrier_storage=storage.sums.data_ptr(),
            num_stages=t.accumulator_stages,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
            consumer_group=pipeline.CooperativeGroup(  # every epilogue thread of all CTAs of the MMA
                pipeline.Agent.Thread, 128 * t.epilogue_groups * t.ctas_per_mma
            ),
            cta_layout_vmnk=layouts.cluster,
            defer_sync=True,
        )
        tmem = cutlass.memory.TmemAllocator(
            storage.tmem.ptr,
            barrier_for_retrieve=pipeline.NamedBarrier(
                barrier_id=Barrier.TENSOR_MEMORY, num_threads=128 * t.epilogue_groups + 32
            ),
            allocator_warp_id=0,
            is_two_cta=t.ctas_per_mma == 2,
            two_cta_tmem_dealloc_mbar_ptr=storage.tmem_freed.ptr,
        )
        return loads, sums, tmem

    @cute.jit
    def load(
        self,
        operands: Operands,
        shared: Stages,  # e2m1, scales e4m3: (MMA, rows, K, stages), of weights (MMA, rows, K, stages * panels)
        loads: pipeline.PipelineTmaUmma,
        units: Units,
        count: Int32,
        member: Int32,
        coordinate: tuple,  # of this CTA in layouts.cluster
        scale_coordinate: tuple,  # and in layouts.scale_cluster
    ):
        """The TMA warp's part: the loads of every unit, at most `stages` in flight."""
        t = self.tile
        layouts = self.layouts()
        thr_mma = layouts.mma.get_slice(member)
        thr_scale_mma = layouts.scale_mma.get_slice(0)
        weight_tile = cute.slice_(self.mma_tile, (None, 0, None))
        token_tile = cute.slice_(self.mma_tile, (0, None, None))
        scale_tile = cute.slice_(self.scale_tile, (0, None, None))
        everything = (None, None, None)
        gWeights = thr_mma.partition_A(cute.local_tile(operands.weights.tensor, weight_tile, everything))
        gTokens = thr_mma.partition_B(cute.local_tile(operands.tokens.tensor, token_tile, everything))
        gWeightScales = thr_mma.partition_A(
            cute.local_tile(operands.weight_scales.tensor, weight_tile, everything)
        )
        gTokenScales = thr_scale_mma.partition_B(
            cute.local_tile(operands.token_scales.tensor, scale_tile, everything)
        )
        by_row = cute.make_layout(cute.slice_(layouts.cluster, (0, 0, None, 0)).shape)
        by_token = cute.make_layout(cute.slice_(layouts.cluster, (0, None, 0, 0)).shape)
        by_scale = cute.make_layout(cute.slice_(layouts.scale_cluster, (0, None, 0, 0)).shape)
        weights = self.loads_of(operands.weights, coordinate[2], by_row, shared.weights, gWeights)
        weight_scales = self.loads_of(
            operands.weight_scales, coordinate[2], by_row, shared.weight_scales, gWeightScales
        )
        tokens = self.loads_of(operands.tokens, coordinate[1], by_token, shared.tokens, gTokens)
        token_scales = self.loads_of(
            operands.token_scales, scale_coordinate[1], by_scale, shared.token_scales, gTokenScales
        )
        # The tokens' scales alone are multicast: both CTAs of a pair need all of them, and each loads half for both.
        mask = None
        if cutlass.const_expr(t.ctas_per_mma == 2):
            mask = cpasync.create_tma_multicast_mask(layouts.scale_cluster, scale_coordinate, mcast_mode=1)
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, t.stages)
        # Issue the first weights: no kernel on the stream writes them, so they need not wait for the previous one.
        # Acquiring their stages does not wait either: nothing has been loaded into the ring yet.
        early = Int32(0)  # stages that have their weights, and whose bytes have been announced
        expert, first_slot, _, _ = load_coherent(units.table + Int64(units.first // units.row_tiles + 1) * 16)
        if units.first < units.number:
            early = cutlass.min(count, t.stages)
            for k in cutlass.range(early, unroll=1):
                loads.producer_acquire(state)
                self.load_weights(
                    weights, weight_scales, loads, state, k, units.first % units.row_tiles, expert
                )
                state.advance()
        # From the first stage again: their tokens arrive at the same barriers, once the previous kernel, which
        # writes them, is complete.
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, t.stages)
        cute.arch.griddepcontrol_wait()
        for unit in cutlass.range(units.first, units.number, units.step, unroll=1):
            # The next unit's entry arrives during this one's loads.
            following = cutlass.min(unit + units.step, units.number - 1)
            next_entry = load_coherent(units.table + Int64(following // units.row_tiles + 1) * 16)
            token_at = first_slot // t.tokens
            row_tile = unit % units.row_tiles
            for k in cutlass.range(count, unroll=1):
                if early <= 0:
                    # Wait for a free stage, announce its bytes and issue the weights' loads
                    loads.producer_acquire(state)
                    self.load_weights(weights, weight_scales, loads, state, k, row_tile, expert)
                early -= 1
                # Issue the tokens' loads
                barrier = loads.producer_get_barrier(state)
                source = tokens.tiles[None, token_at, k, 0]
                cute.copy(tokens.atom, source, tokens.shared[None, state.index], tma_bar_ptr=barrier)
                source, target = (
                    token_scales.tiles[None, token_at, k, 0],
                    token_scales.shared[None, state.index],
                )
                cute.copy(token_scales.atom, source, target, tma_bar_ptr=barrier, mcast_mask=mask)
                state.advance()
            expert, first_slot, _, _ = next_entry
        # Drain the ring: a CTA that ended before the MMAs' last arrivals would have them in memory not its own.
        loads.producer_tail(state)

    @cute.jit
    def loads_of(
        self,
        operand: Operand,
        member,
        members: cute.Layout,
        shared: cute.Tensor,  # (MMA, rows, K, stages) or, of the weights, (MMA, rows, K, stages * panels)
        tiles: cute.Tensor,  # (MMA, rows, K, row tiles, k tiles, matrices)
    ):
        """A CTA's loads of an operand: of `members` that share a box, member `member` loads its part."""
        tTarget, tSource = cpasync.tma_partition(
            operand.atom, member, members, cute.group_modes(shared, 0, 3), cute.group_modes(tiles, 0, 3)
        )
        return Load(operand.atom, cute.filter_zeros(tTarget), cute.filter_zeros(tSource))

    @cute.jit
    def load_weights(self, codes: Load, scales: Load, loads, state, k: Int32, row_tile: Int32, expert: Int32):
        """Codes and scales of every panel into the stage that `state` names."""
        t = self.tile
        barrier = loads.producer_get_barrier(state)
        for p in cutlass.range_constexpr(t.panels):
            if cutlass.const_expr(self.activated):
                row, matrix = row_tile, expert * 2 + p
            else:
                row, matrix = row_tile * t.panels + p, expert
            slot = state.index * t.panels + p
            for load in (codes, scales):
                source, target = load.tiles[None, row, k, matrix], load.shared[None, slot]
                cute.copy(load.atom, source, target, tma_bar_ptr=barrier)

    @cute.jit
    def scale_copy(
        self,
        shared: cute.Tensor,  # e4m3 (MMA, rows, K, stages), or stages * panels
        target: cute.Tensor,  # e4m3 (MMA, rows, K) in tensor memory
    ):
        """The copy of block scales from their stages to `target`."""
        group = tcgen05.CtaGroup.TWO if self.tile.ctas_per_mma == 2 else tcgen05.CtaGroup.ONE
        compact = cute.filter_zeros(target)
        copy = tcgen05.make_s2t_copy(cute.make_copy_atom(tcgen05.Cp4x32x128bOp(group), Float8E4M3FN), compact)
        thr_copy = copy.get_slice(0)
        source = tcgen05.get_s2t_smem_desc_tensor(copy, thr_copy.partition_S(cute.filter_zeros(shared)))
        return ScaleCopy(copy, source, thr_copy.partition_D(compact))

    @cute.jit
    def multiply(
        self,
        mma: cute.TiledMma,
        columns: cute.Pointer,
        sums_layout: cute.Layout,
        shared: Stages,  # e2m1, scales e4m3: (MMA, rows, K, stages), of weights (MMA, rows, K, stages * panels)
        loads,
        sums,
        leads: cutlass.Boolean,
        units: Units,
        count: Int32,
    ):
        """Issue every product of this CTA's tiles; of two CTAs, the first issues for both."""
        t = self.tile
        layouts = self.layouts()
        tCrWeights = mma.make_fragment_A(shared.weights)
        tCrTokens = mma.make_fragment_B(shared.tokens)
        tCtSums = cute.make_tensor(columns, sums_layout)
        # Columns: the accumulators, the scales of every panel, the tokens' scales
        used = t.panels * t.accumulator_stages * t.tokens
        # For each MMA of k = 64 four columns: an atom's 512 scales, a copy for every 32 lanes
        panel_columns = TILE_K // 64 * 4
        weight_layout = blockscaled.make_tmem_layout_sfa(
            mma, self.mma_tile, GROUP_SIZE, cute.slice_(layouts.weight_scales, (None, None, None, 0))
        )
        token_layout = blockscaled.make_tmem_layout_sfb(
            mma, self.mma_tile, GROUP_SIZE, cute.slice_(layouts.token_scales, (None, None, None, 0))
        )
        tWeightScales = [
            cute.make_tensor(
                cute.recast_ptr(columns + (used + p * panel_columns), dtype=Float8E4M3FN), weight_layout
            )
            for p in range(t.panels)
        ]
        tTokenScales = cute.make_tensor(
            cute.recast_ptr(columns + (used + t.panels * panel_columns), dtype=Float8E4M3FN), token_layout
        )
        weight_copies = [self.scale_copy(shared.weight_scales, target) for target in tWeightScales]
        token_copy = self.scale_copy(shared.token_scales, tTokenScales)

        load_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, t.stages)
        sums_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, t.accumulator_stages)
        for _ in cutlass.range(units.first, units.number, units.step, unroll=1):
            if leads:
                # Wait for a free accumulator; the fence keeps our MMAs after the epilogue's tcgen05.ld of it.
                sums.producer_acquire(sums_state)
                fence_after_wait()
                for k in cutlass.range(count, unroll=1):
                    # Wait for the loads. TMA writes and tcgen05 reads in the async proxy: no fence between proxies.
                    loads.consumer_wait(load_state)
                    # Copy the scales: tcgen05.cp and mma of one thread run in the order issued, without a barrier.
                    source = token_copy.source[None, None, None, None, load_state.index]
                    cute.copy(token_copy.copy, source, token_copy.target)
                    for p in cutlass.range_constexpr(t.panels):
                        slot = load_state.index * t.panels + p
                        source = weight_copies[p].source[None, None, None, None, slot]
                        cute.copy(weight_copies[p].copy, source, weight_copies[p].target)
                    # Issue the MMAs of every panel; a tile's first ones overwrite the accumulator.
                    for p in cutlass.range_constexpr(t.panels):
                        mma.set(tcgen05.Field.ACCUMULATE, k != 0)
                        acc = tCtSums[None, None, None, sums_state.index * t.panels + p]
                        cute.gemm(
                            mma,
                            acc,
                            [tCrWeights[None, None, None, load_state.index * t.panels + p], tWeightScales[p]],
                            [tCrTokens[None, None, None, load_state.index], tTokenScales],
                            acc,
                        )
                    # Give the stage back once its MMAs have read it
                    loads.consumer_release(load_state)
                    load_state.advance()
                # Hand the accumulators to the epilogue
                sums.producer_commit(sums_state)
            sums_state.advance()
        # Epilogues, the other CTA's too, still arrive at this CTA's barriers: it must not end before.
        sums.producer_tail(sums_state)

    def accumulator_load(
        self,
        tCtSums: cute.Tensor,  # f32 (MMA, 1, 1, tile * panels + panel), in tensor memory
        thread: Int32 | int,
    ) -> SumsLoad:
        """A thread's load of its lane, `chunk` columns at a time."""
        chunk = self.tile.chunk
        chunks = cute.flat_divide(tCtSums[(None, None), 0, 0, None], (ROWS, chunk))
        atom = cute.make_copy_atom(tcgen05.Ld32x32bOp(tcgen05.Repetition(chunk)), Float32)
        load = tcgen05.make_tmem_copy(atom, chunks[None, None, 0, 0, 0])
        thr_load = load.get_slice(thread)
        values = thr_load.partition_D(cute.make_identity_tensor((ROWS, chunk)))
        return SumsLoad(load, thr_load.partition_S(chunks), values)

    @cute.jit
    def read_sums(
        self,
        load,
        source: cute.Tensor,  # f32 (values, 1, 1), in tensor memory
        target: cute.Tensor,  # f32 (values, 1, 1)
    ):
        cute.copy(load, source, target)
        # tcgen05.ld is asynchronous: its registers hold the values after this wait only.
        cute.arch.fence_view_async_tmem_load()

    @cute.jit
    def store(
        self,
        tCtSums: cute.Tensor,  # f32 (MMA, 1, 1, tile * panels + panel) in tensor memory
        thread: Int32,
        storage,
        sums,
        output: Output,
        units: Units,
        member: Int32,
    ):
        """Scale, activate, transpose through shared memory a chunk of slots at a time, round, store.

        A thread has a weight row of every panel, a group of four warps all rows of a chunk's slots.
        """
        t = self.tile
        group = thread // 128
        inside = thread % 128
        results = output.row_scale.shape[1] // (2 if self.activated else 1)
        sActScales = storage.act_scales.get_tensor(cute.make_layout((t.tokens, t.epilogue_groups)))
        sPairs = storage.pairs.get_tensor(cute.make_layout((t.tokens, t.epilogue_groups)))
        half_bytes = cutlass.const_expr(t.chunk * PITCH)
        staged = smem_address(storage.output.data_ptr()) + group * (2 * half_bytes)

        load = self.accumulator_load(tCtSums, inside)
        acc = [
            cute.make_rmem_tensor(load.values.shape, Float32)
            for _ in range(t.panels if self.activated else 1)
        ]

        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, t.accumulator_stages)
        half = Int32(0)
        expert, first_slot, slots, _ = load_coherent(
            units.table + Int64(units.first // units.row_tiles + 1) * 16
        )
        for unit in cutlass.range(units.first, units.number, units.step, unroll=1):
            following = cutlass.min(unit + units.step, units.number - 1)
            next_entry = load_coherent(units.table + Int64(following // units.row_tiles + 1) * 16)
            # Leave the tile's scales and pairs in shared memory. Before: all have read the previous tile's.
            self.meet(group)
            for slot in cutlass.range(inside, t.tokens, 128, unroll=1):
                if slot < slots:
                    at = output.by_slot * (first_slot + slot) + output.by_expert * expert
                    sActScales[slot, group] = output.act_scale[at]
                    if cutlass.const_expr(not self.activated):
                        sPairs[slot, group] = output.pairs[first_slot + slot]
                else:
                    sActScales[slot, group] = Float32(0.0)
            factors = []
            rows = []
            for p in cutlass.range_constexpr(t.panels):
                if cutlass.const_expr(self.activated):
                    tile_row = (unit % units.row_tiles * t.ctas_per_mma + member) * ROWS
                    n = cutlass.min(tile_row + inside, results - 1) + p * results
                else:
                    tile_row = ((unit % units.row_tiles * t.panels + p) * t.ctas_per_mma + member) * ROWS
                    n = cutlass.min(tile_row + inside, results - 1)
                rows.append(tile_row)
                factors.append(output.row_scale[expert, n])
            out_scale = Float32(1.0)
            if cutlass.const_expr(self.result is Result.NVFP4):
                out_scale = output.out_act_scale[output.out_by_expert * expert]
            # Every thread's scales and pairs are there for all of the group.
            self.meet(group)
            # Wait for the tile's MMAs; the fence keeps our tcgen05.ld after them.
            sums.consumer_wait(state)
            fence_after_wait()
            count = cute.ceil_div(slots, t.chunk)
            if group >= count:  # no chunk for this group; the MMA warp waits for its arrivals all the same
                sums.consumer_release(state)
            for e in cutlass.range(group, count, t.epilogue_groups, unroll=1):
                chunk_slots = slots - e * t.chunk
                for turn in cutlass.range_constexpr(1 if self.activated else t.panels):
                    for p in cutlass.range_constexpr(len(acc)):
                        source = load.source[None, None, None, 0, e, state.index * t.panels + turn + p]
                        self.read_sums(load.copy, source, acc[p])
                    # Give the accumulators back after the group's last chunk; the fence keeps the loads before it.
                    last = cutlass.const_expr(turn + len(acc) == t.panels)
                    if last and e + t.epilogue_groups >= count:
                        fence_before_arrive()
                        sums.consumer_release(state)
                    # Stage the chunk in the half that was not used last. Slow threads may still read that one; those
                    # that read this one have met all since. So one barrier a chunk is enough.
                    buffer = staged + half * half_bytes
                    half = half ^ 1
                    row_scales = factors if self.activated else factors[turn : turn + 1]
                    self.stage_chunk(
                        acc, row_scales, sActScales, e * t.chunk, buffer, group, inside, output.limit
                    )
                    # All rows of the chunk's slots are staged; store them by slot.
                    self.meet(group)
                    if cutlass.const_expr(self.result is Result.NVFP4):
                        self.store_rounded(
                            buffer,
                            inside,
                            first_slot + e * t.chunk,
                            chunk_slots,
                            rows[0],
                            out_scale,
                            output.out,
                            output.out_scales,
                        )
                    elif cutlass.const_expr(self.activated):
                        self.store_rows(
                            buffer, inside, first_slot + e * t.chunk, chunk_slots, rows[0], output.out, None
                        )
                    else:
                        self.store_rows(
                            buffer,
                            inside,
                            e * t.chunk,
                            chunk_slots,
                            rows[turn],
                            output.out,
                            sPairs[None, group],
                        )
            state.advance()
            expert, first_slot, slots, _ = next_entry

    @cute.jit
    def stage_chunk(
        self,
        acc: list,  # f32 (values, 1, 1): the gate's and the up's, or one panel's
        row_scales: list,  # f32, of each
        sActScales: cute.Tensor,  # f32 (tokens, groups)
        first: Int32,  # slot of the tile
        buffer: Int32,
        group: Int32,
        inside: Int32,
        limit: Float32,
    ):
        """A thread's row of a chunk's slots, scaled and activated, to shared memory."""
        for j in cutlass.range_constexpr(self.tile.chunk):
            act_scale = sActScales[first + j, group]
            if cutlass.const_expr(self.activated):
                gate = acc[0][j] * row_scales[0] * act_scale
                up = acc[1][j] * row_scales[1] * act_scale
                value = swiglu(gate, up, limit)
            else:
                value = acc[0][j] * row_scales[0] * act_scale
            store_bf16(buffer + j * PITCH + inside * 2, value)

    @cute.jit
    def store_rows(
        self,
        buffer: Int32,
        inside: Int32,
        first_slot: Int32,
        slots: Int32,
        column: Int32,
        mOut: cute.Tensor,  # bf16 [R, I] or [M * T, H]
        sPairs,  # int32 [tokens], or None
    ):
        """A chunk's 128 columns, 16 bytes a thread; rows are slots from `first_slot` on, or their pairs."""
        lines = cutlass.const_expr(128 // (ROWS * 2 // 16))  # slots at a time
        n = column + inside % 16 * 8
        for i in cutlass.range_constexpr(self.tile.chunk // lines):
            slot = inside // 16 + i * lines
            if slot < slots and n < mOut.shape[1]:
                words = load_words(buffer + slot * PITCH + inside % 16 * 16, 4)
                row = first_slot + slot
                if cutlass.const_expr(sPairs is not None):
                    row = sPairs[row]
                store_words(words, mOut, Int64(row) * mOut.shape[1], n)

    @cute.jit
    def store_rounded(
        self,
        buffer: Int32,
        inside: Int32,
        first_slot: Int32,
        slots: Int32,
        column: Int32,
        scale: Float32,
        mOut: cute.Tensor,  # uint8 [R, I/2]
        mOutScales: cute.Tensor,  # uint8 [tiles * atoms, ceil(I/64), 32, 16]
    ):
        """A chunk's slots in NVFP4: a thread rounds a group of 16 at a time, four threads have an atom's scales."""
        t = self.tile
        lines = cutlass.const_expr(128 // (ROWS // GROUP_SIZE))  # slots at a time
        part = inside % 8
        for i in cutlass.range_constexpr(t.chunk // lines):
            slot = inside // 8 + i * lines
            address = buffer + slot * PITCH + part * 32
            words = cute.make_rmem_tensor(8, Uint32)
            for h in cutlass.range_constexpr(2):
                some = load_words(address + h * 16, 4)
                for w in cutlass.range_constexpr(4):
                    words[h * 4 + w] = some[w]
            values = cute.make_rmem_tensor(GROUP_SIZE, Float32)
            values.store(cute.recast_tensor(words, BFloat16).load().to(Float32))
            low, high, bits = round_group(values, scale)
            # Lanes 4 q .. 4 q + 3 hold the groups of one 64 k: their scales are one word of an atom.
            scales = bits << (8 * (part % 4))
            scales = scales | cute.arch.shuffle_sync_bfly(scales, 1)
            scales = scales | cute.arch.shuffle_sync_bfly(scales, 2)
            row = first_slot + slot
            n = column + part * GROUP_SIZE
            if slot < slots:
                if n < mOut.shape[1] * 2:
                    store_words((low, high), mOut, Int64(row) * mOut.shape[1], n // 2)
                if part % 4 == 0 and n // 64 < mOutScales.shape[1]:
                    target = mOutScales.iterator + scale_offset(
                        row, n // GROUP_SIZE, t.tokens, mOutScales.shape[1]
                    )
                    target = cute.recast_ptr(target.align(4), dtype=Uint32)
                    cute.make_tensor(target, cute.make_layout(1))[0] = scales

    @cute.jit
    def meet(self, group: Int32):
        """A barrier of one group of four warps.

        The groups take chunks on their own, so neither may wait for the other. A computed number would reserve all 16.
        """
        if cutlass.const_expr(self.tile.epilogue_groups == 1):
            cute.arch.barrier(barrier_id=Barrier.FIRST_GROUP, number_of_threads=128)
        else:
            if group == 0:
                cute.arch.barrier(barrier_id=Barrier.FIRST_GROUP, number_of_threads=128)
            else:
                cute.arch.barrier(barrier_id=Barrier.SECOND_GROUP, number_of_threads=128)
