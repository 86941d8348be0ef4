"""Memory that kernels reach: the host's, shared memory's addresses, mbarriers, and the boxes of TMA descriptors."""

import ctypes
from dataclasses import dataclass

import numpy as np

from tests.support.emulator.ptx import Fault, Unsupported

SHARED_START = 1024  # of the dynamic shared memory within a CTA's window
RANK_SHIFT = 24  # of a shared address: the CTA's rank in its cluster


class HostMemory:
    """Arrays that the kernel may access, found by address."""

    def __init__(self, regions: list[tuple[int, int, str]]) -> None:
        self.regions = [
            (address, np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)), name)
            for address, size, name in regions
            if size
        ]

    def find(self, address: int, size: int, what: str) -> tuple[np.ndarray, int]:
        """(the array, the offset in it) of `size` bytes at `address`."""
        for start, array, _ in self.regions:
            if start <= address and address + size <= start + len(array):
                return array, address - start
        near = [f"{name} [{start:#x}, +{len(array)}]" for start, array, name in self.regions]
        raise Fault(f"{what}: {size} bytes at {address:#x} are in no operand ({', '.join(near)})")


@dataclass
class Mbarrier:
    count: int
    pending: int
    bytes: int = 0  # expected and not yet there
    phase: int = 0

    def settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count


@dataclass
class TensorMap:
    """The 128 bytes of a TMA descriptor, as CuTe DSL's host code writes them."""

    address: int
    bits: int  # of an element
    swizzle: int  # bytes: 0, 32, 64, 128
    dims: list[int]
    strides: list[int]  # bytes, of dims 1 and on
    box: list[int]

    @staticmethod
    def decode(raw: np.ndarray) -> "TensorMap":
        words = [int(w) for w in raw.view(np.uint64)[:8]]
        flags = words[1] & 0xFFFFFFFF
        rank = (flags >> 4 & 7) + 1
        element = flags >> 7 & 15
        if flags >> 11 & 3 or element not in _ELEMENT_BITS:
            raise Unsupported(f"TMA descriptor with flags {flags:#x}")
        low = [words[1] >> 32, words[2] & 0xFFFFFFFF, words[2] >> 32, words[3] & 0xFFFFFFFF]
        high = [words[3] >> 32 + 4 * i & 15 for i in range(4)]
        strides = [(low[i] | high[i] << 32) << 4 for i in range(rank - 1)]
        dims = [
            words[4] & 0xFFFFFFFF,
            words[4] >> 32,
            words[5] & 0xFFFFFFFF,
            words[5] >> 32,
            words[6] & 0xFFFFFFFF,
        ]
        boxes = [words[6] >> 56, *(words[7] >> 8 * i & 255 for i in range(4))]
        steps = [words[6] >> 32 + 3 * i & 7 for i in range(5)]
        if any(steps[:rank]):
            raise Unsupported(f"TMA with element strides {steps}")
        return TensorMap(
            words[0], _ELEMENT_BITS[element], {0: 0, 1: 32, 2: 64, 3: 128}[flags >> 13 & 3],
            [d + 1 for d in dims[:rank]], strides, [b + 1 for b in boxes[:rank]],
        )  # fmt: skip

    def offsets(self, coordinates: list[int], limit: bool) -> tuple[np.ndarray, np.ndarray]:
        """Of a box's bytes, in the order of shared memory: (offset from `address`, whether it is in the tensor)."""
        axes = [np.arange(b) + c for b, c in zip(self.box, coordinates)]
        if self.bits == 4:  # two elements a byte
            assert self.box[0] % 2 == 0 and coordinates[0] % 2 == 0
            inner = np.arange(self.box[0] // 2) + coordinates[0] // 2
            valid = (inner >= 0) & (2 * inner < self.dims[0])
        else:
            size = self.bits // 8
            inner = (axes[0][:, None] * size + np.arange(size)).reshape(-1)
            valid = np.repeat((axes[0] >= 0) & (axes[0] < self.dims[0]), size)
        for axis, dim, stride in zip(axes[1:], self.dims[1:], self.strides):
            inner = axis[:, None] * stride + inner.reshape(1, -1)
            valid = ((axis >= 0) & (axis < dim))[:, None] & valid.reshape(1, -1)
            inner, valid = inner.reshape(-1), valid.reshape(-1)
        return inner, valid


# observed in descriptors of known element types
_ELEMENT_BITS = {0: 8, 1: 16, 2: 32, 3: 32, 4: 64, 5: 64, 10: 16, 11: 4}


def swizzled(address: np.ndarray, swizzle: int) -> np.ndarray:
    """Shared memory's address of a byte: 16-byte units change places within 8 rows of `swizzle` bytes."""
    if not swizzle:
        return address
    return address ^ (address >> 7 & swizzle // 16 - 1) << 4
