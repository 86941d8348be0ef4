"""The bits behind the Hopper decode: one 32-bit word -> eight e2m1 codes in bf16 positions, and scale bytes.

An e2m1 code s|eem placed at bf16 bits 15 | 8 7 6 is the number e2m1 * 2^-126. A block scale multiplied by
2^118 turns it into e2m1 * scale * 2^-8: exact in bf16 for every code and every e4m3 scale, so the weights
reach the tensor core unrounded and the epilogue multiplies by EPILOGUE_SCALE = 2^8.

Code words. The 16 + 16 bits of a register that holds two such codes are bits {15, 8, 7, 6} of each half. A
word stores four registers, rotated left by 0, 4 and 10; the fourth fills the gaps in two pieces (no four
rotations of {15, 8, 7, 6} tile 16 bits). Nine logic instructions give back four registers: the nibble
order needs 15.

Scale words. A scale is stored as an unsigned float with 5 exponent and 3 mantissa bits, re-biased such that
`(byte << 4) | 0x7000` are the bf16 bits of scale * 2^118; subnormal e4m3 scales become normal. Byte 0 would
be 2^97, not zero: whoever packs a group with scale zero stores zero codes (layout.py does). A word holds
two scales of row r and two of row r + 8, rotated left by 4, so that one rotation and one three-input logic
instruction give a pair.

All functions are plain operators: they run on CuTe DSL's Uint32 in the kernels and on numpy's uint32 in
tests/sm90/test_decode.py, which proves them for every input.
"""

import math

CODE_BITS = 0x81C081C0  # sign, two exponent bits and the mantissa bit of e2m1, in both bf16 halves
ROTATIONS = (0, 4, 10)  # of registers 0, 1, 2 within a code word
SPLIT_BITS = (0x81808180, 0x00400040)  # register 3 in two pieces...
SPLIT_ROTATIONS = (6, 14)  # ...and where they sit

SCALE_BITS = 0x0FF00FF0
SCALE_ROTATION = 4
SCALE_BIAS = 0x70007000
SCALE_EXPONENT = 118  # bf16 scale = e4m3 scale * 2^118
EPILOGUE_SCALE = 256.0  # 2^126 / 2^118


def rotate_right(word, bits: int):
    """A 32-bit rotation, one funnel shift on the device. Wider integers keep garbage above bit 31: mask it."""
    return word if bits == 0 else (word >> bits) | (word << (32 - bits))


def rotate_left(word, bits: int):
    """The inverse of `rotate_right`, for the host; exact for 32-bit values in wider integers too."""
    return word if bits == 0 else ((word << bits) | (word >> (32 - bits))) & 0xFFFFFFFF


def unpack_word(word):
    """Code word -> four registers of two bf16 each, e2m1 * 2^-126."""
    first = [rotate_right(word, r) & CODE_BITS for r in ROTATIONS]
    low, high = (rotate_right(word, r) & b for r, b in zip(SPLIT_ROTATIONS, SPLIT_BITS, strict=True))
    return (*first, low | high)


def pack_word(registers):
    """Four registers of two bf16-placed codes -> code word; the inverse of `unpack_word`."""
    word = registers[0]
    for register, rotation in zip(registers[1:3], ROTATIONS[1:], strict=True):
        word = word | rotate_left(register, rotation)
    for bits, rotation in zip(SPLIT_BITS, SPLIT_ROTATIONS, strict=True):
        word = word | rotate_left(registers[3] & bits, rotation)
    return word


def place_code(code):
    """e2m1 code 0..15 -> the bf16 bits (in the low half) of e2m1 * 2^-126."""
    return ((code & 8) << 12) | ((code & 7) << 6)


def unpack_scales(word, odd: int, bias=SCALE_BIAS):
    """Scale word -> bf16 pair {scale of row r, scale of row r + 8} * 2^118, of the even or the odd group.

    Kernels pass `bias` in a register: an instruction has room for one immediate, SCALE_BITS.
    """
    return (rotate_right(word, 8 * odd) & SCALE_BITS) | bias


def pack_scales(scale_bytes):
    """Little-endian word of the bytes [even r, odd r, even r + 8, odd r + 8] -> scale word."""
    return rotate_left(scale_bytes, SCALE_ROTATION)


def scale_byte(scale: float) -> int:
    """e4m3 value >= 0 -> its stored byte; 0 for zero, which is only right beside zero codes."""
    if scale == 0:
        return 0
    mantissa, exponent = math.frexp(scale)  # scale = mantissa * 2^exponent, mantissa in [0.5, 1)
    biased = exponent - 1 + SCALE_EXPONENT + 127 - (SCALE_BIAS & 0xFFFF) // 128
    return (biased << 3) | int((2 * mantissa - 1) * 8)
