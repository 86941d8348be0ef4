"""What the tensor cores compute from where their operands lie: tcgen05.mma and mma.sync with block scales.

Written from the PTX manual: "Matrix descriptor", "Instruction descriptor", "Scale factor layouts" of tcgen05, and the
fragments of mma.m16n8k64.
"""

from dataclasses import dataclass

import numpy as np

from tests.support.emulator.alu import E2M1, E4M3
from tests.support.emulator.ptx import LANES, Fault, Unsupported

K = 64  # of one instruction
_VALUES = np.concatenate([E2M1, -E2M1]).astype(np.float64)
_UE4M3 = np.where(np.arange(256) < 127, E4M3, np.nan).astype(np.float64)
_SWIZZLE = {0: 0, 2: 128, 4: 64, 6: 32}
GROUP, THREAD = np.arange(LANES) // 4, np.arange(LANES) % 4  # g and t of lane 4 g + t


@dataclass(frozen=True)
class Descriptor:
    """Where an operand lies in shared memory: bytes."""

    address: int
    leading: int
    stride: int
    swizzle: int

    @staticmethod
    def decode(bits: int) -> "Descriptor":
        if bits >> 46 & 7 != 1:
            raise Fault(f"matrix descriptor {bits:#x}: version {bits >> 46 & 7} is not Blackwell's")
        if bits >> 49 & 7 or bits >> 52 & 1:
            raise Unsupported(
                f"matrix descriptor {bits:#x} with a base offset or an absolute leading dimension"
            )
        kind = bits >> 61 & 7
        if kind not in _SWIZZLE:
            raise Unsupported(f"matrix descriptor {bits:#x}: swizzle {kind}")
        return Descriptor(
            (bits & 0x3FFF) << 4, (bits >> 16 & 0x3FFF) << 4, (bits >> 32 & 0x3FFF) << 4, _SWIZZLE[kind]
        )


@dataclass(frozen=True)
class InstructionDescriptor:
    m: int
    n: int

    @staticmethod
    def decode(bits: int) -> "InstructionDescriptor":
        expected = {
            "A is e2m1": bits >> 7 & 7 == 1,
            "B is e2m1": bits >> 10 & 7 == 1,
            "scales are ue4m3": not bits >> 23 & 1,
        }
        expected["K-major, not negated, K = 64, dense"] = not bits & (0xF << 13 | 1 << 31 | 1 << 2)
        expected["scale ids are 0"] = not (bits >> 4 & 3 or bits >> 29 & 3)
        if wrong := [name for name, holds in expected.items() if not holds]:
            raise Fault(f"instruction descriptor {bits:#010x}: not so: {', '.join(wrong)}")
        return InstructionDescriptor((bits >> 24 & 31) << 4, (bits >> 17 & 63) << 3)


def read_rows(shared: np.ndarray, descriptor: Descriptor, rows: int, width: int, what: str) -> np.ndarray:
    """`rows` x `width` bytes of a K-major operand -> uint8 [rows, width].

    With a swizzle of S bytes eight rows lie S apart; without, they are 16 bytes each and `leading` apart in K. Eight
    rows on is `stride` on. The swizzle applies to the address as a whole.
    """
    row, byte = np.arange(rows)[:, None], np.arange(width)[None, :]
    group = descriptor.address + row // 8 * descriptor.stride
    if descriptor.swizzle:
        address = group + row % 8 * descriptor.swizzle + byte
        if (descriptor.address % descriptor.swizzle) + width > descriptor.swizzle:
            raise Fault(f"{what}: {width} bytes from {descriptor.address:#x} leave their swizzled rows")
        address ^= (address >> 7 & descriptor.swizzle // 16 - 1) << 4
    else:
        address = group + row % 8 * 16 + byte // 16 * descriptor.leading + byte % 16
    if address.max() >= len(shared):
        raise Fault(f"{what}: reads shared memory at {int(address.max())} of {len(shared)}")
    return shared[address]


def _decode(codes: np.ndarray) -> np.ndarray:
    """uint8 [R, K/2] -> float64 [R, K]"""
    return _VALUES[np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)]


def _scales(tmem: np.ndarray, column: int, rows: int, what: str) -> np.ndarray:
    """Scale factors of `rows` rows -> float64 [rows, 4]: row r's four bytes are in lane r % 32, column r // 32.

    Every quarter of the lanes holds a copy. What is no ue4m3 counts as NaN.
    """
    words = tmem[:, column : column + -(-rows // 32)]
    if (words.reshape(4, 32, -1) != words[:32]).any():
        raise Fault(f"{what}: the four copies of the scale factors differ")
    by_row = np.ascontiguousarray(words[:32].T).reshape(-1, 1).view(np.uint8)[:rows]
    return _UE4M3[by_row]


def _scaled(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return _decode(codes) * np.repeat(scales, 16, axis=1)


def block_scaled(
    ctas: list, d: int, a: Descriptor, b: Descriptor, shape: InstructionDescriptor, sfa: int, sfb: int,
    accumulate: bool, what: str,
) -> None:  # fmt: skip
    """tcgen05.mma of one CTA (M = 128) or of a pair (M = 256, each CTA with half of A's and of B's rows)."""
    if shape.m != 128 * len(ctas):
        raise Fault(f"{what}: M = {shape.m} for {len(ctas)} CTAs")
    if shape.n % 8 or not 8 <= shape.n <= 256 or (len(ctas) == 2 and shape.n % 16):
        raise Fault(f"{what}: N = {shape.n}")
    if d >> 16:
        raise Fault(f"{what}: the accumulator begins at lane {d >> 16}")
    n = shape.n // len(ctas)
    b_codes = np.concatenate([read_rows(cta.shared, b, n, K // 2, what) for cta in ctas])
    for cta in ctas:
        b_values = _scaled(b_codes, _scales(cta.tmem, sfb, shape.n, what))
        a_values = _scaled(read_rows(cta.shared, a, 128, K // 2, what), _scales(cta.tmem, sfa, 128, what))
        target = cta.tmem[:, d : d + shape.n]
        product = a_values @ b_values.T
        if accumulate:
            product = product + target.view(np.float32)
        target[:] = product.astype(np.float32).view(np.uint32)


def d_fragment(registers: np.ndarray) -> np.ndarray:
    """f32 [4 J, 32] -> [16 rows, 8 J]

    Register 4 j + i of lane 4 g + t is row g + 8 (i // 2), column 8 j + 2 t + i % 2.
    """
    d = np.zeros((16, 2 * len(registers)), dtype=np.float32)
    for index, values in enumerate(registers):
        j, i = divmod(index, 4)
        d[GROUP + 8 * (i // 2), 8 * j + 2 * THREAD + i % 2] = values
    return d


def d_registers(d: np.ndarray) -> np.ndarray:
    """The inverse of d_fragment, rounded to f32."""
    count = d.shape[1] // 2
    registers = np.zeros((count, LANES), dtype=np.float32)
    for index in range(count):
        j, i = divmod(index, 4)
        registers[index] = d[GROUP + 8 * (i // 2), 8 * j + 2 * THREAD + i % 2]
    return registers


def warp_level(
    a: np.ndarray,
    b: np.ndarray,
    c: np.ndarray,
    sfa: np.ndarray,
    sfb: np.ndarray,
    thread_a: int,
    thread_b: int,
) -> np.ndarray:
    """mma.m16n8k64 with four scales a row: registers uint32 [4, 32], [2, 32], f32 [4, 32], scales [32] -> f32 [4, 32].

    Lane l = 4 g + t: a[i] is row g + 8 (i % 2), k = 8 t .. 8 t + 7 (+ 32 for i >= 2); b[i] is column g, k likewise;
    c is as d_fragment says. The scales of row g + 8 j are those of lane 4 g + 2 * thread_a + j,
    of column g those of lane 4 g + thread_b.
    """
    a_codes, b_codes = np.zeros((16, K // 2), np.uint8), np.zeros((8, K // 2), np.uint8)
    for i in range(4):
        for byte in range(4):
            a_codes[GROUP + 8 * (i % 2), 4 * THREAD + byte + 16 * (i // 2)] = a[i] >> np.uint32(
                8 * byte
            ) & np.uint32(255)
            if i < 2:
                b_codes[GROUP, 4 * THREAD + byte + 16 * i] = b[i] >> np.uint32(8 * byte) & np.uint32(255)
    rows = np.arange(16)
    a_scales = _UE4M3[
        np.ascontiguousarray(sfa[4 * (rows % 8) + 2 * thread_a + rows // 8]).view(np.uint8).reshape(16, 4)
    ]
    b_scales = _UE4M3[np.ascontiguousarray(sfb[4 * np.arange(8) + thread_b]).view(np.uint8).reshape(8, 4)]
    product = _scaled(a_codes, a_scales) @ _scaled(b_codes, b_scales).T
    return d_registers(d_fragment(c) + product)
