"""What instructions compute on registers alone."""

import re
from collections.abc import Callable
from functools import cache

import numpy as np
import torch

from tests.support.emulator.ptx import LANES, Fault, Instruction, Unsupported, Warp, bits_of, inside, unsigned

_SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
_FLOAT = {32: np.float32, 64: np.float64, 16: np.float16}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)


E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()


def _from_bf16(raw: np.ndarray) -> np.ndarray:
    return (np.asarray(raw).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _to_bf16(values: np.ndarray) -> np.ndarray:
    """Nearest, ties to even."""
    values = np.asarray(values).astype(np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


@cache
def kind_of(suffixes: tuple[str, ...]) -> str:
    """'f', 's', 'u', 'b', 'bf16', 'bf16x2', 'f32x2', 'p': the last type among the suffixes."""
    for suffix in reversed(suffixes):
        if suffix in ("bf16", "bf16x2", "f16x2", "f32x2"):
            return suffix
        if suffix == "pred":
            return "p"
        if re.match(r"^[fsub](8|16|32|64|128)$", suffix):
            return suffix[0]
    raise Unsupported(f"no type among {suffixes}")


def as_values(raw: np.ndarray, kind: str) -> np.ndarray:
    """Bits -> what they stand for; the packed kinds with a last axis of two, low half first."""
    raw = np.asarray(raw)
    if kind == "f":
        return raw.view(_FLOAT[raw.dtype.itemsize * 8])
    if kind == "s":
        return raw.view(_SIGNED[raw.dtype.itemsize * 8])
    if kind == "bf16":
        return _from_bf16(raw)
    if kind in ("bf16x2", "f16x2"):
        halves = np.stack([raw & 0xFFFF, raw >> 16], axis=-1).astype(np.uint16)
        return _from_bf16(halves) if kind == "bf16x2" else halves.view(np.float16).astype(np.float32)
    if kind == "f32x2":
        return np.stack([raw & 0xFFFFFFFF, raw >> 32], axis=-1).astype(np.uint32).view(np.float32)
    return raw


def as_bits(values: np.ndarray, kind: str, bits: int) -> np.ndarray:
    """The inverse of `as_values`, floats rounded to the nearest."""
    values = np.asarray(values)
    if kind == "f":
        return values.astype(_FLOAT[bits]).view(unsigned(bits))
    if kind == "bf16":
        return _to_bf16(values)
    if kind in ("bf16x2", "f16x2"):
        halves = _to_bf16(values) if kind == "bf16x2" else values.astype(np.float16).view(np.uint16)
        return halves[..., 0].astype(np.uint32) | (halves[..., 1].astype(np.uint32) << 16)
    if kind == "f32x2":
        halves = values.astype(np.float32).view(np.uint32)
        return halves[..., 0].astype(np.uint64) | (halves[..., 1].astype(np.uint64) << 32)
    if kind == "s":
        return values.astype(_SIGNED[bits]).view(unsigned(bits))
    return values.astype(unsigned(bits))


def _max(a: np.ndarray, b: np.ndarray, suffixes: tuple[str, ...]) -> np.ndarray:
    return np.maximum(a, b) if "NaN" in suffixes or a.dtype.kind in "iu" else np.fmax(a, b)


def _min(a: np.ndarray, b: np.ndarray, suffixes: tuple[str, ...]) -> np.ndarray:
    return np.minimum(a, b) if "NaN" in suffixes or a.dtype.kind in "iu" else np.fmin(a, b)


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "f":
        return a / b
    b = np.where(b == 0, b.dtype.type(1), b)  # of lanes that are not there
    quotient = np.abs(a.astype(object)) // np.abs(b.astype(object)) if a.dtype.kind == "i" else a // b
    if a.dtype.kind == "i":
        quotient = np.where((a < 0) != (b < 0), -quotient, quotient)
    return quotient.astype(a.dtype)


def _copysign(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.copysign(b, a)


_BINARY: dict[str, Callable] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "div": _divide,
    "copysign": _copysign,
}


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)


_UNARY: dict[str, Callable] = {
    "neg": np.negative,
    "abs": np.abs,
    "not": np.invert,
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda a: np.float32(1) / a,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: np.float32(1) / np.sqrt(a),
    "tanh": np.tanh,
}


def _saturate(values: np.ndarray, suffixes: tuple[str, ...]) -> np.ndarray:
    return np.clip(values, 0, 1) if "sat" in suffixes else values


def _elementwise(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    suffixes, opcode = instruction.suffixes, instruction.opcode
    bits, kind = bits_of(suffixes), kind_of(suffixes)
    target, *sources = instruction.operands
    values = [as_values(warp.read(source, bits), kind) for source in sources]
    with np.errstate(all="ignore"):
        if opcode == "fma" or (opcode == "mad" and kind == "f"):
            result = _fma(*values)
        elif opcode in ("max", "min"):
            result = values[0]
            for other in values[1:]:
                result = (_max if opcode == "max" else _min)(result, other, suffixes)
            if "xorsign" in suffixes:
                raise Unsupported(instruction.text)
        elif opcode in _UNARY:
            result = _UNARY[opcode](values[0])
        else:
            result = _BINARY[opcode](*values)
    if kind == "f" and "ftz" in suffixes:
        result = np.where(
            np.abs(result) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), result), result
        )
    if kind == "p":
        warp.write(target, result, lanes)
        return
    warp.write(target, as_bits(_saturate(result, suffixes), kind, bits), lanes)


def _multiply(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    """Integer mul and mad: lo, hi, wide."""
    suffixes = instruction.suffixes
    bits, kind = bits_of(suffixes), kind_of(suffixes)
    if kind in ("f", "f32x2", "bf16", "bf16x2", "f16x2"):
        _elementwise(warp, instruction, lanes)
        return
    target, a, b, *c = instruction.operands
    a, b = (as_values(warp.read(source, bits), kind) for source in (a, b))
    wide = np.int64 if kind == "s" else np.uint64
    with np.errstate(all="ignore"):
        if bits == 64:
            if "lo" in suffixes:
                product = (a * b).view(np.uint64)
            else:  # hi
                exact = a.astype(object) * b.astype(object)
                product = np.asarray(
                    [int(x) >> 64 & (2**64 - 1) for x in np.atleast_1d(exact)], dtype=np.uint64
                )
        else:
            product = (a.astype(wide) * b.astype(wide)).view(np.uint64)
            if "hi" in suffixes:
                product = (product.view(wide) >> wide(bits)).view(np.uint64)
        result_bits = 2 * bits if "wide" in suffixes else bits
        if c:
            product = product + warp.read(c[0], result_bits).astype(np.uint64)
    warp.write(target, product.astype(unsigned(result_bits)), lanes)


def _dp2a(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    """c + a's two halves times two bytes of b: the low ones or the high ones."""
    if instruction.suffixes[1:] != ("u32", "u32"):
        raise Unsupported(instruction.text)
    target, *sources = instruction.operands
    a, b, c = (warp.lanes(source, 32).astype(np.uint64) for source in sources)
    first = np.uint64(16 if "hi" in instruction.suffixes else 0)
    total = c
    for i in (np.uint64(0), np.uint64(1)):
        half = a >> np.uint64(16) * i & np.uint64(0xFFFF)
        byte = b >> first + np.uint64(8) * i & np.uint64(0xFF)
        total = total + half * byte
    warp.write(target, total.astype(np.uint32), lanes)


def _rem(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    bits, kind = bits_of(instruction.suffixes), kind_of(instruction.suffixes)
    target, a, b = instruction.operands
    a, b = (as_values(warp.read(source, bits), kind) for source in (a, b))
    with np.errstate(all="ignore"):
        quotient = _divide(np.broadcast_to(a, LANES), np.broadcast_to(b, LANES))
        warp.write(target, as_bits(a - quotient * b, kind, bits), lanes)


def _shift(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    bits, kind = bits_of(instruction.suffixes), kind_of(instruction.suffixes)
    target, a, by = instruction.operands
    a = as_values(warp.read(a, bits), kind)
    by = np.minimum(np.asarray(warp.read(by, 32)).astype(np.uint64), bits)
    over = by >= bits
    shift = np.where(over, 0, by).astype(a.dtype)
    if instruction.opcode == "shl":
        result = np.where(over, a.dtype.type(0), a << shift)
    elif kind == "s":
        result = np.where(over, a >> a.dtype.type(bits - 1), a >> shift)
    else:
        result = np.where(over, a.dtype.type(0), a >> shift)
    warp.write(target, as_bits(result, kind, bits), lanes)


def _funnel(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    target, low, high, by = instruction.operands
    low, high, by = (np.asarray(warp.read(s, 32)).astype(np.uint64) for s in (low, high, by))
    by = by & np.uint64(31) if "wrap" in instruction.suffixes else np.minimum(by, np.uint64(32))
    both = (high << np.uint64(32)) | low
    result = both << by >> np.uint64(32) if "l" in instruction.suffixes else both >> by
    warp.write(target, (result & np.uint64(0xFFFFFFFF)).astype(np.uint32), lanes)


def _mov(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    bits = bits_of(instruction.suffixes)
    target, source = instruction.operands
    if source.startswith("{"):
        parts = inside(source)
        width = bits // len(parts)
        value = np.zeros(LANES, dtype=np.uint64)
        for index, part in enumerate(parts):
            value = value | np.asarray(warp.read(part, width)).astype(np.uint64) << np.uint64(index * width)
        warp.write(target, value.astype(unsigned(bits)), lanes)
    elif target.startswith("{"):
        parts = inside(target)
        width = bits // len(parts)
        value = np.asarray(warp.read(source, bits)).astype(np.uint64)
        for index, part in enumerate(parts):
            piece = value >> np.uint64(index * width) & np.uint64((1 << width) - 1)
            warp.write(part, piece.astype(unsigned(width)), lanes)
    else:
        warp.write(target, warp.read(source, bits), lanes)


_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def _setp(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    suffixes = instruction.suffixes
    bits, kind = bits_of(suffixes), kind_of(suffixes)
    target, a, b, *combined = instruction.operands
    a, b = (as_values(warp.read(source, bits), kind) for source in (a, b))
    name = suffixes[0]
    if name == "nan":
        result = np.isnan(a) | np.isnan(b)
    elif name == "num":
        result = ~(np.isnan(a) | np.isnan(b))
    elif kind == "f" and name.endswith("u"):  # true for NaN as well
        result = _COMPARE[name[:-1]](a, b) | np.isnan(a) | np.isnan(b)
    else:
        result = _COMPARE[name](a, b)
        if kind == "f" and name == "ne":
            result = result & ~(np.isnan(a) | np.isnan(b))
    if combined:
        other = warp.read(combined[0], 1)
        result = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[suffixes[1]](
            result, other
        )
    true, _, false = target.partition("|")
    warp.write(true, result, lanes)
    if false:
        warp.write(false, ~np.asarray(result), lanes)


def _selp(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    bits = bits_of(instruction.suffixes)
    target, yes, no, condition = instruction.operands
    chosen = warp.read(condition, 1)
    warp.write(target, np.where(chosen, warp.read(yes, bits), warp.read(no, bits)), lanes)


def _lop3(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    target, *sources, table = instruction.operands
    a, b, c = (np.asarray(warp.read(source, 32)) for source in sources)
    table = int(warp.read(table, 32))
    result = np.zeros(LANES, dtype=np.uint32)
    for index in range(8):
        if table >> index & 1:
            result |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    warp.write(target, result, lanes)


def _prmt(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    target, a, b, selector = instruction.operands
    a, b, selector = (warp.lanes(s, 32).astype(np.uint64) for s in (a, b, selector))
    both, result = a | b << np.uint64(32), np.zeros(LANES, dtype=np.uint64)
    for byte in range(4):
        which = selector >> np.uint64(4 * byte) & np.uint64(15)
        value = both >> (which & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        sign = np.where(value & np.uint64(128), np.uint64(255), np.uint64(0))
        result |= np.where(which & np.uint64(8), sign, value) << np.uint64(8 * byte)
    warp.write(target, result.astype(np.uint32), lanes)


def _bfe(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    bits, kind = bits_of(instruction.suffixes), kind_of(instruction.suffixes)
    target, a, first, length = instruction.operands
    a = warp.lanes(a, bits)
    first, length = (warp.lanes(s, 32) & 0xFF for s in (first, length))
    result = []
    for value, start, count in zip(a.tolist(), first.tolist(), length.tolist()):
        piece = value >> start & ((1 << count) - 1)
        if kind == "s" and count and piece >> (count - 1) & 1:
            piece -= 1 << count
        result.append(piece & ((1 << bits) - 1))
    warp.write(target, np.array(result, dtype=unsigned(bits)), lanes)


def _bfi(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    bits = bits_of(instruction.suffixes)
    target, a, b, first, length = instruction.operands
    a, b = (warp.lanes(s, bits) for s in (a, b))
    first, length = (warp.lanes(s, 32) & 0xFF for s in (first, length))
    result = []
    for value, into, start, count in zip(a.tolist(), b.tolist(), first.tolist(), length.tolist()):
        mask = ((1 << count) - 1) << start & ((1 << bits) - 1)
        result.append(into & ~mask | value << start & mask)
    warp.write(target, np.array(result, dtype=unsigned(bits)), lanes)


def _bits_counted(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    bits = bits_of(instruction.suffixes)
    target, a = instruction.operands
    values = warp.lanes(a, bits).tolist()
    count = {
        "popc": lambda v: v.bit_count(),
        "clz": lambda v: bits - v.bit_length(),
        "bfind": lambda v: v.bit_length() - 1 if v else 0xFFFFFFFF,
        "brev": lambda v: int(f"{v:0{bits}b}"[::-1], 2),
    }[instruction.opcode]
    warp.write(target, np.array([count(v) for v in values], dtype=np.uint64), lanes)


def encode_e2m1(values: np.ndarray) -> np.ndarray:
    """cvt.rn.satfinite.e2m1: nearest, ties to even codes, saturating; the sign in bit 3."""
    magnitude = np.minimum(np.abs(values.astype(np.float64)), 6)
    distance = np.abs(magnitude[..., None] - E2M1)
    nearest = distance.min(-1, keepdims=True) == distance
    even = nearest & (np.arange(8) % 2 == 0)
    code = np.where(nearest.sum(-1) > 1, even.argmax(-1), nearest.argmax(-1)).astype(np.uint8)
    return code | np.signbit(values).astype(np.uint8) << 3


def encode_e4m3(values: np.ndarray) -> np.ndarray:
    """cvt.rn.satfinite.e4m3."""
    clipped = torch.from_numpy(np.clip(values.astype(np.float32), -448, 448))
    return clipped.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def _cvt(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    suffixes = instruction.suffixes
    to, source_type = [
        s for s in suffixes if re.match(r"^(e\dm\d(x2|x4)?|ue8m0x2|b?f16(x2)?|[fsub]\d+)$", s)
    ][-2:]
    target, *sources = instruction.operands
    packed = re.match(r"^(e2m1|e4m3)x(2|4)$", to)
    if packed:  # the first source becomes the upper half
        if source_type == "f32":
            values = np.stack([as_values(warp.lanes(s, 32), "f") for s in reversed(sources)], -1)
        else:
            values = as_values(warp.lanes(sources[0], 32), source_type)
        if "relu" in suffixes:
            raise Unsupported(instruction.text)
        code = encode_e2m1(values) if packed[1] == "e2m1" else encode_e4m3(values)
        width = 4 if packed[1] == "e2m1" else 8
        warp.write(target, code[..., 0].astype(np.uint16) | code[..., 1].astype(np.uint16) << width, lanes)
        return
    if to in ("f16x2", "bf16x2"):
        if source_type == "f32":
            halves = [as_values(warp.lanes(s, 32), "f") for s in reversed(sources)]
            values = np.stack(halves, axis=-1)
        elif source_type == "e4m3x2":
            raw = warp.lanes(sources[0], 16)
            codes = np.stack([raw & 0xFF, raw >> 8], -1).astype(np.uint8)
            values = E4M3[codes]
        elif source_type == "e2m1x2":
            raw = warp.lanes(sources[0], 8)
            codes = np.stack([raw & 15, raw >> 4 & 15], -1)
            values = E2M1[codes & 7] * np.where(codes & 8, np.float32(-1), np.float32(1))
        else:
            raise Unsupported(instruction.text)
        warp.write(target, as_bits(values, to, 32), lanes)
        return
    source_kind = "bf16" if source_type == "bf16" else source_type[0]
    source_bits = 16 if source_type == "bf16" else int(source_type[1:])
    raw = np.asarray(warp.read(sources[0], source_bits))
    if source_kind not in ("f", "bf16"):
        raw = raw.astype(unsigned(source_bits))
    values = as_values(raw, source_kind)
    kind = "bf16" if to == "bf16" else to[0]
    bits = 16 if to == "bf16" else int(to[1:])
    with np.errstate(all="ignore"):
        if kind in ("f", "bf16"):
            if "rz" in suffixes or "rm" in suffixes or "rp" in suffixes:
                raise Unsupported(instruction.text)
            warp.write(
                target,
                as_bits(np.asarray(values).astype(np.float32 if bits < 64 else np.float64), kind, bits),
                lanes,
            )
            return
        if source_kind in ("f", "bf16"):
            rounded = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
            (how,) = [s for s in suffixes if s in rounded]
            info = np.iinfo(_SIGNED[bits] if kind == "s" else unsigned(bits))
            values = np.clip(np.nan_to_num(rounded[how](values.astype(np.float64))), info.min, info.max)
            values = values.astype(np.int64 if kind == "s" else np.uint64)
        widened = (
            np.asarray(values).astype(np.int64)
            if source_kind == "s"
            else np.asarray(values).astype(np.uint64)
        )
        warp.write(target, widened.view(np.uint64).astype(unsigned(bits)), lanes)


def _shfl(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    target, source, by, clamp, mask = instruction.operands
    members(warp, instruction, lanes, mask)
    value = warp.lanes(source, 32)
    by, clamp = (warp.lanes(s, 32).astype(np.int64) for s in (by, clamp))
    lane, segment = np.arange(LANES), clamp >> 8 & 31
    most = (lane & segment) | (clamp & 31 & ~segment)
    mode = next(s for s in instruction.suffixes if s in ("idx", "up", "down", "bfly"))
    wanted = {
        "idx": (lane & segment) | (by & 31 & ~segment),
        "up": lane - (by & 31),
        "down": lane + (by & 31),
        "bfly": lane ^ (by & 31),
    }[mode]
    valid = wanted >= most if mode == "up" else wanted <= most
    name, _, flag = target.partition("|")
    warp.write(name, value[np.where(valid, wanted, lane)], lanes)
    if flag:
        warp.write(flag, valid, lanes)


def members(warp: Warp, instruction: Instruction, lanes: np.ndarray | None, mask: str) -> np.ndarray:
    """Lanes that a .sync instruction names; they must all be there."""
    here = warp.lanes_of(lanes)
    value = int(warp.lanes(mask, 32)[here.argmax()])
    named = (value >> np.arange(LANES) & 1).astype(bool) & warp.alive
    if not bool((named <= here).all()):
        raise Fault(f"{instruction.text}: lanes {np.flatnonzero(named & ~here).tolist()} are elsewhere")
    return named


def _elect(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    target, mask = instruction.operands
    named = members(warp, instruction, lanes, mask)
    register, predicate = target.split("|")
    leader = int(named.argmax())
    warp.write(register, np.uint32(leader), lanes)
    warp.write(predicate, np.arange(LANES) == leader, lanes)


def _vote(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    target, predicate, mask = instruction.operands
    named = members(warp, instruction, lanes, mask)
    value = warp.lanes(predicate, 1)
    if "ballot" in instruction.suffixes:
        warp.write(target, np.uint32(int((value & named) @ (1 << np.arange(LANES)))), lanes)
    elif "any" in instruction.suffixes:
        warp.write(target, np.bool_((value & named).any()), lanes)
    else:
        warp.write(target, np.bool_(value[named].all()), lanes)


def _redux(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    target, source, mask = instruction.operands
    named = members(warp, instruction, lanes, mask)
    kind = kind_of(instruction.suffixes)
    values = as_values(warp.lanes(source, 32), kind)[named]
    how = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}
    (name,) = [s for s in instruction.suffixes if s in how]
    warp.write(target, as_bits(how[name].reduce(values), kind, 32), lanes)


def _activemask(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    warp.write(instruction.operands[0], np.uint32(int(warp.lanes_of(lanes) @ (1 << np.arange(LANES)))), lanes)


def _nothing(warp: Warp, instruction: Instruction, lanes: np.ndarray | None) -> None:
    """Orders memory, or is a hint."""


EXECUTE: dict[str, Callable] = {
    **dict.fromkeys((*_BINARY, *_UNARY, "fma", "max", "min"), _elementwise),
    **dict.fromkeys(("mul", "mad", "mul24"), _multiply),
    **dict.fromkeys(("shl", "shr"), _shift),
    **dict.fromkeys(("popc", "clz", "bfind", "brev"), _bits_counted),
    "rem": _rem, "dp2a": _dp2a, "shf": _funnel, "mov": _mov, "setp": _setp, "selp": _selp, "lop3": _lop3, "prmt": _prmt,
    "bfe": _bfe, "bfi": _bfi, "cvt": _cvt, "shfl": _shfl, "elect": _elect, "vote": _vote, "redux": _redux,
    "activemask": _activemask, "cvta": lambda w, i, lanes: w.write(i.operands[0], w.read(i.operands[1], 64), lanes),
    **dict.fromkeys(("fence", "membar", "prefetch", "prefetchu", "setmaxnreg", "griddepcontrol", "discard"), _nothing),
}  # fmt: skip
