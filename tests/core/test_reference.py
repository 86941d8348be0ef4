"""reference.py: the oracle itself, against vLLM's NVFP4 emulation and against float64 written out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
    dequantize_to_dtype,
    ref_nvfp4_quant,
    run_nvfp4_emulations,
)

from cutedsl_nvfp4.format import E2M1_VALUES, decode_e2m1, pack_codes, unpack_codes
from cutedsl_nvfp4.reference import dequantize, dynamic_act_scale, experts, linear, quantize, swiglu

E4M3_SCALES = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)  # every valid one, ascending


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def float64_weight(codes: torch.Tensor, block_scales: torch.Tensor) -> torch.Tensor:
    """[..., N, K] in f64, exact: an e2m1 value times an e4m3 scale has at most 6 significant bits."""
    values = torch.tensor(E2M1_VALUES, dtype=torch.float64)[unpack_codes(codes).long()]
    return values * block_scales.double().repeat_interleave(16, dim=-1)


def assert_close_to_float64(got: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor) -> None:
    """f32 accumulation may err by a few ulps of the sum of magnitudes, and by nothing more."""
    error = (got.double() - exact).abs()
    bound = 2.0**-20 * magnitude + 1e-30
    assert bool((error <= bound).all()), f"error / bound up to {(error / bound).max():.3g}"


def exactly_quantizable(rows: int, k: int, global_scale: float, seed: int = 0) -> torch.Tensor:
    """f32 [rows, K] that NVFP4 holds without loss: each group has a 6, so its scale is found again."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, k), dtype=torch.uint8, generator=generator)
    codes[:, ::16] = 7
    scales = torch.randint(0x20, 0x50, (rows, k // 16), dtype=torch.uint8, generator=generator)
    scales = scales.view(torch.float8_e4m3fn).float().repeat_interleave(16, dim=1)
    return decode_e2m1(codes) * scales * global_scale


# --- dequantize ---


def test_dequantize_every_code_with_every_scale():
    scales = torch.cat((E4M3_SCALES.view(torch.uint8), torch.tensor([0x80], dtype=torch.uint8)))
    codes = pack_codes(torch.arange(16, dtype=torch.uint8).repeat(len(scales), 1))
    scales = scales.view(torch.float8_e4m3fn)
    got = dequantize(codes, scales.unsqueeze(1), 0.5)
    expected = torch.tensor(E2M1_VALUES).double() * scales.double().unsqueeze(1) * 0.5
    assert got.shape == (128, 16) and torch.equal(got.double(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("global_scale", [1.0, 2.0**-7, 2.0**5])
def test_dequantize_is_vllms_where_both_are_exact(random_weight, dtype, global_scale):
    codes, scales = random_weight(24, 64)
    theirs = dequantize_to_dtype(codes, scales, torch.tensor(global_scale), dtype, 16, swizzle=False)
    ours = dequantize(codes, scales, global_scale, dtype)
    assert ours.dtype == dtype and torch.equal(ours, theirs)


def test_dequantize_agrees_with_vllms_to_an_ulp_elsewhere(random_weight):
    codes, scales = random_weight(24, 64)
    theirs = dequantize_to_dtype(codes, scales, torch.tensor(0.0123), torch.float32, 16, swizzle=False)
    torch.testing.assert_close(dequantize(codes, scales, 0.0123), theirs, rtol=2.0**-22, atol=0)


def test_dequantize_broadcasts_global_scales_over_rows_and_rounds_once(random_weight):
    codes, scales = random_weight(3, 5, 32)
    per_row = torch.rand(3, 5, 1, generator=torch.Generator().manual_seed(1)) + 0.1
    exact = (float64_weight(codes, scales).float() * per_row).to(torch.bfloat16)
    assert torch.equal(dequantize(codes, scales, per_row, torch.bfloat16), exact)


# --- quantize ---


@pytest.mark.parametrize("global_scale", [1.0, 2.0**-6, 0.00731])
def test_quantize_picks_the_nearest_scale_and_codes(global_scale):
    x = gaussian(32, 128) * 40
    codes, scales = quantize(x, torch.tensor(global_scale))
    assert codes.dtype == torch.uint8 and codes.shape == (32, 64) and scales.shape == (32, 8)

    ideal = x.double().unflatten(-1, (-1, 16)).abs().amax(-1) / 6 / float(torch.tensor(global_scale))
    error = (ideal.clamp(max=448).unsqueeze(-1) - E4M3_SCALES.double()).abs()
    chosen = (ideal.clamp(max=448) - scales.double()).abs()
    assert bool((chosen <= error.amin(-1) + 1e-5 * ideal).all())

    step = scales.double().repeat_interleave(16, -1) * float(torch.tensor(global_scale))
    values = torch.tensor(E2M1_VALUES, dtype=torch.float64)
    error = (x.double().unsqueeze(-1) - values * step.unsqueeze(-1)).abs().amin(-1)
    chosen = (x.double() - values[unpack_codes(codes).long()] * step).abs()
    assert bool((chosen <= error + 1e-5 * step).all())
    assert len(unpack_codes(codes).unique()) == 16  # the data reaches every code


@pytest.mark.parametrize("global_scale", [1.0, 2.0**-6, 2.0**4])
def test_quantize_is_vllms_on_exact_data(global_scale):
    x = exactly_quantizable(16, 96, global_scale)
    codes, scales = quantize(x, torch.tensor(global_scale))
    # vLLM's emulation wants the reciprocal, which multiplies when quantizing.
    their_values, their_scales = ref_nvfp4_quant(x, torch.tensor([1.0 / global_scale]), 16)
    assert torch.equal(scales.float(), their_scales)
    assert torch.equal(decode_e2m1(unpack_codes(codes)), their_values)
    assert torch.equal(dequantize(codes, scales, global_scale), x)


def test_quantize_is_vllms_on_gaussian_data():
    x = gaussian(64, 256, seed=3)
    amax = x.abs().amax()
    codes, scales = quantize(x, amax / 2688)
    their_values, their_scales = ref_nvfp4_quant(x, (2688 / amax).reshape(1), 16)
    assert torch.equal(scales.float(), their_scales)
    assert torch.equal(decode_e2m1(unpack_codes(codes)), their_values)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.integers(-10, 10), st.integers(1, 4), st.integers(1, 6))
def test_quantize_inverts_dequantize(seed, exponent, rows, groups):
    x = exactly_quantizable(rows, 16 * groups, 2.0**exponent, seed)
    codes, scales = quantize(x, torch.tensor(2.0**exponent))
    again = quantize(dequantize(codes, scales, 2.0**exponent), torch.tensor(2.0**exponent))
    assert torch.equal(dequantize(codes, scales, 2.0**exponent), x)
    assert torch.equal(again[0], codes) and torch.equal(again[1].view(torch.uint8), scales.view(torch.uint8))


def test_quantize_keeps_rows_with_their_own_global_scale_apart():
    x = gaussian(4, 64)
    scale = torch.tensor([[0.001], [0.01], [0.1], [1.0]])
    codes, scales = quantize(x, scale)
    for row in range(4):
        alone = quantize(x[row : row + 1], scale[row])
        assert torch.equal(codes[row : row + 1], alone[0])
        assert torch.equal(scales[row : row + 1].float(), alone[1].float())


def test_quantize_underflow_gives_zero_codes():
    x = torch.full((1, 32), -1e-6)
    x[0, 16:] = 6.0
    codes, scales = quantize(x, torch.tensor(1.0))
    assert scales.float().tolist() == [[0.0, 1.0]]
    assert unpack_codes(codes).tolist() == [[0] * 16 + [7] * 16]


def test_quantize_saturates():
    x = torch.tensor([[1e5, -1e5, 3.0] + [0.0] * 13])
    codes, scales = quantize(x, torch.tensor(1.0))
    assert scales.float().item() == 448.0
    assert unpack_codes(codes)[0, :3].tolist() == [7, 15, 0]


def test_quantize_refuses_a_partial_group():
    with pytest.raises(ValueError, match="K = 24 is not a positive multiple of 16"):
        quantize(torch.zeros(2, 24), torch.tensor(1.0))


def test_dynamic_act_scale():
    x = torch.zeros(3, 32, dtype=torch.bfloat16)
    x[0, 5], x[2, 31] = -2688.0, 5.25
    assert dynamic_act_scale(x).tolist() == [1.0, 1.0, 5.25 / 2688]
    assert dynamic_act_scale(x[:0]).shape == (0,)


# --- linear ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("m, n, k", [(0, 8, 32), (1, 24, 16), (7, 33, 128), (40, 64, 512)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_w4a16_against_float64(random_weight, dtype, m, n, k, with_bias):
    codes, scales = random_weight(n, k)
    x = gaussian(m, k).to(dtype)
    row_scale = torch.rand(n, generator=torch.Generator().manual_seed(1)) + 0.01
    bias = gaussian(n, seed=2).to(dtype) if with_bias else None
    got = linear(x, codes, scales, row_scale, bias=bias, out_dtype=torch.float32)
    weight = float64_weight(codes, scales) * row_scale.double().unsqueeze(1)
    exact = x.double() @ weight.T
    magnitude = x.double().abs() @ weight.abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    assert got.shape == (m, n)
    assert_close_to_float64(got, exact, magnitude)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_hot_activations_show_the_weight(random_weight, out_dtype):
    codes, scales = random_weight(40, 64)
    row_scale = torch.linspace(0.01, 3, 40)
    got = linear(torch.eye(64, dtype=torch.bfloat16), codes, scales, row_scale, out_dtype=out_dtype)
    assert torch.equal(got.T, dequantize(codes, scales, row_scale.unsqueeze(1), out_dtype))


def test_fused_segments_keep_their_global_scales(random_weight):
    """The layer of two segments is the two layers, bit for bit; one scale for both would be far off."""
    codes, scales = random_weight(48, 64)
    x = gaussian(5, 64).bfloat16()
    row_scale = torch.cat((torch.full((16,), 0.003), torch.full((32,), 0.7)))
    fused = linear(x, codes, scales, row_scale, out_dtype=torch.float32)
    weight = float64_weight(codes, scales)
    first = x.double() @ weight[:16].T * float(torch.tensor(0.003))
    second = x.double() @ weight[16:].T * float(torch.tensor(0.7))
    torch.testing.assert_close(fused[:, :16].double(), first, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fused[:, 16:].double(), second, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("m", [0, 1, 5])
@pytest.mark.parametrize("quantized", [False, True])
def test_groups_are_independent_layers(random_weight, groups, m, quantized):
    n, k = 8 * groups, 32
    codes, scales = random_weight(n, k)
    row_scale = torch.linspace(0.1, 1, n)
    x = gaussian(m, groups * k)
    act_scale = torch.tensor([0.002]) if quantized else None
    got = linear(
        x, codes, scales, row_scale, act_scale,
        quantize_activations=quantized, groups=groups, out_dtype=torch.float32,
    )  # fmt: skip
    assert got.shape == (m, n)
    for group in range(groups):
        rows = slice(8 * group, 8 * (group + 1))
        alone = linear(
            x[:, k * group : k * (group + 1)].contiguous(), codes[rows], scales[rows], row_scale[rows],
            act_scale, quantize_activations=quantized, out_dtype=torch.float32,
        )  # fmt: skip
        torch.testing.assert_close(got[:, rows], alone, rtol=1e-5, atol=1e-5)


def test_linear_w4a4_is_vllms_emulation_on_exact_data(random_weight):
    """Everything a small integer times a power of two: no order of summation can round differently."""
    act_scale, weight_scale = 2.0**-5, 2.0**-3
    codes, scales = random_weight(24, 64)
    x = exactly_quantizable(9, 64, act_scale)
    theirs = run_nvfp4_emulations(
        x, torch.tensor([1 / act_scale]), codes, scales, torch.tensor(weight_scale), swizzle=False
    )
    ours = linear(
        x, codes, scales, torch.full((24,), weight_scale), torch.tensor([act_scale]),
        quantize_activations=True, out_dtype=torch.float32,
    )  # fmt: skip
    assert ours.abs().max() > 1 and torch.equal(ours, theirs)
    unquantized = linear(x, codes, scales, torch.full((24,), weight_scale), out_dtype=torch.float32)
    assert torch.equal(ours, unquantized)


def test_linear_w4a4_agrees_with_vllms_emulation_on_gaussian_data(random_weight):
    codes, scales = random_weight(24, 128)
    x = gaussian(9, 128)
    act_scale = x.abs().amax() / 2688
    theirs = run_nvfp4_emulations(
        x, 1 / act_scale.reshape(1), codes, scales, torch.tensor(0.01), swizzle=False
    )
    ours = linear(
        x, codes, scales, torch.full((24,), 0.01), act_scale.reshape(1),
        quantize_activations=True, out_dtype=torch.float32,
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", ["one", "per token", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear_w4a4_against_float64(random_weight, policy, dtype):
    codes, scales = random_weight(24, 64)
    x = (gaussian(6, 64) * torch.tensor([1e-3, 0.1, 1, 10, 100, 0]).unsqueeze(1)).to(dtype)
    row_scale = torch.linspace(0.1, 1, 24)
    act_scale = {
        "one": torch.tensor([0.002]),
        "per token": torch.linspace(0.001, 0.2, 6),
        "dynamic": None,
    }[policy]
    got = linear(x, codes, scales, row_scale, act_scale, quantize_activations=True, out_dtype=torch.float32)
    used = (dynamic_act_scale(x) if act_scale is None else act_scale.expand(6)).unsqueeze(1)
    x_codes, x_scales = quantize(x, used)
    rounded = float64_weight(x_codes, x_scales) * used.double()
    weight = float64_weight(codes, scales) * row_scale.double().unsqueeze(1)
    assert not torch.equal(rounded, x.double())
    assert_close_to_float64(got, rounded @ weight.T, rounded.abs() @ weight.abs().T)


# --- experts ---


def test_swiglu_clamps_gate_above_and_up_on_both_sides():
    gate = torch.tensor([20.0, -20.0, 3.0, 3.0])
    up = torch.tensor([-30.0, 2.0, 30.0, 4.0])
    silu = lambda value: value / (1 + torch.exp(torch.tensor(-value)))  # noqa: E731
    clamped = [silu(10.0) * -10, silu(-20.0) * 2, silu(3.0) * 10, silu(3.0) * 4]
    free = [silu(20.0) * -30, silu(-20.0) * 2, silu(3.0) * 30, silu(3.0) * 4]
    torch.testing.assert_close(swiglu(gate, up, 10.0), torch.stack(clamped))
    torch.testing.assert_close(swiglu(gate, up, None), torch.stack(free))


class Experts:
    """E experts with their own global scale for w1, w3 and w2, and the same computation token by token."""

    def __init__(self, random_weight, num_experts: int = 4, hidden: int = 64, intermediate: int = 32):
        generator = torch.Generator().manual_seed(7)
        self.hidden = hidden
        self.w13_codes, self.w13_block_scales = random_weight(num_experts, 2 * intermediate, hidden, seed=1)
        self.w2_codes, self.w2_block_scales = random_weight(num_experts, hidden, intermediate, seed=2)
        self.w13_global_scales = torch.rand(num_experts, 2, generator=generator) * 0.2 + 0.01
        self.w2_global_scales = torch.rand(num_experts, generator=generator) * 0.1 + 0.01
        self.w13 = float64_weight(self.w13_codes, self.w13_block_scales)
        self.w2 = float64_weight(self.w2_codes, self.w2_block_scales)
        self.operands = (
            self.w13_codes, self.w13_block_scales,
            self.w13_global_scales.repeat_interleave(intermediate, dim=1),
            self.w2_codes, self.w2_block_scales,
            self.w2_global_scales.unsqueeze(1).expand(-1, hidden).contiguous(),
        )  # fmt: skip

    def naive(self, x, topk_weights, topk_ids, expert_map=None, limit=None, act_scale_13=None,
              act_scale_2=None, quantized=False):  # fmt: skip
        """[M, H] in f64, one token and one expert at a time."""
        out = torch.zeros(x.shape[0], self.hidden, dtype=torch.float64)
        for token in range(x.shape[0]):
            for slot in range(topk_ids.shape[1]):
                expert = int(topk_ids[token, slot])
                if expert >= 0 and expert_map is not None:
                    expert = int(expert_map[expert])
                if expert < 0:
                    continue
                w1, w3 = self.w13[expert].chunk(2)
                row = self.rounded(x[token], act_scale_13, expert, quantized)
                gate = w1 @ row * float(self.w13_global_scales[expert, 0])
                up = w3 @ row * float(self.w13_global_scales[expert, 1])
                if limit is not None:
                    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
                middle = (gate / (1 + torch.exp(-gate)) * up).to(x.dtype)
                down = self.w2[expert] @ self.rounded(middle, act_scale_2, expert, quantized)
                out[token] += float(topk_weights[token, slot]) * float(self.w2_global_scales[expert]) * down
        return out

    @staticmethod
    def rounded(row, act_scale, expert, quantized):
        if not quantized:
            return row.double()
        row = row.unsqueeze(0)
        if act_scale is None:
            scale = dynamic_act_scale(row)
        else:
            scale = act_scale[expert] if len(act_scale) > 1 else act_scale[0]
        return (float64_weight(*quantize(row, scale)) * scale.double())[0]


def routing(m: int, top_k: int, num_experts: int, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(m, num_experts, generator=generator)
    weights, ids = scores.topk(top_k, dim=-1)
    return weights, ids.to(torch.int32)


@pytest.mark.parametrize("m", [0, 1, 6])
@pytest.mark.parametrize("top_k", [6, 8])
@pytest.mark.parametrize("limit", [None, 0.5])
def test_experts_against_a_naive_loop(random_weight, m, top_k, limit):
    layer = Experts(random_weight, num_experts=12)
    x = gaussian(m, 64)
    weights, ids = routing(m, top_k, 12)
    got = experts(x, *layer.operands, weights, ids, swiglu_limit=limit, out_dtype=torch.float32)
    assert got.shape == (m, 64)
    torch.testing.assert_close(got.double(), layer.naive(x, weights, ids, limit=limit), rtol=1e-4, atol=1e-4)
    if m and limit:
        assert not torch.allclose(
            got, experts(x, *layer.operands, weights, ids, out_dtype=torch.float32), atol=0.1
        )


def test_experts_round_the_intermediate_to_the_activations_dtype(random_weight):
    layer = Experts(random_weight)
    x = gaussian(7, 64).bfloat16()
    weights, ids = routing(7, 2, 4)
    exact = layer.naive(x, weights, ids)
    got = experts(x, *layer.operands, weights, ids, out_dtype=torch.float32).double()
    unrounded = layer.naive(x.double(), weights, ids)
    assert (got - exact).abs().max() < 0.2 * (unrounded - exact).abs().max()


def test_experts_leave_unrouted_tokens_and_unused_experts_alone(random_weight):
    layer = Experts(random_weight, num_experts=4)
    x = gaussian(3, 64)
    ids = torch.tensor([[1, -1], [-1, -1], [3, 1]], dtype=torch.int32)
    weights = torch.tensor([[0.5, 9.0], [9.0, 9.0], [0.25, 0.75]])
    got = experts(x, *layer.operands, weights, ids, out_dtype=torch.float32)
    torch.testing.assert_close(got.double(), layer.naive(x, weights, ids), rtol=1e-4, atol=1e-4)
    assert not got[1].any() and got[0].any() and got[2].any()


def test_experts_sum_when_a_token_names_one_twice(random_weight):
    layer = Experts(random_weight)
    x = gaussian(2, 64)
    ids = torch.tensor([[2, 2], [0, 2]], dtype=torch.int32)
    weights = torch.tensor([[0.5, 0.25], [1.0, 1.0]])
    got = experts(x, *layer.operands, weights, ids, out_dtype=torch.float32)
    torch.testing.assert_close(got.double(), layer.naive(x, weights, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_expert_map_sends_global_ids_to_local_experts(random_weight, id_dtype):
    layer = Experts(random_weight, num_experts=4)
    expert_map = torch.tensor([-1, 2, -1, 0, 3, -1, 1, -1], dtype=torch.int32)
    x = gaussian(9, 64)
    weights, ids = routing(9, 6, 8)
    ids[0, 0] = -1
    ids = ids.to(id_dtype)
    got = experts(x, *layer.operands, weights, ids, expert_map=expert_map, out_dtype=torch.float32)
    exact = layer.naive(x, weights, ids, expert_map)
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-4)


def test_experts_split_over_ranks_add_up(random_weight):
    layer = Experts(random_weight, num_experts=4)
    x = gaussian(5, 64)
    weights, ids = routing(5, 3, 4)
    whole = experts(x, *layer.operands, weights, ids, out_dtype=torch.float32)
    parts = []
    for local in (slice(0, 2), slice(2, 4)):
        expert_map = torch.full((4,), -1, dtype=torch.int32)
        expert_map[local] = torch.arange(2, dtype=torch.int32)
        operands = tuple(operand[local] for operand in layer.operands)
        parts.append(experts(x, *operands, weights, ids, expert_map=expert_map, out_dtype=torch.float32))
    assert all(part.any() for part in parts)
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", ["one", "per expert", "dynamic"])
def test_experts_w4a4_against_a_naive_loop(random_weight, policy):
    layer = Experts(random_weight)
    x = gaussian(5, 64)
    weights, ids = routing(5, 3, 4)
    act_scales = {
        "one": (torch.tensor([0.002]), torch.tensor([0.01])),
        "per expert": (torch.tensor([0.001, 0.002, 0.003, 0.004]), torch.tensor([0.04, 0.03, 0.02, 0.01])),
        "dynamic": (None, None),
    }[policy]
    got = experts(
        x, *layer.operands, weights, ids, *act_scales,
        quantize_activations=True, swiglu_limit=10.0, out_dtype=torch.float32,
    )  # fmt: skip
    exact = layer.naive(x, weights, ids, None, 10.0, *act_scales, quantized=True)
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-4)
    w4a16 = experts(x, *layer.operands, weights, ids, swiglu_limit=10.0, out_dtype=torch.float32)
    assert not torch.allclose(got, w4a16, rtol=1e-2, atol=1e-2)


def test_observe_sees_both_inputs_of_the_experts(random_weight):
    layer = Experts(random_weight)
    x = gaussian(5, 64)
    weights, ids = routing(5, 2, 3)
    seen = []
    experts(x, *layer.operands, weights, ids, observe=lambda index, *tensors: seen.append((index, *tensors)))
    assert seen[0][0] == 0 and torch.equal(seen[0][1], x)
    assert [index for index, *_ in seen[1:]] == [1]
    assert len(seen[1][1]) == ids.numel() and seen[1][2].tolist() == sorted(ids.flatten().tolist())
    first = int(ids.unique()[0])
    token = int((ids == first).nonzero()[0, 0])
    gate, up = (
        part @ x[token].double() * float(scale)
        for part, scale in zip(layer.w13[first].chunk(2), layer.w13_global_scales[first], strict=True)
    )
    torch.testing.assert_close(
        seen[1][1][0].double(), gate / (1 + torch.exp(-gate)) * up, rtol=1e-4, atol=1e-5
    )
