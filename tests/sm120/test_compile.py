"""Workstation Blackwell's kernels compile without a GPU, use the FP4 tensor cores and spill nothing.

Every tile, and the variants that need most registers; `devtools/kernels/compile.py --sass` reads all of them.
"""

import pytest
import torch

from cutedsl_nvfp4.family import LinearProblem
from cutedsl_nvfp4.sm120 import experts, linear
from cutedsl_nvfp4.sm120.tiles import LinearTile
from devtools.kernels.sass import sm120 as sass
from devtools.kernels.sass.machine_code import disassemble
from tests.support.compiling import cubin, problems

ARCH = "sm_120a"  # sm_121a's machine code is the same: checked below
PLAIN = (torch.bfloat16, False, True)
KERNELS = {
    name: kernel
    for name, kernel in linear.shipped(ARCH).items()
    if (kernel.out_dtype, kernel.has_bias, kernel.aligned) == PLAIN
    or (kernel.tile.tokens == 128 and kernel.out_dtype is torch.float32)
} | {
    name: kernel
    for name, kernel in experts.shipped(ARCH).items()
    if kernel.kind in ("product", "route")
    or kernel.arguments[:2] in (("token", True), ("expert", False), (8, torch.float32))
}


@pytest.mark.parametrize("name", KERNELS)
def test_compiles_with_tensor_cores_and_without_spills(name, tmp_path):
    assert problems(KERNELS[name], tmp_path, "sm120") == []


def kernels_of_both(arch):
    """A linear kernel and an experts kernel."""
    linears, products = linear.shipped(arch), experts.shipped(arch)
    first = next(k for k in linears.values() if k.tile == LinearTile(64, 128, 2, 4, 1, 2, 6))
    return first, next(k for k in products.values() if k.kind == "product" and "nvfp4" in k.arguments)


@pytest.mark.parametrize("which", [0, 1], ids=["linear", "product"])
def test_both_chips_get_the_same_machine_code(tmp_path, which):
    code = []
    for arch in ("sm_120a", "sm_121a"):
        (tmp_path / arch).mkdir()
        text = disassemble(cubin(kernels_of_both(arch)[which], tmp_path / arch))
        code.append([line for line in text.splitlines() if line.strip().startswith("/*")])
    assert len(code[0]) > 100 and code[0] == code[1]


def test_wrong_machine_code_is_noticed(tmp_path):
    """The reader of machine code can say no: this tile has half of the MMAs of the one it is taken for."""
    (_, small), (_, large) = (
        linear.kernels(LinearProblem(64, 64), tile, ARCH)
        for tile in (LinearTile(64, 128, 2, 4, 1, 2, 6), LinearTile())
    )
    assert problems(small, tmp_path, "sm120", large) == [
        f"tensor core instructions in the main loop: {{'{sass.INSTRUCTION}': 16}} instead of 32 {sass.INSTRUCTION}"
    ]
