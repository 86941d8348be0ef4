"""Read a compiled kernel's machine code: registers, spills, and what its main loop consists of.

The main loop is the innermost loop that issues tensor core instructions, found from the branches: of several, the one
that issues most. Everything on its paths counts, the waiting on barriers too. Needs NVIDIA's cuobjdump and nvdisasm.
"""

import re
import shutil
import site
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

MMA = re.compile(
    r"(UTC[A-Z]*MMA|[A-Z]MMA)\b"
)  # tcgen05.mma, wgmma and warp-level mma, not the copies beside them
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")


@cache
def tool(name: str) -> str:
    """Path of a CUDA binary tool, on PATH or from its PyPI package; raises FileNotFoundError where it is not."""
    found = shutil.which(name)
    for folder in site.getsitepackages():
        found = found or next((str(path) for path in Path(folder).glob(f"nvidia/**/bin/{name}")), None)
    if found is None:
        raise FileNotFoundError(f"{name} is not installed (PyPI: nvidia-cuda-{name})")
    return found


def _run(name: str, *arguments: str) -> str:
    return subprocess.run([tool(name), *arguments], capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class MachineCode:
    """One kernel, as compiled."""

    registers: int  # of a thread
    stack_bytes: int  # of a thread, with local memory
    spills: int  # instructions that load from or store to it
    mma: dict[str, int]  # tensor core instructions of the main loop, by opcode
    other: dict[str, int]  # the rest of the main loop
    mma_everywhere: dict[str, int]

    @property
    def other_per_mma(self) -> float:
        """Instructions of the main loop that are no tensor core instructions, for each that is."""
        return sum(self.other.values()) / sum(self.mma.values()) if self.mma else float("inf")

    def problems(self) -> list[str]:
        """What no kernel of this project may do."""
        wrong = []
        if self.stack_bytes:
            wrong.append(f"uses {self.stack_bytes} bytes of stack or local memory")
        if self.spills:
            wrong.append(f"spills registers ({self.spills} LDL, STL)")
        return wrong


def disassemble(cubin: Path) -> str:
    """`cubin` as nvdisasm -c prints it."""
    return _run("nvdisasm", "-c", str(cubin))


def resources(cubin: Path) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) of a thread of `cubin`'s kernel; ValueError unless it holds one."""
    usage = re.findall(r"REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", _run("cuobjdump", "-res-usage", str(cubin)))
    if len(usage) != 1:
        raise ValueError(f"{cubin.name} holds {len(usage)} kernels instead of one")
    registers, stack, local = (int(value) for value in usage[0])
    return registers, stack + local


def read(cubin: Path) -> MachineCode:
    """The kernel of `cubin`; ValueError unless it holds exactly one."""
    return parse(disassemble(cubin), *resources(cubin))


@dataclass
class _Block:
    """Instructions that are executed in a row, and the blocks that may follow."""

    label: str | None
    opcodes: list[str]
    next: set[int]


def parse(sass: str, registers: int = 0, stack_bytes: int = 0) -> MachineCode:
    """What `disassemble` printed."""
    blocks = _blocks(sass)
    everywhere = Counter(opcode for block in blocks for opcode in block.opcodes)
    loop: Counter[str] = Counter()
    for members in _innermost(blocks):
        found = Counter(opcode for index in members for opcode in blocks[index].opcodes)
        if (_mmas(found), found.total()) > (_mmas(loop), loop.total()):
            loop = found
    split = {True: {}, False: {}}
    for opcode, count in loop.most_common():
        split[bool(MMA.match(opcode))][opcode] = count
    mma_everywhere = {opcode: count for opcode, count in everywhere.items() if MMA.match(opcode)}
    spills = sum(count for opcode, count in everywhere.items() if re.match(r"(LDL|STL)\b", opcode))
    return MachineCode(registers, stack_bytes, spills, split[True], split[False], mma_everywhere)


def _mmas(opcodes: Counter[str]) -> int:
    return sum(count for opcode, count in opcodes.items() if MMA.match(opcode))


def _blocks(sass: str) -> list[_Block]:
    """Basic blocks in order, with their successors."""
    blocks = [_Block(None, [], set())]
    leaves: list[tuple[str | None, bool]] = []  # a block's branch target, and whether it falls through
    target, falls = None, True

    def close() -> None:
        nonlocal target, falls
        leaves.append((target, falls))
        blocks.append(_Block(None, [], set()))
        target, falls = None, True

    for line in sass.splitlines():
        if label := _LABEL.match(line.strip()):
            if blocks[-1].opcodes or blocks[-1].label:
                close()
            blocks[-1].label = label[1]
            continue
        instruction = _INSTRUCTION.search(line)
        if not instruction:
            continue
        predicate, opcode, operands = instruction.groups()
        if opcode == "NOP":
            continue
        blocks[-1].opcodes.append(opcode)
        if opcode.split(".")[0] in ("BRA", "BRX", "JMP", "EXIT", "RET"):
            jump = _TARGET.search(operands)
            target = jump[1] if jump else None
            # a branch is taken or not by its predicate, or by one among its operands
            falls = bool(predicate) or bool(re.match(r"!?U?P\d", operands))
            close()
    leaves.append((target, falls))
    index_of = {block.label: index for index, block in enumerate(blocks) if block.label}
    for index, (block, (target, falls)) in enumerate(zip(blocks, leaves, strict=True)):
        if target in index_of:
            block.next.add(index_of[target])
        if falls and index + 1 < len(blocks):
            block.next.add(index + 1)
    return blocks


def _innermost(blocks: list[_Block]) -> Iterator[set[int]]:
    """Loops with tensor core instructions of which no smaller loop has any."""
    loops: dict[int, set[int]] = {}
    before = [set() for _ in blocks]
    for index, block in enumerate(blocks):
        for successor in block.next:
            before[successor].add(index)
    dominators = _dominators(blocks, before)
    for index, block in enumerate(blocks):
        for header in block.next & dominators[index]:
            members, pending = {header}, [index]
            while pending:
                if (member := pending.pop()) not in members:
                    members.add(member)
                    pending.extend(before[member])
            loops.setdefault(header, set()).update(members)
    multiply = {i for i, block in enumerate(blocks) if any(MMA.match(opcode) for opcode in block.opcodes)}
    with_mma = [members for members in loops.values() if members & multiply]
    for members in with_mma:
        if not any(other < members for other in with_mma):
            yield members


def _dominators(blocks: list[_Block], before: list[set[int]]) -> list[set[int]]:
    """Blocks that every way from the start to a block passes; nothing for what is never reached."""
    reached, pending = set(), [0]
    while pending:
        if (index := pending.pop()) not in reached:
            reached.add(index)
            pending.extend(blocks[index].next)
    dominators = [set(reached) if index in reached else set() for index in range(len(blocks))]
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for index in sorted(reached - {0}):
            new = set.intersection(*(dominators[b] for b in before[index] if b in reached)) | {index}
            changed = changed or new != dominators[index]
            dominators[index] = new
    return dominators
