"""The workstation kernels' own addressing, run on the CPU with emulated instructions, gives the reference product.

Shared memory is filled through the CuTe layouts that the kernels hand to TMA, from the views that they make of global
memory; a warp's loads and MMAs are the kernels' own code, 32 lanes at a time as numpy arrays, with instructions as the
PTX manual describes them.
"""

import types
from collections.abc import Callable

import cutlass
import cutlass.cute as cute
import numpy as np
import pytest
import torch

from cutedsl_nvfp4 import reference
from cutedsl_nvfp4.format import swizzle_scales
from cutedsl_nvfp4.sm120 import experts_kernel as grouped
from cutedsl_nvfp4.sm120 import lanes as fragments
from cutedsl_nvfp4.sm120 import layout, mainloop
from cutedsl_nvfp4.sm120 import linear_kernel as dense
from cutedsl_nvfp4.sm120.tiles import BAND, LinearTile, choose, chosen, general, shipped, shipped_expert_tiles

LANES = np.arange(32)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
TILES = list(
    dict.fromkeys([*shipped(), *(t for both in shipped_expert_tiles() for t in (both.w13, both.w2))])
)


# --- instructions ---


class Memory:
    """Shared memory as bytes, and what reads it."""

    def __init__(self, size: int):
        self.bytes = np.full(size, 0xA5, dtype=np.uint8)

    def words(self, addresses):
        assert (addresses % 4 == 0).all()
        return self.bytes[addresses[:, None] + np.arange(4)].copy().view(np.uint32)[:, 0]

    def load_word(self, address):
        return self.words(np.broadcast_to(address, 32))

    def load_words(self, address, count):
        assert (np.asarray(address) % (4 * count) == 0).all()
        return [self.load_word(address + 4 * i) for i in range(count)]

    def load_matrices(self, address):
        """ldmatrix.x4: lanes 8 i .. 8 i + 7 give the rows of matrix i; lane l gets word l % 4 of row l // 4."""
        assert (address % 16 == 0).all()
        return [self.words(address[8 * i + LANES // 4] + LANES % 4 * 4) for i in range(4)]


def nibbles(words):
    """[...] words -> [..., 8] values."""
    return E2M1[(words[..., None] >> (4 * np.arange(8))) & 0xF]


def mma_m16n8k64(acc, a, b, a_scales, b_scales, a_selector, b_selector):
    """The manual's fragments: registers to matrices, one product, back to registers."""
    A, B = np.zeros((16, 64)), np.zeros((8, 64))
    row, k = LANES[:, None] // 4, LANES[:, None] % 4 * 8 + np.arange(8)
    for p in range(2):
        for h in range(2):
            A[8 * h + row, 32 * p + k] = nibbles(a[2 * p + h])
        B[row, 32 * p + k] = nibbles(b[p])
    m, n = np.arange(16), np.arange(8)
    SA = a_scales[4 * (m % 8) + 2 * a_selector + m // 8].copy().view(np.uint8).reshape(16, 4)
    SB = b_scales[4 * n + b_selector].copy().view(np.uint8).reshape(8, 4)
    D = (A * E4M3[SA].repeat(16, 1)) @ (B * E4M3[SB].repeat(16, 1)).T
    return tuple(acc[v] + D[LANES // 4 + v // 2 * 8, LANES % 4 * 2 + v % 2] for v in range(4))


@pytest.fixture
def memory(monkeypatch):
    memory = Memory(1 << 17)
    for name in ("load_word", "load_words", "load_matrices"):
        monkeypatch.setattr(mainloop, name, getattr(memory, name))
    monkeypatch.setattr(mainloop, "mma_m16n8k64", mma_m16n8k64)
    monkeypatch.setattr(mainloop, "smem_address", int)
    monkeypatch.setattr(fragments, "choose", np.where)
    monkeypatch.setattr(fragments, "shuffle", lambda value, distance: value[LANES ^ distance])
    monkeypatch.setattr(fragments, "as_word", lambda value: value.astype(np.float32).view(np.uint32))
    return memory


# --- layouts ---


def evaluate(function):
    """Run `function` where CuTe layouts can be made."""
    result = []

    @cute.jit
    def trace(function: cutlass.Constexpr, result: cutlass.Constexpr):
        result.append(function())

    trace(function, result)
    return result[0]


def offsets(layout, shape) -> np.ndarray:
    """Offset of every coordinate of a layout."""
    found = np.empty(shape, dtype=np.int64)
    for at in np.ndindex(*shape):
        found[at] = cute.crd2idx(tuple(int(i) for i in at), layout)
    return found


def strides(layout, modes: int) -> np.ndarray:
    return np.array(
        [cute.crd2idx(tuple(int(i == mode) for i in range(modes)), layout) for mode in range(modes)]
    )


def shared_offsets(tile: LinearTile) -> dict[str, np.ndarray]:
    """Byte of every element of the boxes of each operand: [16-byte chunks of rows ..., stage and panel]."""

    def all_of():
        found = {}
        for name, made in mainloop.layouts(tile).items():
            if name.endswith("codes"):
                rows, panels = (tile.tokens, 1) if name == "token_codes" else (tile.panel_rows, tile.panels)
                shape = (rows, tile.row_bytes // 16, panels * tile.stages)
                found[name] = np.empty(shape, dtype=np.int64)
                for r, chunk, stage in np.ndindex(*shape):
                    found[name][r, chunk, stage] = cute.crd2idx((r, chunk * 16, stage), made)
            else:
                token = name == "token_scales"
                rows = tile.token_scale_rows if token else 32
                tiles, panels = (1, 1) if token else (tile.row_scale_tiles // tile.panels, tile.panels)
                found[name] = offsets(made, (1, rows, tile.k_blocks, tiles, panels * tile.stages))[0]
        return found

    return evaluate(all_of)


def view(make, tensor: np.ndarray, *arguments):
    """(shape, strides in elements) of the view a kernel makes of a global tensor of this shape."""
    pitch = tuple(stride // tensor.itemsize for stride in tensor.strides)

    def made():
        source = types.SimpleNamespace(shape=tensor.shape, stride=pitch, iterator=None)
        real, cute.make_tensor = cute.make_tensor, lambda iterator, layout: layout
        try:
            layout = make(source, *arguments)
        finally:
            cute.make_tensor = real
        modes = cute.rank(layout)
        return tuple(int(size) for size in layout.shape), strides(layout, modes)

    return evaluate(made)


def box(tensor: np.ndarray, view, start, shape) -> np.ndarray:
    """What a TMA load brings: zero where a coordinate lies outside of the view."""
    sizes, steps = view
    at = np.stack(
        np.meshgrid(*(np.arange(s, s + n) for s, n in zip(start, shape, strict=True)), indexing="ij"), -1
    )
    inside = (at < np.array(sizes)).all(-1)
    flat = tensor.reshape(-1)
    index = np.where(inside, (at * steps).sum(-1), 0)
    return np.where(inside, flat[index], 0).astype(np.uint8)


# --- a CTA ---

BASE = {"token_codes": 0, "row_codes": 1 << 15, "token_scales": 3 << 15, "row_scales": (3 << 15) + (1 << 13)}


class Cta:
    """Fills shared memory with one stage after the other, and multiplies it warp by warp."""

    def __init__(self, memory: Memory, tile: LinearTile):
        self.memory, self.tile, self.loop = memory, tile, mainloop.Mainloop(tile)
        self.offsets = shared_offsets(tile)
        self.storage = types.SimpleNamespace(
            **{name: types.SimpleNamespace(data_ptr=lambda base=base: base) for name, base in BASE.items()}
        )

    def fill(self, name: str, part: int, values: np.ndarray):
        """A box into a stage (and panel): codes [rows, bytes], scales [16, rows, blocks, tiles]."""
        where = BASE[name] + self.offsets[name][..., part]
        if name.endswith("codes"):
            target = where[:, :, None] + np.arange(16)
            self.memory.bytes[target] = values.reshape(*where.shape, 16)
        else:
            self.memory.bytes[where[..., None] + np.arange(16)] = np.moveaxis(values, 0, -1)

    def multiply(self, stages: list[dict], first_token: int, first_row: int) -> np.ndarray:
        """The sums [tokens, rows] of the boxes of `stages`."""
        c, total = self.tile, np.zeros((self.tile.tokens, self.tile.rows))
        sums = [
            {key: np.zeros(32) for key in np.ndindex(4, c.warp_rows // 8, c.warp_tokens // 16)}
            for _ in range(c.warps)
        ]
        for index, boxes in enumerate(stages):
            stage = index % c.stages
            for (name, panel), values in boxes.items():
                self.fill(name, stage * (c.panels if name.startswith("row") else 1) + panel, values)
            for warp in range(c.warps):
                codes = self.loop.operand_addresses(self.storage, warp, LANES)
                scales = (
                    self.loop.token_scale_address(self.storage, warp, LANES, first_token),
                    self.loop.row_scale_address(self.storage, warp, LANES, first_row),
                )
                registers = ({}, {}, {}, {})
                for block in range(c.warp_blocks):
                    self.loop.load_block(registers, block % 2, block, stage, *codes, *scales)
                    self.loop.multiply_block(sums[warp], registers, block % 2)
        for warp in range(c.warps):
            token_warp, row_warp = self.loop.warp_place(warp)
            for (v, row, token), value in sums[warp].items():
                m = token_warp * c.warp_tokens + token * 16 + v // 2 * 8 + LANES // 4
                n = self.loop.row_band(row_warp, row // 4) + row % 4 * 8 + LANES % 4 * 2 + v % 2
                np.add.at(total, (m, n), value)
        return total


class Problem:
    """Random NVFP4 operands of a linear layer as the kernels get them; padding of scales that nobody reads is NaN."""

    def __init__(self, m: int, n: int, k: int, groups: int = 1, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        width = -(-k // 32) * 16

        def operand(rows, columns):
            codes = torch.randint(0, 256, (rows, columns, k // 2), dtype=torch.uint8, generator=generator)
            scales = torch.randint(1, 0x7F, (rows, columns, k // 16), dtype=torch.uint8, generator=generator)
            value = reference.dequantize(codes, scales.view(torch.float8_e4m3fn)).double().numpy()
            codes = torch.nn.functional.pad(codes, (0, width - k // 2))
            return codes, scales, value

        self.m, self.n, self.groups, self.blocks = m, n // groups, groups, -(-k // 64)
        codes, scales, self.x = operand(m, groups)
        self.x_codes = codes.flatten(1).numpy()
        padded = torch.full((groups, -(-m // 128) * 128, k // 16), 0x7F, dtype=torch.uint8)
        padded[:, :m] = scales.transpose(0, 1)
        self.x_scales = swizzle_scales(padded.view(torch.float8_e4m3fn)).flatten(0, 1).numpy()
        codes, scales, self.w = operand(groups, n // groups)
        self.codes = codes.flatten(0, 1).numpy()
        self.scales = swizzle_scales(scales.view(torch.float8_e4m3fn)).flatten(0, 1).numpy()

    def stages(self, tile: LinearTile, token_tile: int, group: int, row_tile: int) -> list[dict]:
        """The boxes that DenseKernel's producer loads for a tile."""
        groups = self.groups
        views = {
            "token_codes": (self.x_codes, view(dense.grouped_columns, self.x_codes, groups)),
            "row_codes": (self.codes, view(dense.grouped_rows, self.codes, groups)),
            "token_scales": (self.x_scales, view(dense.grouped_tiles, self.x_scales, groups)),
            "row_scales": (self.scales, view(dense.grouped_tiles, self.scales, groups)),
        }
        first, rows = token_tile * tile.tokens, tile.token_scale_rows
        stages = []
        for step in range(-(-self.blocks // tile.k_blocks)):
            k, block = step * tile.row_bytes, step * tile.k_blocks
            line, tiles = first % 32 // rows * rows, tile.row_scale_tiles
            scale_tile = row_tile * tile.rows // 128 // tiles * tiles
            where = {
                "token_codes": ((first, k, group), (tile.tokens, tile.row_bytes, 1)),
                "row_codes": ((row_tile * tile.rows, k, group), (tile.rows, tile.row_bytes, 1)),
                "token_scales": ((0, line, block, first // 128, group), (16, rows, tile.k_blocks, 1, 1)),
                "row_scales": ((0, 0, block, scale_tile, group), (16, 32, tile.k_blocks, tiles, 1)),
            }
            stages.append({(name, 0): box(*views[name], *at)[..., 0] for name, at in where.items()})
        return stages

    def exact(self, first: int, tokens: int, group: int, row: int, rows: int) -> np.ndarray:
        product = self.x[first : first + tokens, group] @ self.w[group, row : row + rows].T
        return np.pad(product, ((0, tokens - product.shape[0]), (0, rows - product.shape[1])))


@pytest.mark.parametrize("tile", shipped(), ids=str)
def test_linear_tiles_multiply(memory, tile):
    """Ragged N and K, groups, a second and a last token tile: every sum of a tile is the exact product."""
    problem = Problem(tile.tokens * 2 + 3, 2 * (tile.rows + 40), tile.k_blocks * 128 + 48, groups=2)
    cta = Cta(memory, tile)
    for token_tile, group, row_tile in ((1, 1, 0), (2, 0, 1)):
        first, row = token_tile * tile.tokens, row_tile * tile.rows
        got = cta.multiply(problem.stages(tile, token_tile, group, row_tile), first, row)
        tokens = min(tile.tokens, problem.m - first)  # rows of `out`; those beyond are not stored
        expected = problem.exact(first, tile.tokens, group, row, tile.rows)
        assert np.allclose(got[:tokens], expected[:tokens], rtol=1e-12, atol=0)


def slot_boxes(tile: LinearTile, operands: dict, unit: tuple[int, int, int], blocks: int) -> list[dict]:
    """The boxes that GroupedKernel's producer loads for (tile of the table, expert, row tile)."""
    index, expert, row_tile = unit
    rows, tiles = tile.panel_rows, tile.row_scale_tiles // tile.panels
    stages = []
    for step in range(-(-blocks // tile.k_blocks)):
        k, block = step * tile.row_bytes, step * tile.k_blocks
        where = {
            ("token_codes", 0): ((index * tile.tokens, k), (tile.tokens, tile.row_bytes)),
            ("token_scales", 0): ((0, 0, block, index), (16, tile.token_scale_rows, tile.k_blocks, 1)),
        }
        for panel in range(tile.panels):
            matrix = expert * tile.panels + panel
            where["row_codes", panel] = (row_tile * rows, k, matrix), (rows, tile.row_bytes, 1)
            first = row_tile * rows // 128 // tiles * tiles
            where["row_scales", panel] = (0, 0, block, first, matrix), (16, 32, tile.k_blocks, tiles, 1)
        boxes = {}
        for (name, panel), at in where.items():
            values = box(*operands[name], *at)
            boxes[name, panel] = values if name == "token_scales" else values[..., 0]
            if name == "token_codes":
                boxes[name, panel] = values
        stages.append(boxes)
    return stages


EXPERT_TILES = [
    (t, kind) for both in shipped_expert_tiles() for t, kind in ((both.w13, "w13"), (both.w2, "w2"))
]


@pytest.mark.parametrize("tile, kind", EXPERT_TILES, ids=str)
def test_expert_tiles_multiply(memory, tile, kind):
    """Gate and up rows of sizes that fill no tile side by side, an expert and a tile that are not the first."""
    experts, n, k, slots = 3, tile.panel_rows + 32, tile.k_blocks * 64 + 96, 3 * tile.tokens
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        codes = torch.randint(0, 256, (*shape, k // 2), dtype=torch.uint8, generator=generator)
        scales = torch.randint(1, 0x7F, (*shape, k // 16), dtype=torch.uint8, generator=generator)
        scales = scales.view(torch.float8_e4m3fn)
        return codes, scales, reference.dequantize(codes, scales).double().numpy()

    codes, scales, w = random(experts, tile.panels, n)
    x_codes, x_scales, x = random(3, tile.tokens)
    codes, scales = codes.flatten(1, 2).numpy(), swizzle_scales(scales.clone()).flatten(1, 2).numpy()
    x_codes, x_scales = x_codes.flatten(0, 1).numpy(), swizzle_scales(x_scales.clone()).flatten(0, 1).numpy()
    assert x_codes.shape[0] == slots and x_scales.shape[0] == 3
    operands = {
        "token_codes": (x_codes, (x_codes.shape, np.array(x_codes.strides))),
        "row_codes": (codes, view(grouped.panel_rows, codes, tile.panels)),
        "token_scales": (x_scales, view(grouped.tiles_view, x_scales)),
        "row_scales": (scales, view(grouped.panel_tiles, scales, tile.panels)),
    }
    cta = Cta(memory, tile)
    for index, expert, row_tile in ((2, 1, 0), (1, 2, 1)):
        row = row_tile * tile.panel_rows
        got = cta.multiply(slot_boxes(tile, operands, (index, expert, row_tile), -(-k // 64)), 0, row)
        expected = np.zeros_like(got)
        for panel in range(tile.panels):
            product = x[index] @ w[expert, panel, row : row + tile.panel_rows].T
            expected[:, panel * tile.panel_rows :][:, : product.shape[1]] = product
        assert np.allclose(got, expected, rtol=1e-12, atol=0)


# --- planted errors ---


PLANTED = {
    "token selector": ("token_selector", lambda mma: (mma // 2, 0)),
    "row selector": ("row_selector", lambda mma: (mma // 4, (mma + 1) % 4)),
    "lanes of scales": ("scale_lane", lambda rows, lane: lane % rows),
    "swizzle": ("code_offset", lambda tile, row, chunk: row * tile.row_bytes + chunk * 16),
    "halves of a k block": ("row_lane", lambda lane: (lane % 8 + lane // 8 % 2 * 8, lane // 16)),
    "bands": (
        "scale_offset",
        lambda box, blocks, row, block: ((row // 128 * blocks + block) * box + row % box) * 16,
    ),
    "k blocks of scales": (
        "scale_offset",
        lambda box, blocks, row, block: layout.scale_offset(box, blocks, row, blocks - 1 - block),
    ),
}


def first(wanted: Callable[[LinearTile], bool]) -> LinearTile:
    """Of the shipped tiles the first that is of the wanted kind."""
    return next(tile for tile in shipped() if wanted(tile))


# a warp's second 16 tokens have a selector of their own; more than a band of tokens, more than one offset
@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize(
    "tile",
    [
        first(lambda tile: tile.k_warps > 1 and tile.warp_tokens > 16),
        first(lambda tile: tile.k_warps == 1 and tile.warp_tokens > BAND),
    ],
    ids=str,
)
def test_a_planted_error_is_seen(memory, monkeypatch, planted, tile):
    monkeypatch.setattr(mainloop, *PLANTED[planted])
    problem = Problem(tile.tokens, tile.rows, tile.k_blocks * 64)
    got = Cta(memory, tile).multiply(problem.stages(tile, 0, 0, 0), 0, 0)
    assert not np.allclose(got, problem.exact(0, tile.tokens, 0, 0, tile.rows), rtol=1e-3)


# --- epilogues ---


def pack_bf16(low, high):
    bits = [torch.tensor(v).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16) for v in (low, high)]
    return bits[0].astype(np.uint32) | bits[1].astype(np.uint32) << 16


def lane_values(rows: np.ndarray) -> tuple:
    """[8, 32] f32, a row for each four lanes -> what they hold of it after the MMAs."""
    return tuple(rows[LANES // 4, v // 2 * 8 + LANES % 4 * 2 + v % 2] for v in range(8))


def test_results_are_stored_where_they_belong(memory, monkeypatch):
    monkeypatch.setattr(fragments, "pack_bf16", pack_bf16)
    rows = np.random.default_rng(0).normal(size=(8, 32)).astype(np.float32)
    words, column = fragments.bf16_piece(lane_values(rows), LANES)
    stored = np.empty((8, 32), dtype=np.uint16)
    for i, word in enumerate(words):
        stored[LANES // 4, column + 2 * i], stored[LANES // 4, column + 2 * i + 1] = word & 0xFFFF, word >> 16
    assert np.array_equal(
        stored, torch.tensor(rows).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    )
    stored = np.full((8, 32), np.nan, dtype=np.float32)
    for words, column in fragments.f32_pieces(lane_values(rows), LANES):
        assert (column % 4 == 0).all()
        for i, word in enumerate(words):
            stored[LANES // 4, column + i] = word.view(np.float32)
    assert np.array_equal(stored, rows)


def test_rounding_is_the_references(memory, monkeypatch):
    """Groups of every size of scale, one of zeros and one that underflows among them."""
    as_torch = {
        "as_bf16": lambda v: torch.tensor(v).to(torch.bfloat16).float().numpy(),
        "larger": lambda a, b: np.maximum(a, b) + np.float32(0),  # +0 is larger than -0
        "shuffle": lambda value, distance: value[LANES ^ distance],
        "encode_e4m3": lambda v: torch.tensor(v).clamp(max=448).to(torch.float8_e4m3fn).view(torch.uint8).numpy(),
        "decode_e4m3": lambda bits: E4M3[bits].astype(np.float32),
        "quotients": lambda values, step: [
            np.where(step > 0, value / np.where(step > 0, step, 1), 0).astype(np.float32) for value in values
        ],
        "encode_pair": lambda low, high: (
            reference.encode_e2m1(torch.tensor(low)) | reference.encode_e2m1(torch.tensor(high)) << 4
        ).numpy().astype(np.uint32),
    }  # fmt: skip
    for name, function in as_torch.items():
        monkeypatch.setattr(grouped, name, function)
    for seed in range(20):
        generator = np.random.default_rng(seed)
        rows = generator.normal(size=(8, 32)) * 10.0 ** generator.integers(-6, 4, size=(8, 1))
        rows[0, :16] = 0
        rows = rows.astype(np.float32)
        scale = np.float32(0.03)
        codes, bits = grouped.round_band(lane_values(rows), LANES, scale)
        expected = reference.quantize(torch.tensor(rows).to(torch.bfloat16), torch.tensor(scale))
        assert np.array_equal(codes.astype(np.uint32).view(np.uint8).reshape(8, 16), expected[0].numpy())
        for group in range(2):
            assert (bits[group][LANES] == expected[1].view(torch.uint8).numpy()[LANES // 4, group]).all()


# --- which tile for which problem ---

PROBLEMS = [
    (2048, 7168, 1), (65536, 1536, 1), (64, 4096, 1), (8192, 4096, 8), (128, 128, 2), (1024, 336, 4), (16384, 7168, 1),
]  # fmt: skip


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_every_choice_is_shipped_and_listed(problem):
    n, k, groups = problem
    listed = chosen(n, k, groups, 8192)
    for m in (*range(1, 300), 511, 512, 513, 1000, 2048, 4095, 5000, 8192):
        tile = choose(n, k, m, groups)
        assert tile in listed and tile in shipped(), m
        assert choose(n, k, m, groups, plain=False) in general()
    for tile, m in listed.items():
        assert choose(n, k, m, groups) == tile


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_shipped_tiles_fit_an_sm(tile):
    """No more than the tile says is laid out in shared memory; registers suffice once they have moved."""
    laid_out = evaluate(lambda: mainloop.Mainloop(tile).shared_storage().size_in_bytes())
    assert laid_out <= tile.shared_memory <= 99 * 1024
    if tile.moves_registers:  # the warpgroup that loads gives registers to the others
        registers = 32 * tile.warps * mainloop.CONSUMER_REGISTERS + 128 * mainloop.PRODUCER_REGISTERS
        assert registers <= 64 * 1024


@pytest.mark.parametrize(
    "tile",
    [
        LinearTile(tokens=24),
        LinearTile(rows=512),
        LinearTile(k_blocks=8),
        LinearTile(k_warps=4),
        LinearTile(32, 128, 2, 4),
        LinearTile(row_warps=8),
        LinearTile(stages=1),
        LinearTile(stages=6),
        LinearTile(128, 128, 2, 4, panels=2),
        LinearTile(128, 128, 2, 2, panels=3),
    ],
    ids=str,
)
def test_illegal_tiles_are_refused(tile):
    with pytest.raises(ValueError, match="Tile"):
        tile.check()
