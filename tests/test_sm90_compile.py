"""Every shipped Hopper configuration compiles without a GPU, uses the tensor cores and spills nothing."""

import importlib.util
import pathlib
import re
import shutil
import site
import subprocess

import pytest
import torch

from cutedsl_nvfp4.tiles import Narrow, Wide, shipped

HAS_DSL = importlib.util.find_spec("cutlass") is not None
needs_dsl = pytest.mark.skipif(
    not HAS_DSL, reason="nvidia-cutlass-dsl is not installed: nothing to compile with"
)

VARIANTS = [
    (Narrow(8, 2, 2, 4, 8), torch.float32, torch.bfloat16, True),
    (Wide(1, 64, 2, 4, 4), torch.float32, torch.float32, True),
    (Wide(2, 128, 2, 4), torch.float32, torch.bfloat16, False),
    (Wide(2, 256, 1, 5, persistent=True), torch.bfloat16, torch.float32, False),
]
CASES = [(config, torch.bfloat16, None, True) for config in shipped()] + VARIANTS


def tool(name: str) -> str:
    """A CUDA binary tool from PATH or from its PyPI package; a test without it could not fail."""
    found = shutil.which(name)
    for folder in site.getsitepackages():
        found = found or next((str(p) for p in pathlib.Path(folder).glob(f"nvidia/**/bin/{name}")), None)
    if found is None:
        pytest.skip(f"{name} is not installed (PyPI: nvidia-cuda-{name}): nothing to inspect the kernel with")
    return found


@needs_dsl
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_with_tensor_cores_and_without_spills(case, tmp_path):
    from cutedsl_nvfp4.sm90.compile import compile_linear

    disassembler, inspector = tool("nvdisasm"), tool("cuobjdump")
    config, *types = case
    compile_linear(config, *types, options=f"--keep-cubin --dump-dir {tmp_path}")
    (cubin,) = tmp_path.glob("*.cubin")
    usage = subprocess.run(
        [inspector, "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    assert re.search(r"\bSTACK:0\b", usage) and re.search(r"\bLOCAL:0\b", usage), usage
    sass = subprocess.run([disassembler, "-c", cubin], capture_output=True, text=True, check=True).stdout
    instruction = (
        r"\bHMMA\.16816\.F32\.BF16\b" if isinstance(config, Narrow) else r"\bHGMMA\.64x\d+x16\.F32\.BF16\b"
    )
    steps = 4 * config.blocks * (config.tokens // 8 if isinstance(config, Narrow) else 1)
    assert len(re.findall(instruction, sass)) == steps
    assert not re.search(r"\b(LDL|STL)\b", sass)
    if isinstance(config, Wide):
        waits = re.findall(r"WARPGROUP\.DEPBAR", sass)
        assert len(waits) <= 3, "ptxas serialized the wgmmas: see the comment in WideLinear.accumulate"


@needs_dsl
def test_kernels_survive_the_trip_to_a_library(tmp_path):
    """Ahead of time: exported, linked, loaded by name, without the DSL's compiler in the way."""
    from cutedsl_nvfp4 import compiled
    from cutedsl_nvfp4.sm90.compile import compile_linear

    compiled.export(compile_linear(Narrow(), torch.bfloat16, None), "narrow", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["narrow.so"]


def test_forbidden_compilation_names_the_kernel(monkeypatch, tmp_path):
    from cutedsl_nvfp4 import compiled

    monkeypatch.setenv(compiled.FORBID_JIT, "1")
    monkeypatch.setenv(compiled.KERNELS, str(tmp_path))
    with pytest.raises(RuntimeError, match="no compiled kernel missing_kernel"):
        compiled.compiled("missing_kernel", lambda: pytest.fail("compiled although forbidden"))


@pytest.mark.parametrize("config", shipped(), ids=str)
def test_shipped_configurations_are_legal(config):
    config.check()


@pytest.mark.parametrize(
    "config",
    [
        Narrow(tokens=12),
        Narrow(k_warps=3),
        Narrow(stages=1),
        Narrow(split_k=3),
        Narrow(tokens=32, k_warps=4, blocks=2, stages=8),
        Wide(tokens=40),
        Wide(panels=3),
        Wide(split_k=2, persistent=True),
        Wide(tokens=256, stages=8),
        Wide(ctas_per_sm=3),
    ],
    ids=str,
)
def test_illegal_configurations_are_refused(config):
    with pytest.raises(ValueError, match=type(config).__name__):
        config.check()
