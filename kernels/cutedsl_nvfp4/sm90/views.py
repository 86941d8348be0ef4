"""Views of Hopper's operands in the order of TMA's dimensions, and what all kernels share of the pipeline's stages."""

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import BFloat16, Int32, Int64
from cutlass.cute.nvgpu import cpasync, warpgroup

from ..device.views import DESCRIPTOR_BYTES, descriptor_address, descriptor_at, partition_loads
from .layout import CODE_WORDS, SCALE_WORDS
from .tiles import BLOCK_K

SWIZZLE_ATOM = warpgroup.SmemLayoutAtomKind.K_SW128  # a token's 64 k of bf16 are one row of 128 bytes


class StageLayouts(NamedTuple):
    """Shared memory of all stages; a stage's weights are a box of blocks, or of blocks by panels."""

    x: cute.ComposedLayout  # (tokens, stage's k, stages), 128B-swizzled
    codes: cute.Layout  # (256, *box, stages)
    scales: cute.Layout  # (64, *box, stages)


class Pipeline(NamedTuple):
    """The stages in shared memory, and for each of them two mbarriers."""

    full: cute.Pointer  # what the producer announced has arrived
    empty: cute.Pointer  # the consumers are done with it
    x: cute.Tensor  # bf16 (tokens, stage's k, stages), 128B-swizzled
    codes: cute.Tensor  # int64 (256, *box, stages)
    scales: cute.Tensor  # int32 (64, *box, stages)


class Tokens(NamedTuple):
    """TMA's view of x, and its atoms: number i loads boxes of i + 1 steps of tokens.

    TMA takes 5 to 8 clocks for a row of a box that lies beyond the last token, four times as many as for one that it
    loads, so that no box has a whole step of such rows.
    """

    view: cute.Tensor  # bf16 (M, K, groups)
    atoms: tuple[cute.CopyAtom, ...]


class Weights(NamedTuple):
    """TMA's atoms for packed weights, and its views of a linear's [P, ...] or of experts' [E, P, ...]."""

    code_atom: cute.CopyAtom
    codes: cute.Tensor  # int64 (256, KB, P[, E])
    scale_atom: cute.CopyAtom
    scales: cute.Tensor  # int32 (64, KB, P[, E])


class WeightLoads(NamedTuple):
    """`Weights` as a producer warp loads them: from boxes in global memory to stages in shared memory."""

    code_atom: cute.CopyAtom
    codes: cute.Tensor  # int64 (box, boxes...)
    code_stages: cute.Tensor  # int64 (box, stages)
    scale_atom: cute.CopyAtom
    scales: cute.Tensor  # int32 (box, boxes...)
    scale_stages: cute.Tensor  # int32 (box, stages)


def token_layout(tokens: int, blocks: int, stages: int) -> cute.ComposedLayout:
    """Tokens by stage, as TMA or cp.async write them and ldmatrix or wgmma read them."""
    atom = warpgroup.make_smem_layout_atom(SWIZZLE_ATOM, BFloat16)
    return cute.tile_to_shape(atom, (tokens, blocks * BLOCK_K, stages), order=(0, 1, 2))


def stage_layouts(tokens: int, box: tuple[int, ...], stages: int) -> StageLayouts:
    """`box`: blocks of k a stage, and panels where it has several."""
    return StageLayouts(
        x=token_layout(tokens, box[0], stages),
        codes=cute.make_layout((CODE_WORDS, *box, stages)),
        scales=cute.make_layout((SCALE_WORDS, *box, stages)),
    )


def one_stage(layout: cute.Layout) -> cute.Layout:
    """What TMA writes at a time of a layout by stage."""
    return cute.slice_(layout, (None,) * (cute.rank(layout) - 1) + (0,))


def weights_by_tma(codes: cute.Tensor, scales: cute.Tensor, layouts: StageLayouts, box: tuple) -> Weights:
    """The loads of `codes` and `scales`, which are views from `block_view` or `expert_view`."""
    load = cpasync.CopyBulkTensorTileG2SOp()
    return Weights(
        *cpasync.make_tiled_tma_atom(load, codes, one_stage(layouts.codes), (CODE_WORDS, *box)),
        *cpasync.make_tiled_tma_atom(load, scales, one_stage(layouts.scales), (SCALE_WORDS, *box)),
    )


def tokens_by_tma(x: cute.Tensor, step: int, steps: int, blocks: int, shared: bool = False) -> Tokens:
    """The loads of up to `steps` x `step` tokens of `x`, a `tokens_view`, by `blocks` blocks of k.

    With `shared` a load writes a stage of several CTAs.
    """
    load = cpasync.CopyBulkTensorTileG2SMulticastOp() if shared else cpasync.CopyBulkTensorTileG2SOp()
    atoms = []
    for tokens in range(step, steps * step + 1, step):
        box = (tokens, blocks * BLOCK_K)
        layout = cute.tile_to_shape(
            warpgroup.make_smem_layout_atom(SWIZZLE_ATOM, BFloat16), box, order=(0, 1)
        )
        atom, view = cpasync.make_tiled_tma_atom(load, x, layout, box)
        atoms.append(atom)
    return Tokens(view, tuple(atoms))


def partition_tokens(
    x: Tokens, pipeline: Pipeline, step: int, blocks: int
) -> tuple[cute.Tensor, cute.Tensor]:
    """-> (shared (box, steps, stages), global (box, steps, stages of k, groups)) views of loads of `x`."""
    box = (step, blocks * BLOCK_K)
    gX = cute.local_tile(x.view, box, (None, None, None))
    sX = cute.local_tile(pipeline.x, box, (None, 0, None))
    return partition_loads(x.atoms[0], sX, gX, 2)


def descriptor_of(x: Tokens, steps: Int32) -> cute.Pointer:
    """TMA's descriptor of boxes of so many steps of tokens, at least one."""
    # The atoms are parameters of the kernel that follow each other
    return descriptor_at(descriptor_address(x.atoms[0]) + Int64(steps - 1) * DESCRIPTOR_BYTES)


def load_tokens(
    x: Tokens, source: cute.Tensor, target: cute.Tensor, barrier: cute.Pointer, descriptor: cute.Pointer
) -> None:
    """Issue the TMA load of a stage's tokens, of views from `partition_tokens`; the barrier awaits their bytes."""
    cute.copy(x.atoms[0], source, target, tma_bar_ptr=barrier, tma_desc_ptr=descriptor)


def prefetch_descriptors(x: Tokens, weights: Weights) -> None:
    """Bring TMA's descriptors to its cache."""
    for atom in (*x.atoms, weights.code_atom, weights.scale_atom):
        cpasync.prefetch_descriptor(atom)


def pipeline_in(storage, layouts: StageLayouts) -> Pipeline:
    """The pipeline in a kernel's shared memory."""
    return Pipeline(
        full=storage.full.data_ptr(),
        empty=storage.empty.data_ptr(),
        x=storage.x.get_tensor(layouts.x.outer, swizzle=layouts.x.inner),
        codes=storage.codes.get_tensor(layouts.codes),
        scales=storage.scales.get_tensor(layouts.scales),
    )


def partition_weights(weights: Weights, pipeline: Pipeline, box: tuple, where: tuple) -> WeightLoads:
    """The loads of the boxes that `where` selects, by k step and by whatever else it leaves open."""
    modes = 1 + len(box)
    gCodes = cute.local_tile(weights.codes, (CODE_WORDS, *box), (0, *where))
    gScales = cute.local_tile(weights.scales, (SCALE_WORDS, *box), (0, *where))
    tCs, tCg = partition_loads(weights.code_atom, pipeline.codes, gCodes, modes)
    tSs, tSg = partition_loads(weights.scale_atom, pipeline.scales, gScales, modes)
    return WeightLoads(weights.code_atom, tCg, tCs, weights.scale_atom, tSg, tSs)


@cute.jit
def load_weights(loads: WeightLoads, box: tuple, stage: Int32, full: cute.Pointer, expected: Int32):
    """Tell a stage's barrier to wait for `expected` bytes (with those of tokens by TMA), then load its weights."""
    with cute.arch.elect_one():
        cute.arch.mbarrier_arrive_and_expect_tx(full + stage, expected)
    copy_weights(loads, box, stage, full)


@cute.jit
def copy_weights(loads: WeightLoads, box: tuple, stage: Int32, full: cute.Pointer):
    """Issue the TMA loads of a stage's weights."""
    for atom, source, target in (
        (loads.code_atom, loads.codes, loads.code_stages),
        (loads.scale_atom, loads.scales, loads.scale_stages),
    ):
        cute.copy(atom, source[None, *box], target[None, stage], tma_bar_ptr=full + stage)


@cute.jit
def tokens_view(mX: cute.Tensor, k: Int32):
    """x [M, groups * K] -> (M, K, groups), so that TMA fills with zeros beyond K instead of crossing groups."""
    k = cute.assume(k, divby=16)
    layout = cute.make_layout((mX.shape[0], k, mX.shape[1] // k), stride=(mX.stride[0], 1, k))
    return cute.make_tensor(mX.iterator, layout)


@cute.jit
def results_view(mOut: cute.Tensor):
    """out [M, N] whose rows are known to be whole 16-byte pieces, as TMA's strides have to be."""
    n = cute.assume(mOut.shape[1], divby=8)
    return cute.make_tensor(mOut.iterator, cute.make_layout((mOut.shape[0], n), stride=(n, 1)))


def block_view(packed: cute.Tensor, words: int):
    """[P, KB, words] -> (words, KB, P), the order of TMA's dimensions."""
    layout = cute.make_layout((words, packed.shape[1], packed.shape[0]), stride=(1, words, packed.stride[0]))
    return cute.make_tensor(packed.iterator, layout)


def expert_view(packed: cute.Tensor, words: int):
    """[E, P, KB, words] -> (words, KB, P, E), the order of TMA's dimensions."""
    layout = cute.make_layout(
        (words, packed.shape[2], packed.shape[1], packed.shape[0]),
        stride=(1, words, packed.stride[1], packed.stride[0]),
    )
    return cute.make_tensor(packed.iterator, layout)
