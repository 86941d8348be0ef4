"""Every shipped Hopper kernel compiles without a GPU, uses the tensor cores and spills nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cutedsl_nvfp4 import compiled
from cutedsl_nvfp4.sm90 import experts, sass
from cutedsl_nvfp4.sm90.compile import compile_linear
from cutedsl_nvfp4.sm90.linear import kernel_name, shipped_kernels
from cutedsl_nvfp4.sm90.wide import PRODUCER_REGISTERS
from cutedsl_nvfp4.tiles import Narrow, Wide, choose, chosen, general, shipped, shipped_expert_tiles

COMPILE_KERNELS = Path(__file__).parent.parent / "scripts/compile_kernels"


@pytest.mark.parametrize("name", shipped_kernels())
def test_compiles_with_tensor_cores_and_without_spills(name, tmp_path):
    arguments = shipped_kernels()[name]
    compile_linear(*arguments, options=f"--keep-cubin --dump-dir {tmp_path}")
    (cubin,) = tmp_path.glob("*.cubin")
    assert sass.problems(cubin, arguments[0]) == []


@pytest.mark.parametrize("name", experts.shipped_kernels())
def test_experts_compile_with_tensor_cores_and_without_spills(name, tmp_path):
    kernel = experts.shipped_kernels()[name]
    experts.build(*kernel, options=f"--keep-cubin --dump-dir {tmp_path}")
    (cubin,) = tmp_path.glob("*.cubin")
    assert sass.problems(cubin, kernel[1] if kernel[0] == "product" else None, experts=True) == []


@pytest.mark.parametrize(
    "config",
    [
        Wide(3, 128, 2, 4),
        Wide(3, 192, 1, 6, persistent=True, lag=1, bulk=True),
        Wide(2, 256, 1, 5, persistent=True, lag=2, multicast=2, bulk=True),
        Wide(2, 256, 1, 5, persistent=True, multicast=2, tail=128),
        Wide(3, 192, 1, 6, persistent=True, bulk=True, tail=96),
        Wide(3, 96, 2, 4, split_k=2),
        Wide(2, 96, 2, 4, split_k=8, signal=True),
        Narrow(16, 4, 1, 4, split_k=8, signal=True),
    ],
    ids=str,
)
def test_tiles_that_tuning_tries_compile_as_well(config, tmp_path):
    compile_linear(config, torch.bfloat16, options=f"--keep-cubin --dump-dir {tmp_path}")
    (cubin,) = tmp_path.glob("*.cubin")
    assert sass.problems(cubin, config) == []


def test_wrong_machine_code_is_noticed(tmp_path):
    """The reader of machine code can say no: this tile has twice the k blocks of the one it is taken for."""
    compile_linear(Wide(1, 64, 2, 4), torch.bfloat16, options=f"--keep-cubin --dump-dir {tmp_path}")
    (cubin,) = tmp_path.glob("*.cubin")
    wrong = sass.problems(cubin, Wide(1, 64, 1, 4))
    assert wrong == ["8 tensor core instructions in the main loop instead of 4"]


def test_ahead_of_time_kernels_are_found_by_name(tmp_path, monkeypatch):
    """Exported and linked by scripts/compile_kernels, then loaded without anything being compiled."""
    name = kernel_name(Narrow(), torch.bfloat16, False, True)
    code = (
        "import runpy, sys, torch; from cutedsl_nvfp4.sm90 import experts, linear; "
        "from cutedsl_nvfp4.tiles import Narrow; "
        f"linear.shipped_kernels = lambda: {{{name!r}: (Narrow(), torch.bfloat16, False, True)}}; "
        "experts.shipped_kernels = lambda: {'nvfp4_experts_sm90_route_8': ('route', 8)}; "
        f"sys.argv = ['compile_kernels', {str(tmp_path / 'sm_90a')!r}, '--jobs', '1', '--sass']; "
        f"runpy.run_path({str(COMPILE_KERNELS)!r}, run_name='__main__')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    manifest = json.loads((tmp_path / "sm_90a/manifest.json").read_text())
    assert (
        manifest["kernels"] == ["nvfp4_experts_sm90_route_8", name] and manifest["architecture"] == "sm_90a"
    )
    libraries = [f"{kernel}.so" for kernel in manifest["kernels"]]
    assert sorted(path.name for path in (tmp_path / "sm_90a").iterdir()) == ["manifest.json", *libraries]
    monkeypatch.setenv(compiled.KERNELS, str(tmp_path))
    monkeypatch.setenv(compiled.FORBID_JIT, "1")
    assert callable(compiled.compiled(name, lambda: pytest.fail("compiled although it is there")))
    assert callable(experts.load("nvfp4_experts_sm90_route_8"))


def test_forbidden_compilation_names_the_kernel(monkeypatch, tmp_path):
    monkeypatch.setenv(compiled.FORBID_JIT, "1")
    monkeypatch.setenv(compiled.KERNELS, str(tmp_path))
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
    if isinstance(tile, Narrow) and tile.streams
]


@pytest.mark.parametrize("config", [*shipped(), *dict.fromkeys(STREAMING)], ids=str)
def test_shipped_configurations_fit_an_sm(config):
    """All CTAs that the host counts on at once: shared memory (a KB of each is CUDA's), threads, registers."""
    wide = isinstance(config, Wide)
    ctas = config.ctas_per_sm if wide or config.streams else 1
    assert ctas * (config.shared_memory + 1024) <= 228 * 1024
    assert ctas * config.threads <= 2048
    if wide and config.panels > 1:  # the producer's warpgroup gives registers to the others
        registers = 128 * (config.panels * config.consumer_registers + PRODUCER_REGISTERS)
        assert ctas * registers <= 64 * 1024


@pytest.mark.parametrize(
    "config",
    [
        Narrow(tokens=12),
        Narrow(k_warps=3),
        Narrow(stages=1),
        Narrow(split_k=3),
        Narrow(tokens=32, k_warps=4, blocks=2, stages=8),
        Wide(tokens=40),
        Wide(panels=5),
        Wide(panels=3, tokens=256),
        Wide(panels=3, ctas_per_sm=2, stages=2),
        Wide(lag=1),
        Wide(panels=3, tokens=64, persistent=True, lag=3),
        Wide(split_k=2, bulk=True),
        Wide(signal=True),
        Narrow(signal=True),
        Wide(tokens=16, bulk=True),
        Wide(split_k=2, persistent=True),
        Wide(tokens=256, stages=8),
        Wide(ctas_per_sm=3),
        Wide(tokens=128, tail=64),
        Wide(tokens=128, blocks=2, persistent=True, tail=64),
        Wide(tokens=192, persistent=True, tail=128),
        Wide(tokens=128, persistent=True, tail=128),
        Wide(tokens=96, persistent=True, tail=48),
    ],
    ids=str,
)
def test_illegal_configurations_are_refused(config):
    with pytest.raises(ValueError, match=type(config).__name__):
        config.check()
