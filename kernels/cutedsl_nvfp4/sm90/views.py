"""Views of Hopper's operands, in the order of TMA's dimensions."""

import cutlass.cute as cute
from cutlass import Int32


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
