"""The part all sm_120 products share: shared memory, TMA loads of the operands, the loop of block-scaled MMAs.

    sum[m, n] = sum_k (x codes * x scales)[m, k] * (w codes * w scales)[n, k]

Roles per CTA
    producer warp    the last one: an elected thread keeps `stages` TMA loads in flight
    other warps      each multiplies its tokens x rows, and of every stage its k blocks
Pipelines
    full[stage]      producer (1 arrival + bytes)  ->  every other warp
    empty[stage]     every other warp              ->  producer

A warp loads the operands of the next k block while the MMAs of this one run, over the end of a stage too. Scales
reach the tensor core as TMA left them: one load a band of 32 rows and k block, no shuffle, no rearrangement
(layout.py).
"""

from enum import IntEnum
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, Uint32
from cutlass.cute.nvgpu import cpasync, warpgroup

from ..device.ptx import load_matrices, load_words, smem_address
from ..device.ring import advance
from ..device.views import partition_loads
from .layout import code_offset, row_lane, row_selector, scale_lane, scale_offset, token_lane, token_selector
from .ptx import load_sums, load_word, mma_m16n8k64, store_sums
from .tiles import BAND, SCALE_TILE_ROWS, LinearTile

SCALE_LINE = 16  # bytes: four bands x four k groups
# Three warpgroups share 65,536 registers, 170 a thread, in eights 168; 40 + 2 * 232 = 3 * 168.
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232


class Barrier(IntEnum):
    """Named barriers of a CTA; 0 is sync_threads', of all warps."""

    SUMS = 1  # warps that multiply: partial sums are in shared memory, or have been read


class Operand(NamedTuple):
    """What TMA needs of an operand in global memory."""

    atom: cute.CopyAtom
    tensor: cute.Tensor  # coordinates


class Operands(NamedTuple):
    """All that TMA loads."""

    token_codes: Operand
    token_scales: Operand
    row_codes: Operand
    row_scales: Operand


class Stages(NamedTuple):
    """Where TMA leaves the operands in shared memory; the last mode is the stage, of weights stage * panels + panel."""

    token_codes: cute.Tensor  # uint8 (rows, bytes of k, stages)
    token_scales: cute.Tensor  # uint8 (16 bytes, rows of a band, k blocks, scale tiles, stages)
    row_codes: cute.Tensor  # as the tokens'
    row_scales: cute.Tensor  # as the tokens'


class Load(NamedTuple):
    """A CTA's loads of an operand."""

    atom: cute.CopyAtom
    shared: cute.Tensor  # (box, stages), of weights (box, stages * panels)
    tiles: cute.Tensor  # (box, coordinates of a tile ...), of global memory


class Loads(NamedTuple):
    """A CTA's loads of all operands."""

    token_codes: Load
    token_scales: Load
    row_codes: Load
    row_scales: Load


class Ring(NamedTuple):
    """The mbarriers of the stages."""

    full: cute.Pointer
    empty: cute.Pointer


class Addresses(NamedTuple):
    """Where a lane finds its operands in stage 0."""

    token_codes: Int32
    row_codes: Int32
    token_scales: Int32
    row_scales: Int32


class Fragments(NamedTuple):
    """Registers of two k blocks; the last mode is the buffer."""

    token_codes: cute.Tensor  # (4, token MMAs, 2)
    row_codes: cute.Tensor  # (2, row MMAs, 2)
    token_scales: cute.Tensor  # (bands, 2)
    row_scales: cute.Tensor  # (bands, 2)


def swizzle_kind(tile: LinearTile) -> warpgroup.SmemLayoutAtomKind:
    """TMA's swizzle of the codes: as wide as a stage's rows."""
    kinds = warpgroup.SmemLayoutAtomKind
    return kinds.K_SW64 if tile.k_blocks == 2 else kinds.K_SW128


def code_layout(tile: LinearTile, rows: int, stages: int) -> cute.ComposedLayout:
    """Codes in shared memory: (rows, bytes of k, stages)."""
    atom = warpgroup.make_smem_layout_atom(swizzle_kind(tile), Uint8)
    return cute.tile_to_shape(atom, (rows, tile.row_bytes, stages), order=(0, 1, 2))


def scale_layout(tile: LinearTile, box_rows: int, scale_tiles: int, stages: int) -> cute.Layout:
    """Block scales in shared memory: (16 bytes, rows of a band, k blocks, scale tiles, stages)."""
    return cute.make_layout((SCALE_LINE, box_rows, tile.k_blocks, scale_tiles, stages))


def layouts(tile: LinearTile) -> dict[str, cute.Layout | cute.ComposedLayout]:
    """Every operand's layout in shared memory, as the kernels make it; call inside a @cute.jit function.

    Of the weights, the last mode is stage * panels + panel: each panel is loaded by itself.
    """
    panels = tile.panels * tile.stages
    return {
        "token_codes": code_layout(tile, tile.tokens, tile.stages),
        "row_codes": code_layout(tile, tile.panel_rows, panels),
        "token_scales": scale_layout(tile, tile.token_scale_rows, 1, tile.stages),
        "row_scales": scale_layout(tile, BAND, tile.row_scale_tiles // tile.panels, panels),
    }


def stage_layouts(tile: LinearTile) -> dict[str, cute.Layout | cute.ComposedLayout]:
    """`layouts` of one stage and panel, the boxes of the TMA loads."""
    return {
        name: cute.slice_(layout, (*(None,) * (cute.rank(layout) - 1), 0))
        for name, layout in layouts(tile).items()
    }


def boxes(tile: LinearTile) -> dict[str, tuple[int, ...]]:
    """Shapes of what a TMA load brings of each operand."""
    return {
        "token_codes": (tile.tokens, tile.row_bytes),
        "token_scales": (SCALE_LINE, tile.token_scale_rows, tile.k_blocks, 1),
        "row_codes": (tile.panel_rows, tile.row_bytes),
        "row_scales": (SCALE_LINE, BAND, tile.k_blocks, tile.row_scale_tiles // tile.panels),
    }


class Mainloop:
    """What a kernel of one tile needs to multiply; subclasses add which tiles, and what becomes of the sums."""

    def __init__(self, tile: LinearTile):
        tile.check()
        self.tile = tile

    def shared_storage(self):
        """The struct of shared memory."""
        t = self.tile
        x_size, w_size, x_scale_size, w_scale_size = (cute.cosize(layout) for layout in layouts(t).values())

        @cute.struct
        class Shared:
            full: cute.struct.MemRange[Int64, t.stages]
            empty: cute.struct.MemRange[Int64, t.stages]
            token_codes: cute.struct.Align[cute.struct.MemRange[Uint8, x_size], 1024]
            row_codes: cute.struct.Align[cute.struct.MemRange[Uint8, w_size], 1024]
            token_scales: cute.struct.Align[cute.struct.MemRange[Uint8, x_scale_size], 128]
            row_scales: cute.struct.Align[cute.struct.MemRange[Uint8, w_scale_size], 128]
            sums: cute.struct.Align[cute.struct.MemRange[Uint8, max(16, t.partial_bytes)], 16]

        return Shared

    @cute.jit
    def init_barriers(self, storage, warp: Int32):
        """Every thread calls it; the barriers can be used afterwards."""
        t = self.tile
        full, empty = storage.full.data_ptr(), storage.empty.data_ptr()
        if warp == t.warps:
            with cute.arch.elect_one():
                for stage in cutlass.range_constexpr(t.stages):
                    cute.arch.mbarrier_init(full + stage, 1)  # the producer's announcement of bytes
                    cute.arch.mbarrier_init(empty + stage, t.warps)  # lane 0 of every warp that multiplies
            # Releases the inits; who uses the barriers does so after the sync below.
            cute.arch.mbarrier_init_fence()
        # No warp may wait for a barrier, or arrive at one, before it is initialized.
        cute.arch.sync_threads()

    def warp_place(self, warp: Int32) -> tuple[Int32, Int32]:
        """Warp -> which of the tokens' and of the rows' it is."""
        return warp % self.tile.token_warps, warp // self.tile.token_warps % self.tile.row_warps

    def row_band(self, row_warp: Int32 | int, band: int) -> Int32 | int:
        """First row, of the CTA's, of a warp's band; with two panels a warp's bands are the same rows of both."""
        if self.tile.panels == 2:
            return band * self.tile.panel_rows + row_warp * BAND
        return row_warp * self.tile.warp_rows + band * BAND

    def operand_addresses(self, storage, warp: Int32, lane: Int32):
        """Where a lane finds, in stage 0, the chunks it gives to ldmatrix first: (token codes, row codes).

        A multiple of 8 rows further on is the same multiple of `row_bytes` further on.
        """
        t = self.tile
        token_warp, row_warp = self.warp_place(warp)
        first_block = warp // (t.token_warps * t.row_warps) * t.warp_blocks
        row, half = token_lane(lane)
        token_codes = smem_address(storage.token_codes.data_ptr()) + code_offset(
            t, token_warp * t.warp_tokens + row, first_block * 2 + half
        )
        row, half = row_lane(lane)
        row_codes = smem_address(storage.row_codes.data_ptr()) + code_offset(
            t, self.row_band(row_warp, 0) + row, first_block * 2 + half
        )
        return token_codes, row_codes

    def token_scale_address(self, storage, warp: Int32, lane: Int32, first_token: Int32) -> Int32:
        """Where a lane finds its scale words of the tokens from `first_token` (of all) on, in stage 0."""
        t = self.tile
        block = warp // (t.token_warps * t.row_warps) * t.warp_blocks
        token_warp, _ = self.warp_place(warp)
        row = token_warp * t.warp_tokens + scale_lane(t.token_scale_rows, lane)
        inside = first_token % SCALE_TILE_ROWS + row
        return smem_address(storage.token_scales.data_ptr()) + scale_offset(
            t.token_scale_rows, t.k_blocks, inside, block
        )

    def row_scale_address(self, storage, warp: Int32, lane: Int32, first_row: Int32) -> Int32:
        """Where a lane finds its scale words of the rows from `first_row` (of all) on, in stage 0."""
        t = self.tile
        _, row_warp = self.warp_place(warp)
        block = warp // (t.token_warps * t.row_warps) * t.warp_blocks
        inside = first_row % SCALE_TILE_ROWS + self.row_band(row_warp, 0) + scale_lane(BAND, lane)
        return smem_address(storage.row_scales.data_ptr()) + scale_offset(BAND, t.k_blocks, inside, block)

    def make_fragments(self) -> Fragments:
        """Registers of two k blocks."""
        t = self.tile
        return Fragments(
            cute.make_rmem_tensor((4, t.warp_tokens // 16, 2), Uint32),
            cute.make_rmem_tensor((2, t.warp_rows // 8, 2), Uint32),
            cute.make_rmem_tensor((max(1, t.warp_tokens // BAND), 2), Uint32),
            cute.make_rmem_tensor((t.warp_rows // BAND, 2), Uint32),
        )

    def load_block(
        self,
        fragments: Fragments,
        buffer: int,
        block: int,
        stage: Int32,
        token_codes: Int32,
        row_codes: Int32,
        token_scales: Int32,
        row_scales: Int32,
    ):
        """Operands of a warp's k block `block` of a stage -> registers `buffer`."""
        t = self.tile
        rA, rB, rSA, rSB = fragments
        flip = block * 2 * 16  # chunks of a k block differ from the first one's in these address bits
        token_address = (token_codes + stage * (t.tokens * t.row_bytes)) ^ flip
        for mma in range(t.warp_tokens // 16):
            words = load_matrices(token_address + mma * 16 * t.row_bytes)
            for i in range(4):
                rA[i, mma, buffer] = words[i]
        row_address = (row_codes + stage * (t.rows * t.row_bytes)) ^ flip
        for band in range(t.warp_rows // BAND):
            for pair in range(2):
                words = load_matrices(row_address + (self.row_band(0, band) + pair * 16) * t.row_bytes)
                for i in range(4):
                    rB[i % 2, band * 4 + pair * 2 + i // 2, buffer] = words[i]
        line = block * t.token_scale_rows * SCALE_LINE
        bands = max(1, t.warp_tokens // BAND)
        load_scales(rSA, buffer, 0, token_scales + stage * t.token_scale_bytes + line, bands)
        line = block * BAND * SCALE_LINE
        bands = t.warp_rows // BAND // t.panels
        for panel in range(t.panels):
            address = row_scales + stage * t.row_scale_bytes + line + panel * (t.row_scale_bytes // t.panels)
            load_scales(rSB, buffer, panel * bands, address, bands)

    def multiply_block(
        self,
        acc: cute.Tensor,  # f32 (4, row MMAs, token MMAs)
        fragments: Fragments,
        buffer: int,
    ):
        """acc[:, row MMA, token MMA] += the k block in registers `buffer`."""
        t = self.tile
        rA, rB, rSA, rSB = fragments
        for row in range(t.warp_rows // 8):
            for token in range(t.warp_tokens // 16):
                a_band, a_selector = token_selector(token)
                b_band, b_selector = row_selector(row)
                result = mma_m16n8k64(
                    tuple(acc[v, row, token] for v in range(4)),
                    tuple(rA[i, token, buffer] for i in range(4)),
                    tuple(rB[i, row, buffer] for i in range(2)),
                    rSA[a_band, buffer],
                    rSB[b_band, buffer],
                    a_selector,
                    b_selector,
                )
                for v in range(4):
                    acc[v, row, token] = result[v]

    def operands(self, **tensors: cute.Tensor) -> Operands:
        """What TMA needs to load the stages from views of global memory, whose first modes are those of the boxes."""
        layout, box = stage_layouts(self.tile), boxes(self.tile)
        load = cpasync.CopyBulkTensorTileG2SOp()
        return Operands(
            **{
                name: Operand(*cpasync.make_tiled_tma_atom(load, tensor, layout[name], box[name]))
                for name, tensor in tensors.items()
            }
        )

    def loads(self, operands: Operands, stages: Stages) -> Loads:
        """The CTA's loads, by tiles of the modes of global memory; of scales, all but the first mode."""

        def load_of(name: str) -> Load:
            operand, box = getattr(operands, name), boxes(self.tile)[name]
            whole = 0 if name.endswith("codes") else 1  # modes that one box has all of
            at = (0,) * whole + (None,) * (cute.rank(operand.tensor) - whole)
            tiles = cute.local_tile(operand.tensor, box, at)
            return Load(operand.atom, *partition_loads(operand.atom, getattr(stages, name), tiles, len(box)))

        return Loads(**{name: load_of(name) for name in Loads._fields})

    @cute.jit
    def load_first(self, loads: Loads, ring: Ring, early: Int32, place: tuple):
        """Issue the weights of the first `early` stages of `place`, a tile as the subclass names it.

        No kernel on the stream writes them, so they need not wait for the previous one. No wait for `empty` either:
        nothing has been loaded into the ring yet.
        """
        for stage in cutlass.range(early, unroll=1):
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(ring.full + stage, self.tile.stage_bytes)
            self.load_rows(loads.row_codes, loads.row_scales, place, stage, ring.full + stage, stage)

    @cute.jit
    def load_tile(
        self, loads: Loads, ring: Ring, count: Int32, early: Int32, stage: Int32, phase: Int32, place: tuple
    ):
        """Load the `count` stages of a tile, `early` of which have their weights -> (early, next stage, its phase)."""
        full, empty = ring
        for step in cutlass.range(count, unroll=1):
            if early <= 0:
                # Wait for a free stage: TMA must not overwrite what a warp still reads.
                cute.arch.mbarrier_wait(empty + stage, phase)
                # Announce its bytes and issue the weights' loads
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(full + stage, self.tile.stage_bytes)
                self.load_rows(loads.row_codes, loads.row_scales, place, step, full + stage, stage)
            early -= 1
            # Issue the tokens' loads
            self.load_tokens(loads.token_codes, loads.token_scales, place, step, full + stage, stage)
            stage, phase = advance(stage, phase, self.tile.stages)
        return early, stage, phase

    @cute.jit
    def accumulate(
        self,
        acc: cute.Tensor,  # f32 (4, row MMAs, token MMAs)
        count: Int32,
        stage: Int32,
        phase: Int32,
        lane: Int32,
        ring: Ring,
        addresses: Addresses,
    ):
        """acc = a warp's sums over `count` stages -> (next stage, its phase)."""
        t = self.tile
        blocks = cutlass.const_expr(t.warp_blocks)
        fragments = self.make_fragments()
        full, empty = ring
        acc.fill(0.0)
        # Wait for the loads of the first stage
        cute.arch.mbarrier_wait(full + stage, phase)
        self.load_block(fragments, 0, 0, stage, *addresses)
        for i in cutlass.range(count, unroll=1):
            for block in cutlass.range_constexpr(blocks):
                last = cutlass.const_expr(block + 1 == blocks)
                if cutlass.const_expr(not last):
                    self.load_block(fragments, (block + 1) % 2, block + 1, stage, *addresses)
                else:
                    # Give the stage back: its last operands are in registers. One lane arrives for all, after all of
                    # them have loaded; else the producer could overwrite what a slower lane still has to load.
                    cute.arch.sync_warp()
                    if lane == 0:
                        cute.arch.mbarrier_arrive(empty + stage)
                    stage, phase = advance(stage, phase, t.stages)
                    if cutlass.const_expr(blocks == 1):
                        self.multiply_block(acc, fragments, 0)
                    # Wait for the next stage, and load its first operands while the MMAs of this one run. After a
                    # tile's last stage the next call does, so that the epilogue has the registers.
                    if i + 1 < count:
                        cute.arch.mbarrier_wait(full + stage, phase)
                        self.load_block(fragments, 0, 0, stage, *addresses)
                if cutlass.const_expr(blocks > 1):
                    self.multiply_block(acc, fragments, block % 2)
        return stage, phase

    @cute.jit
    def add_partials(
        self,
        acc: cute.Tensor,  # f32 (4, row MMAs, token MMAs)
        storage,
        warp: Int32,
        lane: Int32,
    ):
        """acc of the first of the k warps += the others', in ascending k order; the others' is lost."""
        t = self.tile
        group = cutlass.const_expr(t.token_warps * t.row_warps)
        k_warp = warp // group
        mmas = cutlass.const_expr(t.warp_rows // 8 * (t.warp_tokens // 16))
        place = smem_address(storage.sums.data_ptr()) + (warp % group * 32 + lane) * 16
        if k_warp > 0:
            for mma in cutlass.range_constexpr(mmas):
                address = place + ((k_warp - 1) * mmas + mma) * (group * 32 * 16)
                store_sums(address, [acc[mma * 4 + v] for v in range(4)])
        # The other warps' sums are in shared memory. Not sync_threads: the producer does not come here.
        cute.arch.barrier(barrier_id=Barrier.SUMS, number_of_threads=32 * t.warps)
        if k_warp == 0:
            for other in cutlass.range_constexpr(t.k_warps - 1):
                for mma in cutlass.range_constexpr(mmas):
                    more = load_sums(place + (other * mmas + mma) * (group * 32 * 16))
                    for v in cutlass.range_constexpr(4):
                        acc[mma * 4 + v] = acc[mma * 4 + v] + more[v]
        # They have been read: the next tile's may overwrite them.
        cute.arch.barrier(barrier_id=Barrier.SUMS, number_of_threads=32 * t.warps)

    def give_registers(self):
        """The producer's warpgroup calls it where registers move: all four of its warps, as setmaxnreg demands."""
        if self.tile.moves_registers:
            cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)

    def take_registers(self):
        """The other warps call it where registers move."""
        if self.tile.moves_registers:
            cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)

    def prefetch(self, operands: Operands):
        """Fetch the TMA descriptors."""
        for operand in operands:
            cpasync.prefetch_descriptor(operand.atom)


def load_scales(registers: cute.Tensor, buffer: int, first: int, address: Int32, bands: int):
    """Scale words of one or two neighbouring bands -> registers[first ..., buffer]."""
    words = load_words(address, 2) if bands == 2 else (load_word(address),)
    for band, word in enumerate(words):
        registers[first + band, buffer] = word


def empty_sums(tile: LinearTile) -> cute.Tensor:
    """Registers of a warp's sums: (4, row MMAs, token MMAs)."""
    return cute.make_rmem_tensor((4, tile.warp_rows // 8, tile.warp_tokens // 16), Float32)
