"""What warps meet: a grid of CTAs with shared memory and tensor memory, in clusters that share asynchronous work.

Shared memory of a CTA begins at (rank in the cluster) << 24, so that clearing bit 24 of an address names the other
CTA of a pair, as the hardware's addresses do. Reading or writing anything that was not allocated is a Fault.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.support.emulator import alu, instructions, tensor_memory, warpgroup
from tests.support.emulator.memory import RANK_SHIFT, SHARED_START, HostMemory, Mbarrier
from tests.support.emulator.ptx import LANES, Fault, Kernel, Unsupported, Warp

BUDGET = 2000  # instructions of a warp before another has its turn
EXECUTE = {**alu.EXECUTE, **instructions.EXECUTE, **tensor_memory.EXECUTE, **warpgroup.EXECUTE}


@dataclass
class Grid:
    kernel: Kernel
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    dynamic_shared_bytes: int
    parameters: np.ndarray
    memory: HostMemory
    parameter_address: int = 1 << 40

    def __post_init__(self) -> None:
        self.threads = int(np.prod(self.block))


class Cta:
    """One CTA: shared memory, tensor memory, warps."""

    def __init__(self, grid: Grid, index: tuple[int, int, int], rank: int, cluster: "Cluster") -> None:
        self.grid, self.position, self.rank, self.cluster = grid, index, rank, cluster
        self.index = int(index[0] + grid.grid[0] * (index[1] + grid.grid[1] * index[2]))
        self.cluster_size = int(np.prod(grid.cluster))
        self.threads = grid.threads
        self.shared = np.zeros(
            SHARED_START + grid.dynamic_shared_bytes + grid.kernel.shared_bytes, dtype=np.uint8
        )
        self.mbarriers: dict[int, Mbarrier] = {}
        self.tmem = np.zeros((128, tensor_memory.COLUMNS), dtype=np.uint32)
        self.tmem_allocated: dict[int, int] = {}
        self.barriers: dict[int, list] = {}
        self.warps = [Warp(grid.kernel, self, i) for i in range(-(-grid.threads // LANES))]

    def shared_address(self, offset: int) -> int:
        return (self.rank << RANK_SHIFT) + SHARED_START + offset

    def coordinates(self, name: str) -> tuple[int, int, int]:
        grid, cluster = self.grid.grid, self.grid.cluster
        return {
            "ntid": self.grid.block,
            "ctaid": self.position,
            "nctaid": grid,
            "clusterid": tuple(p // c for p, c in zip(self.position, cluster)),
            "nclusterid": tuple(g // c for g, c in zip(grid, cluster)),
            "cluster_ctaid": tuple(p % c for p, c in zip(self.position, cluster)),
            "cluster_nctaid": cluster,
        }[name]

    def at(self, address: int, size: int, what: str) -> tuple["Cta", int]:
        """(the CTA of the cluster, the offset in its shared memory) of a shared address."""
        rank, offset = address >> RANK_SHIFT, address & (1 << RANK_SHIFT) - 1
        if rank >= len(self.cluster.ctas):
            raise Fault(f"{what}: shared memory of rank {rank} in a cluster of {len(self.cluster.ctas)}")
        owner = self.cluster.ctas[rank]
        if not SHARED_START <= offset <= len(owner.shared) - size:
            raise Fault(
                f"{what}: {size} bytes at {offset - SHARED_START} of {len(owner.shared) - SHARED_START} shared"
            )
        return owner, offset

    def mbarrier(self, address: int, what: str) -> Mbarrier:
        owner, offset = self.at(address, 8, what)
        if offset not in owner.mbarriers:
            raise Fault(f"{what}: no mbarrier at {offset - SHARED_START}")
        return owner.mbarriers[offset]


class Cluster:
    """CTAs that run together, and the asynchronous work they started."""

    def __init__(self, grid: Grid, first: tuple[int, int, int], lazy: frozenset[str], seed: int) -> None:
        self.grid, self.lazy = grid, lazy
        self.random = np.random.default_rng(seed)
        self.pending: dict[str, list[Callable[[], None]]] = {"tma": [], "mma": [], "store": []}
        self.arrived: dict[int, int] = {}
        self.cluster_phase = 0
        self.ctas: list[Cta] = []
        cx, cy, cz = grid.cluster
        positions = [
            (first[0] + x, first[1] + y, first[2] + z)
            for z in range(cz)
            for y in range(cy)
            for x in range(cx)
        ]
        for rank, position in enumerate(positions):
            self.ctas.append(Cta(grid, position, rank, self))

    def start(self, kind: str, work: Callable[[], None]) -> None:
        """Do asynchronous work: now, or after all that warps can do without it."""
        if kind in self.lazy:
            self.pending[kind].append(work)
        else:
            work()

    def finish(self) -> bool:
        """Do some of the work put off -> whether there was any. tcgen05's is done in its order, TMA's in none."""
        kinds = [kind for kind, work in self.pending.items() if work]
        if not kinds:
            return False
        kind = kinds[self.random.integers(len(kinds))]
        work = self.pending[kind]
        work.pop(0 if kind == "mma" else self.random.integers(len(work)))()
        return True

    def run(self) -> int:
        """Run every warp to its end -> instructions executed."""
        warps = [warp for cta in self.ctas for warp in cta.warps]
        idle = 0  # rounds in which nothing happened; a wait that was only looked at takes two
        while live := [warp for warp in warps if not warp.done]:
            progress = False
            if self.lazy:
                self.random.shuffle(live)
            for warp in live:
                progress = warp.run(BUDGET) or progress
            idle = 0 if progress else idle + 1
            if idle < 3:
                continue
            idle = 0
            if not self.finish():
                raise Fault("deadlock: " + "; ".join(_where(warp) for warp in live))
        while self.finish():
            pass
        for cta in self.ctas:
            if cta.tmem_allocated:
                raise Fault(f"tensor memory is not given back: columns {sorted(cta.tmem_allocated)}")
        return sum(warp.instructions for warp in warps)


def _where(warp: Warp) -> str:
    position = min(path[0] for path in warp.paths)
    return f"CTA {warp.cta.position} warp {warp.index} at {warp.kernel.code[position].text!r}"


def bind(kernel: Kernel) -> None:
    """Give every instruction what executes it; Unsupported for an unknown one."""
    for instruction in kernel.code:
        if instruction.opcode in ("bra", "ret", "exit"):
            continue
        if instruction.opcode not in EXECUTE:
            raise Unsupported(instruction.text)
        instruction.run = EXECUTE[instruction.opcode]


def run(grid: Grid, lazy: frozenset[str] = frozenset(), seed: int = 0) -> int:
    """Run a grid, cluster by cluster -> instructions executed by its warps."""
    bind(grid.kernel)
    cx, cy, cz = grid.cluster
    total = 0
    for z in range(0, grid.grid[2], cz):
        for y in range(0, grid.grid[1], cy):
            for x in range(0, grid.grid[0], cx):
                total += Cluster(grid, (x, y, z), lazy, seed).run()
    return total
