"""Rows of bf16 -> NVFP4 tokens by slot, for the products of the experts_kernel.py of sm100 and sm120.

    from tokens   slot places[m * T + t] = round(x[m]), rounded once unless the scale is the expert's
    from slots    slot s = round(h[s]), where a scale depends on all of a slot and w13 could not round itself

Codes uint8 [R, K/2]; block scales in the atoms of the slot's tile (`rounding.scale_offset`), zero from K to the end
of its last atom; with a scale of every slot also that scale, f32 [R]. Slots without a pair are not written: what
they hold stays in their own column of a product.
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint32

from ..device.launch import launch
from ..device.ptx import load_coherent
from ..format import AMAX_PER_GLOBAL_SCALE, GROUP_SIZE
from .output import store_words
from .rounding import largest, round_group, scale_offset
from .variants import Scale

THREADS = 256


class Gather:
    """One CTA a row; a thread rounds groups of 16."""

    def __init__(self, scale: str, from_slots: bool = False):
        self.scale = Scale(scale)
        if from_slots and self.scale is not Scale.TOKEN:
            raise ValueError(f"w13 rounds with a scale of the {scale} itself")
        self.from_slots = from_slots

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,  # bf16 [M, K], rows 16-byte aligned
        mPlaces: cute.Tensor,  # int32 [M * T], -1 for none; any tensor from slots
        mTable: cute.Tensor,  # int32 [1 + tiles, 4]
        mScale: cute.Tensor,  # f32 [1], [E], or [R] to be written
        mCodes: cute.Tensor,  # uint8 [R, K/2]
        mScales: cute.Tensor,  # uint8 [tiles * atoms, ceil(K/64), 32, 16]
        topk: Int32,
        tokens: Int32,  # slots of a tile
        stream,
    ):
        @cute.struct
        class Shared:
            amax: cute.struct.MemRange[Float32, THREADS // 32]

        self.shared = Shared
        launch(
            self.kernel(mX, mPlaces, mTable, mScale, mCodes, mScales, topk, tokens),
            grid=(mX.shape[0], 1, 1),
            block=(THREADS, 1, 1),
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        mX: cute.Tensor,  # bf16 [M, K]
        mPlaces: cute.Tensor,  # int32 [M * T]
        mTable: cute.Tensor,  # int32 [1 + tiles, 4]
        mScale: cute.Tensor,  # f32 [1], [E] or [R]
        mCodes: cute.Tensor,  # uint8 [R, K/2]
        mScales: cute.Tensor,  # uint8 [tiles * atoms, ceil(K/64), 32, 16]
        topk: Int32,
        tokens: Int32,
    ):
        # In this order: a product that starts early reads the table, which is complete only after this wait.
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        thread, _, _ = cute.arch.thread_idx()
        row, _, _ = cute.arch.block_idx()
        table = mTable.iterator.toint()
        wanted = cutlass.Boolean(True)
        if cutlass.const_expr(self.from_slots):
            tiles, _, _, _ = load_coherent(table)
            tile = row // tokens
            wanted = tile < tiles
            if wanted:
                _, _, slots, _ = load_coherent(table + Int64(tile + 1) * 16)
                wanted = row % tokens < slots
        if wanted:
            self.round_row(mX, mPlaces, mTable, mScale, mCodes, mScales, topk, tokens, thread, row)

    @cute.jit
    def round_row(
        self,
        mX: cute.Tensor,  # bf16 [M, K]
        mPlaces: cute.Tensor,  # int32 [M * T]
        mTable: cute.Tensor,  # int32 [1 + tiles, 4]
        mScale: cute.Tensor,  # f32 [1], [E] or [R]
        mCodes: cute.Tensor,  # uint8 [R, K/2]
        mScales: cute.Tensor,  # uint8 [tiles * atoms, ceil(K/64), 32, 16]
        topk: Int32,
        tokens: Int32,
        thread: Int32,
        row: Int32,
    ):
        """Round a row and write it to the slots of its pairs, or to its own."""
        groups = mX.shape[1] // GROUP_SIZE
        scale = Float32(0.0)
        if cutlass.const_expr(self.scale is Scale.TENSOR):
            scale = mScale[0]
        elif cutlass.const_expr(self.scale is Scale.TOKEN):
            scale = self.scale_of_row(mX, thread, row)
            if thread == 0:
                for t in cutlass.range(topk, unroll=1):
                    slot = row
                    if cutlass.const_expr(not self.from_slots):
                        slot = mPlaces[row * topk + t]
                    if slot >= 0:
                        mScale[slot] = scale
        for group in cutlass.range(thread, mScales.shape[1] * 4, THREADS, unroll=1):
            values = cute.make_rmem_tensor(GROUP_SIZE, Float32)
            values.fill(0.0)
            if group < groups:
                self.load_group(mX, row, group, values)
            low, high, bits = Uint32(0), Uint32(0), Uint32(0)
            if cutlass.const_expr(self.scale is not Scale.EXPERT):
                low, high, bits = round_group(values, scale)
            for t in cutlass.range(topk, unroll=1):
                slot = row
                if cutlass.const_expr(not self.from_slots):
                    slot = mPlaces[row * topk + t]
                if slot >= 0:
                    if cutlass.const_expr(self.scale is Scale.EXPERT):
                        low, high, bits = round_group(values, mScale[mTable[slot // tokens + 1, 0]])
                    if group < groups:
                        store_words((low, high), mCodes, Int64(slot) * mCodes.shape[1], group * 8)
                    at = mScales.iterator + scale_offset(slot, group, tokens, mScales.shape[1])
                    cute.make_tensor(at, cute.make_layout(1))[0] = bits.to(cutlass.Uint8)

    @cute.jit
    def load_group(
        self,
        mX: cute.Tensor,  # bf16 [M, K]
        row: Int32,
        group: Int32,
        values: cute.Tensor,  # f32 [16]
    ):
        """The 16 values of a group as f32."""
        words = cute.make_rmem_tensor(8, Uint32)
        source = mX.iterator + (Int64(row) * mX.stride[0] + group * GROUP_SIZE)
        source = cute.recast_ptr(source.align(16), dtype=Uint32)
        cute.autovec_copy(cute.make_tensor(source, cute.make_layout(8)), words)
        values.store(cute.recast_tensor(words, BFloat16).load().to(Float32))

    @cute.jit
    def scale_of_row(
        self,
        mX: cute.Tensor,  # bf16 [M, K]
        thread: Int32,
        row: Int32,
    ) -> Float32:
        """amax / (6 * 448) of a row, at every thread; 1 for a row of zeros."""
        amax = Float32(0.0)
        for group in cutlass.range(thread, mX.shape[1] // GROUP_SIZE, THREADS, unroll=1):
            values = cute.make_rmem_tensor(GROUP_SIZE, Float32)
            self.load_group(mX, row, group, values)
            amax = cute.arch.fmax(amax, largest(values), nan=True)
        for i in cutlass.range_constexpr(5):  # over the 32 lanes
            amax = cute.arch.fmax(amax, cute.arch.shuffle_sync_bfly(amax, 1 << i), nan=True)
        storage = cutlass.memory.SmemAllocator().allocate(self.shared)
        sAmax = storage.amax.get_tensor(cute.make_layout(THREADS // 32))
        if thread % 32 == 0:
            sAmax[thread // 32] = amax
        # Every warp's amax is in shared memory; nothing is written there again, so one barrier is enough.
        cute.arch.sync_threads()
        for w in cutlass.range_constexpr(THREADS // 32):
            amax = cute.arch.fmax(amax, sAmax[w], nan=True)
        scale = Float32(1.0)
        if amax != Float32(0.0):
            scale = amax / Float32(AMAX_PER_GLOBAL_SCALE)
        return scale
