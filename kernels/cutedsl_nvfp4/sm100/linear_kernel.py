"""NVFP4 W4A4 linear on Blackwell's tensor cores.

    out[m, n] = act_scale[m] * row_scale[n] * sum_k x[m, k] w[n, k] + bias[n]

Swapped operands: weights are tcgen05.mma's A operand, 128 rows a CTA, tokens its B operand, so few tokens make a
narrow tile instead of an empty one. Accumulators lie in tensor memory: a lane is a weight row, a column a token.

    operand     shape                                     dtype      layout
    codes       [N, K'/2]                                 uint8      K-major, K' = K rounded up to 32
    scales      [groups * ceil(N/groups/128), KB, 32, 16] uint8      ue4m3 in 128x4 tiles, KB = ceil(K / 64)
    x codes     [M, groups * K'/2]                        uint8      as codes; quantize_kernel.py makes them
    x scales    [groups * ceil(M/128), KB, 32, 16]        uint8      as scales
    act_scale   [1] or [M]                                f32        index m * stride, stride 0 or 1
    row_scale   [N]                                       f32
    bias        [N]                                       f32        counts `has_bias` (0 or 1) times
    out         [M, N]                                    bf16, f32  row-major

Never run: compiled for sm_100a and sm_103a; no figure of its speed exists.

Roles per CTA (128 weight rows by `tokens`)
    warps 0 to 3    epilogue: tensor memory -> registers -> scaled -> global memory; warp w has lanes 32 w ..
    warp 4          MMA: block scales from shared to tensor memory, then four MMAs of k = 64, for each stage
    warp 5          producer; keeps `stages` TMA loads in flight, the first weights before the previous kernel
                    has finished
A `pair` of CTAs (ranks 0 and 1 of a cluster) has one MMA of 256 rows: each loads its 128 rows, half of the tokens'
codes and all of their scales; rank 0 issues for both.
Pipelines
    full[stage]     producers' bytes, and rank 0's arrival       ->  MMA warp of rank 0
    empty[stage]    MMAs that read the stage are done            ->  producers of both CTAs
    done[buffer]    MMAs of the tile are done                    ->  epilogues of both CTAs
    free[buffer]    epilogue warps of both CTAs have read it     ->  MMA warp of rank 0
    They are stepped by hand, unlike experts_kernel.py's: where accumulators overlap, a tile's columns and its barriers
    have different indices, and a state of cutlass.pipeline has one.
Tensor memory
    two accumulators, then the scales of one stage. Where both do not fit (256 tokens), they share columns: the
    epilogue reads those first and frees them, and the next tile's MMAs run while it reads the rest.
Tiles
    Token tiles are the fast index within groups of `token_group` tiles; a persistent grid walks them.
Reduction
    `split_k` CTAs of a cluster share a tile's K: each sends the partial sums of a slice of tokens to the CTA that
    owns the slice, which adds them in ascending k order and stores. Deterministic, no workspace, one tile a CTA.
Launch
    The next kernel may start once tensor memory is allocated, not before: a kernel that starts early and takes it
    could otherwise wait for this one, and this one for its tensor memory.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.utils.blackwell_helpers as blackwell
import cutlass.utils.blockscaled_layout as blockscaled
from cutlass import Float4E2M1FN, Float8E4M3FN, Float32, Int32, Int64
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, tcgen05

from ..device.cluster import address_in_cluster, store_in_cluster
from ..device.launch import launch
from ..device.ptx import smem_address
from ..device.ring import advance
from ..device.views import partition_loads
from ..format import GROUP_SIZE
from .ptx import fence_after_wait, fence_before_arrive
from .tiles import ATOM_BYTES, ROWS, TILE_K, LinearTile
from .views import ATOM_WORDS, Load, Operand, Operands, Stages, codes_view, scales_view

EPILOGUE_WARPS = 4
MMA_WARP = 4
PRODUCER_WARP = 5
THREADS = 192
BLOCKS = TILE_K // 64  # MMAs, and scale atoms along K, of a stage
LANE = 1 << 16  # from one lane of tensor memory to the next, in its addresses


class Tiles(NamedTuple):
    """The tiles of the output, and which of them a CTA computes: `start`, and every `stride`-th from there on."""

    start: Int32
    stride: Int32
    number: Int32
    token_group: Int32  # token tiles that are neighbours in the order of tiles
    token_tiles: Int32
    row_tiles: Int32  # over all groups
    group_tiles: Int32  # row tiles of a group
    group_rows: Int32  # weight rows of a group


class Place(NamedTuple):
    """Where a tile's operands lie."""

    token_tile: Int32
    token_scale_tile: Int32
    row_tile: Int32  # of the group
    group: Int32


class Share(NamedTuple):
    """What a CTA of a cluster has of its tile."""

    member: Int32  # of a pair: which half of the rows
    part: Int32  # of K
    first: Int32  # stage of K that is the part's first
    count: Int32  # stages of the part


class Output(NamedTuple):
    """What becomes of the sums."""

    act_scale: cute.Tensor  # f32 [1] or [M]
    row_scale: cute.Tensor  # f32 [N]
    bias: cute.Tensor  # f32 [N]
    out: cute.Tensor  # bf16 or f32 [M, N]
    act_stride: Int32
    has_bias: Float32


class Barriers(NamedTuple):
    """The first mbarrier of every pipeline."""

    full: cute.Pointer  # [stages]
    empty: cute.Pointer  # [stages]
    done: cute.Pointer  # [2]
    free: cute.Pointer  # [2]


class LinearKernel:
    """One compiled kernel: a tile."""

    def __init__(self, tile: LinearTile):
        tile.check()
        self.tile = tile
        self.cta_group = tcgen05.CtaGroup.TWO if tile.ctas_per_mma == 2 else tcgen05.CtaGroup.ONE

    def layouts(self) -> dict:
        """What the kernel takes its addresses from: the MMA, shared and tensor memory of one CTA.

        Needs a CuTe DSL context, no GPU. Modes of the codes are (MMA, rows, K, stages), of the scales
        (MMA, rows, K, stages); scales in tensor memory are (MMA, rows, K).
        """
        t = self.tile
        k_major = OperandMajorMode.K
        shape = (t.rows, t.tokens, TILE_K)
        mma = blackwell.make_blockscaled_trivial_tiled_mma(
            Float4E2M1FN, Float4E2M1FN, k_major, k_major, Float8E4M3FN, GROUP_SIZE, self.cta_group, shape[:2]
        )
        weight_scales = blockscaled.make_smem_layout_sfa(mma, shape, GROUP_SIZE, t.stages)
        token_scales = blockscaled.make_smem_layout_sfb(mma, shape, GROUP_SIZE, t.stages)
        one = (None, None, None, 0)
        return {
            "mma": mma,
            "weights": blackwell.make_smem_layout_a(mma, shape, Float4E2M1FN, t.stages),
            "tokens": blackwell.make_smem_layout_b(mma, shape, Float4E2M1FN, t.stages),
            "weight scales": weight_scales,
            "token scales": token_scales,
            "weight scales in tensor memory": blockscaled.make_tmem_layout_sfa(
                mma, shape, GROUP_SIZE, cute.slice_(weight_scales, one)
            ),
            "token scales in tensor memory": blockscaled.make_tmem_layout_sfb(
                mma, shape, GROUP_SIZE, cute.slice_(token_scales, one)
            ),
            # what TMA writes: the same bytes, whole atoms, K fastest
            "weight scale atoms": cute.make_layout((ATOM_WORDS, BLOCKS, 1, t.stages)),
            "token scale atoms": cute.make_layout((ATOM_WORDS, BLOCKS, t.scale_atoms, t.stages)),
        }

    def shared_storage(self, layouts: dict):
        """The struct of shared memory."""
        t = self.tile

        @cute.struct
        class Shared:
            full: cute.struct.MemRange[Int64, t.stages]
            empty: cute.struct.MemRange[Int64, t.stages]
            done: cute.struct.MemRange[Int64, 2]
            free: cute.struct.MemRange[Int64, 2]
            tensor_memory: Int32
            weights: cute.struct.Align[
                cute.struct.MemRange[Float4E2M1FN, cute.cosize(layouts["weights"].outer)], 1024
            ]
            tokens: cute.struct.Align[
                cute.struct.MemRange[Float4E2M1FN, cute.cosize(layouts["tokens"].outer)], 1024
            ]
            weight_scales: cute.struct.Align[
                cute.struct.MemRange[Int64, cute.cosize(layouts["weight scale atoms"])], 1024
            ]
            token_scales: cute.struct.Align[
                cute.struct.MemRange[Int64, cute.cosize(layouts["token scale atoms"])], 1024
            ]
            partials: cute.struct.Align[cute.struct.MemRange[Float32, t.partial_bytes // 4], 128]

        return Shared

    @cute.jit
    def __call__(
        self,
        mCodes: cute.Tensor,  # uint8 [N, K'/2]
        mScales: cute.Tensor,  # uint8 [groups * ceil(N/groups/128), KB, 32, 16]
        mXCodes: cute.Tensor,  # uint8 [M, groups * K'/2]
        mXScales: cute.Tensor,  # uint8 [groups * ceil(M/128), KB, 32, 16]
        mActScale: cute.Tensor,  # f32 [1] or [M]
        mRowScale: cute.Tensor,  # f32 [N]
        mBias: cute.Tensor,  # f32 [N]
        mOut: cute.Tensor,  # bf16 or f32 [M, N]
        groups: Int32,
        act_stride: Int32,  # 0 for an act_scale of all tokens, 1 for one of each
        has_bias: Float32,  # 1, or 0 where mBias stands in for none
        token_group: Int32,  # token tiles that are neighbours in the order of tiles
        max_ctas: Int32,
        stream,
    ):
        t = self.tile
        layouts = self.layouts()
        mma = layouts["mma"]
        k = mCodes.shape[1] * 2
        group_rows = mCodes.shape[0] // groups
        shape = (t.rows, t.tokens, TILE_K)
        load = cpasync.CopyBulkTensorTileG2SOp(self.cta_group)
        one = (None, None, None, 0)
        cluster_shape = cute.tiled_divide(cute.make_layout((t.ctas_per_mma, 1, 1)), (mma.thr_id.shape,)).shape
        weight_atom, tWeights = cute.nvgpu.make_tiled_tma_atom_A(
            load,
            codes_view(mCodes, group_rows, k, groups, False),
            cute.slice_(layouts["weights"], one),
            shape,
            mma,
            cluster_shape,
        )
        token_atom, tTokens = cute.nvgpu.make_tiled_tma_atom_B(
            load,
            codes_view(mXCodes, mXCodes.shape[0], k, groups, True),
            cute.slice_(layouts["tokens"], one),
            shape,
            mma,
            cluster_shape,
        )
        weight_scale_atom, tWeightScales = cpasync.make_tiled_tma_atom(
            load,
            scales_view(mScales, groups),
            cute.slice_(layouts["weight scale atoms"], one),
            (ATOM_WORDS, BLOCKS, 1),
        )
        token_scale_atom, tTokenScales = cpasync.make_tiled_tma_atom(
            load,
            scales_view(mXScales, groups),
            cute.slice_(layouts["token scale atoms"], one),
            (ATOM_WORDS, BLOCKS, t.scale_atoms),
        )

        self.shared = self.shared_storage(layouts)
        token_tiles = cute.ceil_div(mOut.shape[0], t.tokens)
        row_tiles = cute.ceil_div(group_rows, t.rows) * groups
        tiles = token_tiles * row_tiles
        ctas = tiles * t.cluster
        if cutlass.const_expr(t.split_k == 1):
            ctas = cutlass.min(tiles, cutlass.max(max_ctas // t.ctas_per_mma, 1)) * t.ctas_per_mma
        launch(
            self.kernel(
                mma,
                Operands(
                    Operand(weight_atom, tWeights),
                    Operand(token_atom, tTokens),
                    Operand(weight_scale_atom, tWeightScales),
                    Operand(token_scale_atom, tTokenScales),
                ),
                mActScale,
                mRowScale,
                mBias,
                mOut,
                group_rows,
                act_stride,
                has_bias,
                token_group,
                token_tiles,
                row_tiles,
                layouts["weights"],
                layouts["tokens"],
            ),
            grid=(ctas, 1, 1),
            block=(THREADS, 1, 1),
            cluster=(t.cluster, 1, 1),
            min_blocks_per_mp=1,
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        mma: cute.TiledMma,
        operands: Operands,  # e2m1 (rows, K', groups), scales int64 (64, KB, 128-row tiles, groups): whole tiles
        mActScale: cute.Tensor,  # f32 [1] or [M]
        mRowScale: cute.Tensor,  # f32 [N]
        mBias: cute.Tensor,  # f32 [N]
        mOut: cute.Tensor,  # bf16 or f32 [M, N]
        group_rows: Int32,
        act_stride: Int32,
        has_bias: Float32,
        token_group: Int32,
        token_tiles: Int32,
        row_tiles: Int32,
        weight_layout: cute.ComposedLayout,
        token_layout: cute.ComposedLayout,
    ):
        t = self.tile
        layouts = self.layouts()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        bid, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        rank = bid % t.cluster
        member = rank if t.ctas_per_mma == 2 else 0  # of the pair
        part = rank if t.split_k > 1 else 0  # of K

        storage = cutlass.memory.SmemAllocator().allocate(self.shared)
        full, empty = storage.full.data_ptr(), storage.empty.data_ptr()
        done, free = storage.done.data_ptr(), storage.free.data_ptr()
        barriers = Barriers(full, empty, done, free)
        sWeights = storage.weights.get_tensor(weight_layout.outer, swizzle=weight_layout.inner)
        sTokens = storage.tokens.get_tensor(token_layout.outer, swizzle=token_layout.inner)
        # Initialize the barriers
        if warp == PRODUCER_WARP:
            for operand in operands:
                cpasync.prefetch_descriptor(operand.atom)
            with cute.arch.elect_one():
                for stage in cutlass.range_constexpr(t.stages):
                    cute.arch.mbarrier_init(full + stage, 1)  # rank 0's `expect`
                    cute.arch.mbarrier_init(empty + stage, 1)  # the MMA warp's `commit`
                for buffer in cutlass.range_constexpr(2):
                    cute.arch.mbarrier_init(done + buffer, 1)  # the MMA warp's `commit`
                    cute.arch.mbarrier_init(free + buffer, EPILOGUE_WARPS * t.ctas_per_mma)
            # Releases the inits, to the whole cluster; who uses the barriers does so after a sync below.
            cute.arch.mbarrier_init_fence()
        # No CTA may signal another's barrier, store into its shared memory or allocate with it before it is there.
        if cutlass.const_expr(t.cluster > 1):
            cute.arch.cluster_arrive_relaxed()  # the fence above has released the inits
            cute.arch.cluster_wait()
        # Allocate tensor memory
        if warp == 0:
            cute.arch.alloc_tmem(t.tensor_memory, storage.tensor_memory.ptr, is_two_cta=t.ctas_per_mma == 2)
            cute.arch.relinquish_tmem_alloc_permit(is_two_cta=t.ctas_per_mma == 2)
        # Every warp reads the address that warp 0 allocated, and without a cluster this publishes the barriers too.
        cute.arch.sync_threads()
        # Not earlier: a successor could take the tensor memory that this CTA would then wait for.
        cute.arch.griddepcontrol_launch_dependents()

        steps = cute.ceil_div(operands.weights.tensor.shape[1], TILE_K)
        first = part * steps // t.split_k
        share = Share(member, part, first, (part + 1) * steps // t.split_k - first)
        tiles = Tiles(
            number=token_tiles * row_tiles,
            token_group=token_group,
            token_tiles=token_tiles,
            row_tiles=row_tiles,
            group_tiles=cute.ceil_div(group_rows, t.rows),
            group_rows=group_rows,
            start=bid // t.cluster,
            stride=ctas // t.cluster,
        )
        output = Output(mActScale, mRowScale, mBias, mOut, act_stride, has_bias)
        if warp == PRODUCER_WARP:
            stages = Stages(
                sWeights,
                sTokens,
                storage.weight_scales.get_tensor(layouts["weight scale atoms"]),
                storage.token_scales.get_tensor(layouts["token scale atoms"]),
            )
            self.load(mma, operands, barriers, stages, tiles, share)
        elif warp == MMA_WARP:
            if member == 0:
                self.multiply(mma, storage, barriers, sWeights, sTokens, tiles, share)
        else:
            self.store(storage, barriers, tiles, share, output)
        # With split K, partial sums sent by every CTA of the cluster are in their owners' shared memory after this.
        # Of a pair, both have read their tensor memory, which they free together. Alone: warps 0 to 3 have read it.
        if cutlass.const_expr(t.cluster > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()
        if warp < EPILOGUE_WARPS:
            if cutlass.const_expr(t.split_k > 1):
                self.reduce_partials(storage, tiles, share, output)
            if warp == 0:
                pointer = cute.arch.retrieve_tmem_ptr(Float32, 16, storage.tensor_memory.ptr)
                cute.arch.dealloc_tmem(pointer, t.tensor_memory, is_two_cta=t.ctas_per_mma == 2)

    @cute.jit
    def load(
        self,
        mma: cute.TiledMma,
        operands: Operands,
        barriers: Barriers,
        shared: Stages,  # e2m1 (MMA, rows, K, stages), scales int64 (64, k atoms, atoms of rows, stages)
        tiles: Tiles,
        share: Share,
    ):
        """The producer warp's part: the loads of every tile, at most `stages` in flight."""
        t = self.tile
        stages = t.stages
        full, empty = barriers.full, barriers.empty
        thr_mma = mma.get_slice(share.member)
        every = (None, None, None)
        gWeights = cute.local_tile(operands.weights.tensor, (t.rows, TILE_K), every)
        gTokens = cute.local_tile(operands.tokens.tensor, (t.tokens, TILE_K), every)
        gWeightScales = cute.local_tile(
            operands.weight_scales.tensor, (ATOM_WORDS, BLOCKS, 1), (0, None, None, None)
        )
        gTokenScales = cute.local_tile(
            operands.token_scales.tensor, (ATOM_WORDS, BLOCKS, t.scale_atoms), (0, None, None, None)
        )
        weights = self.loads_of(operands.weights, shared.weights, thr_mma.partition_A(gWeights))
        tokens = self.loads_of(operands.tokens, shared.tokens, thr_mma.partition_B(gTokens))
        weight_scales = self.loads_of(operands.weight_scales, shared.weight_scales, gWeightScales)
        token_scales = self.loads_of(operands.token_scales, shared.token_scales, gTokenScales)

        # Issue the first weights: no kernel on the stream writes them, so they need not wait for the previous one.
        # No wait for `empty` either: nothing has been loaded into the ring yet.
        place = self.place(tiles.start, tiles)
        for stage in cutlass.range_constexpr(stages):
            if stage < share.count:
                self.expect(full + stage, share.member)
                at = share.first + stage
                self.load_weights(weights, weight_scales, place, at, stage, full + stage, share.member)
        # Issue the first tokens: the previous kernel quantized them, and its writes are visible after the wait.
        cute.arch.griddepcontrol_wait()
        for stage in cutlass.range_constexpr(stages):
            if stage < share.count:
                at = share.first + stage
                self.load_tokens(tokens, token_scales, place, at, stage, full + stage)
        # A wait with parity 1 passes on a fresh barrier: a stage nothing was loaded into counts as released.
        # Once every stage has been loaded, the ring has wrapped, and its first releases complete parity 0.
        stage = cutlass.min(share.count, stages) % stages
        phase = Int32(1)
        if share.count >= stages:
            phase = Int32(0)
        step = cutlass.min(share.count, stages)
        for tile in cutlass.range(tiles.start, tiles.number, tiles.stride, unroll=1):
            place = self.place(tile, tiles)
            for at in cutlass.range(share.first + step, share.first + share.count, unroll=1):
                # Wait for a free stage: TMA must not overwrite what MMAs still read.
                cute.arch.mbarrier_wait(empty + stage, phase)
                # Issue the TMA loads
                self.expect(full + stage, share.member)
                self.load_weights(weights, weight_scales, place, at, stage, full + stage, share.member)
                self.load_tokens(tokens, token_scales, place, at, stage, full + stage)
                stage, phase = advance(stage, phase, stages)
            step = Int32(0)
        # Drain the ring: commits arrive on their own time, rank 0's at both CTAs of a pair.
        # A CTA that ended before them would have its shared memory written, and maybe be another's.
        for _ in cutlass.range(stages, unroll=1):
            cute.arch.mbarrier_wait(empty + stage, phase)
            stage, phase = advance(stage, phase, stages)

    def loads_of(
        self,
        operand: Operand,
        shared: cute.Tensor,  # (three modes, stages)
        tiles: cute.Tensor,  # (three modes, tiles ...)
    ) -> Load:
        """The loads of an operand: boxes of three modes from `tiles` to `shared`."""
        return Load(operand.atom, *partition_loads(operand.atom, shared, tiles, 3))

    @cute.jit
    def load_weights(
        self,
        codes: Load,  # tiles (box, row tiles, k tiles, groups)
        scales: Load,  # tiles (box, k tiles, 128-row tiles, groups)
        place: Place,
        at: Int32,
        stage: Int32,
        barrier: cute.Pointer,
        member: Int32,
    ):
        """This CTA's weights of k tile `at` into a stage, and their scales."""
        tiles, shared = codes.tiles[None, place.row_tile, at, place.group], codes.shared[None, stage]
        cute.copy(codes.atom, tiles, shared, tma_bar_ptr=barrier)
        scale_tile = place.row_tile * self.tile.ctas_per_mma + member
        tiles, shared = scales.tiles[None, at, scale_tile, place.group], scales.shared[None, stage]
        cute.copy(scales.atom, tiles, shared, tma_bar_ptr=barrier)

    @cute.jit
    def load_tokens(
        self,
        codes: Load,  # tiles (box, token tiles, k tiles, groups)
        scales: Load,  # tiles (box, k tiles, tiles of whole atoms, groups)
        place: Place,
        at: Int32,
        stage: Int32,
        barrier: cute.Pointer,
    ):
        """This CTA's share of the tokens' k tile `at` into a stage, and the scales of all of them."""
        tiles, shared = codes.tiles[None, place.token_tile, at, place.group], codes.shared[None, stage]
        cute.copy(codes.atom, tiles, shared, tma_bar_ptr=barrier)
        tiles, shared = (
            scales.tiles[None, at, place.token_scale_tile, place.group],
            scales.shared[None, stage],
        )
        cute.copy(scales.atom, tiles, shared, tma_bar_ptr=barrier)

    @cute.jit
    def place(self, index: Int32, tiles: Tiles) -> Place:
        """Linear tile index -> where its operands lie."""
        t = self.tile
        token_tile, row_tile = self.coordinates(index, tiles)
        group, inside = row_tile // tiles.group_tiles, row_tile % tiles.group_tiles
        return Place(token_tile, token_tile * t.tokens // (128 * t.scale_atoms), inside, group)

    @cute.jit
    def coordinates(self, index: Int32, tiles: Tiles):
        """Linear tile index -> (token tile, row tile over all groups)."""
        group = index // (tiles.token_group * tiles.row_tiles)
        width = cutlass.min(tiles.token_group, tiles.token_tiles - group * tiles.token_group)
        inside = index - group * tiles.token_group * tiles.row_tiles
        return group * tiles.token_group + inside % width, inside // width

    @cute.jit
    def expect(self, barrier: cute.Pointer, member: Int32):
        """Announce a stage's bytes of all its CTAs, which arrive at rank 0's barrier.

        Rank 1's bytes may come first: the phase cannot complete before the one arrival that rank 0 makes here.
        """
        t = self.tile
        if member == 0:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(barrier, t.stage_bytes * t.ctas_per_mma)

    @cute.jit
    def commit(self, barrier: cute.Pointer):
        """Arrive, at both CTAs of a pair, when the MMAs issued so far are done."""
        # A commit tracks its own thread's operations: elect.sync names the same lane each time, as cute.gemm's does.
        with cute.arch.elect_one():
            if cutlass.const_expr(self.tile.ctas_per_mma == 2):
                tcgen05.commit(barrier, 0b11, self.cta_group)
            else:
                tcgen05.commit(barrier, None, self.cta_group)

    @cute.jit
    def accumulator(self, pointer: cute.Pointer, buffer: Int32, layout: cute.Layout) -> cute.Tensor:
        """Accumulator `buffer`, f32 (MMA, 1, 1) in tensor memory."""
        return cute.make_tensor(pointer + buffer * self.tile.accumulator_stride, layout)

    @cute.jit
    def scale_copy(
        self,
        sScales: cute.Tensor,  # e4m3 (MMA, rows, K, stages)
        tScales: cute.Tensor,  # e4m3 (MMA, rows, K), in tensor memory
    ):
        """(copy, its sources by stage, its target) of a stage's block scales into tensor memory."""
        atom = cute.make_copy_atom(tcgen05.Cp4x32x128bOp(self.cta_group), Float8E4M3FN)
        target = cute.filter_zeros(tScales)
        copy = tcgen05.make_s2t_copy(atom, target)
        slice_ = copy.get_slice(0)
        source = slice_.partition_S(cute.filter_zeros(sScales))
        return copy, tcgen05.get_s2t_smem_desc_tensor(copy, source), slice_.partition_D(target)

    @cute.jit
    def multiply(
        self,
        mma: cute.TiledMma,
        storage,
        barriers: Barriers,
        sWeights: cute.Tensor,  # e2m1 (MMA, rows, K, stages)
        sTokens: cute.Tensor,  # e2m1 (MMA, tokens, K, stages)
        tiles: Tiles,
        share: Share,
    ):
        """The MMA warp's part: the main loop of every tile."""
        t = self.tile
        layouts = self.layouts()
        full, empty, done, free = barriers
        buffers = cutlass.const_expr(1 if t.overlaps else 2)
        pointer = cute.arch.retrieve_tmem_ptr(Float32, 16, storage.tensor_memory.ptr)
        tCrA = mma.make_fragment_A(sWeights)
        tCrB = mma.make_fragment_B(sTokens)
        shape_c = mma.partition_shape_C((t.rows, t.tokens))
        acc_layout = mma.make_fragment_C(shape_c).layout
        scales = pointer + (t.accumulator_stride + t.tokens)
        weight_scales = cute.recast_ptr(scales, dtype=Float8E4M3FN)
        token_scales = cute.recast_ptr(scales + 4 * BLOCKS, dtype=Float8E4M3FN)
        sfa_layout = layouts["weight scales in tensor memory"]
        sfb_layout = layouts["token scales in tensor memory"]
        tSFA = cute.make_tensor(weight_scales, sfa_layout)
        tSFB = cute.make_tensor(token_scales, sfb_layout)
        sSFA = cute.make_tensor(
            cute.recast_ptr(storage.weight_scales.data_ptr(), dtype=Float8E4M3FN), layouts["weight scales"]
        )
        sSFB = cute.make_tensor(
            cute.recast_ptr(storage.token_scales.data_ptr(), dtype=Float8E4M3FN), layouts["token scales"]
        )
        copy_a, from_a, to_a = self.scale_copy(sSFA, tSFA)
        copy_b, from_b, to_b = self.scale_copy(sSFB, tSFB)
        stage = Int32(0)
        phase = Int32(0)
        number = Int32(0)  # of tiles done
        for tile in cutlass.range(tiles.start, tiles.number, tiles.stride, unroll=1):
            token_tile, _ = self.coordinates(tile, tiles)
            buffer = number % buffers
            # Wait for a free accumulator; a fresh barrier passes with parity 1, so the first of each is free.
            cute.arch.mbarrier_wait(free + buffer, (number // buffers & 1) ^ 1)
            # The epilogue's tcgen05.ld come before our MMAs: else these could overwrite what is still being read.
            fence_after_wait()
            acc = self.accumulator(pointer, number % 2, acc_layout)
            # a tile of fewer than 128 tokens starts at a column of its atom, 32 tokens each
            tSFBt = tSFB
            if cutlass.const_expr(t.tokens < 128):
                column = token_tile * t.tokens % 128 // 32
                tSFBt = cute.make_tensor(
                    cute.recast_ptr(scales + (4 * BLOCKS + column), dtype=Float8E4M3FN), sfb_layout
                )
            mma.set(tcgen05.Field.ACCUMULATE, False)  # a tile's first MMA overwrites the accumulator
            for _ in cutlass.range(share.count, unroll=1):
                # Wait for the loads. TMA writes and tcgen05 reads in the async proxy: no fence between proxies.
                cute.arch.mbarrier_wait(full + stage, phase)
                # Copy the scales and issue the MMAs: tcgen05.cp and mma of one thread run in the order issued, so
                # that MMAs find their scales, and the next stage's scales do not overtake them.
                cute.copy(copy_a, from_a[None, None, None, None, stage], to_a)
                cute.copy(copy_b, from_b[None, None, None, None, stage], to_b)
                for block in cutlass.range_constexpr(BLOCKS):
                    at = (None, None, block, stage)
                    mma.set(tcgen05.Field.SFA, tSFA[None, None, block].iterator)
                    mma.set(tcgen05.Field.SFB, tSFBt[None, None, block].iterator)
                    cute.gemm(mma, acc, tCrA[at], tCrB[at], acc)
                    mma.set(tcgen05.Field.ACCUMULATE, True)
                # Give the stage back once its MMAs have read it
                self.commit(empty + stage)
                stage, phase = advance(stage, phase, t.stages)
            # Hand the accumulator to the epilogue
            self.commit(done + buffer)
            number += 1

    @cute.jit
    def store(
        self,
        storage,
        barriers: Barriers,
        tiles: Tiles,
        share: Share,
        output: Output,
    ):
        """An epilogue warp's part: a lane stores its weight row of every tile, `chunk` tokens at a time."""
        t = self.tile
        done, free = barriers.done, barriers.free
        buffers = cutlass.const_expr(1 if t.overlaps else 2)
        chunks = cutlass.const_expr(t.tokens // t.chunk)
        # where accumulators overlap, these chunks have all the shared columns
        shared = cutlass.const_expr(
            -(-(t.tokens - t.accumulator_stride) // t.chunk) if t.overlaps else chunks
        )
        thread, _, _ = cute.arch.thread_idx()
        pointer = cute.arch.retrieve_tmem_ptr(Float32, 16, storage.tensor_memory.ptr)
        load = cute.make_copy_atom(
            tcgen05.Ld32x32bOp(tcgen05.Repetition(t.chunk), tcgen05.Pack.NONE), Float32
        )
        columns = cute.make_layout((ROWS, t.chunk), stride=(LANE, 1))
        copy = tcgen05.make_tmem_copy(load, cute.make_tensor(pointer, columns))
        slice_ = copy.get_slice(thread)
        shape = slice_.partition_D(cute.make_identity_tensor((ROWS, t.chunk))).shape
        # act_scale may be the previous kernel's output, and out what it still reads: nothing before it is complete.
        # With split K, `reduce_partials` waits, which alone touches them.
        if cutlass.const_expr(t.split_k == 1):
            cute.arch.griddepcontrol_wait()
        number = Int32(0)
        for tile in cutlass.range(tiles.start, tiles.number, tiles.stride, unroll=1):
            token_tile, row_tile = self.coordinates(tile, tiles)
            n, real = self.row(row_tile, thread, tiles, share)
            factor, offset = self.scale_and_bias(n, real, output)
            buffer = number % buffers
            # Wait for the tile's MMAs; the fence keeps our tcgen05.ld after them.
            cute.arch.mbarrier_wait(done + buffer, number // buffers & 1)
            fence_after_wait()
            for i in cutlass.range_constexpr(chunks):
                at = Int32(i)
                if cutlass.const_expr(t.overlaps):  # the first's last columns are the second's first
                    at = i + (1 - number % 2) * (chunks - 1 - 2 * i)
                first = at * t.chunk
                values = cute.make_rmem_tensor(shape, Float32)
                source = cute.make_tensor(pointer + (number % 2 * t.accumulator_stride + first), columns)
                cute.copy(copy, slice_.partition_S(source), values)
                # tcgen05.ld is asynchronous: its registers hold the values after this wait only.
                cute.arch.fence_view_async_tmem_load()
                if share.count == 0:  # no MMA wrote the accumulator
                    values.fill(0.0)
                # Give the accumulator back, at rank 0: the MMA warp may overwrite it once all warps have arrived.
                # The fence keeps the loads above before the arrival.
                if cutlass.const_expr(i + 1 == shared):
                    fence_before_arrive()
                    with cute.arch.elect_one():
                        if cutlass.const_expr(t.ctas_per_mma == 2):
                            cute.arch.mbarrier_arrive(free + buffer, 0)
                        else:
                            cute.arch.mbarrier_arrive(free + buffer)
                if cutlass.const_expr(t.split_k > 1):
                    self.send_partials(values, storage, thread, share.part, i)
                else:
                    m = token_tile * t.tokens + first
                    if m < output.out.shape[0]:
                        self.store_tokens(values, t.chunk, m, n, real, factor, offset, output)
            number += 1

    @cute.jit
    def row(self, row_tile: Int32, thread: Int32, tiles: Tiles, share: Share):
        """(weight row n of a thread's lane, whether it is one of the group's)."""
        inside = row_tile % tiles.group_tiles * self.tile.rows + share.member * ROWS + thread
        return row_tile // tiles.group_tiles * tiles.group_rows + inside, inside < tiles.group_rows

    @cute.jit
    def scale_and_bias(self, n: Int32, real, output: Output):
        """(row_scale, bias) of weight row n; zero beyond the group's rows."""
        factor = Float32(0.0)
        offset = Float32(0.0)
        if real:
            factor = output.row_scale[n]
            offset = output.bias[n] * output.has_bias
        return factor, offset

    @cute.jit
    def store_tokens(
        self,
        values: cute.Tensor,  # f32 [tokens]
        tokens: cutlass.Constexpr,
        m: Int32,
        n: Int32,
        real,
        factor: Float32,
        offset: Float32,
        output: Output,
    ):
        """Scale and store `tokens` (at most 32) values of row n, tokens m and on; lanes store consecutive n."""
        # A lane loads the scale of one token, and all lanes get it by shuffle.
        lane = cute.arch.lane_idx()
        out = output.out
        last = out.shape[0] - 1
        own = output.act_scale[cutlass.min(m + lane, last) * output.act_stride]
        target = out.iterator + (Int64(m) * out.shape[1] + n)
        for i in cutlass.range_constexpr(tokens):
            scale = cute.arch.shuffle_sync(own, i)
            if real and m + i <= last:
                value = values[i] * (scale * factor) + offset
                one = cute.make_tensor(target + Int64(i) * out.shape[1], cute.make_layout(1))
                one[0] = value.to(out.element_type)

    @cute.jit
    def send_partials(
        self,
        values: cute.Tensor,  # f32 [chunk]
        storage,
        thread: Int32,
        part: Int32,
        chunk: cutlass.Constexpr,
    ):
        """Partial sums of token slice s go to CTA s of the cluster."""
        t = self.tile
        owned = cutlass.const_expr(t.tokens // t.split_k)
        width = cutlass.const_expr(min(4, owned))
        pieces = cutlass.const_expr(owned // width)
        buffer = smem_address(storage.partials.data_ptr()) + (part * pieces * ROWS + thread) * (width * 4)
        for i in cutlass.range_constexpr(t.chunk // width):
            token = cutlass.const_expr(chunk * t.chunk + i * width)
            target = address_in_cluster(buffer, Int32(token // owned))
            sums = [values[i * width + j] for j in range(width)]
            store_in_cluster(target + token % owned // width * (ROWS * width * 4), sums)

    @cute.jit
    def reduce_partials(
        self,
        storage,
        tiles: Tiles,
        share: Share,
        output: Output,
    ):
        """Add the tokens this CTA owns in ascending k order, scale, store."""
        t = self.tile
        owned = cutlass.const_expr(t.tokens // t.split_k)
        width = cutlass.const_expr(min(4, owned))
        pieces = cutlass.const_expr(owned // width)
        token_tile, row_tile = self.coordinates(tiles.start, tiles)
        thread, _, _ = cute.arch.thread_idx()
        n, real = self.row(row_tile, thread, tiles, share)
        factor, offset = self.scale_and_bias(n, real, output)
        partials = storage.partials.get_tensor(cute.make_layout((width, ROWS, pieces, t.split_k)))
        # act_scale may be the previous kernel's output, and out what it still reads.
        cute.arch.griddepcontrol_wait()
        for piece in cutlass.range_constexpr(pieces):
            total = cute.make_rmem_tensor(width, Float32)
            total.fill(0.0)
            for source in cutlass.range_constexpr(t.split_k):
                some = partials[None, thread, piece, source].load()
                total.store(total.load() + some)
            m = token_tile * t.tokens + share.part * owned + piece * width
            if m < output.out.shape[0]:
                self.store_tokens(total, width, m, n, real, factor, offset, output)


assert ATOM_BYTES == ATOM_WORDS * 8
