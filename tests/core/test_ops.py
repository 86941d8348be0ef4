"""torch.ops.cutedsl.*: valid custom ops whose results are the reference's, traced, compiled or empty."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cutedsl_nvfp4 import family, ops, reference
from cutedsl_nvfp4.family import Layout
from cutedsl_nvfp4.prepare import prepare_experts, prepare_linear

HIDDEN, INTERMEDIATE, NUM_EXPERTS = 64, 32, 6

MODES = {
    "w4a16": (False, None),
    "w4a4 static": (True, torch.tensor([0.002])),
    "w4a4 dynamic": (True, None),
}
ROWS = [0, 5]


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear_arguments(
    random_weight, m, mode, groups=1, dtype=torch.bfloat16, bias=None, out_dtype=torch.bfloat16
):
    n, k = 8 * groups, 32
    quantize_activations, act_scale = MODES[mode]
    return (
        gaussian(m, groups * k, dtype=dtype), *random_weight(n, k), torch.linspace(0.1, 1, n),
        act_scale, bias, n, k, groups, quantize_activations, out_dtype, str(Layout.PLAIN),
    )  # fmt: skip


def experts_arguments(random_weight, m, mode, dtype=torch.bfloat16, expert_map=None, limit=10.0):
    generator = torch.Generator().manual_seed(3)
    weights, ids = torch.rand(m, NUM_EXPERTS, generator=generator).topk(4, dim=-1)
    quantize_activations, act_scale = MODES[mode]
    return (
        gaussian(m, HIDDEN, dtype=dtype),
        *random_weight(NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN, seed=1),
        torch.rand(NUM_EXPERTS, 2 * INTERMEDIATE, generator=generator) * 0.1,
        *random_weight(NUM_EXPERTS, HIDDEN, INTERMEDIATE, seed=2),
        torch.rand(NUM_EXPERTS, HIDDEN, generator=generator) * 0.1,
        weights, ids.to(torch.int32), act_scale, act_scale, expert_map, quantize_activations, limit, dtype,
        str(Layout.PLAIN),
    )  # fmt: skip


def faked(op, arguments):
    """What `op`'s fake implementation says of its results."""
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(item) if isinstance(item, torch.Tensor) else item for item in arguments]
        return op(*fake)


def assert_fake_agrees(op, arguments):
    real, fake = op(*arguments), faked(op, arguments)
    if isinstance(real, torch.Tensor):
        real, fake = (real,), (fake,)
    for ours, theirs in zip(real, fake, strict=True):
        assert (ours.shape, ours.dtype, ours.device, ours.stride()) == (
            theirs.shape, theirs.dtype, theirs.device, theirs.stride()
        )  # fmt: skip


@pytest.fixture
def e4m3_comparable(monkeypatch):
    """opcheck looks for mutated inputs with torch.allclose, which torch has not for e4m3 on the CPU."""
    allclose = torch.allclose

    def allclose_or_same_bytes(a, b, **options):
        if a.dtype == torch.float8_e4m3fn:
            return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        return allclose(a, b, **options)

    monkeypatch.setattr(torch, "allclose", allclose_or_same_bytes)


# --- each op is a valid custom op ---


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("groups", [1, 2])
def test_linear_opcheck(e4m3_comparable, random_weight, m, mode, groups):
    arguments = linear_arguments(random_weight, m, mode, groups)
    torch.library.opcheck(torch.ops.cutedsl.nvfp4_linear, arguments)
    assert_fake_agrees(torch.ops.cutedsl.nvfp4_linear, arguments)


@pytest.mark.parametrize(
    "dtype, out_dtype",
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
)
def test_linear_opcheck_over_dtypes(e4m3_comparable, random_weight, dtype, out_dtype):
    arguments = linear_arguments(
        random_weight, 1, "w4a16", dtype=dtype, bias=gaussian(8, dtype=dtype), out_dtype=out_dtype
    )
    torch.library.opcheck(torch.ops.cutedsl.nvfp4_linear, arguments)
    assert_fake_agrees(torch.ops.cutedsl.nvfp4_linear, arguments)


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("mode", MODES)
def test_experts_opcheck(e4m3_comparable, random_weight, m, mode):
    arguments = experts_arguments(random_weight, m, mode)
    torch.library.opcheck(torch.ops.cutedsl.nvfp4_experts, arguments)
    assert_fake_agrees(torch.ops.cutedsl.nvfp4_experts, arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_experts_opcheck_over_dtypes_with_a_map_and_no_clamp(e4m3_comparable, random_weight, dtype):
    expert_map = torch.tensor([0, 1, -1, 2, -1, 3], dtype=torch.int32)
    arguments = experts_arguments(random_weight, 1, "w4a16", dtype, expert_map, limit=None)
    torch.library.opcheck(torch.ops.cutedsl.nvfp4_experts, arguments)
    assert_fake_agrees(torch.ops.cutedsl.nvfp4_experts, arguments)


# --- on the CPU the results are the reference's ---


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("groups", [1, 2])
def test_linear_is_the_reference(random_weight, mode, groups):
    bias = gaussian(8 * groups, seed=1)
    x, codes, scales, row_scale, act_scale, bias, n, k, groups, quantized, out_dtype, layout = (
        linear_arguments(random_weight, 5, mode, groups, bias=bias)
    )
    got = torch.ops.cutedsl.nvfp4_linear(
        x, codes, scales, row_scale, act_scale, bias, n, k, groups, quantized, out_dtype, layout
    )
    expected = reference.linear(
        x, codes, scales, row_scale, act_scale, bias,
        quantize_activations=quantized, groups=groups, out_dtype=out_dtype,
    )  # fmt: skip
    assert got.abs().max() > 0.1 and torch.equal(got, expected)


@pytest.mark.parametrize("mode", MODES)
def test_experts_are_the_reference(random_weight, mode):
    expert_map = torch.tensor([0, 1, -1, 2, -1, 3], dtype=torch.int32)
    arguments = experts_arguments(random_weight, 5, mode, expert_map=expert_map, limit=0.5)
    *tensors, quantized, limit, out_dtype, _ = arguments
    expected = reference.experts(
        *tensors, quantize_activations=quantized, swiglu_limit=limit, out_dtype=out_dtype
    )
    got = torch.ops.cutedsl.nvfp4_experts(*arguments)
    assert got.abs().max() > 0.01 and torch.equal(got, expected)


# --- caller's mistakes ---


@pytest.mark.parametrize(
    "position, value, message",
    [
        (0, torch.zeros(2, 48), r"x must be \[M, 1 \* 32\], got \(2, 48\)"),
        (0, torch.zeros(2, 2, 32), r"x must be \[M, 1 \* 32\], got \(2, 2, 32\)"),
        (3, torch.ones(7), r"row_scale \(7,\) do not belong to N = 8, K = 32"),
        (6, 16, r"codes \(8, 16\) and row_scale \(8,\) do not belong to N = 16, K = 32"),
        (7, 64, r"x must be \[M, 1 \* 64\], got \(2, 32\)"),
        (8, 2, r"x must be \[M, 2 \* 32\], got \(2, 32\)"),
    ],
)
def test_linear_refuses_operands_that_do_not_fit(random_weight, position, value, message):
    arguments = list(linear_arguments(random_weight, 2, "w4a16"))
    arguments[position] = value
    with pytest.raises(ValueError, match=message):
        torch.ops.cutedsl.nvfp4_linear(*arguments)


def test_linear_refuses_groups_that_do_not_divide_n(random_weight):
    arguments = list(linear_arguments(random_weight, 2, "w4a16"))
    arguments[0], arguments[8] = torch.zeros(2, 96), 3
    with pytest.raises(ValueError, match="N = 8 rows do not divide into 3 groups"):
        torch.ops.cutedsl.nvfp4_linear(*arguments)


@pytest.mark.parametrize(
    "position, value", [(7, torch.ones(3, 5)), (7, torch.ones(2, 4)), (0, torch.zeros(1, 3, 64))]
)
def test_experts_refuse_routing_of_another_shape(random_weight, position, value):
    arguments = list(experts_arguments(random_weight, 3, "w4a16"))
    arguments[position] = value
    with pytest.raises(ValueError, match=r"x must be \[M, H\] and topk_ids, topk_weights \[M, T\], got"):
        torch.ops.cutedsl.nvfp4_experts(*arguments)


def test_a_device_without_kernels_is_refused_unless_the_reference_is_asked_for(monkeypatch):
    with pytest.raises(
        RuntimeError, match=r"cutedsl::nvfp4_linear has no kernel for xpu.*CUTEDSL_NVFP4_IMPL=reference"
    ):
        ops._require_reference(torch.device("xpu"), "nvfp4_linear", False)
    monkeypatch.setenv("CUTEDSL_NVFP4_IMPL", "reference")
    ops._require_reference(torch.device("xpu"), "nvfp4_linear", False)


# --- through the compiler ---


class Layer(torch.nn.Module):
    """Every op once, as a model calls them: linear -> experts -> a linear layer in float32."""

    def __init__(self, random_weight, quantize_activations: bool):
        super().__init__()
        self.quantize_activations = quantize_activations
        experts = experts_arguments(random_weight, 1, "w4a16")
        self.experts = experts[1:7]
        self.codes, self.block_scales = random_weight(HIDDEN, HIDDEN, seed=4)
        self.row_scale = torch.full((HIDDEN,), 0.05)

    def linear(self, x, out_dtype):
        return torch.ops.cutedsl.nvfp4_linear(
            x, self.codes, self.block_scales, self.row_scale, None, None,
            HIDDEN, HIDDEN, 1, self.quantize_activations, out_dtype, str(Layout.PLAIN),
        )  # fmt: skip

    def forward(self, x, weights, ids):
        x = self.linear(torch.nn.functional.silu(x), x.dtype)
        x = x + torch.ops.cutedsl.nvfp4_experts(
            x,
            *self.experts,
            weights,
            ids,
            None,
            None,
            None,
            self.quantize_activations,
            10.0,
            x.dtype,
            str(Layout.PLAIN),
        )
        return self.linear(x, torch.float32) * 2


@pytest.mark.parametrize("quantize_activations", [False, True])
def test_compiles_into_one_graph_for_every_number_of_tokens(random_weight, quantize_activations):
    layer = Layer(random_weight, quantize_activations)
    graphs = []

    def aot_eager_counting_graphs(graph_module, example_inputs):
        graphs.append(graph_module)
        return torch._dynamo.lookup_backend("aot_eager")(graph_module, example_inputs)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=aot_eager_counting_graphs, dynamic=True)
    for m in (5, 7, 40):
        generator = torch.Generator().manual_seed(m)
        weights, ids = torch.rand(m, NUM_EXPERTS, generator=generator).topk(4, dim=-1)
        x = gaussian(m, HIDDEN, dtype=torch.bfloat16, seed=m)
        eager = layer(x, weights, ids)
        assert eager.abs().max() > 0.1 and torch.equal(compiled(x, weights, ids), eager)
    assert len(graphs) == 1
    called = [str(node.target) for node in graphs[0].graph.nodes if "cutedsl" in str(node.target)]
    assert [name.removesuffix(".default") for name in called] == [
        "cutedsl.nvfp4_linear", "cutedsl.nvfp4_experts", "cutedsl.nvfp4_linear",
    ]  # fmt: skip


# --- operands of Blackwell's layout go to the device's kernels ---


@pytest.fixture
def launched(monkeypatch) -> list:
    """The calls that kernels of a B200 would get: (operation, arguments, named arguments)."""
    calls = []

    def run_of(operation):
        def run(x, *arguments, **named):
            calls.append((operation, (x, *arguments), named))
            return x.new_zeros((x.shape[0], named.get("n", x.shape[1])), dtype=named["out_dtype"])

        return run

    monkeypatch.setattr(family, "capability_of", lambda device: 100)
    for operation in ("linear", "experts"):
        monkeypatch.setattr(getattr(family.family_of(100), operation), "run", run_of(operation))
    return calls


@pytest.mark.parametrize("mode", ["w4a4 static", "w4a4 dynamic"])
def test_block_scaled_linear_reaches_the_kernel(random_weight, launched, mode):
    x, codes, scales, row_scale, act_scale, bias, n, k, groups, quantized, out_dtype, _ = linear_arguments(
        random_weight, 5, mode, groups=2, bias=gaussian(16)
    )
    operands = prepare_linear(codes, scales, row_scale, [1] * n, layout=Layout.BLOCK_SCALED, groups=groups)
    weight = operands.codes, operands.block_scales, operands.row_scale
    out = ops.nvfp4_linear(
        x, *weight, act_scale, bias, n, k, groups, quantized, out_dtype, str(Layout.BLOCK_SCALED)
    )
    ((operation, arguments, named),) = launched
    assert operation == "linear" and out.shape == (5, n)
    for got, want in zip(arguments, (x, *weight, act_scale, bias), strict=True):
        assert got is want or got.data_ptr() == want.data_ptr()
    assert named == {
        "n": n, "k": k, "groups": groups, "out_dtype": out_dtype, "batch_invariant": False
    }  # fmt: skip


def test_block_scaled_experts_reach_the_kernel(random_weight, launched):
    x, w13, w13_scales, _, w2, w2_scales, _, *rest = experts_arguments(random_weight, 5, "w4a4 static")
    operands = prepare_experts(
        w13, w13_scales, torch.ones(NUM_EXPERTS, 2), w2, w2_scales, torch.ones(NUM_EXPERTS),
        layout=Layout.BLOCK_SCALED,
    )  # fmt: skip
    weights = [value for value in vars(operands).values() if isinstance(value, torch.Tensor)]
    ops.nvfp4_experts(x, *weights, *rest[:-1], str(Layout.BLOCK_SCALED))
    ((operation, arguments, named),) = launched
    assert operation == "experts" and len(arguments) == 12
    assert (named["hidden"], named["intermediate"], named["swiglu_limit"]) == (HIDDEN, INTERMEDIATE, 10.0)


def test_block_scaled_operands_have_no_other_arithmetic(random_weight, launched):
    x, codes, scales, row_scale, _, bias, n, k, groups, _, out_dtype, _ = linear_arguments(
        random_weight, 5, "w4a16"
    )
    operands = prepare_linear(codes, scales, row_scale, [1] * n, layout=Layout.BLOCK_SCALED)
    weight = operands.codes, operands.block_scales, operands.row_scale
    with pytest.raises(ValueError, match="prepared for Blackwell are multiplied in W4A4 only"):
        ops.nvfp4_linear(x, *weight, None, bias, n, k, groups, False, out_dtype, str(Layout.BLOCK_SCALED))
    with pytest.raises(ValueError, match="do not promise batch-invariant results"):
        ops.nvfp4_linear(
            x, *weight, None, bias, n, k, groups, True, out_dtype, str(Layout.BLOCK_SCALED), True
        )
    assert not launched


def test_block_scaled_operands_on_another_device_are_refused(random_weight):
    x, codes, scales, row_scale, _, bias, n, k, groups, _, out_dtype, _ = linear_arguments(
        random_weight, 5, "w4a16"
    )
    operands = prepare_linear(codes, scales, row_scale, [1] * n, layout=Layout.BLOCK_SCALED)
    weight = operands.codes, operands.block_scales, operands.row_scale
    with pytest.raises(ValueError, match="multiplied on a CUDA device, got cpu"):
        ops.nvfp4_linear(x, *weight, None, bias, n, k, groups, True, out_dtype, str(Layout.BLOCK_SCALED))
