"""Products of NVFP4 experts and NVFP4 tokens on workstation Blackwell: w13 with SwiGLU, and w2.

    acc[p, s, n] = sum_k token[s, k] * weight[e, p, n, k]     panels p, slots s of one expert e
    w13   h[s, n] = swiglu(acc[0] * g, acc[1] * u)            g, u = act_scale * row_scale of gate and up rows
    w2    y[pair of s, n] = acc * act_scale * row_scale

A slot is a row of the scratch: tile t of the table holds slots tokens * t and following. A panel is here the gate or
the up rows of a tile, not the 64 packed rows of Hopper's weights.

    weights       e2m1 [E, N, K' / 2], the checkpoint's; their scales e4m3 [E, P, KB, 32, 16], 128x4 tiles, of w13
                  those of gate rows first, then those of up rows
    tokens        e2m1 [R, K' / 2] by slot; their scales e4m3 [tiles, KB, 32, 16], a 128x4 tile each
    h, NVFP4      as tokens; h or y, bf16: [R, I], [M * T, H]

Roles, pipelines and main loop are mainloop.py's; a CTA takes every grid-th unit, a tile of the table times a tile of
weight rows. Row tiles are the fast index: CTAs that run together share an expert's tokens, and its next tile of
tokens finds the weights in L2.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, Uint32

from ..blackwell.output import Output
from ..blackwell.ptx import decode_e4m3, encode_e4m3
from ..blackwell.rounding import divide, scale_offset
from ..blackwell.variants import Result
from ..device.activation import swiglu
from ..device.launch import launch
from ..device.ptx import load_coherent, settle
from ..format import E2M1_MAX
from .lanes import bf16_piece, shuffle, transpose_bytes
from .linear_kernel import SCALE_TILE_BYTES, store_piece
from .mainloop import SCALE_LINE, Addresses, Load, Mainloop, Operands, Ring, Stages, empty_sums, layouts
from .ptx import encode_pair
from .tiles import BAND, SCALE_TILE_ROWS, LinearTile


class Units(NamedTuple):
    """The table's tiles times the tiles of weight rows: a CTA takes `first` and every `step`-th from there on."""

    table: Int64  # address of int32 [1 + tiles, 4]
    row_tiles: Int32
    first: Int32
    step: Int32


class Place(NamedTuple):
    """A unit; its row tile is unit % row_tiles, for which w13's tile of 16 tokens has no register in the loop."""

    tile: Int32  # of the table
    expert: Int32
    unit: Int32
    row_tiles: Int32


class Slots(NamedTuple):
    """The slots from a warp's first on: it may have fewer, or none."""

    expert: Int32
    first: Int32
    count: Int32


class ExpertsKernel(Mainloop):
    """One compiled kernel: a tile and what becomes of its sums."""

    def __init__(self, tile: LinearTile, result: str):
        super().__init__(tile)
        self.result = Result(result)
        self.activated = self.result is not Result.ROWS
        if self.activated is not (tile.panels == 2):
            raise ValueError(f"{tile}: w13 takes two panels, gate and up, and w2 one")

    @cute.jit
    def __call__(
        self,
        mCodes: cute.Tensor,  # uint8 [E, N, K' / 2]
        mScales: cute.Tensor,  # uint8 [E, P, KB, 32, 16]
        mRowScale: cute.Tensor,  # f32 [E, N]
        mX: cute.Tensor,  # uint8 [R, K' / 2]
        mXScales: cute.Tensor,  # uint8 [tiles, KB, 32, 16]
        mActScale: cute.Tensor,  # f32 [1], [E] or [R]
        mTable: cute.Tensor,  # int32 [1 + tiles, 4]: (tiles, ...), then (expert, first slot, slots, ...)
        mPairs: cute.Tensor,  # int32 [R]
        mOut: cute.Tensor,  # uint8 [R, I / 2], bf16 [R, I] or bf16 [M * T, H]
        mOutScales: cute.Tensor,  # uint8 [tiles, ceil(I / 64), 32, 16]; any without NVFP4
        mOutActScale: cute.Tensor,  # f32 [1] or [E]; any without NVFP4
        by_slot: Int32,  # 1 for an act_scale of every slot
        by_expert: Int32,  # 1 for an act_scale of every expert
        out_by_expert: Int32,  # the same of mOutActScale
        limit: Float32,
        max_ctas: Int32,
        stream,
    ):
        t = self.tile
        operands = self.operands(
            token_codes=mX,
            row_codes=panel_rows(mCodes, t.panels),
            token_scales=tiles_view(mXScales),
            row_scales=panel_tiles(mScales, t.panels),
        )
        self.shared = self.shared_storage()
        rows = mCodes.shape[1] // t.panels
        if cutlass.const_expr(self.result is Result.NVFP4):
            rows = mOutScales.shape[1] * 64  # up to the end of the last scale word: the rest is zero
        row_tiles = cute.ceil_div(rows, t.panel_rows)
        launch(
            self.kernel(
                operands,
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
                cute.ceil_div(mScales.shape[2], t.k_blocks),
            ),
            grid=(cutlass.min((mTable.shape[0] - 1) * row_tiles, max_ctas), 1, 1),
            block=(t.threads, 1, 1),
            min_blocks_per_mp=1,
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        operands: Operands,  # uint8 (rows, K' / 2, E * panels), scales (16, 32, KB, scale tiles, E * panels)
        mRowScale: cute.Tensor,  # f32 [E, N]
        mActScale: cute.Tensor,  # f32 [1], [E] or [R]
        mTable: cute.Tensor,  # int32 [1 + tiles, 4]
        mPairs: cute.Tensor,  # int32 [R]
        mOut: cute.Tensor,  # uint8 [R, I / 2], bf16 [R, I] or bf16 [M * T, H]
        mOutScales: cute.Tensor,  # uint8 [tiles, ceil(I / 64), 32, 16]
        mOutActScale: cute.Tensor,  # f32 [1] or [E]
        by_slot: Int32,
        by_expert: Int32,
        out_by_expert: Int32,
        limit: Float32,
        row_tiles: Int32,
        count: Int32,
    ):
        t = self.tile
        # At once: before this kernel is complete, a successor only reads weights, the table and the router's results.
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
        # The table is the routing's, which had finished before the kernel before this one could let it start.
        units = Units(mTable.iterator.toint(), row_tiles, bid, ctas)
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
                self.load(operands, stages, ring, units, count)
        else:
            self.take_registers()
            output = Output(
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
            )
            self.multiply(storage, ring, units, count, warp, lane, output)

    @cute.jit
    def load(self, operands: Operands, stages: Stages, ring: Ring, units: Units, count: Int32):
        """The producer warp's part: the loads of every unit."""
        loads = self.loads(operands, stages)
        tiles, _, _, _ = load_coherent(units.table)
        number = cute.arch.make_warp_uniform(tiles * units.row_tiles)
        early = Int32(0)
        if units.first < number:
            early = cutlass.min(count, self.tile.stages)
            self.load_first(loads, ring, early, self.place(units.first, units))
        # The previous kernel wrote the tokens: its writes are visible after the wait.
        cute.arch.griddepcontrol_wait()
        stage = Int32(0)
        phase = Int32(1)  # a wait with parity 1 passes on a fresh barrier: the stage is free
        for unit in cutlass.range(units.first, number, units.step, unroll=1):
            place = self.place(unit, units)
            early, stage, phase = self.load_tile(loads, ring, count, early, stage, phase, place)

    @cute.jit
    def multiply(
        self,
        storage,
        ring: Ring,
        units: Units,
        count: Int32,
        warp: Int32,
        lane: Int32,
        output: Output,
    ):
        """A multiplying warp's part: the sums of every unit, and what becomes of them."""
        t = self.tile
        codes = self.operand_addresses(storage, warp, lane)
        acc = empty_sums(t)
        stage = Int32(0)
        phase = Int32(0)
        tiles, _, _, _ = load_coherent(units.table)
        number = cute.arch.make_warp_uniform(tiles * units.row_tiles)
        for unit in cutlass.range(units.first, number, units.step, unroll=1):
            first_row = unit % units.row_tiles * t.panel_rows
            addresses = Addresses(
                *codes,
                self.token_scale_address(storage, warp, lane, Int32(0)),
                self.row_scale_address(storage, warp, lane, first_row),
            )
            stage, phase = self.accumulate(acc, count, stage, phase, lane, ring, addresses)
            # Sum over the warps that share the tokens and rows; the first of them has the result.
            if cutlass.const_expr(t.k_warps > 1):
                self.add_partials(acc, storage, warp, lane)
            if warp < t.token_warps * t.row_warps:
                # The slots' scales may be the previous kernel's result, and out what it still reads.
                cute.arch.griddepcontrol_wait()
                # Computed again, so that it takes no registers in the main loop
                token_warp, row_warp = self.warp_place(Int32(settle(Uint32(warp))))
                first_token = token_warp * t.warp_tokens
                entry = load_coherent(units.table + Int64(unit // units.row_tiles + 1) * 16)
                slots = Slots(entry[0], entry[1] + first_token, entry[2] - first_token)
                row = first_row + self.row_band(row_warp, 0)
                if cutlass.const_expr(self.activated):
                    self.store_activated(acc, slots, row, lane, output)
                else:
                    self.store_rows(acc, slots, row, lane, output)

    @cute.jit
    def place(self, unit: Int32, units: Units) -> Place:
        """Unit -> where its operands lie."""
        tile = unit // units.row_tiles
        expert, _, _, _ = load_coherent(units.table + Int64(tile + 1) * 16)
        return Place(tile, expert, unit, units.row_tiles)

    @cute.jit
    def load_rows(
        self,
        codes: Load,  # tiles (box, row tiles, k tiles, E * panels)
        scales: Load,  # tiles (box, 1, k tiles, scale tiles, E * panels)
        place: Place,
        step: Int32,
        barrier: cute.Pointer,
        stage: Int32,
    ):
        """Weight codes and scales of one stage."""
        t = self.tile
        row_tile = place.unit % place.row_tiles
        scale_tile = row_tile
        if cutlass.const_expr(t.panel_rows < SCALE_TILE_ROWS):
            scale_tile = row_tile * t.panel_rows // SCALE_TILE_ROWS
        for panel in cutlass.range_constexpr(t.panels):
            matrix, part = place.expert * t.panels + panel, stage * t.panels + panel
            tiles = codes.tiles[None, row_tile, step, matrix]
            cute.copy(codes.atom, tiles, codes.shared[None, part], tma_bar_ptr=barrier)
            tiles = scales.tiles[None, 0, step, scale_tile, matrix]
            cute.copy(scales.atom, tiles, scales.shared[None, part], tma_bar_ptr=barrier)

    @cute.jit
    def load_tokens(
        self,
        codes: Load,  # tiles (box, tiles of the table, k tiles)
        scales: Load,  # tiles (box, 1, k tiles, tiles of the table)
        place: Place,
        step: Int32,
        barrier: cute.Pointer,
        stage: Int32,
    ):
        """Token codes and scales of one stage."""
        tiles = codes.tiles[None, place.tile, step]
        cute.copy(codes.atom, tiles, codes.shared[None, stage], tma_bar_ptr=barrier)
        tiles = scales.tiles[None, 0, step, place.tile]
        cute.copy(scales.atom, tiles, scales.shared[None, stage], tma_bar_ptr=barrier)

    @cute.jit
    def row_scales(
        self,
        mRowScale: cute.Tensor,  # f32 [E, N]
        expert: Int32,
        first_row: Int32,
        lane: Int32,
    ) -> cute.Tensor:
        """Scales of a lane's rows: [2, row MMAs]; zero beyond the last row."""
        t = self.tile
        rows = mRowScale.shape[1] // t.panels
        factors = cute.make_rmem_tensor((2, t.warp_rows // 8), Float32)
        for mma in cutlass.range_constexpr(t.warp_rows // 8):
            for i in cutlass.range_constexpr(2):
                inside = mma * 8 if t.panels == 1 else mma % 4 * 8
                row = first_row + inside + lane % 4 * 2 + i
                factors[i, mma] = Float32(0.0)
                if row < rows:
                    if cutlass.const_expr(t.panels == 2):
                        row += mma // 4 * rows
                    factors[i, mma] = mRowScale[expert, row]
        return factors

    @cute.jit
    def act_scale(self, slots: Slots, slot: Int32, output: Output) -> Float32:
        """act_scale of a slot, counted from the warp's first."""
        return output.act_scale[output.by_slot * (slots.first + slot) + output.by_expert * slots.expert]

    @cute.jit
    def store_rows(
        self,
        acc: cute.Tensor,  # f32 (4, row MMAs, token MMAs)
        slots: Slots,
        first_row: Int32,
        lane: Int32,
        output: Output,
    ):
        """w2: a warp's sums, scaled, to the rows of their pairs."""
        t = self.tile
        factors = self.row_scales(output.row_scale, slots.expert, first_row, lane)
        for token in cutlass.range_constexpr(t.warp_tokens // 16):
            for h in cutlass.range_constexpr(2):
                slot = token * 16 + h * 8 + lane // 4
                pair = Int32(0)
                act_scale = Float32(0.0)
                if slot < slots.count:
                    pair = output.pairs[slots.first + slot]
                    act_scale = self.act_scale(slots, slot, output)
                for band in cutlass.range_constexpr(t.warp_rows // BAND):
                    values = tuple(
                        acc[2 * h + v % 2, band * 4 + v // 2, token]
                        * factors[v % 2, band * 4 + v // 2]
                        * act_scale
                        for v in range(8)
                    )
                    words, column = bf16_piece(values, lane)
                    store_slot(words, slot < slots.count, pair, first_row + band * BAND + column, output.out)

    @cute.jit
    def store_activated(
        self,
        acc: cute.Tensor,  # f32 (4, row MMAs, token MMAs): the gate's, then the up's
        slots: Slots,
        first_row: Int32,
        lane: Int32,
        output: Output,
    ):
        """w13: SwiGLU of a warp's 32 gate and 32 up rows, to the slots' h."""
        t = self.tile
        factors = self.row_scales(output.row_scale, slots.expert, first_row, lane)
        out_scale = Float32(1.0)
        if cutlass.const_expr(self.result is Result.NVFP4):
            out_scale = output.out_act_scale[output.out_by_expert * slots.expert]
        for token in cutlass.range_constexpr(t.warp_tokens // 16):
            for h in cutlass.range_constexpr(2):
                slot = token * 16 + h * 8 + lane // 4
                act_scale = Float32(0.0)
                if slot < slots.count:
                    act_scale = self.act_scale(slots, slot, output)
                values = []
                for v in cutlass.range_constexpr(8):  # of rows 8 * (v // 2) + 2 * (lane % 4) + v % 2
                    gate = acc[2 * h + v % 2, v // 2, token] * factors[v % 2, v // 2] * act_scale
                    up = acc[2 * h + v % 2, 4 + v // 2, token] * factors[v % 2, 4 + v // 2] * act_scale
                    values.append(swiglu(gate, up, output.limit))
                if cutlass.const_expr(self.result is Result.NVFP4):
                    self.store_rounded(
                        tuple(values),
                        slots.first + slot,
                        slot < slots.count,
                        first_row,
                        lane,
                        out_scale,
                        output.out,
                        output.out_scales,
                    )
                else:
                    words, column = bf16_piece(tuple(values), lane)
                    store_slot(words, slot < slots.count, slots.first + slot, first_row + column, output.out)

    @cute.jit
    def store_rounded(
        self,
        values: tuple,  # eight f32
        slot: Int32,
        wanted: cutlass.Boolean,
        first_row: Int32,
        lane: Int32,
        scale: Float32,
        mOut: cute.Tensor,  # uint8 [R, I / 2]
        mOutScales: cute.Tensor,  # uint8 [tiles, ceil(I / 64), 32, 16]
    ):
        """32 values of a slot, eight in each of four lanes, to NVFP4."""
        word, bits = round_band(values, lane, scale)
        row = first_row + lane % 4 * 8
        if wanted and row < mOut.shape[1] * 2:
            target = mOut.iterator + (Int64(slot) * mOut.shape[1] + row // 2)
            target = cute.recast_ptr(target.align(4), dtype=Uint32)
            cute.make_tensor(target, cute.make_layout(1))[0] = word
        # One of the row's four lanes stores the band's two scales; the other two of their word are another band's.
        if wanted and lane % 4 == 0 and first_row // 64 < mOutScales.shape[1]:
            target = mOutScales.iterator + scale_offset(
                slot, first_row // 16, self.tile.tokens, mOutScales.shape[1]
            )
            both = cute.make_tensor(target, cute.make_layout(2))
            for group in cutlass.range_constexpr(2):
                both[group] = bits[group].to(Uint8)


def round_band(values: tuple, lane, scale):
    """Two groups of 16 columns, a lane's values as in `bf16_piece` -> (their codes, their block scales).

    The codes are the word of columns 8 * (lane % 4) and following; all bit for bit reference.quantize's of the values
    in bf16.
    """
    codes, bits = None, []
    for group in range(2):
        some = [as_bf16(value) for value in values[4 * group : 4 * group + 4]]
        amax = some[0]
        for value in some:
            amax = larger(amax, larger(value, -value))
        for distance in (1, 2):  # over the four lanes that hold the group
            amax = larger(amax, shuffle(amax, distance))
        bits.append(encode_e4m3(amax / E2M1_MAX / scale))
        step = decode_e4m3(bits[group]) * scale
        scaled = quotients(some, step)
        for j in range(2):
            pair = encode_pair(scaled[2 * j], scaled[2 * j + 1]) << (8 * (2 * group + j))
            codes = pair if codes is None else codes | pair
    return transpose_bytes(codes, lane), bits


def larger(a, b):
    """The larger one; NaN if one is."""
    return cute.arch.fmax(a, b, nan=True)


@cute.jit
def as_bf16(value: Float32) -> Float32:
    """Rounded to bf16."""
    return value.to(BFloat16).to(Float32)


@cute.jit
def quotients(values: list, step: Float32):
    """Each of four values / step, zero for a step of zero."""
    scaled = cute.make_rmem_tensor(4, Float32)
    scaled.fill(0.0)
    if step > Float32(0.0):
        inverse = Float32(1.0) / step
        for i in cutlass.range_constexpr(4):
            scaled[i] = divide(values[i], step, inverse)
    return scaled[0], scaled[1], scaled[2], scaled[3]


@cute.jit
def store_slot(
    words: tuple,  # four Uint32
    wanted: cutlass.Boolean,
    row: Int32,
    column: Int32,
    mOut: cute.Tensor,  # bf16 [R, I] or [M * T, H]
):
    """16 bytes to out[row] from `column` on, where they lie within it."""
    if wanted:
        store_piece(words, Int64(row) * mOut.shape[1], column, mOut.shape[1], Int32(0), mOut)


def panel_rows(codes: cute.Tensor, panels: int) -> cute.Tensor:
    """Weight codes [E, panels * N, K' / 2] -> (N, K' / 2, E * panels): TMA fills with zeros beyond a panel's rows."""
    rows, width = codes.shape[1] // panels, codes.shape[2]
    layout = cute.make_layout((rows, width, codes.shape[0] * panels), stride=(width, 1, rows * width))
    return cute.make_tensor(codes.iterator, layout)


def panel_tiles(scales: cute.Tensor, panels: int) -> cute.Tensor:
    """Block scales [E, panels * P, KB, 32, 16] -> (16, 32, KB, P, E * panels)."""
    tiles, pitch = scales.shape[1] // panels, scales.stride[1]
    layout = cute.make_layout(
        (SCALE_LINE, BAND, scales.shape[2], tiles, scales.shape[0] * panels),
        stride=(1, SCALE_LINE, SCALE_TILE_BYTES, pitch, tiles * pitch),
    )
    return cute.make_tensor(scales.iterator, layout)


def tiles_view(scales: cute.Tensor) -> cute.Tensor:
    """Block scales [tiles, KB, 32, 16] -> (16, 32, KB, tiles)."""
    layout = cute.make_layout(
        (SCALE_LINE, BAND, scales.shape[1], scales.shape[0]),
        stride=(1, SCALE_LINE, SCALE_TILE_BYTES, scales.stride[0]),
    )
    return cute.make_tensor(scales.iterator, layout)
