"""Instructions that reach memory or wait: loads and stores, barriers, TMA and asynchronous copies."""

import re
from collections.abc import Callable, Iterator

import numpy as np

from tests.support.emulator import alu
from tests.support.emulator.memory import RANK_SHIFT, Mbarrier, TensorMap, swizzled
from tests.support.emulator.ptx import (
    LANES,
    Fault,
    Instruction,
    Unsupported,
    Warp,
    bits_of,
    inside,
    names_in,
    unsigned,
)


def address_of(warp: Warp, operand: str, bits: int) -> np.ndarray:
    """[register + offset] -> int64 [32]"""
    base, _, offset = operand.strip("[]").partition("+")
    value = warp.lanes(base.strip(), bits).astype(np.int64)
    return value + int(offset, 0) if offset else value


def one_value(values: np.ndarray, lanes: np.ndarray | None, instruction: Instruction) -> int:
    """The value of the one lane that executes, or that all lanes share."""
    values = np.broadcast_to(np.asarray(values), LANES)
    chosen = values if lanes is None else values[lanes]
    if (chosen != chosen[0]).any():
        raise Fault(f"{instruction.text}: lanes disagree: {chosen.tolist()}")
    return int(chosen[0])


def read_one(warp: Warp, operand: str, bits: int, lanes: np.ndarray | None, instruction: Instruction) -> int:
    return one_value(warp.read(operand, bits), lanes, instruction)


def lanes_in(lanes: np.ndarray | None) -> Iterator[int]:
    return iter(range(LANES)) if lanes is None else iter(np.flatnonzero(lanes).tolist())


def _location(warp: Warp, space: str, address: int, size: int, what: str) -> tuple[np.ndarray, int]:
    if address % min(size, 16):
        raise Fault(f"{what}: address {address:#x} is not aligned to {size}")
    if space.startswith("shared"):
        owner, offset = warp.cta.at(address, size, what)
        return owner.shared, offset
    if space == "param":
        return warp.cta.grid.parameters, address - warp.cta.grid.parameter_address
    return warp.cta.grid.memory.find(address, size, what)


def _space(suffixes: tuple[str, ...]) -> str:
    return next((s for s in suffixes if re.match(r"^(shared|global|param|local)", s)), "generic")


def _vector(suffixes: tuple[str, ...]) -> int:
    return next((int(s[1:]) for s in suffixes if re.match(r"^v[248]$", s)), 1)


def _load(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    suffixes = instruction.suffixes
    bits, count, space = bits_of(suffixes), _vector(suffixes), _space(suffixes)
    target, source = instruction.operands[:2]
    size = bits // 8
    addresses = address_of(warp, source, 32 if space.startswith("shared") else 64)
    values = np.zeros((LANES, count), dtype=unsigned(bits))
    if space == "param" or _same(addresses, lanes):
        array, offset = _location(
            warp, space, int(addresses[next(lanes_in(lanes))]), size * count, instruction.text
        )
        values[:] = array[offset : offset + size * count].view(unsigned(bits))
    else:
        for lane in lanes_in(lanes):
            array, offset = _location(warp, space, int(addresses[lane]), size * count, instruction.text)
            values[lane] = array[offset : offset + size * count].view(unsigned(bits))
    signed = any(s in suffixes for s in ("s8", "s16", "s32"))
    for index, register in enumerate(inside(target) if count > 1 else [target]):
        value = values[:, index]
        if signed and register != "_":
            width = np.dtype(warp.kernel.registers[register]).itemsize * 8
            value = value.view(f"i{size}").astype(f"i{width // 8}").view(unsigned(width))
        warp.write(register, value, lanes)


def _same(addresses: np.ndarray, lanes: np.ndarray | None) -> bool:
    chosen = addresses if lanes is None else addresses[lanes]
    return bool((chosen == chosen[0]).all())


def _store(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    suffixes = instruction.suffixes
    bits, count, space = bits_of(suffixes), _vector(suffixes), _space(suffixes)
    target, source = instruction.operands[:2]
    size = bits // 8
    addresses = address_of(warp, target, 32 if space.startswith("shared") else 64)
    registers = inside(source) if count > 1 else [source]
    values = np.stack([warp.lanes(r, bits).astype(unsigned(bits)) for r in registers], axis=1)
    for lane in lanes_in(lanes):
        array, offset = _location(warp, space, int(addresses[lane]), size * count, instruction.text)
        array[offset : offset + size * count] = np.ascontiguousarray(values[lane]).view(np.uint8)
        if "async" in suffixes:
            barriers = address_of(warp, instruction.operands[2], 32)
            told = warp.cta.mbarrier(int(barriers[lane]), instruction.text)
            told.bytes -= size * count
            told.settle()


def _atomic(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    """atom and red: add, min, max, and, or, exch, cas; vectors of f32 and bf16x2 for red."""
    suffixes = instruction.suffixes
    bits, kind, count = bits_of(suffixes), alu.kind_of(suffixes), _vector(suffixes)
    operands = list(instruction.operands)
    target = operands.pop(0) if instruction.opcode == "atom" else "_"
    space = _space(suffixes)
    addresses = address_of(warp, operands[0], 32 if space.startswith("shared") else 64)
    size = bits // 8
    how = next(s for s in suffixes if s in ("add", "min", "max", "and", "or", "exch", "cas", "inc"))
    registers = names_in(operands[1])
    old_values = np.zeros(LANES, dtype=unsigned(bits))
    for lane in lanes_in(lanes):
        for index, register in enumerate(registers):
            address = int(addresses[lane]) + index * size
            array, offset = _location(warp, space, address, size, instruction.text)
            cell = array[offset : offset + size].view(unsigned(bits))
            value = warp.lanes(register, bits)[lane : lane + 1]
            old = cell.copy()
            a, b = alu.as_values(old, kind), alu.as_values(value, kind)
            if how == "cas":
                new_value = warp.lanes(operands[2], bits)[lane : lane + 1]
                cell[:] = new_value if old[0] == value[0] else old
            elif how == "exch":
                cell[:] = value
            else:
                function = {
                    "add": np.add,
                    "min": np.minimum,
                    "max": np.maximum,
                    "and": np.bitwise_and,
                    "or": np.bitwise_or,
                }
                cell[:] = alu.as_bits(function[how](a, b), kind, bits)
            old_values[lane] = old[0]
    if target != "_":
        if count > 1:
            raise Unsupported(instruction.text)
        warp.write(target, old_values, lanes)


def _ldmatrix(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    """Matrices of eight rows of 16 bytes; lane l gets row l // 4, four bytes at 4 * (l % 4)."""
    warp.converged(lanes, instruction)
    if (
        "m8n8" not in instruction.suffixes
        or "trans" in instruction.suffixes
        or "b16" not in instruction.suffixes
    ):
        raise Unsupported(instruction.text)
    target, source = instruction.operands
    addresses = address_of(warp, source, 32)
    registers = names_in(target)
    for matrix, register in enumerate(registers):
        rows = []
        for row in range(8):
            array, offset = _location(warp, "shared", int(addresses[8 * matrix + row]), 16, instruction.text)
            rows.append(array[offset : offset + 16].view(np.uint32))
        warp.write(register, np.concatenate(rows), lanes)


def _stmatrix(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    warp.converged(lanes, instruction)
    if "m8n8" not in instruction.suffixes or "b16" not in instruction.suffixes:
        raise Unsupported(instruction.text)
    target, source = instruction.operands
    addresses = address_of(warp, target, 32)
    for matrix, register in enumerate(names_in(source)):
        values = warp.lanes(register, 32).astype(np.uint32)
        halves = values.view(np.uint16).reshape(8, 8)
        if "trans" in instruction.suffixes:
            halves = halves.T
        for row in range(8):
            array, offset = _location(warp, "shared", int(addresses[8 * matrix + row]), 16, instruction.text)
            array[offset : offset + 16] = np.ascontiguousarray(halves[row]).view(np.uint8)


# --- barriers ---


def _bar(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> str | None:
    """bar and barrier.cta: named barriers; barrier.cluster: all threads of the cluster."""
    suffixes = instruction.suffixes
    if "cluster" in suffixes:
        return _cluster_barrier(warp, instruction, lanes)
    if "warp" in suffixes:
        alu.members(warp, instruction, lanes, instruction.operands[0])
        return None
    warp.converged(lanes, instruction)
    number = read_one(warp, instruction.operands[0], 32, lanes, instruction)
    total = warp.cta.threads
    if len(instruction.operands) > 1:
        total = read_one(warp, instruction.operands[1], 32, lanes, instruction)
    state = warp.cta.barriers.setdefault(number, [0, 0])  # threads arrived, phase
    if "arrive" not in suffixes and warp.waiting is not None:
        if state[1] == warp.waiting:
            return "wait"
        warp.waiting = None
        return None
    phase = state[1]
    state[0] += LANES
    if state[0] > -(-total // LANES) * LANES:
        raise Fault(f"{instruction.text}: {state[0]} threads arrived at a barrier of {total}")
    if state[0] == -(-total // LANES) * LANES:
        state[:] = [0, phase ^ 1]
        return None
    if "arrive" in suffixes:
        return None
    warp.waiting = phase
    return "arrived"


def _cluster_barrier(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> str | None:
    cluster = warp.cta.cluster
    key = (warp.cta.rank, warp.index)
    if "arrive" in instruction.suffixes:
        warp.converged(lanes, instruction)
        cluster.arrived[key] = cluster.cluster_phase
        everyone = [(cta.rank, w.index) for cta in cluster.ctas for w in cta.warps if not w.done]
        if all(cluster.arrived.get(each) == cluster.cluster_phase for each in everyone):
            cluster.cluster_phase += 1
        return None
    if key not in cluster.arrived:
        raise Fault(f"{instruction.text}: no arrival before it")
    return "wait" if cluster.arrived[key] == cluster.cluster_phase else None


def _mbarrier(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> str | None:
    suffixes, operands, what = instruction.suffixes, instruction.operands, instruction.text
    action = suffixes[0]
    if action == "init":
        for lane in lanes_in(lanes):
            owner, offset = warp.cta.at(int(address_of(warp, operands[0], 32)[lane]), 8, what)
            count = int(warp.lanes(operands[1], 32)[lane])
            owner.mbarriers[offset] = Mbarrier(count, count)
        return None
    if action == "inval":
        return None
    if action in ("try_wait", "test_wait"):
        target, address, parity = operands[:3]
        if "parity" not in suffixes:
            raise Unsupported(what)
        addresses = address_of(warp, address, 32)
        parities = warp.lanes(parity, 32)
        done = np.zeros(LANES, dtype=bool)
        if _same(addresses, lanes) and _same(parities, lanes):
            first = next(lanes_in(lanes))
            done[:] = warp.cta.mbarrier(int(addresses[first]), what).phase != int(parities[first]) & 1
            warp.write(target, done, lanes)
            return None if done[0] else "yield"
        for lane in lanes_in(lanes):
            done[lane] = warp.cta.mbarrier(int(addresses[lane]), what).phase != int(parities[lane]) & 1
        warp.write(target, done, lanes)
        # a failed wait gives way; the loop around it comes back
        return None if done[list(lanes_in(lanes))].all() else "yield"
    if action in ("arrive", "expect_tx", "complete_tx", "arrive_drop"):
        address = next(o for o in operands if o.startswith("["))
        rest = operands[operands.index(address) + 1 :]
        addresses = address_of(warp, address, 32)
        for lane in lanes_in(lanes):
            barrier = warp.cta.mbarrier(int(addresses[lane]), what)
            number = int(warp.lanes(rest[0], 32)[lane]) if rest else 1
            if action == "complete_tx":
                barrier.bytes -= number
            elif "expect_tx" in suffixes:
                barrier.bytes += number
            if action == "arrive":
                arrive(barrier, 1 if "expect_tx" in suffixes else number, what)
            barrier.settle()
        return None
    raise Unsupported(what)


def arrive(barrier: Mbarrier, number: int, what: str) -> None:
    if barrier.pending < number:
        raise Fault(f"{what}: {number} arrivals where {barrier.pending} of {barrier.count} are awaited")
    barrier.pending -= number


# --- TMA and asynchronous copies ---


def _tensor_map(warp: Warp, address: int) -> TensorMap:
    grid = warp.cta.grid
    if address >= grid.parameter_address:
        offset = address - grid.parameter_address
        return TensorMap.decode(grid.parameters[offset : offset + 128])
    array, offset = grid.memory.find(address, 128, "tensor map")
    return TensorMap.decode(array[offset : offset + 128])


def _cp(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> str | None:
    suffixes = instruction.suffixes
    if suffixes[:2] != ("async", "bulk"):
        return _cp_async(warp, instruction, lanes)
    if suffixes[2] == "commit_group":
        for lane in lanes_in(lanes):
            warp.bulk_groups[lane].append(warp.bulk_open[lane])
            warp.bulk_open[lane] = []
        return None
    if suffixes[2] == "wait_group":
        most = int(instruction.operands[0], 0)
        for lane in lanes_in(lanes):
            groups = warp.bulk_groups[lane]
            if any(not done[0] for group in groups[: len(groups) - most] for done in group):
                return "wait"
        return None
    if suffixes[2] == "prefetch":
        return None
    if suffixes[2] != "tensor":
        return _bulk(warp, instruction, lanes)
    for lane in lanes_in(lanes):
        one = np.arange(LANES) == lane
        if "reduce" in suffixes:
            raise Unsupported(instruction.text)
        direction = [s for s in suffixes if s.startswith(("shared", "global"))]
        if direction[0].startswith("shared"):
            _tensor_load(warp, instruction, one)
        else:
            _tensor_store(warp, instruction, one)
    return None


def _map_and_coordinates(
    warp: Warp, operand: str, lanes: np.ndarray, what: Instruction
) -> tuple[TensorMap, list[int]]:
    pointer, _, coordinates = operand.strip("[]").partition(",")
    address = read_one(warp, pointer.strip(), 64, lanes, what)
    values = [read_one(warp, c, 32, lanes, what) for c in inside(coordinates.strip())]
    return _tensor_map(warp, address), [v - (1 << 32) if v >> 31 else v for v in values]


def _tensor_load(warp: Warp, instruction: Instruction, lanes: np.ndarray) -> None:
    suffixes, operands = instruction.suffixes, instruction.operands
    if "tile" not in suffixes and any("im2col" in s or "gather" in s for s in suffixes):
        raise Unsupported(instruction.text)
    destination = one_value(address_of(warp, operands[0], 32), lanes, instruction)
    tensor, coordinates = _map_and_coordinates(warp, operands[1], lanes, instruction)
    barrier = one_value(address_of(warp, operands[2], 32), lanes, instruction)
    targets = [destination >> RANK_SHIFT]
    multicast = any("multicast" in s for s in suffixes)
    if multicast:
        mask = read_one(warp, operands[3], 16, lanes, instruction)
        targets = [rank for rank in range(len(warp.cta.cluster.ctas)) if mask >> rank & 1]
    if destination % 128:
        raise Fault(f"{instruction.text}: shared address {destination:#x} is not aligned to 128")
    cta, what = warp.cta, instruction.text

    def work() -> None:
        offsets, valid = tensor.offsets(coordinates, limit=True)
        values = np.zeros(len(offsets), dtype=np.uint8)
        if valid.any():
            low, high = int(offsets[valid].min()), int(offsets[valid].max())
            array, start = cta.grid.memory.find(tensor.address + low, high - low + 1, what)
            values[valid] = array[start + offsets[valid] - low]
        where = destination & (1 << RANK_SHIFT) - 1
        for rank in targets:
            owner, first = cta.at(rank << RANK_SHIFT | where, len(values), what)
            owner.shared[swizzled(first + np.arange(len(values)), tensor.swizzle)] = values
            signal = rank << RANK_SHIFT | barrier & (1 << RANK_SHIFT) - 1 if multicast else barrier
            if (
                multicast and "cta_group::2" in suffixes
            ):  # the barrier of the pair's leader where bit 24 is cleared
                signal = (rank & ~1 | barrier >> RANK_SHIFT & 1) << RANK_SHIFT | barrier & (
                    1 << RANK_SHIFT
                ) - 1
            arrived = cta.mbarrier(signal, what)
            arrived.bytes -= len(values)
            arrived.settle()

    cta.cluster.start("tma", work)


def _tensor_store(warp: Warp, instruction: Instruction, lanes: np.ndarray) -> None:
    operands, what = instruction.operands, instruction.text
    tensor, coordinates = _map_and_coordinates(warp, operands[0], lanes, instruction)
    source = one_value(address_of(warp, operands[1], 32), lanes, instruction)
    if source % 128:
        raise Fault(f"{what}: shared address {source:#x} is not aligned to 128")
    cta, done = warp.cta, [False]
    warp.bulk_open[int(lanes.argmax())].append(done)

    def work() -> None:
        offsets, valid = tensor.offsets(coordinates, limit=True)
        owner, first = cta.at(source, len(offsets), what)
        values = owner.shared[swizzled(first + np.arange(len(offsets)), tensor.swizzle)]
        if valid.any():
            low, high = int(offsets[valid].min()), int(offsets[valid].max())
            array, start = cta.grid.memory.find(tensor.address + low, high - low + 1, what)
            array[start + offsets[valid] - low] = values[valid]
        done[0] = True

    cta.cluster.start("store", work)


def _bulk(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    """cp.async.bulk between global and shared memory, in one piece."""
    suffixes, operands, what = instruction.suffixes, instruction.operands, instruction.text
    spaces = [s for s in suffixes if s.startswith(("shared", "global"))]
    cta = warp.cta
    for lane in lanes_in(lanes):
        one = np.arange(LANES) == lane
        size = read_one(warp, operands[2], 32, one, instruction)
        if spaces[0].startswith("shared"):
            target = one_value(address_of(warp, operands[0], 32), one, instruction)
            source = one_value(address_of(warp, operands[1], 64), one, instruction)
            barrier = one_value(address_of(warp, operands[3], 32), one, instruction)
            if target % 16 or source % 16 or size % 16:
                raise Fault(f"{what}: not aligned to 16")

            def load(target=target, source=source, barrier=barrier, size=size) -> None:
                array, start = cta.grid.memory.find(source, size, what)
                owner, first = cta.at(target, size, what)
                owner.shared[first : first + size] = array[start : start + size]
                arrived = cta.mbarrier(barrier, what)
                arrived.bytes -= size
                arrived.settle()

            cta.cluster.start("tma", load)
        else:
            target = one_value(address_of(warp, operands[0], 64), one, instruction)
            source = one_value(address_of(warp, operands[1], 32), one, instruction)
            done = [False]
            warp.bulk_open[lane].append(done)

            def store(target=target, source=source, size=size, done=done) -> None:
                array, start = cta.grid.memory.find(target, size, what)
                owner, first = cta.at(source, size, what)
                array[start : start + size] = owner.shared[first : first + size]
                done[0] = True

            cta.cluster.start("store", store)


def _cp_async(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    """cp.async of 4, 8 or 16 bytes, done at once; what is beyond the source size is zero."""
    suffixes, operands, what = instruction.suffixes, instruction.operands, instruction.text
    if suffixes[1] in ("commit_group", "wait_group", "wait_all"):
        return
    if suffixes[1] == "mbarrier":
        for lane in lanes_in(lanes):
            barrier = warp.cta.mbarrier(int(address_of(warp, operands[0], 32)[lane]), what)
            if "noinc" in suffixes:
                arrive(barrier, 1, what)
            barrier.settle()
        return
    targets, sources = address_of(warp, operands[0], 32), address_of(warp, operands[1], 64)
    size = int(operands[2], 0)
    given = np.full(LANES, size)
    if (
        len(operands) > 3
        and _whole(operands[3]) is None
        and warp.kernel.registers.get(operands[3]) is np.uint32
    ):
        given = warp.lanes(operands[3], 32)
    for lane in lanes_in(lanes):
        owner, first = warp.cta.at(int(targets[lane]), size, what)
        value = np.zeros(size, dtype=np.uint8)
        if given[lane]:
            array, start = warp.cta.grid.memory.find(int(sources[lane]), int(given[lane]), what)
            value[: given[lane]] = array[start : start + int(given[lane])]
        owner.shared[first : first + size] = value


def _whole(text: str) -> int | None:
    return int(text, 0) if re.match(r"^-?\d+$", text) else None


def _mapa(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    target, address, rank = instruction.operands
    address = np.asarray(warp.read(address, 32)).astype(np.uint32) & np.uint32((1 << RANK_SHIFT) - 1)
    warp.write(
        target, address | np.asarray(warp.read(rank, 32)).astype(np.uint32) << np.uint32(RANK_SHIFT), lanes
    )


def _yield(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> str:
    return "yield"


EXECUTE: dict[str, Callable] = {
    "ld": _load, "ldu": _load, "st": _store, "atom": _atomic, "red": _atomic, "ldmatrix": _ldmatrix,
    "stmatrix": _stmatrix, "bar": _bar, "barrier": _bar, "mbarrier": _mbarrier, "cp": _cp, "mapa": _mapa,
    "nanosleep": _yield,
}  # fmt: skip
