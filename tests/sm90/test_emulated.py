"""Hopper's kernels, as compiled, run on the CPU (tests/support/emulator): every shipped tile, waves, planted faults."""

import copy
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple

import pytest
import torch

from cutedsl_nvfp4 import reference
from cutedsl_nvfp4.family import Layout
from cutedsl_nvfp4.prepare import prepare_experts, prepare_linear
from cutedsl_nvfp4.sm90 import experts, linear
from cutedsl_nvfp4.sm90.tiles import ExpertTiles, NarrowTile, WideTile, general, shipped, shipped_expert_tiles
from tests.support.emulator import device
from tests.support.emulator.ptx import Fault, Instruction

TMA_LATE = frozenset({"tma", "store"})  # done when nothing else can go on; else at once
LIMIT = 7.0


def seed(config: object) -> int:
    """A schedule for each tile, whatever it is called; printed, and so shown where the test fails."""
    number = zlib.crc32(repr(astuple(config)).encode())
    print(f"seed {number}")
    return number


def emulated(monkeypatch, sms: int, late: bool, number: int) -> None:
    """A device on which TMA is late or not, with schedule `number`."""
    gpu = device.Device(monkeypatch, 90, sms)
    gpu.lazy, gpu.seed = TMA_LATE if late else frozenset(), number


def kind(config: NarrowTile | WideTile | ExpertTiles) -> tuple:
    """The code that a tile's kernel consists of, whatever its sizes."""
    if isinstance(config, ExpertTiles):
        return kind(config.w13), kind(config.w2)
    if isinstance(config, NarrowTile):
        return NarrowTile, config.streams, config.split_k > 1, config.signal
    return (
        WideTile, config.blocks > 1, config.split_k > 1, config.persistent, config.multicast > 1, config.lag > 0,
        config.bulk, config.signal, config.tail > 0,
    )  # fmt: skip


def late_or_not(configs: Iterable[object]) -> list[tuple[object, bool]]:
    """(tile, whether TMA is late): both ways for every kind, at once for its tile that is cheapest to emulate."""
    kinds: dict[tuple, list] = {}
    for config in configs:
        kinds.setdefault(kind(config), []).append(config)
    runs = []
    for of_kind in kinds.values():
        cheapest = min(of_kind, key=lambda config: config.tokens)
        runs += [(cheapest, False), *((config, True) for config in of_kind if config is not cheapest)]
        if len(of_kind) == 1:
            runs.append((cheapest, True))
    return runs


def product(
    random_weight, config, m: int, n: int, k: int, groups: int = 1, bias: bool = False, dtype=torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the kernel wrote, the exact product in float64) of random operands."""
    generator = torch.Generator().manual_seed(m)
    codes, scales = random_weight(n, k)
    row_scale, offset = torch.rand(n, generator=generator) + 0.5, torch.randn(n, generator=generator)
    x = torch.randn(m, groups * k, generator=generator).to(torch.bfloat16)
    weight = reference.dequantize(codes, scales, dtype=torch.float64).view(groups, n // groups, k)
    exact = (
        torch.einsum("mgk,gnk->mgn", x.double().view(m, groups, k), weight).reshape(m, n) * row_scale.double()
    )
    packed = prepare_linear(
        codes.clone(), scales.clone(), row_scale, [1] * n, layout=Layout.SM90, groups=groups
    )
    operands = (x, packed.codes, packed.block_scales, row_scale)
    got = linear.run(
        *map(device.on_device, operands), bias=device.on_device(offset) if bias else None,
        n=n, k=k, groups=groups, tile=config, out_dtype=dtype,
    )  # fmt: skip
    return got.as_subclass(torch.Tensor), exact + offset.double() if bias else exact


def right(got: torch.Tensor, exact: torch.Tensor) -> bool:
    """Within what f32 sums, or rounding them to bf16, leave."""
    error = (got.double() - exact).norm() / exact.norm()
    rounding = (exact.to(torch.bfloat16).double() - exact).norm() / exact.norm()
    return bool(error <= (3e-6 if got.dtype == torch.float32 else 1.05 * rounding))


def ragged(config: NarrowTile | WideTile) -> dict[str, int]:
    """Two tiles of tokens, the second not full; rows and K that fill neither a tile nor a stage."""
    if isinstance(config, NarrowTile):
        return {"m": config.tokens - 1, "n": 72, "k": 64 * config.stage_blocks * config.split_k + 80}
    return {
        "m": config.tokens + 9,
        "n": config.rows * config.multicast + 8,
        "k": 128 * config.blocks * config.split_k + 80,
    }


@pytest.mark.parametrize("config, late", late_or_not(shipped()), ids=str)
def test_every_tile(monkeypatch, random_weight, config, late):
    emulated(monkeypatch, 2, late, seed(config))
    assert right(*product(random_weight, config, **ragged(config)))


def with_tails() -> list[WideTile]:
    """Of the shipped tiles with a tail the cheapest of each kind, and of two parts or more."""
    kinds: dict[tuple, WideTile] = {}
    tails = [config for config in shipped() if getattr(config, "tail", 0)]
    for config in sorted(tails, key=lambda config: config.tokens, reverse=True):
        kinds[kind(config), config.tokens > 2 * config.tail] = config
    return list(kinds.values())


@pytest.mark.parametrize("config", with_tails(), ids=str)
@pytest.mark.parametrize("tiles, last", [(3, "all but a part"), (5, "all but a part"), (5, "one part")])
def test_waves(monkeypatch, random_weight, config, tiles, last):
    """Whole waves, and a last one that is cut into parts or not; last tokens that are parts, a tile, or cut."""
    emulated(monkeypatch, 4, True, tiles)
    m = tiles * config.tokens - 5 - (config.tail if last == "all but a part" else config.tokens - config.tail)
    assert right(*product(random_weight, config, m, n=64 * config.panels * config.multicast, k=192))


@pytest.mark.parametrize("config, n", list(itertools.product(general(), (68, 71))), ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bias_and_ragged_rows(monkeypatch, random_weight, config, n, dtype):
    device.Device(monkeypatch, 90, sms=2)
    m = config.tokens + 3
    assert right(*product(random_weight, config, m, n, k=400, bias=True, dtype=dtype))


@pytest.mark.parametrize(
    "config",
    [
        NarrowTile(split_k=2),
        WideTile(2, 64, 2, 4, split_k=2),
        WideTile(2, 256, 1, 5, persistent=True, tail=64),
    ],
    ids=str,
)
def test_groups(monkeypatch, random_weight, config):
    """Block-diagonal: a group's rows see only the group's tokens, also where K is no multiple of 64."""
    device.Device(monkeypatch, 90, sms=2)
    assert right(*product(random_weight, config, min(config.tokens, 70), n=384, k=208, groups=3))


# --- experts ---


def layer(random_weight, tiles: ExpertTiles, m: int, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """(the layer by the kernels, the reference's) with an expert that gets nothing and pairs nobody computes."""
    hidden, intermediate, topk = 336, 80, 2
    w13, w2 = (
        random_weight(count, 2 * intermediate, hidden, seed=1),
        random_weight(count, hidden, intermediate, seed=2),
    )
    generator = torch.Generator().manual_seed(m)
    gates = torch.rand(count, 2, generator=generator) * 0.01 + 0.002
    downs = torch.rand(count, generator=generator) * 0.01 + 0.002
    x = torch.randn(m, hidden, generator=generator).to(torch.bfloat16)
    ids = torch.tensor([[1, 4]]).repeat(m, 1).to(torch.int32)
    ids[::3] = torch.tensor([4, 6])  # of this rank's: 1, 4 and, without a pair, 3; 6 is another's
    ids[0] = torch.tensor([-1, 4])
    weights = torch.rand(m, topk, generator=generator)
    expert_map = torch.tensor([-1, 0, -1, 1, 2, -1, -1], dtype=torch.int32)
    rows13 = gates.repeat_interleave(intermediate, dim=1)
    expected = reference.experts(
        x, *w13, rows13, *w2, downs[:, None].repeat(1, hidden), weights, ids, expert_map=expert_map,
        swiglu_limit=LIMIT, out_dtype=torch.float32,
    )  # fmt: skip
    w = prepare_experts(*(t.clone() for t in w13), gates, *(t.clone() for t in w2), downs, layout=Layout.SM90)
    operands = (
        x, w.w13_codes, w.w13_block_scales, w.w13_row_scale, w.w2_codes, w.w2_block_scales, w.w2_row_scale, weights,
        ids,
    )  # fmt: skip
    got = experts.run(
        *map(device.on_device, operands), expert_map=device.on_device(expert_map), hidden=hidden,
        intermediate=intermediate, swiglu_limit=LIMIT, out_dtype=torch.float32, tiles=tiles,
    )  # fmt: skip
    return got.as_subclass(torch.Tensor), expected


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((got - expected).norm() / expected.norm() < 4e-3)


@pytest.mark.parametrize("tiles, late", late_or_not(shipped_expert_tiles()), ids=str)
def test_every_tile_of_experts(monkeypatch, random_weight, tiles, late):
    """Two tiles and more of an expert, the last not full."""
    emulated(monkeypatch, 2, late, seed(tiles))
    assert close(*layer(random_weight, tiles, m=tiles.tokens * 3 // 2 + 9))


# --- planted faults: each must be seen ---


def products(code: list[Instruction]) -> list[Instruction]:
    return [i for i in code if i.opcode == "wgmma" and "mma_async" in i.suffixes]


def first_tokens_always(code: list[Instruction]) -> None:
    """Every product takes the first one's tokens."""
    for instruction in products(code):
        instruction.operands[2] = products(code)[0].operands[2]


def rows_exchanged(code: list[Instruction]) -> None:
    """A's registers of rows r and r + 8 change places."""
    for instruction in products(code):
        a, b, c, d = instruction.operands[1].strip("{}").split(", ")
        instruction.operands[1] = f"{{{b}, {a}, {d}, {c}}}"


def no_wait(code: list[Instruction]) -> None:
    """Tokens and weights are not waited for."""
    for instruction in code:
        if instruction.opcode == "mbarrier" and "try_wait" in instruction.suffixes:
            instruction.opcode, instruction.suffixes = "setp", ("eq", "u32")
            instruction.operands = [instruction.operands[0], "0", "0"]


def arrival_more(code: list[Instruction]) -> None:
    """A barrier awaits an arrival that never comes."""
    first = next(i for i in code if i.opcode == "mbarrier" and "init" in i.suffixes)
    first.operands = [first.operands[0], "77"]


@contextmanager
def changed(gpu: device.Device, change: Callable[[list[Instruction]], None]) -> Iterator[None]:
    """The kernel that was launched last, with other instructions for a while."""
    (kernel,) = gpu.kernel(gpu.launched[-1]).kernels.values()
    right_code, kernel.code = kernel.code, copy.deepcopy(kernel.code)
    change(kernel.code)
    try:
        yield
    finally:
        kernel.code = right_code


@pytest.mark.parametrize("fault", [first_tokens_always, rows_exchanged, no_wait, arrival_more])
def test_broken_code_is_seen(monkeypatch, random_weight, fault):
    gpu = device.Device(monkeypatch, 90, sms=2)
    gpu.lazy = TMA_LATE

    def seen() -> bool:
        try:
            return not right(*product(random_weight, WideTile(2, 64, 2, 4, split_k=2), m=70, n=128, k=1088))
        except Fault:
            return True

    assert not seen()
    with changed(gpu, fault):
        assert seen()


def test_a_stage_released_early_is_seen(monkeypatch, random_weight):
    """No wait for products: TMA refills a stage that they may still read."""

    def wait_for_none(code: list[Instruction]) -> None:
        for instruction in code:
            if instruction.opcode == "wgmma" and instruction.suffixes[0] == "wait_group":
                instruction.operands = [str(int(instruction.operands[0]) and 99)]  # all but the last wait

    gpu = device.Device(monkeypatch, 90, sms=2)
    sizes = {"config": WideTile(1, 64, 1, 2), "m": 64, "n": 64, "k": 1024}
    assert right(*product(random_weight, **sizes))
    with changed(gpu, wait_for_none), pytest.raises(Fault, match="was overwritten before"):
        product(random_weight, **sizes)
