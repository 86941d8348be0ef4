"""Every shipped Blackwell kernel compiles without a GPU, uses the FP4 tensor cores and spills nothing."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch

from cutedsl_nvfp4 import format, settings
from cutedsl_nvfp4.blackwell import quantize
from cutedsl_nvfp4.family import LinearProblem
from cutedsl_nvfp4.sm100 import experts, linear
from cutedsl_nvfp4.sm100.tiles import SHARED_MEMORY, SMS, TENSOR_COLUMNS, LinearTile, choose, shipped
from devtools.kernels.sass import machine_code
from tests.support.compiling import compile_ahead, problems

ARCHITECTURES = ("sm_100a", "sm_103a")
KERNELS = {
    name: kernel
    for arch in ARCHITECTURES
    for kernels in (linear.shipped(arch), experts.shipped(arch), quantize.shipped(arch))
    for name, kernel in kernels.items()
}


def kernel_of(tile, arch="sm_100a"):
    _, product = linear.kernels(LinearProblem(64, 64), tile, arch)
    return product


@pytest.mark.parametrize("name", [*KERNELS, *quantize.shipped("sm_120a")])
def test_compiles_with_tensor_cores_and_without_spills(name, tmp_path):
    kernel = {**KERNELS, **quantize.shipped("sm_120a")}[name]
    assert problems(kernel, tmp_path, "sm100") == []
    if kernel.kind == "product":
        (compiled,) = tmp_path.glob("*.cubin")
        code = machine_code.read(compiled)
        assert code.registers * kernel.tile.threads <= 65536
        copies = sum(count for opcode, count in code.other.items() if opcode.startswith("UTCCP"))
        assert copies == 4 * (kernel.tile.panels + kernel.tile.scale_atoms)


def test_wrong_machine_code_is_noticed(tmp_path):
    """The reader of machine code can say no: this kernel's MMAs are those of one CTA."""
    (wrong,) = problems(kernel_of(LinearTile(128, 1, 5)), tmp_path, "sm100", kernel_of(LinearTile(128, 2, 5)))
    assert wrong.startswith("tensor core instructions in the main loop: {'UTCOMMA.4X': 4} instead of")


def test_ahead_of_time_kernels_are_found_by_name(tmp_path, monkeypatch):
    """Exported and linked by devtools/kernels/compile.py, for two architectures side by side, then loaded by name."""
    loaded = []
    for arch in ARCHITECTURES:
        route = experts.shipped(arch)[f"nvfp4_experts_{arch.replace('_', '')}_route"]
        kernels = [kernel_of(LinearTile(16, 1, 9), arch), quantize.kernel(True, arch), route]
        compile_ahead(tmp_path, arch, [kernel.name for kernel in kernels])
        loaded += kernels
    monkeypatch.setenv(settings.KERNELS, str(tmp_path))
    monkeypatch.setenv(settings.FORBID_JIT, "1")
    assert all(callable(kernel.load()) for kernel in loaded)


# --- which tile for which problem ---

PROBLEMS = [
    (2048, 7168, 1), (65536, 1536, 1), (64, 4096, 1), (8192, 4096, 8), (128, 128, 2), (1024, 336, 4), (16384, 7168, 1),
    (7168, 16384, 1), (24, 16, 1), (7168, 2048, 1),
]  # fmt: skip
TOKENS = [1, 2, 15, 16, 17, 32, 33, 64, 65, 128, 129, 500, 1024, 4096, 16384, 100000]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_choice_is_shipped_and_takes_the_tokens(problem):
    n, k, groups = problem
    for m in TOKENS:
        tile = choose(n, k, m, groups)
        assert tile in shipped() and tile.takes(m)
        assert tile.split_k == 1 or -(-k // 256) >= 2 * tile.split_k


def ctas(tile: LinearTile, m: int, n: int, groups: int) -> int:
    """CTAs of a product that `tile` computes."""
    return -(-(n // groups) // tile.rows) * groups * -(-m // tile.tokens) * tile.cluster


def test_k_is_shared_by_ctas_that_run_at_once_wherever_half_of_the_sms_would_idle():
    shared = 0
    for (n, k, groups), m in itertools.product(PROBLEMS, TOKENS):
        tile = choose(n, k, m, groups)
        shared += tile.split_k > 1
        if tile.split_k > 1:
            assert ctas(tile, m, n, groups) <= SMS, (n, k, m, tile)
        elif k >= 4096 and any(
            (t.tokens, t.ctas_per_mma, t.split_k) == (tile.tokens, tile.ctas_per_mma, 2) for t in shipped()
        ):
            assert 2 * ctas(tile, m, n, groups) > SMS, (n, k, m, tile)
    assert shared > 0


def test_products_that_fill_all_sms_take_the_tile_that_loads_least():
    """Bytes for each result; of the products that fill every SM four times with whole tiles of the largest size."""
    largest = max(shipped(), key=lambda tile: tile.rows * tile.tokens)

    def loaded(tile: LinearTile) -> float:
        return tile.stage_bytes * tile.ctas_per_mma / (tile.rows * tile.tokens)

    full = 0
    for (n, k, groups), m in itertools.product(PROBLEMS, TOKENS):
        if n // groups % largest.rows == 0 and ctas(largest, m, n, groups) >= 4 * SMS:
            full += 1
            assert loaded(choose(n, k, m, groups)) == min(map(loaded, shipped())), (n, k, m)
    assert full > 0


@pytest.mark.parametrize("tile", shipped(), ids=str)
def test_shipped_tiles_fit(tile):
    tile.check()
    assert tile.shared_memory <= SHARED_MEMORY and tile.tensor_memory <= TENSOR_COLUMNS
    last = tile.accumulator_stride + tile.tokens + tile.scale_columns
    assert last <= tile.tensor_memory and (last == TENSOR_COLUMNS) == tile.overlaps


@pytest.mark.parametrize(
    "tile, reason",
    [
        (LinearTile(48), "tokens must be"),
        (LinearTile(256), "need ctas_per_mma=2"),
        (LinearTile(32, 2), "at least 64 tokens"),
        (LinearTile(128, 2, 4, 2), "and split_k=1"),
        (LinearTile(16, split_k=3), "split_k must be"),
        (LinearTile(16, stages=1), "at least 2 stages"),
        (LinearTile(128, stages=7), "bytes of shared memory"),
    ],
)
def test_impossible_tiles_are_refused(tile, reason):
    with pytest.raises(ValueError, match=reason):
        tile.check()


# --- the quantizer's division ---


def fma(a: np.float32, b: np.float32, c: np.float32) -> np.float32:
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    if exact == 0:  # a sum of zeros of both signs is +0, a sum of equal ones that zero
        product = np.copysign(np.float32(1), a) * np.copysign(np.float32(1), b)
        return np.float32(-0.0) if product < 0 and np.signbit(c) else np.float32(0.0)
    return nearest(exact)


def nearest(exact: Fraction) -> np.float32:
    """`exact` rounded to float32, ties to even."""
    guess = np.float32(float(exact))
    around = (np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf)))
    return min(
        around, key=lambda value: (abs(Fraction(float(value)) - exact), int(value.view(np.uint32)) & 1)
    )


def test_division_by_way_of_the_reciprocal_is_correctly_rounded():
    """The three operations of rounding.divide, against division, on activations and steps as they occur."""
    generator = np.random.default_rng(0)
    scales = torch.arange(1, 127, dtype=torch.uint8).view(format.SCALE_DTYPE).float().numpy()
    for _ in range(3000):
        step = np.float32(generator.choice(scales)) * np.float32(10.0 ** generator.uniform(-8, 2))
        x = np.float32(torch.tensor(generator.normal() * float(step) * 3).bfloat16().float().item())
        inverse = nearest(1 / Fraction(float(step)))
        quotient = x * inverse
        remainder = fma(quotient, step, -x)
        assert fma(-remainder, inverse, quotient) == nearest(Fraction(float(x)) / Fraction(float(step)))


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_division_keeps_the_sign_of_zero(zero):
    x, step = np.float32(zero), np.float32(0.3)
    inverse = np.float32(1) / step
    quotient = x * inverse
    remainder = fma(quotient, step, -x)
    assert np.signbit(fma(-remainder, inverse, quotient)) == np.signbit(x)
