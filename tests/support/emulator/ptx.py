"""The PTX of one kernel: parsed once, executed a warp at a time, 32 lanes in numpy arrays.

Lanes of a warp that took different branches run from the lowest instruction on until they meet again. Instructions
that need all lanes refuse when some are elsewhere.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import numpy as np

LANES = 32
FULL = np.ones(LANES, dtype=bool)
# instructions that others can notice; a loop of any others waits for something
_EFFECTS = frozenset({"st", "stmatrix", "atom", "red", "cp", "bar", "barrier", "mbarrier", "tcgen05"})
_DTYPES = {"pred": bool, "b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64, "b128": object}
_BITS = re.compile(r"^[busf](8|16|32|64|128)$")
_SPECIAL = re.compile(
    r"^%(tid|ntid|ctaid|nctaid|clusterid|nclusterid|cluster_ctaid|cluster_nctaid)\.([xyz])$"
)


class Unsupported(NotImplementedError):
    """An instruction this emulator does not know."""


class Fault(RuntimeError):
    """The kernel did what the hardware would trap, hang or answer with garbage on."""


@dataclass
class Parameter:
    offset: int
    size: int


@dataclass
class Instruction:
    text: str
    opcode: str  # without its suffixes
    suffixes: tuple[str, ...]
    operands: list[str]
    predicate: str | None = None
    negated: bool = False
    target: int = -1
    run: Callable | None = None


@dataclass
class Kernel:
    """One .entry of a PTX module."""

    name: str
    parameters: dict[str, Parameter]
    code: list[Instruction]
    labels: dict[str, int]
    registers: dict[str, type]
    shared: dict[str, int] = field(default_factory=dict)  # address within the CTA
    shared_bytes: int = 0  # static
    threads: int | None = None


def parse(text: str) -> dict[str, Kernel]:
    """Kernels of a module by name."""
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    shared = re.findall(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]", text)
    found = {}
    for match in re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", text, flags=re.DOTALL):
        body = _body(text, match.end())
        threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)(?:\s*,\s*(\d+)(?:\s*,\s*(\d+))?)?", match[3])
        kernel = Kernel(match[1], _parameters(match[2]), [], {}, {})
        if threads:
            kernel.threads = int(np.prod([int(n) for n in threads.groups() if n]))
        for align, name, size in shared:
            kernel.shared_bytes = -(-kernel.shared_bytes // int(align)) * int(align)
            kernel.shared[name] = kernel.shared_bytes
            kernel.shared_bytes += int(size or 0)
        _statements(kernel, body)
        found[kernel.name] = kernel
    return found


def _body(text: str, start: int) -> str:
    depth = 1
    for index in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if not depth:
            return text[start:index]
    raise ValueError("a kernel without an end")


def _parameters(text: str) -> dict[str, Parameter]:
    found, offset = {}, 0
    for declaration in filter(None, (part.strip() for part in text.split(","))):
        match = re.match(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?$", declaration)
        if not match:
            raise Unsupported(f"parameter {declaration!r}")
        size = int(match[2][1:]) // 8 * int(match[4] or 1)
        align = int(match[1] or size)
        offset = -(-offset // align) * align
        found[match[3]] = Parameter(offset, size)
        offset += size
    return found


def _statements(kernel: Kernel, body: str) -> None:
    """Fill `kernel` with the instructions of `body`. Names inside { } belong to them."""
    scopes: list[dict[str, str]] = [{}]
    blocks = 0
    position = 0
    token = re.compile(r"\s*(?:([\w$]+)\s*:(?!:)|(\{)|(\})|([^;{}]*(?:\{[^{};]*\}[^;{}]*)*;))")

    def rename(name: str) -> str:
        for scope in reversed(scopes):
            if name in scope:
                return scope[name]
        return name

    # labels of inner blocks are used before they are defined
    for match in re.finditer(r"^\s*([\w$]+)\s*:(?!:)", body, flags=re.MULTILINE):
        kernel.labels.setdefault(match[1], -1)
    while position < len(body):
        if not body[position:].strip():
            break
        match = token.match(body, position)
        if not match:
            raise Unsupported(f"PTX near {body[position : position + 80]!r}")
        position = match.end()
        label, opens, closes, statement = match.groups()
        if label:
            if len(scopes) > 1 and label not in scopes[-1]:
                scopes[-1][label] = f"{label}@{blocks}"
            kernel.labels[rename(label)] = len(kernel.code)
        elif opens:
            blocks += 1
            scopes.append({})
            end = position + len(_body(body, position))
            for inner in re.findall(r"^\s*([\w$]+)\s*:(?!:)", body[position:end], flags=re.MULTILINE):
                scopes[-1][inner] = f"{inner}@{blocks}"
        elif closes:
            scopes.pop()
        else:
            _statement(kernel, statement.strip().rstrip(";").strip(), scopes, blocks, rename)
    for instruction in kernel.code:
        if instruction.opcode == "bra":
            instruction.target = kernel.labels[instruction.operands[0]]


def _statement(
    kernel: Kernel, text: str, scopes: list[dict], block: int, rename: Callable[[str], str]
) -> None:
    if not text:
        return
    if text.startswith(".reg"):
        _, kind, names = re.split(r"\s+", text, maxsplit=2)
        for name in (part.strip() for part in names.split(",")):
            ranged = re.match(r"(%?\w+)<(\d+)>$", name)
            for each in [f"{ranged[1]}{i}" for i in range(int(ranged[2]))] if ranged else [name]:
                if len(scopes) > 1:
                    scopes[-1][each] = f"{each}@{block}"
                width = kind[1:] if kind[1:] == "pred" else f"b{kind[2:]}"
                kernel.registers[rename(each)] = _DTYPES[width]
        return
    if text.startswith("."):
        if re.match(r"\.(pragma|loc|file)", text):
            return
        raise Unsupported(text)
    predicate, negated = None, False
    if match := re.match(r"@(!?)([%\w]+)\s+", text):
        predicate, negated = rename(match[2]), bool(match[1])
        text = text[match.end() :]
    head, _, rest = text.partition(" ") if " " in text else (*text.partition("\t"),)
    if "\t" in head:
        head, _, more = head.partition("\t")
        rest = f"{more} {rest}"
    parts = re.sub(r"::", "@@", head).split(".")
    opcode, suffixes = parts[0], tuple(part.replace("@@", "::") for part in parts[1:] if part)
    operands = [_renamed(o, rename) for o in _operands(rest)]
    kernel.code.append(Instruction(text, opcode, suffixes, operands, predicate, negated))


def _operands(text: str) -> list[str]:
    """Operands at the top level: commas inside [ ] and { } do not separate."""
    found, depth, current = [], 0, ""
    for character in text:
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(character, 0)
        if character == "," and not depth:
            found.append(current.strip())
            current = ""
        else:
            current += character
    found.append(current.strip())
    return [operand for operand in found if operand]


def _renamed(operand: str, rename: Callable[[str], str]) -> str:
    return re.sub(r"%?[A-Za-z_$][\w$]*", lambda match: rename(match[0]), operand)


def inside(operand: str, opening: str = "{", closing: str = "}") -> list[str]:
    """Parts of {a, b, c}."""
    assert operand.startswith(opening) and operand.endswith(closing), operand
    return _operands(operand[1:-1])


def names_in(operand: str) -> list[str]:
    """The registers of {a, b, c}, or of one that stands alone."""
    return inside(operand) if operand.startswith("{") else [operand]


@cache
def bits_of(suffixes: tuple[str, ...]) -> int:
    """Width of an instruction's type, the last one among its suffixes."""
    for suffix in reversed(suffixes):
        if match := _BITS.match(suffix):
            return int(match[1])
        if suffix in ("bf16x2", "f16x2"):
            return 32
        if suffix in ("bf16", "f16"):
            return 16
        if suffix == "f32x2":
            return 64
        if suffix == "pred":
            return 1
    raise Unsupported(f"no type among {suffixes}")


@cache
def unsigned(bits: int) -> type:
    return {1: bool, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}[bits]


@cache
def literal(text: str, bits: int) -> int | None:
    """An immediate operand's bits, or None if `text` is none."""
    if match := re.match(r"^0[fF]([0-9a-fA-F]{8})$", text):
        return int(match[1], 16)
    if match := re.match(r"^0[dD]([0-9a-fA-F]{16})$", text):
        return int(match[1], 16)
    if re.match(r"^-?(0[xX][0-9a-fA-F]+|\d+)U?$", text):
        value = int(text.rstrip("U"), 0)
        return int(bool(value)) if bits == 1 else value & ((1 << bits) - 1)
    return None


class Warp:
    """32 lanes of a CTA. `paths` are [instruction, lanes], lanes None where all of them are there."""

    def __init__(self, kernel: Kernel, cta: object, index: int) -> None:
        self.kernel, self.cta, self.index = kernel, cta, index
        self.registers: dict[str, np.ndarray] = {}
        threads = kernel.threads if kernel.threads is not None else cta.threads
        alive = np.arange(LANES) + LANES * index < threads
        self.alive = alive
        self.paths: list[list] = [[0, None if alive.all() else alive.copy()]]
        self.waiting: object = None  # a barrier this warp has arrived at
        self.bulk_groups: list[list[list]] = [[] for _ in range(LANES)]
        self.bulk_open: list[list] = [[] for _ in range(LANES)]
        self.wgmma_groups: list[list] = []
        self.wgmma_open: list = []
        self.instructions = 0

    @property
    def done(self) -> bool:
        return not self.paths

    def read(self, operand: str, bits: int) -> np.ndarray | np.generic:
        """Bits of an operand, one unsigned integer a lane, or one for all."""
        if operand in self.registers:
            return self.registers[operand]
        if operand.startswith("!"):
            return ~self.read(operand[1:], 1)
        if operand in self.kernel.registers:
            value = np.zeros(LANES, dtype=self.kernel.registers[operand])
            self.registers[operand] = value
            return value
        value = literal(operand, bits)
        if value is not None:
            return unsigned(bits)(value)
        return self.special(operand, bits)

    def lanes(self, operand: str, bits: int) -> np.ndarray:
        """The same, one a lane in any case."""
        value = self.read(operand, bits)
        return value if value.shape else np.full(LANES, value)

    def words(self, operand: str) -> np.ndarray:
        """uint32 [registers of the operand, LANES]"""
        return np.stack([self.lanes(name, 32).astype(np.uint32) for name in names_in(operand)])

    def write_words(self, operand: str, words: np.ndarray) -> None:
        """`words`, as `words` returns them, in all lanes."""
        for name, values in zip(names_in(operand), words, strict=True):
            self.write(name, values, None)

    def special(self, operand: str, bits: int) -> np.ndarray | np.generic:
        kind = unsigned(bits)
        if operand in self.kernel.shared:
            return kind(self.cta.shared_address(self.kernel.shared[operand]))
        if operand in self.kernel.parameters:
            return kind(self.cta.grid.parameter_address + self.kernel.parameters[operand].offset)
        lane = np.arange(LANES)
        if match := _SPECIAL.match(operand):
            axis = "xyz".index(match[2])
            if match[1] == "tid":
                thread, block = lane + LANES * self.index, self.cta.grid.block
                x = thread % block[0], thread // block[0] % block[1], thread // (block[0] * block[1])
                return x[axis].astype(kind)
            return kind(self.cta.coordinates(match[1])[axis])
        simple = {
            "%laneid": lane,
            "%warpid": self.index,
            "%lanemask_lt": (1 << lane) - 1,
            "%lanemask_le": (2 << lane) - 1,
            "%lanemask_eq": 1 << lane,
            "%cluster_ctarank": self.cta.rank,
            "%cluster_nctarank": self.cta.cluster_size,
            "%smid": self.cta.index,
            "%dynamic_smem_size": self.cta.grid.dynamic_shared_bytes,
            "WARP_SZ": LANES,
        }
        if operand in simple:
            return np.asarray(simple[operand]).astype(kind)
        raise Unsupported(f"operand {operand}")

    def write(self, operand: str, value: np.ndarray, lanes: np.ndarray | None) -> None:
        """`value` (unsigned bits, of the register's width or wider) into a register of the `lanes`."""
        if operand == "_":
            return
        kind = self.kernel.registers.get(operand)
        if kind is None:
            raise Unsupported(f"cannot write {operand}")
        if getattr(value, "shape", ()) != (LANES,):
            value = np.full(LANES, value)
        if value.dtype != kind:
            value = value.astype(kind)
        if lanes is None:
            self.registers[operand] = value
        else:
            self.registers[operand] = np.where(lanes, value, self.read(operand, 0))

    def lanes_of(self, lanes: np.ndarray | None) -> np.ndarray:
        return FULL if lanes is None else lanes

    def run(self, budget: int) -> bool:
        """Execute up to `budget` instructions, or until the warp has to wait -> whether others could notice."""
        code = self.kernel.code
        progress = False
        while self.paths:
            if budget == 0:
                return True
            budget -= 1
            path = self.paths[0] if len(self.paths) == 1 else min(self.paths, key=lambda p: p[0])
            position, lanes = path
            instruction = code[position]
            active = lanes
            if instruction.predicate is not None:
                chosen = self.read(instruction.predicate, 1)
                if instruction.negated:
                    chosen = ~chosen
                active = chosen if lanes is None else lanes & chosen
                if active.all():
                    active = None
                elif not active.any():
                    self._advance(path, position + 1)
                    continue
            self.instructions += 1
            opcode = instruction.opcode
            if opcode == "bra":
                self._branch(path, active, instruction.target)
                continue
            if opcode in ("ret", "exit"):
                self._exit(path, active)
                progress = True
                continue
            again = instruction.run(self, instruction, active)
            if again is not None:
                if again == "yield":
                    self._advance(path, position + 1)
                return progress or again == "arrived"
            progress = progress or opcode in _EFFECTS
            self._advance(path, position + 1)
        return progress

    def _advance(self, path: list, position: int) -> None:
        path[0] = position
        if len(self.paths) > 1:
            self._merge()

    def _merge(self) -> None:
        by_position: dict[int, np.ndarray] = {}
        for position, lanes in self.paths:
            by_position[position] = by_position[position] | lanes if position in by_position else lanes
        self.paths = [[p, None if lanes.all() else lanes] for p, lanes in by_position.items()]

    def _branch(self, path: list, active: np.ndarray | None, target: int) -> None:
        position, lanes = path
        if active is None or (lanes is not None and bool((active == lanes).all())):
            self._advance(path, target)
            return
        rest = ~active if lanes is None else lanes & ~active
        path[0], path[1] = position + 1, rest
        self.paths.append([target, active])
        self._merge()

    def _exit(self, path: list, active: np.ndarray | None) -> None:
        position, lanes = path
        leaving = self.lanes_of(active)
        staying = self.lanes_of(lanes) & ~leaving
        self.alive = self.alive & ~leaving
        self.paths.remove(path)
        if staying.any():
            self.paths.append([position + 1, staying])

    def converged(self, lanes: np.ndarray | None, instruction: Instruction) -> None:
        """Raise unless every lane that is alive is at `instruction`."""
        if lanes is not None and not bool((lanes == self.alive).all()):
            raise Fault(f"{instruction.text}: {int(lanes.sum())} of {int(self.alive.sum())} lanes are there")
