"""Where a warp of the sm_120 kernels finds its operands in shared memory, and what its lanes hold.

Functions of whole numbers, Python's or the device's: the kernels compute their addresses with them, tests
evaluate the very same on the CPU.

A stage holds, for the tokens and for the weight rows,

    codes    [rows][k_blocks * 32 bytes], 16-byte chunks swizzled by TMA (64 or 128 bytes)
    scales   [scale tiles][k_blocks][32 or 16 rows][4 bands][4 k groups], one byte each: the 128x4 layout

One MMA (m16n8k64) takes 16 tokens, 8 weight rows and a block of 64 k. With lane = 4 * g + q:

    tokens   register 2 * p + h: row 8 * h + g, k = 32 * p + 8 * q .. + 7
    rows     register p:         row g,         k = 32 * p + 8 * q .. + 7
    sums     register 2 * h + i: token 8 * h + g, row 2 * q + i
    scales   a word is the four scales of a row and a k block. Of a register, the instruction's selector s
             takes for the tokens lanes q = 2 * s + h (row 8 * h + g), for the rows lanes q = s (row g).

So one word a lane, of row 8 * q + g, is the scales of a band: two token MMAs or four row MMAs, by selector alone.
"""

from .tiles import BAND, SCALE_TILE_ROWS, LinearTile

CHUNK = 16  # bytes of ldmatrix's rows: 32 codes


def code_offset(tile: LinearTile, row, chunk):
    """Byte of 16-byte chunk `chunk` (0 .. 2 * k_blocks - 1) of `row` in a stage's codes."""
    if tile.k_blocks == 2:
        return row * 64 + (chunk ^ (row // 2 % 4)) * CHUNK
    return row * 128 + (chunk ^ (row % 8)) * CHUNK


def token_lane(lane):
    """(row, half of a k block) whose chunk's address `lane` gives to ldmatrix, for 16 tokens x 64 k."""
    return lane % 8 + lane // 8 % 2 * 8, lane // 16


def row_lane(lane):
    """(row, half of a k block) whose chunk's address `lane` gives to ldmatrix, for 2 x 8 weight rows x 64 k."""
    return lane % 8 + lane // 16 * 8, lane // 8 % 2


def scale_offset(box_rows: int, k_blocks: int, row, k_block):
    """Byte of the scale word of `row` and k block `k_block` in a stage's scales, `box_rows` of each band.

    Rows count from the start of the scale tile that the stage's first row lies in.
    """
    scale_tile, inside = row // SCALE_TILE_ROWS, row % SCALE_TILE_ROWS
    line = (scale_tile * k_blocks + k_block) * box_rows + inside % box_rows
    return line * 16 + inside // BAND * 4


def scale_lane(box_rows: int, lane):
    """Row of a band, of which a stage holds `box_rows`, whose scale word `lane` holds."""
    return lane % 4 % (box_rows // 8) * 8 + lane // 4


def token_selector(mma: int) -> tuple[int, int]:
    """(register, selector) of the scales of a warp's token MMA `mma`; registers are one a band."""
    return mma // 2, mma % 2


def row_selector(mma: int) -> tuple[int, int]:
    """(register, selector) of the scales of a warp's row MMA `mma`; registers are one a band."""
    return mma // 4, mma % 4
