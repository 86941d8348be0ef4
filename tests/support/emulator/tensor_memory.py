"""Tensor memory and the instructions of the tensor cores; what they compute is in mma.py."""

import re
from collections.abc import Callable

import numpy as np

from tests.support.emulator import mma, warpgroup
from tests.support.emulator.instructions import address_of, arrive, one_value, read_one
from tests.support.emulator.memory import RANK_SHIFT
from tests.support.emulator.ptx import Fault, Instruction, Unsupported, Warp, inside, names_in

COLUMNS = 512  # of 128 lanes x 4 bytes


def _tcgen05(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> str | None:
    suffixes = instruction.suffixes
    action = suffixes[0]
    if action.partition("::")[0] in ("fence", "wait", "relinquish_alloc_permit"):
        return None
    handler = {
        "alloc": _tmem_alloc, "dealloc": _tmem_dealloc, "cp": _tmem_copy, "mma": _tmem_mma, "commit": _tmem_commit,
        "ld": _tmem_load, "st": _tmem_store,
    }.get(action)  # fmt: skip
    if handler is None:
        raise Unsupported(instruction.text)
    return handler(warp, instruction, lanes)


def _tmem_alloc(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> str | None:
    warp.converged(lanes, instruction)
    address, columns = instruction.operands
    columns = read_one(warp, columns, 32, lanes, instruction)
    if columns < 32 or columns > COLUMNS or columns & columns - 1:
        raise Fault(f"{instruction.text}: {columns} columns")
    taken = warp.cta.tmem_allocated
    first = max((start + size for start, size in taken.items()), default=0)
    if first + columns > COLUMNS:
        return "wait"
    taken[first] = columns
    owner, offset = warp.cta.at(
        one_value(address_of(warp, address, 32), lanes, instruction), 4, instruction.text
    )
    owner.shared[offset : offset + 4].view(np.uint32)[0] = first
    return None


def _tmem_dealloc(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    warp.converged(lanes, instruction)
    first, columns = (read_one(warp, o, 32, lanes, instruction) for o in instruction.operands)
    if warp.cta.tmem_allocated.pop(first, None) != columns:
        raise Fault(f"{instruction.text}: {columns} columns at {first} were not allocated so")


def _group(instruction: Instruction) -> int:
    return 2 if "cta_group::2" in instruction.suffixes else 1


def _pair(warp: Warp, instruction: Instruction) -> list:
    """CTAs a tcgen05 instruction works in: this one, or the pair whose even one has to issue it."""
    if _group(instruction) == 1:
        return [warp.cta]
    if warp.cta.rank % 2:
        raise Fault(f"{instruction.text}: issued by the odd CTA of a pair")
    return warp.cta.cluster.ctas[warp.cta.rank : warp.cta.rank + 2]


def _tmem_copy(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    if "32x128b" not in instruction.suffixes or "warpx4" not in instruction.suffixes:
        raise Unsupported(instruction.text)
    address, descriptor = instruction.operands
    address = one_value(address_of(warp, address, 32), lanes, instruction)
    descriptor = mma.Descriptor.decode(read_one(warp, descriptor, 64, lanes, instruction))
    ctas, what = _pair(warp, instruction), instruction.text

    def work() -> None:
        for cta in ctas:
            rows = mma.read_rows(cta.shared, descriptor, 32, 16, what)
            _columns(cta, address, 4, what)
            cta.tmem[:, address & 0xFFFF : (address & 0xFFFF) + 4] = np.tile(rows.view(np.uint32), (4, 1))

    warp.cta.cluster.start("mma", work)


def _columns(cta: object, address: int, count: int, what: str) -> None:
    """Raise unless `count` columns at `address` are allocated."""
    first = address & 0xFFFF
    if not any(
        start <= first and first + count <= start + size for start, size in cta.tmem_allocated.items()
    ):
        raise Fault(f"{what}: tensor memory columns {first} .. {first + count} are not allocated")


def _tmem_mma(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    suffixes, what = instruction.suffixes, instruction.text
    if "kind::mxf4nvf4" not in suffixes or not {"block16", "scale_vec::4X"} & set(suffixes):
        raise Unsupported(what)
    d, a, b, idesc, sfa, sfb, enable = instruction.operands
    read = lambda operand, bits: read_one(warp, operand, bits, lanes, instruction)  # noqa: E731
    d, sfa, sfb = (one_value(address_of(warp, o, 32), lanes, instruction) for o in (d, sfa, sfb))
    a, b = (mma.Descriptor.decode(read(o, 64)) for o in (a, b))
    shape = mma.InstructionDescriptor.decode(read(idesc, 32))
    accumulate = bool(read(enable, 1))
    ctas = _pair(warp, instruction)

    def work() -> None:
        for cta in ctas:
            _columns(cta, d, shape.n, what)
            _columns(cta, sfa, 4, what)
            _columns(cta, sfb, -(-shape.n // 32), what)
        mma.block_scaled(ctas, d, a, b, shape, sfa & 0xFFFF, sfb & 0xFFFF, accumulate, what)

    warp.cta.cluster.start("mma", work)


def _tmem_commit(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    operands, what = instruction.operands, instruction.text
    address = one_value(address_of(warp, operands[0], 32), lanes, instruction)
    targets = [address]
    if any("multicast" in s for s in instruction.suffixes):
        mask = read_one(warp, operands[1], 16, lanes, instruction)
        low = address & (1 << RANK_SHIFT) - 1
        targets = [r << RANK_SHIFT | low for r in range(len(warp.cta.cluster.ctas)) if mask >> r & 1]
    cta = warp.cta

    def work() -> None:
        for target in targets:
            barrier = cta.mbarrier(target, what)
            arrive(barrier, 1, what)
            barrier.settle()

    cta.cluster.start("mma", work)


def _tmem_shape(instruction: Instruction) -> int:
    """Columns of a 32x32b load or store."""
    if "32x32b" not in instruction.suffixes:
        raise Unsupported(instruction.text)
    return next(int(s[1:]) for s in instruction.suffixes if re.match(r"^x\d+$", s))


def _tmem_lanes(warp: Warp, address: int, instruction: Instruction) -> slice:
    first = 32 * (warp.index % 4)
    if address >> 16 != first:
        raise Fault(
            f"{instruction.text}: warp {warp.index} reaches lanes from {first}, not from {address >> 16}"
        )
    return slice(first, first + 32)


def _tmem_load(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    warp.converged(lanes, instruction)
    count = _tmem_shape(instruction)
    target, address = instruction.operands
    address = one_value(address_of(warp, address, 32), lanes, instruction)
    rows, first = _tmem_lanes(warp, address, instruction), address & 0xFFFF
    _columns(warp.cta, address, count, instruction.text)
    for index, register in enumerate(names_in(target)):
        warp.write(register, warp.cta.tmem[rows, first + index].copy(), lanes)


def _tmem_store(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    warp.converged(lanes, instruction)
    count = _tmem_shape(instruction)
    address, source = instruction.operands
    address = one_value(address_of(warp, address, 32), lanes, instruction)
    rows, first = _tmem_lanes(warp, address, instruction), address & 0xFFFF
    _columns(warp.cta, address, count, instruction.text)
    for index, register in enumerate(names_in(source)):
        warp.cta.tmem[rows, first + index] = warp.lanes(register, 32)


def _mma_sync(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    warp.converged(lanes, instruction)
    suffixes, operands = instruction.suffixes, instruction.operands
    if {"m16n8k16", "row", "col", "f32", "bf16"} == {*suffixes} - {"sync", "aligned"}:
        warpgroup.mma_bf16(warp, instruction)
        return
    wanted = {"m16n8k64", "kind::mxf4nvf4", "block_scale", "scale_vec::4X", "ue4m3"}
    if not wanted <= set(suffixes):
        raise Unsupported(instruction.text)
    d, a, b, c, sfa, ids_a, sfb, ids_b = operands
    byte_a, thread_a = (read_one(warp, part, 16, lanes, instruction) for part in inside(ids_a))
    byte_b, thread_b = (read_one(warp, part, 16, lanes, instruction) for part in inside(ids_b))
    if byte_a or byte_b:
        raise Fault(f"{instruction.text}: byte ids {byte_a}, {byte_b} with four scales a register")
    result = mma.warp_level(
        warp.words(a),
        warp.words(b),
        warp.words(c).view(np.float32),
        warp.words(sfa)[0],
        warp.words(sfb)[0],
        thread_a,
        thread_b,
    )
    warp.write_words(d, result.view(np.uint32))


EXECUTE: dict[str, Callable] = {"tcgen05": _tcgen05, "mma": _mma_sync}
