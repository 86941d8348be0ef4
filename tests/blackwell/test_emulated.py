"""Blackwell's kernels, as compiled, run on the CPU (tests/support/emulator): products, waiting, planted faults.

The emulator itself is anchored to NVIDIA's own kernel, which runs on the hardware: it has to be right here.
"""

import copy
import ctypes
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from bench.blackwell import nvidia_examples
from cutedsl_nvfp4 import reference
from cutedsl_nvfp4.blackwell import quantize as sm100_quantize
from cutedsl_nvfp4.family import Layout, family_of
from cutedsl_nvfp4.format import swizzle_scales
from cutedsl_nvfp4.prepare import prepare_experts, prepare_linear
from cutedsl_nvfp4.selfcheck.products import Layer, SelfCheckFailed, Variant
from cutedsl_nvfp4.selfcheck.synthetic import check_quantizer, check_variant
from cutedsl_nvfp4.sm100 import experts as sm100_experts
from cutedsl_nvfp4.sm100 import linear as sm100_linear
from cutedsl_nvfp4.sm100.tiles import LinearTile
from cutedsl_nvfp4.sm120 import experts as sm120_experts
from cutedsl_nvfp4.sm120 import linear as sm120_linear
from tests.support.emulator.device import Device, on_device
from tests.support.emulator.host import EmulatedKernel
from tests.support.emulator.ptx import Fault, Instruction
from tests.support.faults.kernel import planted

ROUNDING = 2.0**-8 / 3**0.5  # relative size of rounding to bf16, some
EVERYTHING = frozenset({"tma", "mma", "store"})


@pytest.fixture
def device(monkeypatch) -> Callable[..., Device]:
    return lambda capability=100, sms=3: Device(monkeypatch, capability, sms)


def random_weight(*shape: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    *rows, k = shape
    codes = torch.randint(0, 256, (*rows, k // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0x20, 0x50, (*rows, k // 16), dtype=torch.uint8, generator=generator)
    return codes, scales.view(torch.float8_e4m3fn)


def far(got: torch.Tensor, right: torch.Tensor) -> float:
    return float((got.as_subclass(torch.Tensor).double() - right.double()).norm() / right.double().norm())


# --- the anchor ---


@functools.cache
def nvidias_kernel(m: int, n: int) -> EmulatedKernel:
    return EmulatedKernel(lambda: nvidia_examples.dense_sm100(m, n, "sm_100a", "--enable-tvm-ffi"))


@pytest.mark.parametrize(
    "tile, lazy", [((128, 128), frozenset()), ((256, 192), EVERYTHING)], ids=["one CTA", "a pair, late"]
)
def test_nvidias_own_kernel_is_right(tile, lazy):
    generator = torch.Generator().manual_seed(0)
    m, n, k = 300, 200, 576
    (a, a_scales), (b, b_scales) = (random_weight(rows, k, generator=generator) for rows in (m, n))
    out = torch.full((m, n), float("nan"), dtype=torch.bfloat16)
    kernel = nvidias_kernel(*tile)
    kernel.lazy = lazy
    operands = (a, b, swizzle_scales(a_scales.clone()), swizzle_scales(b_scales.clone()), out)
    kernel.call_with_pointers(operands, (m, n, k, 1), ctypes.c_void_p(0))
    right = reference.dequantize(a, a_scales, dtype=torch.float64)
    right = right @ reference.dequantize(b, b_scales, dtype=torch.float64).T
    assert far(out, right) < ROUNDING


# --- products ---


class Problem:
    """A random linear layer, its input, and the reference's product."""

    def __init__(
        self, m: int, n: int, k: int, groups: int = 1, bias: bool = False, act: str = "token"
    ) -> None:
        generator = torch.Generator().manual_seed(m + n + k)
        codes, scales = random_weight(n, k, generator=generator)
        global_scales = torch.rand(n, generator=generator) + 0.5
        self.x = torch.randn(m, groups * k, generator=generator).to(torch.bfloat16)
        self.bias = torch.randn(n, generator=generator) * 50 if bias else None
        self.act_scale = {"token": None, "tensor": torch.tensor([0.002])}[act]
        self.right = reference.linear(
            self.x, codes, scales, global_scales, self.act_scale, self.bias,
            quantize_activations=True, groups=groups, out_dtype=torch.float32,
        )  # fmt: skip
        self.weight = prepare_linear(
            codes, scales, global_scales, [1] * n, layout=Layout.BLOCK_SCALED, groups=groups
        )

    def multiply(
        self, run: Callable, out_dtype: torch.dtype = torch.float32, **operands: object
    ) -> torch.Tensor:
        """`run` on the emulated device; `operands` replace the weight's own."""
        weight = replace(self.weight, **operands)
        optional = [None if t is None else on_device(t) for t in (self.act_scale, self.bias)]
        given = (self.x, weight.codes, weight.block_scales, weight.row_scale)
        return run(
            *map(on_device, given),
            *optional,
            n=weight.n,
            k=weight.k,
            groups=weight.groups,
            out_dtype=out_dtype,
        )


LINEAR = {
    "decode": {"m": 5, "n": 200, "k": 1200, "bias": True, "act": "tensor"},
    "groups": {"m": 40, "n": 256, "k": 96, "groups": 2},
    "prefill": {"m": 150, "n": 320, "k": 592},
}


@pytest.mark.parametrize("case", LINEAR)
def test_linear_on_data_centre_blackwell(device, case):
    emulated_device = device()
    problem = Problem(**LINEAR[case])
    assert far(problem.multiply(sm100_linear.run, torch.bfloat16), problem.right) < ROUNDING
    emulated_device.lazy = EVERYTHING
    assert far(problem.multiply(sm100_linear.run), problem.right) < 1e-6


@pytest.mark.parametrize("capability, run", [(103, sm100_linear.run), (121, sm120_linear.run)])
def test_linear_compiled_for_their_siblings(device, capability, run):
    device(capability).lazy = EVERYTHING
    problem = Problem(**LINEAR["decode"])
    assert far(problem.multiply(run), problem.right) < 1e-6


@pytest.mark.parametrize(
    "tile",
    [
        LinearTile(16, 1, 9, 4),
        LinearTile(64, 1, 6, 2),
        LinearTile(128, 2, 7),
        LinearTile(256, 2, 5),
    ],
    ids=str,
)
def test_tiles_that_share_work(device, tile):
    """CTAs of a cluster split K, or multiply as a pair; fewer SMs than tiles, so that every CTA takes several."""
    device(sms=2 * tile.cluster).lazy = EVERYTHING
    problem = Problem(
        m=12 if tile.tokens < 32 else tile.tokens + 7, n=400, k=1104 if tile.split_k > 1 else 528
    )
    result = problem.multiply(functools.partial(sm100_linear.run, tile=tile))
    assert far(result, problem.right) < 1e-6


@pytest.mark.parametrize("case", LINEAR)
def test_linear_on_workstation_blackwell(device, case):
    device(capability=120).lazy = EVERYTHING
    problem = Problem(**LINEAR[case])
    assert far(problem.multiply(sm120_linear.run), problem.right) < 1e-6


class ExpertsProblem:
    """Random experts, tokens and routing, and the reference's result."""

    def __init__(self, m: int, experts: int, known: int, topk: int, acts: tuple[str, str]) -> None:
        hidden, intermediate, limit = 272, 144, 2.0
        generator = torch.Generator().manual_seed(m)
        w13 = random_weight(experts, 2 * intermediate, hidden, generator=generator)
        w2 = random_weight(experts, hidden, intermediate, generator=generator)
        scales = (torch.rand(experts, 2, generator=generator) + 0.5) * 0.1 / hidden**0.5
        scales_2 = torch.rand(experts, generator=generator) + 0.5
        self.x = torch.randn(m, hidden, generator=generator).to(torch.bfloat16)
        self.ids = torch.rand(m, known, generator=generator).topk(topk).indices.to(torch.int32)
        self.weights = torch.rand(m, topk, generator=generator) + 0.5
        self.expert_map = torch.full((known,), -1, dtype=torch.int32)
        local = torch.randperm(known, generator=generator)[:experts]
        self.expert_map[local] = torch.arange(experts, dtype=torch.int32)
        self.act_scales = [
            {
                "tensor": torch.tensor([0.002]),
                "expert": torch.rand(experts, generator=generator) * 0.002 + 0.001,
            }.get(a)
            for a in acts
        ]
        row_scales = scales.repeat_interleave(intermediate, dim=1), scales_2.unsqueeze(1).expand(-1, hidden)
        self.right = reference.experts(
            self.x, *w13, row_scales[0], *w2, row_scales[1], self.weights, self.ids, *self.act_scales,
            self.expert_map, quantize_activations=True, swiglu_limit=limit, out_dtype=torch.float32,
        )  # fmt: skip
        self.operands = prepare_experts(*w13, scales, *w2, scales_2, layout=Layout.BLOCK_SCALED)
        self.sizes = {"hidden": hidden, "intermediate": intermediate, "swiglu_limit": limit}

    def multiply(
        self, run: Callable, expert_map: torch.Tensor | None = None, **operands: object
    ) -> torch.Tensor:
        weight = replace(self.operands, **operands)
        given = (
            self.x, weight.w13_codes, weight.w13_block_scales, weight.w13_row_scale, weight.w2_codes,
            weight.w2_block_scales, weight.w2_row_scale, self.weights, self.ids, *self.act_scales,
            self.expert_map if expert_map is None else expert_map,
        )  # fmt: skip
        given = [None if t is None else on_device(t) for t in given]
        return run(*given, out_dtype=torch.float32, **self.sizes)


# w2's results are stored in bf16 before they are summed, h may round to the neighbouring code
EXPERTS_ERROR = 3e-3
EXPERTS = {
    "one scale": {"m": 9, "experts": 5, "known": 8, "topk": 3, "acts": ("tensor", "tensor")},
    "a scale each": {"m": 5, "experts": 4, "known": 4, "topk": 2, "acts": ("expert", "expert")},
    "a scale a token": {"m": 9, "experts": 5, "known": 5, "topk": 3, "acts": ("token", "token")},
}


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_on_data_centre_blackwell(device, case):
    device(sms=2).lazy = EVERYTHING
    problem = ExpertsProblem(**EXPERTS[case])
    assert far(problem.multiply(sm100_experts.run), problem.right) < EXPERTS_ERROR


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_on_workstation_blackwell(device, case):
    device(capability=120, sms=2).lazy = EVERYTHING
    problem = ExpertsProblem(**EXPERTS[case])
    assert far(problem.multiply(sm120_experts.run), problem.right) < EXPERTS_ERROR


# --- planted faults: each must be seen ---


def unswizzled(weight) -> dict:
    """Block scales in rows, not in tiles."""
    plain = weight.block_scales.view(-1, 32, 4, 4).transpose(1, 2)
    return {"block_scales": plain.reshape(weight.block_scales.shape).contiguous()}


def k_major_mixed_up(weight) -> dict:
    """Codes with N fastest."""
    nibbles = torch.stack((weight.codes & 15, weight.codes >> 4), dim=-1).flatten(1).T.contiguous().flatten()
    return {"codes": (nibbles[0::2] | nibbles[1::2] << 4).view(weight.codes.shape)}


def inverted_scale(weight) -> dict:
    return {"row_scale": 1 / weight.row_scale}


@pytest.mark.parametrize(
    "capability, linear", [(100, sm100_linear), (120, sm120_linear)], ids=["sm100", "sm120"]
)
@pytest.mark.parametrize("fault", [unswizzled, k_major_mixed_up, inverted_scale])
def test_layout_faults_of_a_linear_are_seen(device, fault, capability, linear):
    device(capability)
    problem = Problem(m=5, n=256, k=256, act="tensor")
    assert far(problem.multiply(linear.run, **fault(problem.weight)), problem.right) > 0.1
    assert far(problem.multiply(linear.run), problem.right) < 1e-6


def next_expert(problem: ExpertsProblem) -> dict:
    return {
        "expert_map": torch.where(problem.expert_map >= 0, (problem.expert_map + 1) % 4, -1).to(torch.int32)
    }


def next_experts_scales(problem: ExpertsProblem) -> dict:
    return {"w13_block_scales": problem.operands.w13_block_scales.roll(1, dims=0)}


def up_before_gate(problem: ExpertsProblem) -> dict:
    return {"w13_row_scale": problem.operands.w13_row_scale.roll(problem.sizes["intermediate"], dims=1)}


@pytest.mark.parametrize(
    "capability, experts", [(100, sm100_experts), (120, sm120_experts)], ids=["sm100", "sm120"]
)
@pytest.mark.parametrize("fault", [next_expert, next_experts_scales, up_before_gate])
def test_layout_faults_of_experts_are_seen(device, fault, capability, experts):
    device(capability)
    problem = ExpertsProblem(m=5, experts=4, known=4, topk=2, acts=("tensor", "tensor"))
    assert far(problem.multiply(experts.run, **fault(problem)), problem.right) > 0.1


# NVIDIA's kernel with one instruction changed: (opcode, a suffix, which of them, its operands)
BROKEN_CODE = {
    "scales a column on": ("tcgen05", "cp", 0, lambda o: [o[0].replace("]", "+4]"), *o[1:]]),
    "A and B exchanged": ("tcgen05", "mma", 1, lambda o: [o[0], o[2], o[1], *o[3:]]),
    "the next accumulator column": ("tcgen05", "ld", 0, lambda o: [o[0], o[1].replace("]", "+1]")]),
    "another warp's lanes": ("tcgen05", "ld", 0, lambda o: [o[0], o[1].replace("]", "+2097152]")]),
    "a byte more awaited": ("mbarrier", "expect_tx", 0, lambda o: [*o[:-1], "36865"]),
    "an arrival more awaited": ("mbarrier", "init", 0, lambda o: [o[0], "2"]),
    "a box's coordinates exchanged": (
        "cp", "tensor", 0, lambda o: [o[0], re.sub(r"\{(.*?), (.*?),", r"{\2, \1,", o[1]), *o[2:]]
    ),
}  # fmt: skip


def broken(kernel: EmulatedKernel, change: Callable[[list[Instruction]], None]) -> Iterator[None]:
    """`kernel` with other instructions, for a while."""
    (parsed,) = kernel.kernels.values()
    right, parsed.code = parsed.code, copy.deepcopy(parsed.code)
    change(parsed.code)
    yield
    parsed.code = right


def nvidias_error(kernel: EmulatedKernel) -> float:
    generator = torch.Generator().manual_seed(0)
    m, n, k = 256, 128, 1600  # more steps than stages
    (a, a_scales), (b, b_scales) = (random_weight(rows, k, generator=generator) for rows in (m, n))
    out = torch.full((m, n), float("nan"), dtype=torch.bfloat16)
    operands = (a, b, swizzle_scales(a_scales.clone()), swizzle_scales(b_scales.clone()), out)
    kernel.call_with_pointers(operands, (m, n, k, 1), ctypes.c_void_p(0))
    right = reference.dequantize(a, a_scales, dtype=torch.float64)
    return far(out, right @ reference.dequantize(b, b_scales, dtype=torch.float64).T)


def seen(kernel: EmulatedKernel) -> str | None:
    """How a fault shows, if it does."""
    try:
        error = nvidias_error(kernel)
    except Fault as fault:
        return str(fault)
    return None if error < ROUNDING else f"error {error}"


@pytest.mark.parametrize("name", BROKEN_CODE)
def test_broken_code_is_seen(name):
    opcode, suffix, index, operands = BROKEN_CODE[name]

    def change(code: list[Instruction]) -> None:
        found = [i for i in code if i.opcode == opcode and suffix in i.suffixes]
        found[index].operands = operands(found[index].operands)

    kernel = nvidias_kernel(128, 128)
    kernel.lazy = EVERYTHING
    for _ in broken(kernel, change):
        assert seen(kernel) is not None
    assert seen(kernel) is None


def test_a_kernel_that_does_not_wait_is_seen():
    """Every wait returns at once: with work put off, what it waits for is not there."""

    def change(code: list[Instruction]) -> None:
        for instruction in code:
            if instruction.opcode == "mbarrier" and "try_wait" in instruction.suffixes:
                instruction.opcode, instruction.suffixes = "mov", ("pred",)
                instruction.operands = [instruction.operands[0], "1"]

    kernel = nvidias_kernel(128, 128)
    kernel.lazy = EVERYTHING
    for _ in broken(kernel, change):
        assert seen(kernel) is not None


# --- the self-check ---


def emulated(inputs: tuple[torch.Tensor, ...], layer: Layer, tile: object, out: torch.Tensor) -> None:
    """Layer.multiply, with everything on the emulated device."""

    def moved(data: object) -> object:
        tensors = {n: on_device(v) for n, v in vars(data).items() if isinstance(v, torch.Tensor)}
        return replace(data, **tensors)

    layer = replace(moved(layer), operands=moved(layer.operands))
    layer.multiply(tuple(map(on_device, inputs)), tile, on_device(out))


def emulated_quantizer(x: torch.Tensor, scale: torch.Tensor | None, groups: int) -> list[torch.Tensor]:
    result = sm100_quantize.run(on_device(x), None if scale is None else on_device(scale), groups)
    return [t.as_subclass(torch.Tensor) for t in result]


def self_checked(capability: int, kind: str) -> Variant:
    """A kernel with a small tile, or the kernels of experts' smallest tiles."""
    found = family_of(capability)
    (arch,) = (arch for arch in found.architectures if str(capability) in arch)
    if kind == "linear":
        kernels = found.linear.shipped(arch).values()
        return Variant(found.name, arch, kind, next(k.name for k in kernels if k.tile.tokens == 16))
    smallest = min(found.experts.choices().items(), key=lambda choice: choice[1].tokens)
    return Variant(found.name, arch, kind, smallest[0], static=True)


SELF_CHECKED = [(capability, kind) for capability in (100, 120) for kind in ("linear", "experts")]


@pytest.mark.parametrize("capability, kind", SELF_CHECKED)
def test_self_check_passes(device, capability, kind):
    device(capability, sms=4)
    variant = self_checked(capability, kind)
    assert check_variant(variant, 2, torch.device("cpu"), emulated) <= 1


def test_self_check_of_the_quantizer(device):
    device(sms=4)
    assert check_quantizer(True, torch.device("cpu"), emulated_quantizer) == 0

    def one_code_off(*arguments: object) -> list[torch.Tensor]:
        codes, scales, act_scale = emulated_quantizer(*arguments)
        codes[-1, -1] ^= 1
        return [codes, scales, act_scale]

    with pytest.raises(SelfCheckFailed, match=r"1 of .* values differ"):
        check_quantizer(True, torch.device("cpu"), one_code_off)


@pytest.mark.parametrize("fault", planted(emulated))
@pytest.mark.parametrize("capability, kind", SELF_CHECKED)
def test_self_check_sees_every_planted_fault(device, capability, kind, fault):
    device(capability, sms=4)
    variant = self_checked(capability, kind)
    with pytest.raises(SelfCheckFailed):
        check_variant(variant, 2, torch.device("cpu"), planted(emulated)[fault])
