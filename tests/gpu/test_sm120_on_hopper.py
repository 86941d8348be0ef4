"""The workstation kernels on a Hopper chip: all but two instructions, which `emulated_mma` computes in software.

What runs is the code that serves: host path, TMA, swizzles, pipelines, k warps, scale selectors, epilogues, routing.
Only the rounding of activations is torch's (its instruction is Blackwell's too), and nothing here says how fast.
"""

import emulated_mma
import pytest
import test_sm100_experts as emulated
import torch

from cutedsl_nvfp4 import compiled, reference
from cutedsl_nvfp4.format import padded_k, swizzle_scales
from cutedsl_nvfp4.prepare import prepare_experts, prepare_linear
from cutedsl_nvfp4.sm100 import experts as shared
from cutedsl_nvfp4.sm120 import experts, linear
from cutedsl_nvfp4.support import Layout
from cutedsl_nvfp4.tiles120 import general, shipped, shipped_expert_tiles

pytestmark = pytest.mark.gpu_sm90

ARCH = emulated_mma.ARCH
NAN = 0x7F  # of e4m3


def kernels() -> dict[str, tuple]:
    """{name: (what compiles it, arguments)} of all kernels below: `python test_sm120_on_hopper.py DIR` exports them."""
    from cutedsl_nvfp4.sm120.compile import compile_linear

    found = {name: (compile_linear, kernel) for name, kernel in linear.shipped_kernels(ARCH).items()}
    kept = ("product", "route", "combine")
    return found | {
        name: (experts.build, kernel)
        for name, kernel in experts.shipped_kernels(ARCH).items()
        if kernel[1] in kept
    }


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch):
    """Kernels compiled with the emulation, activations rounded by torch; what nobody wrote is NaN."""
    if compiled.folder() is None:
        emulated_mma.install()
    monkeypatch.setattr(linear, "arch_of", lambda device: ARCH)
    monkeypatch.setattr(shared, "arch_of", lambda device: ARCH)
    monkeypatch.setattr(linear.quantize, "run", quantize)
    real = shared._kernel

    def kernel(arch, kind, *arguments):
        if kind == "gather":
            return lambda *operands: on_cpu(emulated.gather, *arguments, *operands)
        return real(arch, kind, *arguments)

    monkeypatch.setattr(shared, "_kernel", kernel)
    empty = torch.empty

    def poisoned(*args, **kwargs):
        fresh = empty(*args, **kwargs)
        return fresh.fill_(
            NAN if fresh.dtype == torch.uint8 else -1 if not fresh.is_floating_point() else torch.nan
        )

    monkeypatch.setattr(shared.torch, "empty", poisoned)


def on_cpu(function, *arguments):
    """`function` of CPU copies of CUDA tensors, which then take what it left in them."""
    copies = [a.cpu() if isinstance(a, torch.Tensor) else a for a in arguments]
    function(*copies)
    for original, copy in zip(arguments, copies, strict=True):
        if isinstance(original, torch.Tensor):
            original.copy_(copy)


def quantize(x, act_scale=None, groups=1):
    """sm100.quantize.run in torch; block scales of tokens beyond M are NaN."""
    m, k = x.shape[0], x.shape[1] // groups
    act_scale = reference.dynamic_act_scale(x) if act_scale is None else act_scale
    codes, scales = reference.quantize(x.view(m, groups, k), act_scale.view(-1, 1, 1))
    codes = torch.nn.functional.pad(codes, (0, (padded_k(k) - k) // 2)).flatten(1)
    padded = torch.full((groups, -(-m // 128) * 128, k // 16), NAN, dtype=torch.uint8, device=x.device)
    padded[:, :m] = scales.view(torch.uint8).transpose(0, 1)
    return codes, swizzle_scales(padded.view(torch.float8_e4m3fn)).flatten(0, 1), act_scale


class Problem:
    """Fresh valid operands, and the exact product of the rounded activations in float64."""

    def __init__(self, m, n, k, groups=1, bias=False, dynamic=True):
        generator = torch.Generator("cuda").manual_seed(m + n + k)
        rand = lambda *shape: torch.rand(*shape, device="cuda", generator=generator)  # noqa: E731
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda", generator=generator)
        scales = (rand(n, k // 16) * 3 + 0.5).to(torch.float8_e4m3fn)
        self.x = torch.randn(m, groups * k, device="cuda", generator=generator).to(torch.bfloat16)
        self.act_scale = None if dynamic else torch.tensor([0.004], device="cuda")
        self.bias = rand(n) if bias else None
        self.sizes = {"n": n, "k": k, "groups": groups}
        rounded = self.act_scale if self.act_scale is not None else reference.dynamic_act_scale(self.x)
        rounded = rounded.view(-1, 1)
        x = reference.dequantize(*reference.quantize(self.x, rounded)).double().view(m, groups, k)
        weight = reference.dequantize(codes, scales).double().view(groups, n // groups, k)
        prepared = prepare_linear(
            codes, scales, rand(1) + 0.5, [n], layout=Layout.BLOCK_SCALED, groups=groups
        )
        self.operands = prepared.codes, prepared.block_scales, prepared.row_scale
        factor = prepared.row_scale.double() * rounded.double()

        def product(x, weight):
            return torch.einsum("mgk,gnk->mgn", x, weight).reshape(m, n) * factor

        self.exact, self.magnitude = product(x, weight), product(x.abs(), weight.abs())
        if bias:
            self.exact, self.magnitude = self.exact + self.bias.double(), self.magnitude + self.bias.double()

    def check(self, dtype, tile):
        got = linear.run(
            self.x, *self.operands, self.act_scale, self.bias, **self.sizes, out_dtype=dtype, config=tile
        )
        error = ((got.double() - self.exact).abs() / self.magnitude.clamp(min=1e-20)).max().item()
        assert got.dtype == dtype and error < (2**-8 if dtype == torch.bfloat16 else 1e-5), error


LINEAR = [  # (M, N, K, groups): whole tiles, ragged ones, K of every remainder, groups that fill no tile
    (128, 256, 512, 1), (1, 512, 7168, 1), (5, 1000, 1536, 1), (200, 1032, 448, 1), (300, 2048, 272, 1),
    (77, 4 * 328, 512, 4), (37, 3 * 104, 80, 3), (600, 4096, 1024, 1),
]  # fmt: skip


@pytest.mark.parametrize("tile", shipped(), ids=str)
@pytest.mark.parametrize("m, n, k, groups", LINEAR)
def test_linear(tile, m, n, k, groups):
    for dtype, dynamic in ((torch.bfloat16, True), (torch.float32, False)):
        Problem(m, n, k, groups, dynamic=dynamic).check(dtype, tile)


@pytest.mark.parametrize("tile", general(), ids=str)
@pytest.mark.parametrize("m, n, k", [(3, 999, 336), (150, 1001, 64), (64, 1024, 128)])
def test_linear_with_bias_and_ragged_rows(tile, m, n, k):
    for dtype in (torch.bfloat16, torch.float32):
        Problem(m, n, k, bias=True).check(dtype, tile)
        if n % 8:
            Problem(m, n, k).check(dtype, tile)


@pytest.mark.parametrize("tile", shipped(), ids=str)
def test_linear_is_the_same_in_every_run(tile):
    problem = Problem(700, 2048, 4096)
    runs = [linear.run(problem.x, *problem.operands, None, **problem.sizes, config=tile) for _ in range(20)]
    assert all(torch.equal(run, runs[0]) for run in runs)


def experts_layer(count, hidden, intermediate):
    generator = torch.Generator().manual_seed(7)
    weights = []
    for n, k in ((2 * intermediate, hidden), (hidden, intermediate)):
        codes = torch.randint(0, 256, (count, n, k // 2), dtype=torch.uint8, generator=generator)
        scales = (torch.rand(count, n, k // 16, generator=generator) * 3 + 0.5).to(torch.float8_e4m3fn)
        weights.append((codes, scales))
    (w13, s13), (w2, s2) = weights
    scales = [torch.rand(*shape, generator=generator) * 0.01 + 0.002 for shape in ((count, 2), (count,))]
    plain = prepare_experts(w13, s13, scales[0], w2, s2, scales[1], layout=Layout.PLAIN)
    plain = [t.clone() for t in list(vars(plain).values())[:6]]
    packed = prepare_experts(w13, s13, scales[0], w2, s2, scales[1], layout=Layout.BLOCK_SCALED)
    return [t.cuda() for t in list(vars(packed).values())[:6]], [t.cuda() for t in plain]


POLICIES = {
    "tensor": (torch.tensor([0.002]), torch.tensor([0.05])),
    "expert": (torch.linspace(0.001, 0.003, 5), torch.linspace(0.02, 0.08, 5)),
    "token": (None, None),
}


@pytest.mark.parametrize("tiles", shipped_expert_tiles(), ids=lambda tiles: str(tiles.tokens))
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("hidden, intermediate", [(256, 96), (512, 256), (1024, 384), (272, 48)])
def test_experts(tiles, policy, hidden, intermediate):
    packed, plain = experts_layer(5, hidden, intermediate)
    scales = [None if scale is None else scale.cuda() for scale in POLICIES[policy]]
    expert_map = torch.tensor([-1, 3, 0, -1, 4, 1, -1, 2], device="cuda")
    for m in (1, 40, 150):
        generator = torch.Generator("cuda").manual_seed(m)
        x = torch.randn(m, hidden, device="cuda", generator=generator).to(torch.bfloat16)
        ids = torch.rand(m, 8, device="cuda", generator=generator).argsort(1)[:, :6].to(torch.int32)
        ids[0, 0] = -1
        weights = torch.rand(m, 6, device="cuda", generator=generator)
        options = {"swiglu_limit": 7.0, "out_dtype": torch.float32}
        got = experts.run(
            x, *packed, weights, ids, *scales, expert_map, hidden=hidden, intermediate=intermediate, config=tiles,
            **options,
        )  # fmt: skip
        expected = reference.experts(
            x, *plain, weights, ids, *scales, expert_map, quantize_activations=True, **options
        )
        error = ((got - expected).norm() / expected.norm()).item()
        assert got.isfinite().all() and error < 5e-3, (m, error)


if __name__ == "__main__":
    import pathlib
    import sys

    emulated_mma.install()
    for name, (compile_kernel, kernel) in kernels().items():
        compiled.export(compile_kernel(*kernel), name, pathlib.Path(sys.argv[1]))
