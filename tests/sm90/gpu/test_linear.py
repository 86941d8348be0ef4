"""The Hopper linear on the chip: exact weights, float64 products, shapes that do not fit, streams, graphs."""

import random

import pytest
import torch

from cutedsl_nvfp4 import ops
from cutedsl_nvfp4.family import Layout
from cutedsl_nvfp4.prepare import prepare_linear
from cutedsl_nvfp4.reference import dequantize
from cutedsl_nvfp4.sm90.linear import run
from cutedsl_nvfp4.sm90.tiles import NarrowTile, WideTile

pytestmark = pytest.mark.gpu_sm90

assert ops  # registers torch.ops.cutedsl

NARROW = [NarrowTile(8, 2, 2, 4, 4), NarrowTile(16, 2, 2, 4, 1), NarrowTile(16, 4, 1, 4, 8, signal=True)]
WIDE = [
    WideTile(1, 64, 2, 4, 4),
    WideTile(2, 128, 2, 4),
    WideTile(2, 256, 1, 5, persistent=True, multicast=2),
    WideTile(3, 96, 2, 4, 2),
    WideTile(2, 96, 2, 4, 8, signal=True),
    WideTile(2, 256, 1, 5, persistent=True, lag=2, bulk=True),
    WideTile(3, 192, 1, 6, persistent=True, multicast=2, lag=1, bulk=True),
    WideTile(2, 256, 1, 5, persistent=True, tail=128),
    WideTile(2, 256, 1, 5, persistent=True, lag=1, bulk=True, tail=64),
    WideTile(2, 256, 1, 5, persistent=True, multicast=2, tail=128),
    WideTile(2, 128, 2, 4, persistent=True, bulk=True, tail=64),
    WideTile(3, 192, 1, 6, persistent=True, multicast=2, bulk=True, tail=96),
]
CONFIGS = NARROW + WIDE


class Problem:
    """Fresh valid operands and the exact product in float64."""

    def __init__(self, n: int, k: int, groups: int = 1, bias: torch.dtype | None = None, seed: int = 0):
        generator = torch.Generator("cuda").manual_seed(seed)
        self.n, self.k, self.groups = n, k, groups
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda", generator=generator)
        scales = torch.rand(n, k // 16, device="cuda", generator=generator) * 3 + 0.5
        scales[torch.rand(n, k // 16, device="cuda", generator=generator) < 0.01] = 0
        scales = scales.to(torch.float8_e4m3fn)
        scales.view(torch.uint8)[0, 0] = 0x80  # minus zero
        self.row_scale = torch.rand(n, device="cuda", generator=generator) + 0.5
        self.bias = None if bias is None else torch.randn(n, device="cuda", generator=generator).to(bias)
        self.weight = dequantize(codes, scales).double()
        prepared = prepare_linear(codes, scales, self.row_scale, [1] * n, layout=Layout.SM90, groups=groups)
        self.packed = prepared.codes, prepared.block_scales
        self.generator = generator

    def tokens(self, m: int) -> torch.Tensor:
        x = torch.randn(m, self.groups * self.k, device="cuda", generator=self.generator)
        return x.to(torch.bfloat16)

    def run(self, x: torch.Tensor, **options) -> torch.Tensor:
        options = {"n": self.n, "k": self.k, "groups": self.groups} | options
        return run(x, *self.packed, self.row_scale, bias=self.bias, **options)

    def exact(self, x: torch.Tensor) -> torch.Tensor:
        m, rows = x.shape[0], self.n // self.groups
        x = x.double().view(m, self.groups, self.k)
        weight = self.weight.view(self.groups, rows, self.k)
        out = torch.einsum("mgk,gnk->mgn", x, weight).reshape(m, self.n) * self.row_scale.double()
        return out if self.bias is None else out + self.bias.double()


def relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


def check(got: torch.Tensor, exact: torch.Tensor) -> None:
    """f32 within accumulation error; bf16 within 1.05 x the error of rounding the exact product."""
    assert got.shape == exact.shape and bool(torch.isfinite(got).all())
    if got.dtype == torch.float32:
        assert relative(got, exact) < 3e-6
    else:
        assert relative(got, exact) <= 1.05 * relative(exact.to(torch.bfloat16), exact) + 1e-12


@pytest.fixture(autouse=True)
def poison():
    """What torch.empty hands out is NaN, so an element nobody wrote shows."""
    torch.cuda.empty_cache()
    blocks = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(64)]
    blocks += [torch.full((1 << s,), float("nan"), device="cuda") for s in range(8, 20) for _ in range(8)]
    del blocks


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("m", [1, 2, 7, 8, 9, 16, 17, 63, 65, 130, 300])
def test_matches_float64(config, m):
    problem = Problem(n=384, k=1536, seed=m)
    x = problem.tokens(m)
    check(problem.run(x, tile=config), problem.exact(x))


@pytest.mark.parametrize("n, k, groups", [(2048, 7168, 1), (16384, 1024, 1), (200, 336, 1), (1536, 1024, 2)])
def test_every_number_of_tokens(n, k, groups):
    """With the shipped choice of tiles: 1 to 300 tokens, then some of as many as a server's step has."""
    problem = Problem(n, k, groups, seed=n)
    x = problem.tokens(6000)
    exact = problem.exact(x)
    for m in (*range(1, 301), *random.Random(n).sample(range(301, 6001), 30)):
        check(problem.run(x[:m]), exact[:m])


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_any_number_of_tokens(config):
    """Last tiles that are full by any share, alone and after others; several tiles a CTA."""
    problem = Problem(n=12544, k=640, seed=config.tokens)
    x = problem.tokens(4 * config.tokens)
    exact = problem.exact(x)
    for m in random.Random(repr(config)).sample(range(1, len(x) + 1), min(40, len(x))):
        check(problem.run(x[:m], tile=config), exact[:m])


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_result_does_not_depend_on_the_tokens_after_it(config):
    problem = Problem(n=1536, k=1536, seed=config.tokens)
    x = problem.tokens(3 * config.tokens)
    full = problem.run(x, tile=config)
    for m in (1, config.tokens // 2 + 1, config.tokens, config.tokens + 1, 2 * config.tokens + 5, len(x) - 1):
        assert torch.equal(problem.run(x[:m], tile=config), full[:m]), m


@pytest.mark.parametrize("config", [c for c in WIDE if c.persistent], ids=str)
@pytest.mark.parametrize("k", [128, 1536])
@pytest.mark.parametrize("m", [500, 700, 1000])
def test_more_tiles_than_ctas(config, k, m):
    """Several tiles a CTA; with `tail` the last wave of 500 and 700 tokens is cut into parts, that of 1000 is not."""
    problem = Problem(n=12544, k=k, seed=m)
    x = problem.tokens(m)
    check(problem.run(x, tile=config), problem.exact(x))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(
    "n,k", [(64, 7168), (16, 16), (72, 48), (200, 144), (130, 2064), (1000, 640), (8192, 512)]
)
def test_ragged_shapes(config, n, k):
    problem = Problem(n, k, seed=n)
    for m in (3, 33):
        x = problem.tokens(m)
        check(problem.run(x, tile=config), problem.exact(x))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [None, torch.bfloat16, torch.float32], ids=str)
def test_results_and_bias(config, out_dtype, bias):
    problem = Problem(512, 1024, bias=bias, seed=5)
    for m in (5, 200):
        x = problem.tokens(m)
        check(problem.run(x, tile=config, out_dtype=out_dtype), problem.exact(x))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_groups(config):
    """Block-diagonal wo_a: a group's rows see only the group's tokens, also where K is no multiple of 64."""
    for k in (4096, 336):
        problem = Problem(1536, k, groups=2, seed=6)  # 12 panels a group: every tile fits
        for m in (4, 100):
            x = problem.tokens(m)
            check(problem.run(x, tile=config), problem.exact(x))


@pytest.mark.parametrize("rows", [32, 40, 100])
@pytest.mark.parametrize("bias", [None, torch.bfloat16], ids=str)
def test_groups_that_do_not_fill_their_panels(rows, bias):
    problem = Problem(4 * rows, 256, groups=4, bias=bias, seed=rows)
    for m in (1, 70):
        x = problem.tokens(m)
        check(problem.run(x), problem.exact(x))


def test_the_op_dispatches_on_the_layout():
    problem = Problem(256, 128, groups=2, seed=3)
    x = problem.tokens(9)
    for invariant in (False, True):
        out = torch.ops.cutedsl.nvfp4_linear(
            x,
            *problem.packed,
            problem.row_scale,
            None,
            None,
            256,
            128,
            2,
            False,
            torch.float32,
            "sm90",
            invariant,
        )
        check(out, problem.exact(x))
    with pytest.raises(ValueError, match="W4A16 only"):
        torch.ops.cutedsl.nvfp4_linear(
            x, *problem.packed, problem.row_scale, None, None, 256, 128, 2, True, torch.bfloat16, "sm90"
        )


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_one_hot_tokens_read_back_the_weights(config):
    """With x = e_k the result is column k of the weight, bit for bit."""
    problem = Problem(256, 512, seed=7)
    problem.row_scale.fill_(1.0)
    for start in range(0, 512, 128):
        x = torch.zeros(128, 512, dtype=torch.bfloat16, device="cuda")
        x[torch.arange(128), start + torch.arange(128)] = 1
        got = problem.run(x, tile=config, out_dtype=torch.float32)
        assert torch.equal(got.double(), problem.weight[:, start : start + 128].t())


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_tokens(out_dtype):
    problem = Problem(128, 256)
    out = problem.run(problem.tokens(0), out_dtype=out_dtype)
    assert out.shape == (0, 128) and out.dtype == out_dtype


def test_strided_and_unaligned_tokens():
    problem = Problem(128, 256, seed=8)
    wide = problem.tokens(40).repeat(1, 3)
    one = torch.randn(256, 1, device="cuda").to(torch.bfloat16).t()  # M = 1 with strides (1, 1)
    unaligned = wide.flatten()[3 : 3 + 40 * 256].view(40, 256)
    for x in (wide[:, 256:512], unaligned, wide[::2, :256], wide[:1, :256].expand(5, -1), one):
        for config in (NARROW[1], WIDE[0]):
            check(problem.run(x, tile=config), problem.exact(x))


@pytest.mark.parametrize("n,k", [(2048, 7168), (7168, 2048)])
def test_rows_do_not_depend_on_the_batch(n, k):
    problem = Problem(n, k, seed=9)
    x = problem.tokens(600)
    full = problem.run(x, batch_invariant=True)
    check(full, problem.exact(x))
    for m in (1, 2, 8, 16, 17, 64, 100, 256, 599):
        assert torch.equal(problem.run(x[:m], batch_invariant=True), full[:m]), m
        assert torch.equal(problem.run(x[600 - m :].contiguous(), batch_invariant=True), full[600 - m :]), m


def _four_projections() -> list:
    shapes = [(2048, 7168), (1024, 7168), (64, 7168), (512, 7168)]
    return [Problem(n, k, seed=n) for n, k in shapes]


@pytest.mark.parametrize("m", [1, 48])
def test_four_streams_equal_serial(m):
    """The attention's four input projections run at once: bit-equal to one after the other."""
    problems = _four_projections()
    x = problems[0].tokens(m)
    serial = [p.run(x, out_dtype=torch.float32) for p in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    for _ in range(100):
        rounds = [[] for _ in problems]
        for _ in range(25):
            for problem, stream, results in zip(problems, streams, rounds, strict=True):
                with torch.cuda.stream(stream):
                    results.append(problem.run(x, out_dtype=torch.float32))
        torch.cuda.synchronize()
        for expected, results in zip(serial, rounds, strict=True):
            assert all(torch.equal(got, expected) for got in results)


@pytest.mark.parametrize("m", [1, 48])
def test_graph_replay_with_four_streams(m):
    problems = _four_projections()
    x = problems[0].tokens(m)
    streams = [torch.cuda.Stream() for _ in problems]
    for problem in problems:
        problem.run(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        main = torch.cuda.current_stream()
        results = []
        for problem, stream in zip(problems, streams, strict=True):
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                results.append(problem.run(x))
        for stream in streams:
            main.wait_stream(stream)
    for seed in range(20):
        x.copy_(problems[0].tokens(m))
        for result in results:
            result.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        for problem, result in zip(problems, results, strict=True):
            assert torch.equal(result, problem.run(x)), seed


def test_refuses_operands_that_do_not_fit():
    problem = Problem(128, 256)
    x = problem.tokens(2)
    with pytest.raises(ValueError, match="x must be bf16"):
        problem.run(x[:, :128])
    with pytest.raises(ValueError, match="codes must be int64"):
        problem.run(x, n=192)
    with pytest.raises(ValueError, match="do not divide into 3 groups"):
        problem.run(problem.tokens(2).repeat(1, 3), groups=3)
    with pytest.raises(ValueError, match="out must be contiguous"):
        problem.run(x, out=torch.empty(2, 64, device="cuda", dtype=torch.bfloat16))
