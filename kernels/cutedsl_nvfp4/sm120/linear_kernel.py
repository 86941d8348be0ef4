"""NVFP4 W4A4 linear on workstation Blackwell: block-scaled warp MMAs, persistent tiles.

    out[m, n] = act_scale[m] * row_scale[n] * sum_k x[m, g * K + k] w[n, k] + bias[n],  g = n // (N / groups)

    operand    shape                          dtype      layout
    x          [M, groups * K' / 2]           uint8      e2m1 codes, row-major; K' = K up to a multiple of 32
    x_scales   [groups * MT, KB, 32, 16]      uint8      e4m3 in 128x4 tiles (format.py), MT = ceil(M / 128)
    act_scale  [1] or [M]                     f32        element m * act_stride
    codes      [N, K' / 2]                    uint8      as in the checkpoint
    scales     [groups * P, KB, 32, 16]       uint8      P = ceil(N / groups / 128), KB = ceil(K / 64)
    row_scale  [N]                            f32
    bias       [N]                            f32        optional
    out        [M, N]                         bf16, f32  row-major

Roles, pipelines and main loop are mainloop.py's. Weights are fetched before the previous kernel on the stream has
finished (programmatic dependent launch), what was quantized afterwards.

Tiles
    Token tiles are the fast index within groups of `token_group` tiles: a weight tile is read from memory once, by
    CTAs that run together. A CTA takes every grid-th tile; its producer fills the next one's stages meanwhile.
Epilogue
    In registers: the four lanes of a row exchange words, so that each stores 16 consecutive bytes.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32
from cutlass.cute.nvgpu import cpasync

from ..device.ptx import settle
from ..device.ring import advance
from ..device.views import partition_loads
from .lanes import bf16_piece, f32_pieces
from .mainloop import SCALE_LINE, Mainloop, empty_sums, layouts, stage_layouts
from .tiles import BAND, SCALE_TILE_ROWS

SCALE_TILE_BYTES = 512  # 128 rows x 4 k groups


class LinearKernel(Mainloop):
    """One compiled kernel: a tile, the presence of a bias, whether 16-byte pieces of out's rows are aligned."""

    def __init__(self, tile, has_bias: bool, aligned_rows: bool):
        super().__init__(tile)
        if tile.panels != 1:
            raise ValueError(f"{tile}: a linear layer has no second panel")
        self.has_bias = has_bias
        self.aligned_rows = aligned_rows

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,  # uint8 [M, groups * K' / 2]
        mXScales: cute.Tensor,  # uint8 [groups * MT, KB, 32, 16]
        mActScale: cute.Tensor,  # f32 [1] or [M]
        mCodes: cute.Tensor,  # uint8 [N, K' / 2]
        mScales: cute.Tensor,  # uint8 [groups * P, KB, 32, 16]
        mRowScale: cute.Tensor,  # f32 [N]
        mBias: cute.Tensor,  # f32 [N], any without `has_bias`
        mOut: cute.Tensor,  # bf16 or f32 [M, N]
        act_stride: Int32,  # 0 for an act_scale of all tokens, 1 for one of each
        groups: Int32,
        token_group: Int32,  # token tiles that are neighbours in the order of tiles
        max_ctas: Int32,
        stream,
    ):
        t = self.tile
        boxes = stage_layouts(t)
        k_blocks = mScales.shape[1]
        load = cpasync.CopyBulkTensorTileG2SOp()
        x_atom, tX = cpasync.make_tiled_tma_atom(
            load,
            grouped_columns(mX, groups),
            boxes["token_codes"],
            (t.tokens, t.row_bytes),
        )
        code_atom, tCodes = cpasync.make_tiled_tma_atom(
            load, grouped_rows(mCodes, groups), boxes["row_codes"], (t.rows, t.row_bytes)
        )
        x_scale_atom, tXScales = cpasync.make_tiled_tma_atom(
            load,
            grouped_tiles(mXScales, groups),
            boxes["token_scales"],
            (SCALE_LINE, t.token_scale_rows, t.k_blocks, 1),
        )
        scale_atom, tScales = cpasync.make_tiled_tma_atom(
            load,
            grouped_tiles(mScales, groups),
            boxes["row_scales"],
            (SCALE_LINE, BAND, t.k_blocks, t.row_scale_tiles),
        )
        self.shared = self.shared_storage()
        token_tiles = cute.ceil_div(mX.shape[0], t.tokens)
        row_tiles = cute.ceil_div(mCodes.shape[0] // groups, t.rows)
        self.kernel(
            x_atom,
            tX,
            x_scale_atom,
            tXScales,
            code_atom,
            tCodes,
            scale_atom,
            tScales,
            mActScale,
            mRowScale,
            mBias,
            mOut,
            act_stride,
            groups,
            token_group,
            token_tiles,
            row_tiles,
            cute.ceil_div(k_blocks, t.k_blocks),
        ).launch(
            grid=(cutlass.min(token_tiles * row_tiles * groups, max_ctas), 1, 1),
            block=(t.threads, 1, 1),
            min_blocks_per_mp=1,
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self,
        x_atom: cute.CopyAtom,
        tX: cute.Tensor,  # uint8 (M, K' / 2, groups), coordinates for TMA
        x_scale_atom: cute.CopyAtom,
        tXScales: cute.Tensor,  # uint8 (16, 32, KB, MT, groups)
        code_atom: cute.CopyAtom,
        tCodes: cute.Tensor,  # uint8 (N / groups, K' / 2, groups)
        scale_atom: cute.CopyAtom,
        tScales: cute.Tensor,  # uint8 (16, 32, KB, P, groups)
        mActScale: cute.Tensor,  # f32 [1] or [M]
        mRowScale: cute.Tensor,  # f32 [N]
        mBias: cute.Tensor,  # f32 [N]
        mOut: cute.Tensor,  # bf16 or f32 [M, N]
        act_stride: Int32,
        groups: Int32,
        token_group: Int32,
        token_tiles: Int32,
        row_tiles: Int32,
        count: Int32,
    ):
        t = self.tile
        # At once: before this kernel is complete, a successor of this project only reads weights.
        cute.arch.griddepcontrol_launch_dependents()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        lane = cute.arch.lane_idx()
        bid, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        storage = cutlass.memory.SmemAllocator().allocate(self.shared)
        full, empty = storage.full.data_ptr(), storage.empty.data_ptr()
        if warp == t.warps:
            self.prefetch((x_atom, x_scale_atom, code_atom, scale_atom))
        self.init_barriers(storage, warp)
        tiles = token_tiles * row_tiles * groups

        if warp >= t.warps:
            self.give_registers()
            if warp == t.warps:
                shared = layouts(t)
                sX = storage.token_codes.get_tensor(
                    shared["token_codes"].outer, swizzle=shared["token_codes"].inner
                )
                sCodes = storage.row_codes.get_tensor(
                    shared["row_codes"].outer, swizzle=shared["row_codes"].inner
                )
                sXScales = storage.token_scales.get_tensor(shared["token_scales"])
                sScales = storage.row_scales.get_tensor(shared["row_scales"])
                gX = cute.local_tile(tX, (t.tokens, t.row_bytes), (None, None, None))
                gCodes = cute.local_tile(tCodes, (t.rows, t.row_bytes), (None, None, None))
                gXScales = cute.local_tile(
                    tXScales, (SCALE_LINE, t.token_scale_rows, t.k_blocks, 1), (0, None, None, None, None)
                )
                gScales = cute.local_tile(
                    tScales, (SCALE_LINE, BAND, t.k_blocks, t.row_scale_tiles), (0, 0, None, None, None)
                )
                tXs, tXg = partition_loads(x_atom, sX, gX, 2)
                tCs, tCg = partition_loads(code_atom, sCodes, gCodes, 2)
                tXSs, tXSg = partition_loads(x_scale_atom, sXScales, gXScales, 4)
                tSs, tSg = partition_loads(scale_atom, sScales, gScales, 4)

                # Issue the first weights: no kernel on the stream writes them, so they need not wait for the previous
                # one. No wait for `empty` either: nothing has been loaded into the ring yet.
                early = cutlass.min(count, t.stages)
                if bid >= tiles:
                    early = Int32(0)
                token_tile, group, row_tile = self.place(bid, token_group, token_tiles, row_tiles, groups)
                for stage in cutlass.range(early, unroll=1):
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive_and_expect_tx(full + stage, t.stage_bytes)
                    self.load_rows(
                        code_atom, tCg, tCs, scale_atom, tSg, tSs, row_tile, group, stage, full + stage, stage
                    )
                # The previous kernel quantized the tokens: its writes are visible after the wait.
                cute.arch.griddepcontrol_wait()
                stage = Int32(0)
                phase = Int32(1)  # a wait with parity 1 passes on a fresh barrier: the stage is free
                for tile in cutlass.range(bid, tiles, ctas, unroll=1):
                    token_tile, group, row_tile = self.place(
                        tile, token_group, token_tiles, row_tiles, groups
                    )
                    for step in cutlass.range(count, unroll=1):
                        if early <= 0:
                            # Wait for a free stage: TMA must not overwrite what a warp still reads.
                            cute.arch.mbarrier_wait(empty + stage, phase)
                            # Announce its bytes and issue the weights' loads
                            with cute.arch.elect_one():
                                cute.arch.mbarrier_arrive_and_expect_tx(full + stage, t.stage_bytes)
                            self.load_rows(
                                code_atom,
                                tCg,
                                tCs,
                                scale_atom,
                                tSg,
                                tSs,
                                row_tile,
                                group,
                                step,
                                full + stage,
                                stage,
                            )
                        early -= 1
                        # Issue the tokens' loads
                        self.load_tokens(
                            x_atom,
                            tXg,
                            tXs,
                            x_scale_atom,
                            tXSg,
                            tXSs,
                            token_tile,
                            group,
                            step,
                            full + stage,
                            stage,
                        )
                        stage, phase = advance(stage, phase, t.stages)
        else:
            self.take_registers()
            token_codes, row_codes = self.operand_addresses(storage, warp, lane)
            acc = empty_sums(t)
            stage = Int32(0)
            phase = Int32(0)
            for tile in cutlass.range(cute.arch.make_warp_uniform(bid), tiles, ctas, unroll=1):
                token_tile, _, row_tile = self.place(tile, token_group, token_tiles, row_tiles, groups)
                stage, phase = self.accumulate(
                    acc,
                    count,
                    stage,
                    phase,
                    lane,
                    full,
                    empty,
                    token_codes,
                    row_codes,
                    self.token_scale_address(storage, warp, lane, token_tile * t.tokens),
                    self.row_scale_address(storage, warp, lane, row_tile * t.rows),
                )
                # Sum over the warps that share the tokens and rows; the first of them has the result.
                if cutlass.const_expr(t.k_warps > 1):
                    self.add_partials(acc, storage, warp, lane)
                if warp < t.token_warps * t.row_warps:
                    # act_scale may be the previous kernel's result, and out what it still reads.
                    cute.arch.griddepcontrol_wait()
                    # Computed again, so that it takes no registers in the main loop
                    warp_again, group_again, row_again = (
                        Int32(settle(Uint32(value))) for value in (warp, token_group, row_tiles)
                    )
                    token_tile, group, row_tile = self.place(
                        tile, group_again, token_tiles, row_again, groups
                    )
                    token_warp, row_warp = self.warp_place(warp_again)
                    self.store_tile(
                        acc,
                        token_tile * t.tokens + token_warp * t.warp_tokens,
                        row_tile * t.rows + self.row_band(row_warp, 0),
                        group,
                        lane,
                        mActScale,
                        act_stride,
                        mRowScale,
                        mBias,
                        mOut,
                        mOut.shape[1] // groups,
                    )

    @cute.jit
    def place(self, index: Int32, token_group: Int32, token_tiles: Int32, row_tiles: Int32, groups: Int32):
        """Linear tile index -> (token tile, group, row tile of the group)."""
        per_group = token_group * row_tiles * groups
        first = index // per_group * token_group
        width = cutlass.min(token_group, token_tiles - first)
        inside = index % per_group
        row_tile = inside // width
        return first + inside % width, row_tile // row_tiles, row_tile % row_tiles

    @cute.jit
    def load_rows(
        self,
        code_atom: cute.CopyAtom,
        tCg: cute.Tensor,  # uint8 (box, row tiles, k tiles, groups)
        tCs: cute.Tensor,  # uint8 (box, stages), in shared memory
        scale_atom: cute.CopyAtom,
        tSg: cute.Tensor,  # uint8 (box, k tiles, scale tiles, groups)
        tSs: cute.Tensor,  # uint8 (box, stages)
        row_tile: Int32,
        group: Int32,
        step: Int32,
        barrier: cute.Pointer,
        stage: Int32,
    ):
        """Weight codes and scales of one stage."""
        t = self.tile
        scale_tile = row_tile
        if cutlass.const_expr(t.rows < SCALE_TILE_ROWS):
            scale_tile = row_tile * t.rows // SCALE_TILE_ROWS
        cute.copy(code_atom, tCg[None, row_tile, step, group], tCs[None, stage], tma_bar_ptr=barrier)
        cute.copy(scale_atom, tSg[None, step, scale_tile, group], tSs[None, stage], tma_bar_ptr=barrier)

    @cute.jit
    def load_tokens(
        self,
        x_atom: cute.CopyAtom,
        tXg: cute.Tensor,  # uint8 (box, token tiles, k tiles, groups)
        tXs: cute.Tensor,  # uint8 (box, stages), in shared memory
        x_scale_atom: cute.CopyAtom,
        tXSg: cute.Tensor,  # uint8 (box, parts of a band, k tiles, scale tiles, groups)
        tXSs: cute.Tensor,  # uint8 (box, stages)
        token_tile: Int32,
        group: Int32,
        step: Int32,
        barrier: cute.Pointer,
        stage: Int32,
    ):
        """Activation codes and scales of one stage."""
        t = self.tile
        first = token_tile * t.tokens
        line = first % BAND // t.token_scale_rows
        cute.copy(x_atom, tXg[None, token_tile, step, group], tXs[None, stage], tma_bar_ptr=barrier)
        cute.copy(
            x_scale_atom,
            tXSg[None, line, step, first // SCALE_TILE_ROWS, group],
            tXSs[None, stage],
            tma_bar_ptr=barrier,
        )

    @cute.jit
    def store_tile(
        self,
        acc: cute.Tensor,  # f32 (4, row MMAs, token MMAs)
        first_token: Int32,
        first_row: Int32,
        group: Int32,
        lane: Int32,
        mActScale: cute.Tensor,  # f32 [1] or [M]
        act_stride: Int32,
        mRowScale: cute.Tensor,  # f32 [N]
        mBias: cute.Tensor,  # f32 [N]
        mOut: cute.Tensor,  # bf16 or f32 [M, N]
        rows: Int32,
    ):
        """Scale a warp's sums and store them; `first_row` counts from the group's first, of `rows`."""
        t = self.tile
        factors = cute.make_rmem_tensor((2, t.warp_rows // 8), Float32)
        offsets = cute.make_rmem_tensor((2, t.warp_rows // 8), Float32)
        for mma in cutlass.range_constexpr(t.warp_rows // 8):
            for i in cutlass.range_constexpr(2):
                row = first_row + mma * 8 + lane % 4 * 2 + i
                factors[i, mma] = Float32(0.0)
                offsets[i, mma] = Float32(0.0)
                if row < rows:
                    factors[i, mma] = mRowScale[group * rows + row]
                    if cutlass.const_expr(self.has_bias):
                        offsets[i, mma] = mBias[group * rows + row]
        for token in cutlass.range_constexpr(t.warp_tokens // 16):
            for h in cutlass.range_constexpr(2):
                m = first_token + token * 16 + h * 8 + lane // 4
                if m < mOut.shape[0]:
                    act_scale = mActScale[m * act_stride]
                    for mma in cutlass.range_constexpr(t.warp_rows // 8):
                        for i in cutlass.range_constexpr(2):
                            value = acc[2 * h + i, mma, token] * factors[i, mma] * act_scale
                            if cutlass.const_expr(self.has_bias):
                                value = value + offsets[i, mma]
                            acc[2 * h + i, mma, token] = value
                # lanes of a row exchange values whether the row exists or not
                for band in cutlass.range_constexpr(t.warp_rows // BAND):
                    values = tuple(acc[2 * h + v % 2, band * 4 + v // 2, token] for v in range(8))
                    store_band(values, m, first_row + band * BAND, group, lane, rows, mOut, self.aligned_rows)


def grouped_columns(codes: cute.Tensor, groups: Int32) -> cute.Tensor:
    """Activation codes [M, groups * K' / 2] -> (M, K' / 2, groups): TMA fills with zeros beyond K'."""
    width = cute.assume(codes.shape[1] // groups, divby=16)
    layout = cute.make_layout((codes.shape[0], width, groups), stride=(codes.stride[0], 1, width))
    return cute.make_tensor(codes.iterator, layout)


def grouped_rows(codes: cute.Tensor, groups: Int32) -> cute.Tensor:
    """Weight codes [N, K' / 2] -> (N / groups, K' / 2, groups): TMA fills with zeros beyond a group's rows."""
    rows = codes.shape[0] // groups
    layout = cute.make_layout(
        (rows, codes.shape[1], groups), stride=(codes.stride[0], 1, rows * codes.stride[0])
    )
    return cute.make_tensor(codes.iterator, layout)


def grouped_tiles(scales: cute.Tensor, groups: Int32) -> cute.Tensor:
    """Block scales [groups * P, KB, 32, 16] -> (16, 32, KB, P, groups)."""
    tiles = scales.shape[0] // groups
    layout = cute.make_layout(
        (SCALE_LINE, BAND, scales.shape[1], tiles, groups),
        stride=(1, SCALE_LINE, SCALE_TILE_BYTES, scales.stride[0], tiles * scales.stride[0]),
    )
    return cute.make_tensor(scales.iterator, layout)


@cute.jit
def store_band(
    values: tuple,  # eight f32
    m: Int32,
    first_row: Int32,
    group: Int32,
    lane: Int32,
    rows: Int32,
    mOut: cute.Tensor,  # bf16 or f32 [M, N]
    aligned_rows: cutlass.Constexpr[bool],
):
    """A lane's values[2 * j + i] of rows 8 * j + 2 * (lane % 4) + i of a band -> out[m]; `rows` are the group's."""
    base = Int64(m) * mOut.shape[1] + group * rows
    if cutlass.const_expr(not aligned_rows):
        for j in cutlass.range_constexpr(4):
            for i in cutlass.range_constexpr(2):
                row = first_row + j * 8 + lane % 4 * 2 + i
                if m < mOut.shape[0] and row < rows:
                    mOut[m, group * rows + row] = values[2 * j + i].to(mOut.element_type)
    elif cutlass.const_expr(mOut.element_type.width == 16):
        words, column = bf16_piece(values, lane)
        store_piece(words, base, first_row + column, rows, m, mOut)
    else:
        for words, column in f32_pieces(values, lane):
            store_piece(words, base, first_row + column, rows, m, mOut)


@cute.jit
def store_piece(
    words: tuple,  # four Uint32
    base: Int64,
    row: Int32,
    rows: Int32,
    m: Int32,
    mOut: cute.Tensor,  # bf16 or f32 [M, N]
):
    """16 bytes to out, where they lie within it."""
    if m < mOut.shape[0] and row < rows:
        piece = cute.make_rmem_tensor(4, Uint32)
        for i in cutlass.range_constexpr(4):
            piece[i] = words[i]
        target = cute.recast_ptr((mOut.iterator + (base + row)).align(16), dtype=Uint32)
        cute.autovec_copy(piece, cute.make_tensor(target, cute.make_layout(4)))
