"""Hopper's tensor cores: wgmma with A in registers, and mma.sync of bf16.

Written from the PTX manual: "Asynchronous warpgroup level matrix instructions", "Matrix descriptor" of wgmma, and the
fragments of mma.m16n8k16. A warp's sixteen rows of a wgmma depend on no other warp's, so each warp computes its own.
"""

import re
from collections.abc import Callable

import numpy as np

from tests.support.emulator.mma import GROUP, THREAD, Descriptor, d_fragment, d_registers, read_rows
from tests.support.emulator.ptx import Fault, Instruction, Unsupported, Warp

K = 16  # of one instruction
_SWIZZLE = {0: 0, 1: 128, 2: 64, 3: 32}


def _bf16(raw: np.ndarray) -> np.ndarray:
    return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def _pair(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two bf16 of each uint32, the low one first."""
    return _bf16(words & np.uint32(0xFFFF)), _bf16(words >> np.uint32(16))


def decode(bits: int) -> Descriptor:
    """A shared-memory operand of wgmma; `leading` and `stride` in bytes."""
    if bits >> 49 & 7:
        raise Unsupported(f"matrix descriptor {bits:#x} with a base offset")
    return Descriptor(
        (bits & 0x3FFF) << 4, (bits >> 16 & 0x3FFF) << 4, (bits >> 32 & 0x3FFF) << 4, _SWIZZLE[bits >> 62]
    )


def a_fragment(registers: np.ndarray) -> np.ndarray:
    """uint32 [4, 32] -> float64 [16 rows, K]

    Register 2 p + h of lane 4 g + t is row g + 8 h, k = 8 p + 2 t + {0, 1}.
    """
    a = np.zeros((16, K))
    for p in range(2):
        for h in range(2):
            for i, values in enumerate(_pair(registers[2 * p + h])):
                a[GROUP + 8 * h, 8 * p + 2 * THREAD + i] = values
    return a


def _wgmma(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    warp.converged(lanes, instruction)
    action = instruction.suffixes[0]
    if action == "mma_async":
        _mma_async(warp, instruction)
    elif action == "commit_group":
        warp.wgmma_groups.append(warp.wgmma_open)
        warp.wgmma_open = []
    elif action == "wait_group":
        most = int(instruction.operands[0], 0)
        over = warp.wgmma_groups[: len(warp.wgmma_groups) - most]
        warp.wgmma_groups = warp.wgmma_groups[len(over) :]
        for group in over:
            for check in group:
                check()
    elif action != "fence":
        raise Unsupported(instruction.text)


def _mma_async(warp: Warp, instruction: Instruction) -> None:
    """The product at once; when it is waited for, B must still be what it was."""
    what = instruction.text
    shape = next(s for s in instruction.suffixes if re.match(r"^m64n\d+k16$", s))
    d, a, b, scale_d, *flags = instruction.operands
    if not a.startswith("{") or not {"f32", "bf16"} <= set(instruction.suffixes):
        raise Unsupported(what)
    if [int(flag, 0) for flag in flags] != [1, 1, 0]:
        raise Unsupported(f"{what}: negated or transposed operands")
    n = int(shape[4:].split("k")[0])
    descriptor = np.asarray(warp.read(b, 64)).reshape(-1)
    if (descriptor != descriptor[0]).any():
        raise Fault(f"{what}: lanes disagree about B")
    shared, where = warp.cta.shared, decode(int(descriptor[0]))
    rows = read_rows(shared, where, n, 2 * K, what)
    values = _bf16(np.ascontiguousarray(rows).view(np.uint16))
    product = a_fragment(warp.words(a)) @ values.T
    keeps = np.asarray(warp.read(scale_d, 1)).reshape(-1)
    if keeps[0]:
        product = product + d_fragment(warp.words(d).view(np.float32))
    warp.write_words(d, d_registers(product).view(np.uint32))

    def check() -> None:
        if not np.array_equal(read_rows(shared, where, n, 2 * K, what), rows):
            raise Fault(
                f"{what[:90]}: B at {where.address:#x} was overwritten before the product was waited for"
            )

    warp.wgmma_open.append(check)


def mma_bf16(warp: Warp, instruction: Instruction) -> None:
    """mma.sync.m16n8k16: B's register p of lane 4 g + t is column g, k = 8 p + 2 t + {0, 1}."""
    d, a, b, c = instruction.operands
    columns = np.zeros((8, K))
    for p, words in enumerate(warp.words(b)):
        for i, values in enumerate(_pair(words)):
            columns[GROUP, 8 * p + 2 * THREAD + i] = values
    total = a_fragment(warp.words(a)) @ columns.T + d_fragment(warp.words(c).view(np.float32))
    warp.write_words(d, d_registers(total).view(np.uint32))


EXECUTE: dict[str, Callable] = {"wgmma": _wgmma}
