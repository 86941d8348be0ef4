"""Blackwell's main loops against those of NVIDIA's own kernels of their kind: at most 1.2 times the overhead."""

from dataclasses import replace

import pytest

from bench.blackwell import sass


def kernels() -> list:
    """sm_100a and sm_120a; of sm_100a's kernels that differ in stages or in the split of K alone, the first."""
    found = {}
    for arch in ("sm_100a", "sm_120a"):
        for kernel in sass.ours(arch):
            loop = (arch, kernel.kind, kernel.example_tile) if arch == "sm_100a" else kernel.name
            found.setdefault(loop, (arch, kernel))
    return [pytest.param(arch, kernel, id=kernel.name) for arch, kernel in found.values()]


@pytest.mark.parametrize("arch, kernel", kernels())
def test_main_loop_is_as_lean_as_nvidias(arch, kernel):
    assert sass.compare(kernel, arch).problems == []


@pytest.mark.parametrize("kind", ["linear", "w13", "w2"])
def test_tiles_of_two_ctas_are_compared_with_such_of_nvidias(kind):
    """Both loops show it: the instruction's name holds 2CTA."""
    pairs = [
        kernel for kernel in sass.ours("sm_100a") if kernel.kind == kind and kernel.example_tile[0] == 256
    ]
    assert pairs
    found = sass.compare(pairs[0], "sm_100a")
    assert all("2CTA" in opcode for code in (found.code, found.example) for opcode in code.mma)


def test_a_fat_main_loop_is_noticed():
    arch, kernel = kernels()[0].values
    found = sass.compare(kernel, arch)
    fat = replace(
        found, code=replace(found.code, other={"UMOV": 21 * sum(found.code.mma.values())}, spills=3)
    )
    spills, ratio = fat.problems
    assert (
        spills == "spills registers (3 LDL, STL)" and "1.2" in ratio and "21.00 other instructions" in ratio
    )
