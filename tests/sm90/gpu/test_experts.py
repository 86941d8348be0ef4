"""The Hopper experts on the chip: exact weights, float64 products, every kind of routing, graphs."""

import pytest
import torch

from cutedsl_nvfp4.format import pack_codes
from cutedsl_nvfp4.reference import dequantize
from cutedsl_nvfp4.sm90.experts import ROUTE_CTAS, run, shipped
from cutedsl_nvfp4.sm90.layout import interleave_gate_up, pack_experts, pack_linear
from cutedsl_nvfp4.sm90.tiles import ExpertTiles, NarrowTile, WideTile
from tests.support.routed import check_route

pytestmark = pytest.mark.gpu_sm90

NARROW = [
    ExpertTiles(NarrowTile(8, 2, 2, 4), NarrowTile(8, 2, 2, 4)),
    ExpertTiles(NarrowTile(8, 2, 2, 4, 4), NarrowTile(8, 2, 2, 4, 2)),
    ExpertTiles(NarrowTile(8, 1, 2, 6), NarrowTile(8, 1, 2, 6)),  # streams
    ExpertTiles(NarrowTile(16, 2, 2, 3), NarrowTile(16, 1, 2, 5)),
]
WIDE = [
    ExpertTiles(WideTile(2, 32, 2, 4, ctas_per_sm=2, persistent=True), NarrowTile(32, 1, 1, 6)),
    *(
        ExpertTiles(config, config)
        for config in (
            WideTile(2, 64, 2, 3, ctas_per_sm=2, persistent=True),
            WideTile(4, 64, 1, 8, persistent=True),
            WideTile(4, 64, 2, 5, persistent=True),
            WideTile(4, 96, 1, 8, persistent=True),
            WideTile(4, 128, 1, 7, persistent=True),
        )
    ),
]
CONFIGS = NARROW + WIDE


def random_codes(generator, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Valid codes [..., N, K/2] and block scales with some zeros, for shape [..., N, K]."""
    *rows, k = shape
    codes = torch.randint(0, 256, (*rows, k // 2), dtype=torch.uint8, device="cuda", generator=generator)
    scales = torch.rand(*rows, k // 16, device="cuda", generator=generator) * 3 + 0.5
    scales[torch.rand(*rows, k // 16, device="cuda", generator=generator) < 0.01] = 0
    return codes, scales.to(torch.float8_e4m3fn)


class Problem:
    """Fresh valid experts, and the exact layer in float64."""

    def __init__(
        self, experts: int, hidden: int, intermediate: int, limit: float | None = 10.0, seed: int = 0
    ):
        self.generator = torch.Generator("cuda").manual_seed(seed)
        self.experts, self.hidden, self.intermediate, self.limit = experts, hidden, intermediate, limit
        self.w13 = random_codes(self.generator, experts, 2 * intermediate, hidden)
        self.w2 = random_codes(self.generator, experts, hidden, intermediate)
        self.w13_row_scale = self.rand(experts, 2 * intermediate) / hidden**0.5
        self.w2_row_scale = self.rand(experts, hidden)

    def rand(self, *shape: int) -> torch.Tensor:
        return torch.rand(*shape, device="cuda", generator=self.generator) + 0.5

    def tokens(self, m: int) -> torch.Tensor:
        x = torch.randn(m, self.hidden, device="cuda", generator=self.generator)
        return x.to(torch.bfloat16)

    def route(self, m: int, topk: int, known: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Distinct random experts of `known` for every token, and their weights."""
        noise = torch.rand(m, known or self.experts, device="cuda", generator=self.generator)
        ids = noise.argsort(dim=1)[:, :topk].to(torch.int32)
        return self.rand(m, topk), ids

    def packed(self) -> tuple:
        """Operands of `run`, packed once; tests that change weights call it afterwards."""
        if not hasattr(self, "_packed"):
            w13 = pack_experts(*(t.clone() for t in self.w13), gate_up=True)
            w2 = pack_experts(*(t.clone() for t in self.w2), gate_up=False)
            self._packed = (*w13, self.w13_row_scale, *w2, self.w2_row_scale)
        return self._packed

    def run(self, x, weights, ids, expert_map=None, **options) -> torch.Tensor:
        options = {
            "hidden": self.hidden,
            "intermediate": self.intermediate,
            "swiglu_limit": self.limit,
        } | options
        return run(x, *self.packed(), weights, ids, expert_map=expert_map, **options)

    def exact(self, x, weights, ids, expert_map=None, rounds: bool = False) -> torch.Tensor:
        """The layer in float64; with `rounds`, what a kernel stores is rounded to bf16, as any fused path does."""

        def stored(value: torch.Tensor) -> torch.Tensor:
            return value.to(torch.bfloat16).double() if rounds else value

        local = ids.long()
        if expert_map is not None:
            local = torch.where(local >= 0, expert_map.long()[local.clamp(min=0)], local)
        out = torch.zeros(*ids.shape, self.hidden, dtype=torch.float64, device="cuda")
        for expert in local[local >= 0].unique().tolist():
            token, choice = (local == expert).nonzero(as_tuple=True)
            w13 = dequantize(self.w13[0][expert], self.w13[1][expert]).double()
            w2 = dequantize(self.w2[0][expert], self.w2[1][expert]).double()
            both = x[token].double() @ (w13 * self.w13_row_scale[expert].double()[:, None]).t()
            gate, up = both.chunk(2, dim=-1)
            if self.limit is not None:
                gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
            h = stored(torch.nn.functional.silu(gate) * up)
            out[token, choice] = stored(h @ (w2 * self.w2_row_scale[expert].double()[:, None]).t())
        return stored((out * weights.double().unsqueeze(-1)).sum(dim=1))

    def check(self, x, weights, ids, expert_map=None, **options) -> torch.Tensor:
        """Run, and hold the error against 1.1 x the error of rounding to bf16 where it must be stored."""
        got = self.run(x, weights, ids, expert_map, **options)
        exact = self.exact(x, weights, ids, expert_map)
        rounded = self.exact(x, weights, ids, expert_map, rounds=True)
        assert got.shape == exact.shape and bool(torch.isfinite(got).all())
        error, allowed = ((v.double() - exact).norm().item() for v in (got, rounded))
        assert error <= 1.1 * allowed + 1e-12, (error / exact.norm().item(), allowed / exact.norm().item())
        return got


@pytest.fixture(autouse=True)
def poison():
    """What torch.empty hands out is NaN, so an element nobody wrote shows."""
    torch.cuda.empty_cache()
    blocks = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(64)]
    blocks += [torch.full((1 << s,), float("nan"), device="cuda") for s in range(8, 20) for _ in range(8)]
    del blocks


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_matches_float64(config):
    problem = Problem(experts=8, hidden=512, intermediate=256)
    for m in (1, 2, 7, 33, 130, 600):
        problem.check(problem.tokens(m), *problem.route(m, 6), tiles=config)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("hidden,intermediate", [(16, 16), (80, 48), (144, 208), (1040, 336), (2064, 64)])
def test_ragged_shapes(config, hidden, intermediate):
    problem = Problem(5, hidden, intermediate, seed=hidden)
    for m in (3, 90):
        problem.check(problem.tokens(m), *problem.route(m, 3), tiles=config)


@pytest.mark.parametrize("hidden,intermediate", [(7168, 384), (4096, 256), (4096, 512), (7168, 3072)])
@pytest.mark.parametrize("topk", [6, 8])
def test_model_slices(hidden, intermediate, topk):
    """Flash and Pro under tensor parallelism and Pro whole, with the tiles the layer chooses."""
    problem = Problem(24, hidden, intermediate, seed=topk)
    for m in (1, 5, 40, 200):
        problem.check(problem.tokens(m), *problem.route(m, topk))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("limit", [None, 10.0, 0.5])
def test_clamp(config, limit):
    """Gates and ups beyond the limit on both sides."""
    problem = Problem(4, 256, 128, limit, seed=3)
    problem.w13_row_scale *= 8
    for m in (4, 60):
        problem.check(problem.tokens(m), *problem.route(m, 2), tiles=config)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_uneven_routing(config):
    """Empty experts, one with everything, and pairs nobody computes."""
    problem = Problem(16, 256, 128, seed=4)
    for m in (1, 9, 300, 1500):
        x = problem.tokens(m)
        weights, ids = problem.route(m, 4)
        problem.check(x, weights, torch.full_like(ids, 11), tiles=config)
        problem.check(x, weights, ids % 3, tiles=config)
        ids[::2, 1] = -1
        ids[:, 3] = -1
        problem.check(x, weights, ids, tiles=config)
        nothing = problem.run(x, weights, torch.full_like(ids, -1), tiles=config)
        assert torch.equal(nothing, torch.zeros_like(nothing))


@pytest.mark.parametrize("ctas", ROUTE_CTAS)
@pytest.mark.parametrize("pairs", [1, 5, 777, 6000, 98304])
@pytest.mark.parametrize("mapped,step", [(False, 32), (True, 32), (True, 96)])
def test_route(ctas, pairs, mapped, step):
    check_route(shipped("sm_90a")[f"nvfp4_experts_sm90_route_{ctas}"].load(), pairs, mapped, step, "cuda")


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_expert_map(config):
    """Ranks of expert parallelism add up to the layer."""
    problem = Problem(6, 256, 128, seed=5)
    expert_map = torch.full((24,), -1, dtype=torch.int32, device="cuda")
    expert_map[[3, 8, 9, 17, 20, 23]] = torch.tensor([4, 0, 2, 5, 1, 3], dtype=torch.int32, device="cuda")
    for m in (1, 8, 200):
        x = problem.tokens(m)
        weights, ids = problem.route(m, 6, known=24)
        problem.check(x, weights, ids, expert_map, tiles=config)
        problem.check(x, weights, ids.long(), expert_map.long(), tiles=config)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_one_hot_reads_back_the_weights(config):
    """Gates of 64 make swiglu 64 * up; a one-hot token, or one-hot intermediates, then show one column."""
    size = 256
    problem = Problem(3, size, size, limit=None, seed=6)
    problem.w13_row_scale.fill_(1.0)
    problem.w2_row_scale.fill_(1.0)
    gate = torch.full((size, size), 2, dtype=torch.uint8, device="cuda")  # e2m1 code of 1
    one = torch.eye(size, dtype=torch.uint8, device="cuda") * 2
    scale = torch.full((size, size // 16), 64.0, device="cuda").to(torch.float8_e4m3fn)
    unit = torch.ones(size, size // 16, device="cuda").to(torch.float8_e4m3fn)
    x = torch.eye(size, dtype=torch.bfloat16, device="cuda")
    weights = torch.ones(size, 1, device="cuda")
    for expert in range(3):
        problem.w13[0][expert, :size], problem.w13[1].view(torch.uint8)[expert, :size] = (
            pack_codes(gate),
            scale.view(torch.uint8),
        )
    up = dequantize(problem.w13[0][1, size:], problem.w13[1][1, size:]).double()
    problem.w2[0][1], problem.w2[1].view(torch.uint8)[1] = pack_codes(one), unit.view(torch.uint8)
    problem.w13[0][2, size:], problem.w13[1].view(torch.uint8)[2, size:] = (
        pack_codes(one),
        unit.view(torch.uint8),
    )
    down = dequantize(problem.w2[0][2], problem.w2[1][2]).double()
    for expert, columns in ((1, up), (2, down)):
        ids = torch.full((size, 1), expert, dtype=torch.int32, device="cuda")
        got = problem.run(x, weights, ids, out_dtype=torch.float32, tiles=config)
        assert torch.equal(got.double(), 64 * columns.t())


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_tokens(out_dtype):
    problem = Problem(4, 128, 64)
    weights, ids = problem.route(0, 2)
    out = problem.run(problem.tokens(0), weights, ids, out_dtype=out_dtype)
    assert out.shape == (0, 128) and out.dtype == out_dtype


def test_strided_and_unaligned_tokens():
    problem = Problem(4, 256, 128, seed=8)
    wide = problem.tokens(40).repeat(1, 3)
    unaligned = wide.flatten()[3 : 3 + 40 * 256].view(40, 256)
    for x in (wide[:, 256:512], unaligned, wide[::2, :256], wide[:1, :256].expand(5, -1)):
        for config in (NARROW[0], NARROW[2], WIDE[0]):
            problem.check(x, *problem.route(x.shape[0], 2), tiles=config)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_bad_tokens_stay_alone(config):
    """A NaN token spoils its own row only, and is not hidden by the clamp."""
    problem = Problem(4, 256, 128, seed=9)
    x = problem.tokens(40)
    weights, ids = problem.route(40, 2)
    clean = problem.run(x, weights, ids, tiles=config)
    x[7] = float("nan")
    got = problem.run(x, weights, ids, tiles=config)
    assert bool(torch.isnan(got[7]).all())
    others = torch.arange(40, device="cuda") != 7
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_run_is_the_same(config):
    problem = Problem(16, 512, 256, seed=10)
    x = problem.tokens(300)
    weights, ids = problem.route(300, 6)
    first = problem.run(x, weights, ids, tiles=config)
    for _ in range(50):
        assert torch.equal(problem.run(x, weights, ids, tiles=config), first)


@pytest.mark.parametrize("hidden,intermediate", [(4096, 256), (7168, 384)])
def test_rows_do_not_depend_on_the_batch(hidden, intermediate):
    problem = Problem(8, hidden, intermediate, seed=11)
    x = problem.tokens(2000)
    weights, ids = problem.route(2000, 6)
    full = problem.run(x, weights, ids, batch_invariant=True)
    for m in (1, 2, 8, 17, 64, 256, 600, 1999):
        some = problem.run(x[:m], weights[:m], ids[:m], batch_invariant=True)
        assert torch.equal(some, full[:m]), m
        last = problem.run(x[2000 - m :], weights[2000 - m :], ids[2000 - m :], batch_invariant=True)
        assert torch.equal(last, full[2000 - m :]), m


@pytest.mark.parametrize("m", [1, 48, 700])
def test_graph_replay_with_changed_routing(m):
    problem = Problem(16, 512, 256, seed=12)
    x = problem.tokens(m)
    weights, ids = problem.route(m, 6)
    problem.run(x, weights, ids)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = problem.run(x, weights, ids)
        again = problem.run(x, weights, ids)  # a layer right behind, in other scratch
    for seed in range(20):
        x.copy_(problem.tokens(m))
        new_weights, new_ids = problem.route(m, 6)
        weights.copy_(new_weights)
        ids.copy_(new_ids if seed % 3 else torch.full_like(new_ids, seed % 16))
        result.fill_(float("nan"))
        again.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        expected = problem.run(x, weights, ids)
        assert torch.equal(result, expected) and torch.equal(again, expected), seed


def test_layers_in_a_row():
    """Scratch of one layer is the next one's: no kernel that starts early may meet it."""
    problem = Problem(16, 512, 256, seed=13)
    inputs = [(problem.tokens(m), *problem.route(m, 6)) for m in (3, 40, 3, 200, 7, 40)]
    expected = []
    for x, weights, ids in inputs:
        expected.append(problem.run(x, weights, ids))
        torch.cuda.synchronize()
    for _ in range(30):
        results = [problem.run(x, weights, ids) for x, weights, ids in inputs]
        for got, wanted in zip(results, expected, strict=True):
            assert torch.equal(got, wanted)


def test_packing_on_the_gpu():
    """The same words as one expert at a time, with at most an eighth of the layer besides it."""
    problem = Problem(64, 1024, 512, seed=14)
    singles = [
        pack_linear(interleave_gate_up(problem.w13[0][e]), interleave_gate_up(problem.w13[1][e]))
        for e in (0, 40)
    ]
    codes, scales = (t.clone() for t in problem.w13)
    layer = sum(t.nbytes for t in (*problem.w13, *problem.w2))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    packed = pack_experts(codes, scales, gate_up=True)
    assert torch.cuda.max_memory_allocated() - before <= layer / 8
    assert packed[0].data_ptr() == codes.data_ptr()
    for expert, single in zip((0, 40), singles, strict=True):
        assert torch.equal(packed[0][expert], single[0]) and torch.equal(packed[1][expert], single[1])


def test_refuses_operands_that_do_not_fit():
    problem = Problem(4, 128, 64)
    x, (weights, ids) = problem.tokens(2), problem.route(2, 2)
    with pytest.raises(ValueError, match="x must be bf16"):
        problem.run(x[:, :64], weights, ids)
    with pytest.raises(ValueError, match="w13 codes must be contiguous int64"):
        problem.run(x, weights, ids, intermediate=80)
    with pytest.raises(ValueError, match="topk_ids and topk_weights"):
        problem.run(x, weights[:1], ids)
    with pytest.raises(ValueError, match="expert_map must be"):
        problem.run(x, weights, ids, ids)
    with pytest.raises(ValueError, match="out must be contiguous"):
        problem.run(x, weights, ids, out=torch.empty(2, 64, dtype=torch.bfloat16, device="cuda"))


def test_result_in_given_memory():
    problem = Problem(4, 128, 64, seed=15)
    x, (weights, ids) = problem.tokens(5), problem.route(5, 2)
    out = torch.full((5, 128), float("nan"), dtype=torch.bfloat16, device="cuda")
    assert problem.run(x, weights, ids, out=out).data_ptr() == out.data_ptr()
    assert torch.equal(out, problem.run(x, weights, ids))
