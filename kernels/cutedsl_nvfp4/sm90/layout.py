"""Weights as the Hopper kernels read them: blocks of 64 rows x 64 k, each contiguous, panels of 64 rows.

    codes   int64 [..., P, KB, 256]   P = ceil(N / 64) panels, KB = ceil(K / 64) blocks, 2048 bytes a block
    scales  int32 [..., P, KB, 64]    256 bytes a block

Inside a block, with row = 16 * w + 8 * h + r (w < 4 warps, h < 2, r < 8) and k = 16 * j + 8 * p + 2 * c + i
(j < 4 groups, p < 2, c < 4 lanes, i < 2):

    code word    [w][lane = 4 * r + c][j]   uint32, its register 2 * p + h holds k = (.., i = 0) and (.., i = 1)
    scale word   [w][r][j // 2], four bytes [h][j % 2] before rotation

That is the A operand of `mma.m16n8k16` and `wgmma.m64nNk16`: a thread reads 16 bytes of codes and 8 bytes
of scales for four k16 steps. Rows beyond N and k beyond K are zero, so kernels mask nothing but the store.
"""

import torch

from ..format import check_block_scales, check_k, pack_codes
from .decode import SCALE_ROTATION, pack_scales, pack_word, place_code, rotate_right, scale_byte, unpack_word

PANEL_ROWS = 64
BLOCK_K = 64
CODE_WORDS = PANEL_ROWS * BLOCK_K // 16  # int64 a block
SCALE_WORDS = PANEL_ROWS * BLOCK_K // 64  # int32 a block
CHUNK = 1 << 23  # weights that `pack_in_place` works on at a time, some 4 bytes each
PACK_CHUNKS = 64  # of a layer's experts; packing one takes about five times its bytes

_E4M3_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
_SCALE_BYTES = torch.tensor([scale_byte(v) if v > 0 else 0 for v in _E4M3_VALUES.tolist()], dtype=torch.uint8)


def _as_int32(words: torch.Tensor) -> torch.Tensor:
    """int64 0 .. 2^32 - 1 -> the int32 of the same bits."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _register_words() -> torch.Tensor:
    """int32 [4, 256]: the bits of a code word that come from register 0..3 holding the two codes of a byte."""
    byte = torch.arange(256, dtype=torch.int64)
    register = place_code(byte & 15) | (place_code(byte >> 4) << 16)
    none = torch.zeros_like(register)
    return torch.stack(
        [_as_int32(pack_word([register if i == index else none for i in range(4)])) for index in range(4)]
    )


def packed_shape(n: int, k: int) -> tuple[int, int]:
    """(panels, k blocks) of a packed [n, k] weight."""
    return -(-n // PANEL_ROWS), -(-k // BLOCK_K)


def pack_linear(codes: torch.Tensor, block_scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Checkpoint weight -> (codes int64 [..., P, KB, 256], scales int32 [..., P, KB, 64]).

    codes uint8 [..., N, K/2] and block_scales e4m3 [..., N, K/16] as in format.py, on any device. Codes of
    groups whose scale is zero become zero. Raises ValueError for a K that is no multiple of 16, for shapes
    that do not belong together, and for NaN or negative scales.
    """
    *batch, n, k_bytes = codes.shape
    k = 2 * k_bytes
    check_k(k)
    if codes.dtype != torch.uint8 or block_scales.shape != (*batch, n, k // 16):
        raise ValueError(
            f"expected codes uint8 [..., N, K/2] and block scales [..., N, K/16], "
            f"got {codes.dtype} {tuple(codes.shape)} and {tuple(block_scales.shape)}"
        )
    check_block_scales(block_scales, "block_scales")
    panels, blocks = packed_shape(n, k)
    scale_bytes = _SCALE_BYTES.to(codes.device)[block_scales.view(torch.uint8).int()]
    codes = (codes.view(*batch, n, k // 16, 8) * (scale_bytes > 0).unsqueeze(-1)).flatten(-2)
    pad_rows, pad_groups = panels * PANEL_ROWS - n, blocks * BLOCK_K // 16 - k // 16
    if pad_rows or pad_groups:
        codes = torch.nn.functional.pad(codes, (0, pad_groups * 8, 0, pad_rows))
        scale_bytes = torch.nn.functional.pad(scale_bytes, (0, pad_groups, 0, pad_rows))

    # A byte holds the two codes of a register: [..., P, w, h, r, KB, j, p, c] -> [..., P, KB, w, r, c, j] of
    # every (p, h). Bits of a word's registers are disjoint.
    b = len(batch)
    split = codes.view(*batch, panels, 4, 2, 8, blocks, 4, 2, 4)
    order = (*range(b), b, b + 3, b + 1, b + 2, b + 5, b + 4)
    words = None
    for index, table in enumerate(_REGISTER_WORDS.to(codes.device)):
        register = split[..., index // 2, :].select(b + 2, index % 2).permute(order)
        part = table[register.contiguous().int()]
        words = part if words is None else words.bitwise_or_(part)
    packed_codes = words.flatten(b + 2).view(torch.int64)

    scales = scale_bytes.view(*batch, panels, 4, 2, 8, blocks, 2, 2)  # [..., P, w, h, r, KB, j // 2, j % 2]
    order = (*range(b), b, b + 4, b + 1, b + 3, b + 5, b + 2, b + 6)
    scale_words = scales.permute(order).contiguous().flatten(b + 2).view(torch.int32).to(torch.int64)
    return packed_codes, _as_int32(pack_scales(scale_words & 0xFFFFFFFF))


def pack_in_place(
    codes: torch.Tensor, block_scales: torch.Tensor, chunk: int = CHUNK
) -> tuple[torch.Tensor, torch.Tensor]:
    """`pack_linear`, `chunk` weights at a time, into the operands' own storage where N and K fill whole blocks.

    The operands are overwritten then, and nothing but one chunk is allocated; ragged ones are packed into new,
    padded storage and left alone. Raises as `pack_linear` does, before anything is written for the first chunk.
    """
    *batch, n, half = codes.shape
    panels, blocks = packed_shape(n, 2 * half)
    code_shape, scale_shape = (*batch, panels, blocks, CODE_WORDS), (*batch, panels, blocks, SCALE_WORDS)
    whole = n % PANEL_ROWS == 0 and 2 * half % BLOCK_K == 0
    if whole and codes.is_contiguous() and block_scales.is_contiguous():
        packed = codes.view(torch.int64).view(code_shape), block_scales.view(torch.int32).view(scale_shape)
    else:
        packed = (
            codes.new_empty(code_shape, dtype=torch.int64),
            codes.new_empty(scale_shape, dtype=torch.int32),
        )
    sources = codes.reshape(-1, n, half), block_scales.reshape(-1, n, block_scales.shape[-1])
    targets = tuple(t.view(-1, panels, blocks, t.shape[-1]) for t in packed)
    rows = min(n, max(PANEL_ROWS, chunk // (2 * half) // PANEL_ROWS * PANEL_ROWS))
    matrices = max(1, chunk // (2 * half * n)) if rows == n else 1
    for matrix in range(0, len(sources[0]), matrices):
        for row in range(0, n, rows):
            some = pack_linear(*(s[matrix : matrix + matrices, row : row + rows] for s in sources))
            first = row // PANEL_ROWS
            for target, result in zip(targets, some, strict=True):
                target[matrix : matrix + matrices, first : first + result.shape[1]] = result
    return packed


def pack_experts(
    codes: torch.Tensor, block_scales: torch.Tensor, gate_up: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Checkpoint experts -> `pack_linear` of each, in the operands' own storage, a 64th of the layer at a time.

    codes uint8 [E, N, K/2] and block_scales e4m3 [E, N, K/16], contiguous; both are overwritten, unless N or
    K is no multiple of 64 and the result is larger. Rows of w13 (`gate_up`) are interleaved. Raises
    ValueError as `pack_linear` does.
    """
    experts, n, half = codes.shape
    chunk = -(-experts * n * 2 * half // PACK_CHUNKS)
    if not gate_up:
        return pack_in_place(codes, block_scales, chunk)
    shape = packed_shape(n, 2 * half)
    if n % PANEL_ROWS or 2 * half % BLOCK_K:
        packed_codes = codes.new_empty((experts, *shape, CODE_WORDS), dtype=torch.int64)
        packed_scales = codes.new_empty((experts, *shape, SCALE_WORDS), dtype=torch.int32)
    else:
        packed_codes = codes.view(torch.int64).view(experts, *shape, CODE_WORDS)
        packed_scales = block_scales.view(torch.int32).view(experts, *shape, SCALE_WORDS)
    step = -(-experts // PACK_CHUNKS)
    for first in range(0, experts, step):
        some = slice(first, first + step)
        rows = interleave_gate_up(codes[some]), interleave_gate_up(block_scales[some])
        packed_codes[some], packed_scales[some] = pack_in_place(*rows, chunk)
    return packed_codes, packed_scales


def interleave_gate_up(rows: torch.Tensor) -> torch.Tensor:
    """[..., 2I, X] of gate rows then up rows -> eight gate rows, their eight up rows, and so on.

    A tensor core's thread then holds a gate value and its up value. Raises ValueError for I not in eights.
    """
    *batch, two_i, width = rows.shape
    if two_i % 16:
        raise ValueError(f"intermediate size {two_i / 2} is not a multiple of 8")
    split = rows.view(torch.uint8).view(*batch, 2, two_i // 16, 8, width * rows.element_size())
    return split.transpose(-4, -3).reshape(*batch, two_i, -1).view(rows.dtype)


def separate_gate_up(rows: torch.Tensor) -> torch.Tensor:
    """The inverse of `interleave_gate_up`: [..., 2I, X] -> gate rows, then up rows."""
    *batch, two_i, width = rows.shape
    split = rows.view(torch.uint8).view(*batch, two_i // 16, 2, 8, width * rows.element_size())
    return split.transpose(-4, -3).reshape(*batch, two_i, -1).view(rows.dtype)


_REGISTER_WORDS = _register_words()


def unpack_linear(
    codes: torch.Tensor, scales: torch.Tensor, n: int, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `pack_linear` -> (codes uint8 [..., n, k/2], block_scales e4m3 [..., n, k/16]).

    Codes of zero-scale groups come back as zero.
    """
    *batch, panels, blocks, _ = codes.shape
    b = len(batch)
    words = codes.view(torch.int32).view(*batch, panels, blocks, 4, 8, 4, 4).to(torch.int64) & 0xFFFFFFFF
    registers = torch.stack(unpack_word(words)).unflatten(0, (2, 2))  # [p][h][..., P, KB, w, r, c, j]
    halves = torch.stack((registers & 0xFFFF, registers >> 16), dim=-1)
    nibbles = ((halves >> 12) & 8) | ((halves >> 6) & 7)
    order = (*range(2, b + 3), b + 4, 1, b + 5, b + 3, b + 7, 0, b + 6, b + 8)
    nibbles = nibbles.permute(order).reshape(*batch, panels * PANEL_ROWS, blocks * BLOCK_K)

    e4m3_of_byte = torch.zeros(256, dtype=torch.uint8)
    e4m3_of_byte[_SCALE_BYTES[:127].long()] = torch.arange(127, dtype=torch.uint8)
    unrotated = _as_int32(rotate_right(scales.to(torch.int64) & 0xFFFFFFFF, SCALE_ROTATION) & 0xFFFFFFFF)
    packed = unrotated.view(torch.uint8).view(
        *batch, panels, blocks, 4, 8, 2, 2, 2
    )  # [w][r][j // 2][h][j % 2]
    order = (*range(b), b, b + 2, b + 5, b + 3, b + 1, b + 4, b + 6)
    packed = packed.permute(order).reshape(*batch, panels * PANEL_ROWS, blocks * BLOCK_K // 16)
    block_scales = e4m3_of_byte.to(codes.device)[packed.int()][..., :n, : k // 16]
    return (
        pack_codes(nibbles[..., :n, :k].to(torch.uint8)),
        block_scales.contiguous().view(torch.float8_e4m3fn),
    )


def lay_out_linear(
    codes: torch.Tensor,  # uint8 [N, K/2]
    block_scales: torch.Tensor,  # e4m3 [N, K/16]
    groups: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Checkpoint weight -> (codes int64 [P, KB, 256], scales int32 [P, KB, 64]), panels within a group."""
    grouped = (t.view(groups, codes.shape[0] // groups, -1) for t in (codes, block_scales))
    packed_codes, packed_scales = pack_in_place(*grouped)
    return packed_codes.flatten(0, 1), packed_scales.flatten(0, 1)


def lay_out_experts(
    w13_codes: torch.Tensor,  # uint8 [E, 2I, H/2], gate (w1) rows first
    w13_block_scales: torch.Tensor,  # e4m3 [E, 2I, H/16]
    w2_codes: torch.Tensor,  # uint8 [E, H, I/2]
    w2_block_scales: torch.Tensor,  # e4m3 [E, H, I/16]
) -> tuple[torch.Tensor, ...]:
    """Checkpoint experts -> the same four, packed; gate and up rows interleaved."""
    w13 = pack_experts(w13_codes, w13_block_scales, gate_up=True)
    return *w13, *pack_experts(w2_codes, w2_block_scales, gate_up=False)


def plain_linear(
    codes: torch.Tensor, block_scales: torch.Tensor, n: int, k: int, groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `lay_out_linear` -> (codes uint8 [N, K/2], block scales e4m3 [N, K/16]), copies."""
    grouped = (t.unflatten(0, (groups, -1)) for t in (codes, block_scales))
    plain_codes, plain_scales = unpack_linear(*grouped, n // groups, k)
    return plain_codes.flatten(0, 1), plain_scales.flatten(0, 1)


def plain_panels(
    codes: torch.Tensor, block_scales: torch.Tensor, panels: torch.Tensor, n: int, k: int, groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`plain_linear` of some panels of 64 rows, counted group by group -> [P, 64, ...]; rows of padding are zero."""
    single = (t[panels].unsqueeze(1) for t in (codes, block_scales))  # a matrix of one panel each
    return unpack_linear(*single, PANEL_ROWS, k)


def plain_experts(
    w13_codes: torch.Tensor,
    w13_block_scales: torch.Tensor,
    w2_codes: torch.Tensor,
    w2_block_scales: torch.Tensor,
    hidden: int,
    intermediate: int,
) -> tuple[torch.Tensor, ...]:
    """The inverse of `lay_out_experts`; copies."""
    w13 = unpack_linear(w13_codes, w13_block_scales, 2 * intermediate, hidden)
    w2 = unpack_linear(w2_codes, w2_block_scales, hidden, intermediate)
    return *(separate_gate_up(t) for t in w13), *w2
