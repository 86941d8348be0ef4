"""Every shipped Hopper kernel compiles without a GPU, uses the tensor cores and spills nothing."""

import pytest
import torch

from cutedsl_nvfp4 import compiled, settings
from cutedsl_nvfp4.family import LinearProblem
from cutedsl_nvfp4.sm90 import experts, linear
from cutedsl_nvfp4.sm90.linear_wide import PRODUCER_REGISTERS
from cutedsl_nvfp4.sm90.tiles import (
    NarrowTile,
    WideTile,
    choose,
    chosen,
    general,
    shipped,
    shipped_expert_tiles,
)
from tests.support.compiling import compile_ahead, problems

ARCH = "sm_90a"
LINEAR, EXPERTS = linear.shipped(ARCH), experts.shipped(ARCH)


def kernel_of(tile):
    """The linear kernel of `tile`, for results that all of DeepSeek-V4's are."""
    (kernel,) = linear.kernels(LinearProblem(64, 64), tile, ARCH)
    return kernel


@pytest.mark.parametrize("name", [*LINEAR, *EXPERTS])
def test_compiles_with_tensor_cores_and_without_spills(name, tmp_path):
    assert problems({**LINEAR, **EXPERTS}[name], tmp_path, "sm90") == []


@pytest.mark.parametrize(
    "tile",
    [
        WideTile(3, 128, 2, 4),
        WideTile(3, 192, 1, 6, persistent=True, lag=1, bulk=True),
        WideTile(2, 256, 1, 5, persistent=True, lag=2, multicast=2, bulk=True),
        WideTile(2, 256, 1, 5, persistent=True, multicast=2, tail=128),
        WideTile(3, 192, 1, 6, persistent=True, bulk=True, tail=96),
        WideTile(3, 96, 2, 4, split_k=2),
        WideTile(2, 96, 2, 4, split_k=8, signal=True),
        NarrowTile(16, 4, 1, 4, split_k=8, signal=True),
    ],
    ids=str,
)
def test_tiles_that_tuning_tries_compile_as_well(tile, tmp_path):
    assert problems(kernel_of(tile), tmp_path, "sm90") == []


def test_wrong_machine_code_is_noticed(tmp_path):
    """The reader of machine code can say no: this tile has twice the k blocks of the one it is taken for."""
    taken_for = kernel_of(WideTile(1, 64, 1, 4))
    wrong = problems(kernel_of(WideTile(1, 64, 2, 4)), tmp_path, "sm90", taken_for)
    assert wrong == ["8 tensor core instructions in the main loop instead of 4"]


def test_ahead_of_time_kernels_are_found_by_name(tmp_path, monkeypatch):
    """Exported and linked by devtools/kernels/compile.py, then loaded without anything being compiled."""
    narrow = next(tile for tile in shipped() if isinstance(tile, NarrowTile))  # small, and so soon compiled
    product, route = kernel_of(narrow), EXPERTS["nvfp4_experts_sm90_route_8"]
    assert product.out_dtype is torch.bfloat16
    compile_ahead(tmp_path, ARCH, [product.name, route.name])
    monkeypatch.setenv(settings.KERNELS, str(tmp_path))
    monkeypatch.setenv(settings.FORBID_JIT, "1")
    assert callable(product.load()) and callable(route.load())


def test_forbidden_compilation_names_the_kernel(monkeypatch, tmp_path):
    monkeypatch.setenv(settings.FORBID_JIT, "1")
    monkeypatch.setenv(settings.KERNELS, str(tmp_path))
    with pytest.raises(RuntimeError, match="no compiled kernel missing_kernel"):
        compiled.compiled("missing_kernel", lambda: pytest.fail("compiled although forbidden"))


# --- which tile for which problem ---

PROBLEMS = [
    (2048, 7168, 1), (65536, 1536, 1), (64, 4096, 1), (8192, 4096, 8), (128, 128, 2), (1024, 336, 4), (16384, 7168, 1),
]  # fmt: skip


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_every_choice_is_shipped_and_listed(problem, batch_invariant):
    """Whatever the number of tokens: `chosen` lists the tile, and its kernel is compiled ahead of time."""
    n, k, groups = problem
    listed = chosen(n, k, groups, 8192, batch_invariant)
    for m in (*range(1, 300), 511, 512, 513, 1000, 2048, 4095, 5000, 8192):
        tile = choose(n, k, m, groups, batch_invariant)
        assert tile in listed and tile in shipped(), m
    for tile, m in listed.items():
        assert choose(n, k, m, groups, batch_invariant) == tile


def test_results_with_a_bias_or_ragged_rows_take_general_tiles():
    taken = {choose(n, k, m, 1, False, plain=False) for n in (64, 8000) for k in (64, 8192) for m in (1, 500)}
    assert taken == set(general())


STREAMING = [
    tile
    for tiles in shipped_expert_tiles()
    for tile in (tiles.w13, tiles.w2)
    if isinstance(tile, NarrowTile) and tile.streams
]


@pytest.mark.parametrize("tile", [*shipped(), *dict.fromkeys(STREAMING)], ids=str)
def test_shipped_tiles_fit_an_sm(tile):
    """All CTAs that the host counts on at once: shared memory (a KB of each is CUDA's), threads, registers."""
    wide = isinstance(tile, WideTile)
    ctas = tile.ctas_per_sm if wide or tile.streams else 1
    assert ctas * (tile.shared_memory + 1024) <= 228 * 1024
    assert ctas * tile.threads <= 2048
    if wide and tile.panels > 1:  # the producer's warpgroup gives registers to the others
        registers = 128 * (tile.panels * tile.consumer_registers + PRODUCER_REGISTERS)
        assert ctas * registers <= 64 * 1024


@pytest.mark.parametrize(
    "config",
    [
        NarrowTile(tokens=12),
        NarrowTile(k_warps=3),
        NarrowTile(stages=1),
        NarrowTile(split_k=3),
        NarrowTile(tokens=32, k_warps=4, blocks=2, stages=8),
        WideTile(tokens=40),
        WideTile(panels=5),
        WideTile(panels=3, tokens=256),
        WideTile(panels=3, ctas_per_sm=2, stages=2),
        WideTile(lag=1),
        WideTile(panels=3, tokens=64, persistent=True, lag=3),
        WideTile(split_k=2, bulk=True),
        WideTile(signal=True),
        NarrowTile(signal=True),
        WideTile(tokens=16, bulk=True),
        WideTile(split_k=2, persistent=True),
        WideTile(tokens=256, stages=8),
        WideTile(ctas_per_sm=3),
        WideTile(tokens=128, tail=64),
        WideTile(tokens=128, blocks=2, persistent=True, tail=64),
        WideTile(tokens=192, persistent=True, tail=128),
        WideTile(tokens=128, persistent=True, tail=128),
        WideTile(tokens=96, persistent=True, tail=48),
    ],
    ids=str,
)
def test_illegal_configurations_are_refused(config):
    with pytest.raises(ValueError, match=type(config).__name__):
        config.check()
