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

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32

from ..blackwell.output import store_words
from ..device.launch import launch
from ..device.ptx import settle
from .lanes import bf16_piece, f32_pieces
from .mainloop import SCALE_LINE, Addresses, Load, Mainloop, Operands, Ring, Stages, empty_sums, layouts
from .tiles import BAND, SCALE_TILE_ROWS

SCALE_TILE_BYTES = 512  # 128 rows x 4 k groups


class Tiles(NamedTuple):
    """The tiles of the output, and which of them a CTA computes: `start`, and every `stride`-th from there on."""

    start: Int32
    stride: Int32
    number: Int32
    token_group: Int32  # token tiles that are neighbours in the order of tiles
    token_tiles: Int32
    row_tiles: Int32  # of a group
    groups: Int32


class Place(NamedTuple):
    """A tile."""

    token_tile: Int32
    group: Int32
    row_tile: Int32  # of the group


class Output(NamedTuple):
    """What becomes of the sums."""

    act_scale: cute.Tensor  # f32 [1] or [M]
    act_stride: Int32
    row_scale: cute.Tensor  # f32 [N]
    bias: cute.Tensor  # f32 [N]
    out: cute.Tensor  # bf16 or f32 [M, N]


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
        k_blocks = mScales.shape[1]
        operands = self.operands(
            token_codes=grouped_columns(mX, groups),
            row_codes=grouped_rows(mCodes, groups),
            token_scales=grouped_tiles(mXScales, groups),
            row_scales=grouped_tiles(mScales, groups),
        )
        self.shared = self.shared_storage()
        token_tiles = cute.ceil_div(mX.shape[0], t.tokens)
        row_tiles = cute.ceil_div(mCodes.shape[0] // groups, t.rows)
        launch(
            self.kernel(
                operands,
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
            ),
            grid=(cutlass.min(token_tiles * row_tiles * groups, max_ctas), 1, 1),
            block=(t.threads, 1, 1),
            min_blocks_per_mp=1,
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        operands: Operands,  # uint8 (rows, K' / 2, groups), scales (16, 32, KB, scale tiles, groups)
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
        ring = Ring(storage.full.data_ptr(), storage.empty.data_ptr())
        if warp == t.warps:
            self.prefetch(operands)
        self.init_barriers(storage, warp)
        tiles = Tiles(
            bid, ctas, token_tiles * row_tiles * groups, token_group, token_tiles, row_tiles, groups
        )
        if warp >= t.warps:
            self.give_registers()
            if warp == t.warps:
                # Not in a method: only so are the addresses computed in this branch, not before it.
                layout = layouts(t)
                stages = Stages(
                    storage.token_codes.get_tensor(
                        layout["token_codes"].outer, swizzle=layout["token_codes"].inner
                    ),
                    storage.token_scales.get_tensor(layout["token_scales"]),
                    storage.row_codes.get_tensor(
                        layout["row_codes"].outer, swizzle=layout["row_codes"].inner
                    ),
                    storage.row_scales.get_tensor(layout["row_scales"]),
                )
                self.load(operands, stages, ring, tiles, count)
        else:
            self.take_registers()
            output = Output(mActScale, act_stride, mRowScale, mBias, mOut)
            self.multiply(storage, ring, tiles, count, warp, lane, output)

    @cute.jit
    def load(self, operands: Operands, stages: Stages, ring: Ring, tiles: Tiles, count: Int32):
        """The producer warp's part: the loads of every tile."""
        loads = self.loads(operands, stages)
        early = cutlass.min(count, self.tile.stages)
        if tiles.start >= tiles.number:
            early = Int32(0)
        self.load_first(loads, ring, early, self.place(tiles.start, tiles))
        # The previous kernel quantized the tokens: its writes are visible after the wait.
        cute.arch.griddepcontrol_wait()
        stage = Int32(0)
        phase = Int32(1)  # a wait with parity 1 passes on a fresh barrier: the stage is free
        for tile in cutlass.range(tiles.start, tiles.number, tiles.stride, unroll=1):
            place = self.place(tile, tiles)
            early, stage, phase = self.load_tile(loads, ring, count, early, stage, phase, place)

    @cute.jit
    def multiply(
        self,
        storage,
        ring: Ring,
        tiles: Tiles,
        count: Int32,
        warp: Int32,
        lane: Int32,
        output: Output,
    ):
        """A multiplying warp's part: the sums of every tile, and what becomes of them."""
        t = self.tile
        codes = self.operand_addresses(storage, warp, lane)
        acc = empty_sums(t)
        stage = Int32(0)
        phase = Int32(0)
        for tile in cutlass.range(
            cute.arch.make_warp_uniform(tiles.start), tiles.number, tiles.stride, unroll=1
        ):
            place = self.place(tile, tiles)
            addresses = Addresses(
                *codes,
                self.token_scale_address(storage, warp, lane, place.token_tile * t.tokens),
                self.row_scale_address(storage, warp, lane, place.row_tile * t.rows),
            )
            stage, phase = self.accumulate(acc, count, stage, phase, lane, ring, addresses)
            # Sum over the warps that share the tokens and rows; the first of them has the result.
            if cutlass.const_expr(t.k_warps > 1):
                self.add_partials(acc, storage, warp, lane)
            if warp < t.token_warps * t.row_warps:
                # act_scale may be the previous kernel's result, and out what it still reads.
                cute.arch.griddepcontrol_wait()
                # Computed again, so that it takes no registers in the main loop
                warp_again, group_again, row_again = (
                    Int32(settle(Uint32(value))) for value in (warp, tiles.token_group, tiles.row_tiles)
                )
                place = self.place(tile, tiles._replace(token_group=group_again, row_tiles=row_again))
                token_warp, row_warp = self.warp_place(warp_again)
                self.store_tile(
                    acc,
                    place.token_tile * t.tokens + token_warp * t.warp_tokens,
                    place.row_tile * t.rows + self.row_band(row_warp, 0),
                    place.group,
                    lane,
                    output,
                    output.out.shape[1] // tiles.groups,
                )

    @cute.jit
    def place(self, index: Int32, tiles: Tiles) -> Place:
        """Linear tile index -> the tile."""
        per_group = tiles.token_group * tiles.row_tiles * tiles.groups
        first = index // per_group * tiles.token_group
        width = cutlass.min(tiles.token_group, tiles.token_tiles - first)
        inside = index % per_group
        row_tile = inside // width
        return Place(first + inside % width, row_tile // tiles.row_tiles, row_tile % tiles.row_tiles)

    @cute.jit
    def load_rows(
        self,
        codes: Load,  # tiles (box, row tiles, k tiles, groups)
        scales: Load,  # tiles (box, 1, k tiles, scale tiles, groups)
        place: Place,
        step: Int32,
        barrier: cute.Pointer,
        stage: Int32,
    ):
        """Weight codes and scales of one stage."""
        t = self.tile
        scale_tile = place.row_tile
        if cutlass.const_expr(t.rows < SCALE_TILE_ROWS):
            scale_tile = place.row_tile * t.rows // SCALE_TILE_ROWS
        tiles = codes.tiles[None, place.row_tile, step, place.group]
        cute.copy(codes.atom, tiles, codes.shared[None, stage], tma_bar_ptr=barrier)
        tiles = scales.tiles[None, 0, step, scale_tile, place.group]
        cute.copy(scales.atom, tiles, scales.shared[None, stage], tma_bar_ptr=barrier)

    @cute.jit
    def load_tokens(
        self,
        codes: Load,  # tiles (box, token tiles, k tiles, groups)
        scales: Load,  # tiles (box, parts of a band, k tiles, scale tiles, groups)
        place: Place,
        step: Int32,
        barrier: cute.Pointer,
        stage: Int32,
    ):
        """Activation codes and scales of one stage."""
        t = self.tile
        first = place.token_tile * t.tokens
        line = first % BAND // t.token_scale_rows
        tiles = codes.tiles[None, place.token_tile, step, place.group]
        cute.copy(codes.atom, tiles, codes.shared[None, stage], tma_bar_ptr=barrier)
        tiles = scales.tiles[None, line, step, first // SCALE_TILE_ROWS, place.group]
        cute.copy(scales.atom, tiles, scales.shared[None, stage], tma_bar_ptr=barrier)

    @cute.jit
    def store_tile(
        self,
        acc: cute.Tensor,  # f32 (4, row MMAs, token MMAs)
        first_token: Int32,
        first_row: Int32,
        group: Int32,
        lane: Int32,
        output: Output,
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
                    factors[i, mma] = output.row_scale[group * rows + row]
                    if cutlass.const_expr(self.has_bias):
                        offsets[i, mma] = output.bias[group * rows + row]
        for token in cutlass.range_constexpr(t.warp_tokens // 16):
            for h in cutlass.range_constexpr(2):
                m = first_token + token * 16 + h * 8 + lane // 4
                if m < output.out.shape[0]:
                    act_scale = output.act_scale[m * output.act_stride]
                    for mma in cutlass.range_constexpr(t.warp_rows // 8):
                        for i in cutlass.range_constexpr(2):
                            value = acc[2 * h + i, mma, token] * factors[i, mma] * act_scale
                            if cutlass.const_expr(self.has_bias):
                                value = value + offsets[i, mma]
                            acc[2 * h + i, mma, token] = value
                # lanes of a row exchange values whether the row exists or not
                for band in cutlass.range_constexpr(t.warp_rows // BAND):
                    values = tuple(acc[2 * h + v % 2, band * 4 + v // 2, token] for v in range(8))
                    store_band(
                        values, m, first_row + band * BAND, group, lane, rows, output.out, self.aligned_rows
                    )


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
        store_words(words, mOut, base, row)
