"""Activations to NVFP4, bit for bit as reference.quantize: e2m1 codes and ue4m3 block scales in 128x4 tiles.

    operand    shape                                  dtype   layout
    x          [M, groups * K]                        bf16    rows of 16-byte pieces
    act_scale  [1] or [M]                             f32     in: index m * stride; `dynamic`: out, [M]
    codes      [M, groups * K'/2]                     uint8   K' = K rounded up to 32; zeros beyond K
    scales     [groups * ceil(M/128), KB, 32, 16]     uint8   KB = ceil(K / 64); zeros beyond K, nothing beyond M

A thread takes 16 values, a row's CTA (or several) its threads. With `dynamic` a row's scale is its own
amax / (6 * 448), found in a first pass whose loads the second finds in cache.

    block scale   e4m3(amax / 6 / act_scale)
    code          e2m1(x / (block scale * act_scale)), see rounding.py
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, Uint32

from ..device.launch import launch
from ..format import AMAX_PER_GLOBAL_SCALE, GROUP_SIZE
from .rounding import largest, round_group

THREADS = 256
WARPS = THREADS // 32


class Quantize:
    """One compiled kernel: with the scales given, or `dynamic`."""

    def __init__(self, dynamic: bool):
        self.dynamic = dynamic

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,  # bf16 [M, groups * K]
        mActScale: cute.Tensor,  # f32 [1] or [M]
        mCodes: cute.Tensor,  # uint8 [M, groups * K'/2]
        mScales: cute.Tensor,  # uint8 [groups * ceil(M/128), KB, 32, 16]
        groups: Int32,
        k: Int32,
        act_stride: Int32,
        stream,
    ):
        slots = mScales.shape[1] * 4 * groups
        ctas = 1 if self.dynamic else cute.ceil_div(slots, THREADS)
        launch(
            self.kernel(mX, mActScale, mCodes, mScales, groups, k, act_stride),
            grid=(mX.shape[0], ctas, 1),
            block=(THREADS, 1, 1),
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        mX: cute.Tensor,  # bf16 [M, groups * K]
        mActScale: cute.Tensor,  # f32 [1] or [M]
        mCodes: cute.Tensor,  # uint8 [M, groups * K'/2]
        mScales: cute.Tensor,  # uint8 [groups * ceil(M/128), KB, 32, 16]
        groups: Int32,
        k: Int32,
        act_stride: Int32,
    ):
        # At once: before this kernel is complete, a linear kernel only reads weights.
        cute.arch.griddepcontrol_launch_dependents()
        thread, _, _ = cute.arch.thread_idx()
        m, part, _ = cute.arch.block_idx()
        _, parts, _ = cute.arch.grid_dim()
        blocks = mScales.shape[1]
        slots = blocks * 4  # of a group; those beyond K are padding
        used = k // GROUP_SIZE
        row_tiles = mScales.shape[0] // groups
        row_bytes = mCodes.shape[1] // groups
        row = mX.iterator + Int64(m) * mX.stride[0]
        codes = mCodes.iterator + Int64(m) * mCodes.shape[1]
        within_tile = m % 32 * 16 + m % 128 // 32 * 4  # byte of token m's first group in a 128x4 tile
        # x is the previous kernel's result, and what is written here it may still read.
        cute.arch.griddepcontrol_wait()
        scale = Float32(1.0)
        if cutlass.const_expr(self.dynamic):
            amax = Float32(0.0)
            for index in cutlass.range(thread, groups * used, THREADS, unroll=1):
                amax = cute.arch.fmax(amax, largest(self.load(row, index * GROUP_SIZE)), nan=True)
            amax = self.over_threads(amax, thread)
            if amax != Float32(0.0):
                scale = amax / Float32(AMAX_PER_GLOBAL_SCALE)
            if thread == 0:
                mActScale[m] = scale
        else:
            scale = mActScale[m * act_stride]
        for index in cutlass.range(part * THREADS + thread, groups * slots, parts * THREADS, unroll=1):
            group, slot = index // slots, index % slots
            block_scale = Uint32(0)
            words = cute.make_rmem_tensor(2, Uint32)
            words.fill(Uint32(0))
            if slot < used:
                values = self.load(row, group * k + slot * GROUP_SIZE)
                words[0], words[1], block_scale = round_group(values, scale)
            if slot * 8 < row_bytes:
                target = cute.recast_ptr((codes + (group * row_bytes + slot * 8)).align(8), dtype=Uint32)
                cute.autovec_copy(words, cute.make_tensor(target, cute.make_layout(2)))
            tile = (Int64(group * row_tiles + m // 128) * blocks + slot // 4) * 512  # bytes of a 128x4 tile
            byte = cute.make_tensor(mScales.iterator + (tile + within_tile + slot % 4), cute.make_layout(1))
            byte[0] = block_scale.to(Uint8)

    @cute.jit
    def load(self, row: cute.Pointer, column: Int32):
        """16 values of a row as f32."""
        piece = cute.make_rmem_tensor(GROUP_SIZE, BFloat16)
        source = cute.make_tensor((row + column).align(16), cute.make_layout(GROUP_SIZE))
        cute.autovec_copy(source, piece)
        values = cute.make_rmem_tensor(GROUP_SIZE, Float32)
        values.store(piece.load().to(Float32))
        return values

    @cute.jit
    def over_threads(self, amax: Float32, thread: Int32) -> Float32:
        """The largest of all threads' values, at every thread."""
        shared = cutlass.memory.SmemAllocator().allocate_tensor(Float32, cute.make_layout(WARPS), 16)
        for i in cutlass.range_constexpr(5):  # over the 32 lanes
            amax = cute.arch.fmax(amax, cute.arch.shuffle_sync_bfly(amax, 1 << i), nan=True)
        if thread % 32 == 0:
            shared[thread // 32] = amax
        # Every warp's amax is in shared memory; nothing is written there again, so one barrier is enough.
        cute.arch.sync_threads()
        for warp in cutlass.range_constexpr(WARPS):
            amax = cute.arch.fmax(amax, shared[warp], nan=True)
        return amax
