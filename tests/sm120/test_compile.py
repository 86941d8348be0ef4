"""Workstation Blackwell's kernels compile without a GPU, use the FP4 tensor cores and spill nothing.

Every tile, and the variants that need most registers; `devtools/kernels/compile.py --sass` reads all of them.
"""

from pathlib import Path

import pytest
import torch

from cutedsl_nvfp4.sm120 import experts, linear
from cutedsl_nvfp4.sm120.compile import compile_linear
from cutedsl_nvfp4.sm120.tiles import LinearTile, shipped_expert_tiles
from devtools.kernels.sass import sm120 as sass
from devtools.kernels.sass.machine_code import disassemble

ARCH = "sm_120a"  # sm_121a's machine code is the same: checked below
LINEAR = {
    name: kernel
    for name, kernel in linear.shipped_kernels(ARCH).items()
    if kernel[1:4] == (torch.bfloat16, False, True)
    or (kernel[0].tokens == 128 and kernel[1] == torch.float32)
}
EXPERTS = {
    name: kernel
    for name, kernel in experts.shipped_kernels(ARCH).items()
    if kernel[1] in ("product", "route")
    or kernel[2:] in (("token", True), ("expert", False), (8, torch.float32))
}


def cubin(folder: Path, build, *arguments) -> Path:
    build(*arguments, options=f"--keep-cubin --dump-dir {folder}")
    (found,) = folder.glob("*.cubin")
    return found


@pytest.mark.parametrize("name", LINEAR)
def test_linear_compiles_with_tensor_cores_and_without_spills(name, tmp_path):
    assert sass.problems(cubin(tmp_path, compile_linear, *LINEAR[name]), LINEAR[name][0]) == []


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_compile_with_tensor_cores_and_without_spills(name, tmp_path):
    _, kind, *arguments = EXPERTS[name]
    tile = arguments[0] if kind == "product" else None
    assert sass.problems(cubin(tmp_path, experts.build, *EXPERTS[name]), tile) == []


def test_both_chips_get_the_same_machine_code(tmp_path):
    kept = [
        (compile_linear, (LinearTile(64, 128, 2, 4, 1, 2, 6), torch.bfloat16, False, True)),
        (lambda arch, **options: experts.build(arch, "product", shipped_expert_tiles()[0].w13, "nvfp4", **options), ()),
    ]  # fmt: skip
    for number, (build, arguments) in enumerate(kept):
        code = []
        for arch in ("sm_120a", "sm_121a"):
            folder = tmp_path / f"{number}{arch}"
            folder.mkdir()
            text = disassemble(cubin(folder, build, *arguments, arch))
            code.append([line for line in text.splitlines() if line.strip().startswith("/*")])
        assert len(code[0]) > 100 and code[0] == code[1]


def test_wrong_machine_code_is_noticed(tmp_path):
    """The reader of machine code can say no: this tile has half of the MMAs of the one it is taken for."""
    found = cubin(tmp_path, compile_linear, LinearTile(64, 128, 2, 4, 1, 2, 6), torch.bfloat16)
    wrong = sass.problems(found, LinearTile())
    assert wrong == [
        f"tensor core instructions in the main loop: {{'{sass.INSTRUCTION}': 16}} instead of 32 {sass.INSTRUCTION}"
    ]
