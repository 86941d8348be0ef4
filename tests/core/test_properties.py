"""Properties of preparation and of the ops over random shapes, scales and damage."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cutedsl_nvfp4 import ops, reference
from cutedsl_nvfp4.family import Layout
from cutedsl_nvfp4.format import decode_e2m1, global_scale_from_divisor, unpack_codes
from cutedsl_nvfp4.prepare import PreparedLinear, prepare_experts, prepare_linear

FUZZ = settings(max_examples=100, deadline=None)
NAME = "model.layers.7.attn.wq_b"
EXPORT_AGAIN = r"[Ee]xport"

rows = st.integers(1, 40)
groups_of_16 = st.integers(1, 5)
seeds = st.integers(0, 2**32 - 1)


def weight(*shape: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes [..., K/2] and valid block scales [..., K/16], zeros and subnormals among them."""
    generator = torch.Generator().manual_seed(seed)
    *outer, k = shape
    codes = torch.randint(0, 256, (*outer, k // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 0x7F, (*outer, k // 16), dtype=torch.uint8, generator=generator)
    return codes, scales.view(torch.float8_e4m3fn)


def exact(codes: torch.Tensor, scales: torch.Tensor, row_scale: torch.Tensor) -> torch.Tensor:
    """The weight in float64, one product at a time."""
    values = decode_e2m1(unpack_codes(codes), torch.float64)
    return values * scales.double().repeat_interleave(16, -1) * row_scale.double().unsqueeze(-1)


def prepared(n: int, k: int, seed: int, global_scale: float = 0.01) -> PreparedLinear:
    codes, scales = weight(n, k, seed=seed)
    return prepare_linear(codes, scales, torch.tensor(global_scale), [n], layout=Layout.PLAIN, name=NAME)


def multiply(
    x: torch.Tensor, p: PreparedLinear, groups: int = 1, quantized: bool = False, **scales
) -> torch.Tensor:
    return torch.ops.cutedsl.nvfp4_linear(
        x, p.codes, p.block_scales, p.row_scale, scales.get("act_scale"), None, p.n, p.k, groups, quantized,
        torch.float32, str(p.layout),
    )  # fmt: skip


# --- shapes ---


@FUZZ
@given(m=st.integers(0, 9), n=rows, k=groups_of_16, groups=st.integers(1, 3), seed=seeds)
@example(m=0, n=1, k=1, groups=1, seed=0)
@example(m=1, n=1, k=1, groups=3, seed=0)
def test_linear_is_the_exact_product(m, n, k, groups, seed):
    k *= 16
    p = prepared(n * groups, k, seed)
    x = torch.randn(m, groups * k, generator=torch.Generator().manual_seed(seed)).bfloat16()
    blocks = exact(p.codes, p.block_scales, p.row_scale).view(groups, n, k)
    expected = torch.einsum("mgk,gnk->mgn", x.double().view(m, groups, k), blocks).flatten(1)
    got = multiply(x, p, groups)
    bound = torch.einsum("mgk,gnk->mgn", x.double().abs().view(m, groups, k), blocks.abs()).flatten(1)
    assert got.shape == (m, n * groups) and bool(((got - expected).abs() <= 1e-5 * bound).all())


@FUZZ
@given(m=st.integers(0, 9), n=rows, k=groups_of_16, seed=seeds, scale=st.floats(1e-6, 1e3))
def test_w4a4_rows_do_not_depend_on_each_other(m, n, k, seed, scale):
    """One token's result is the same alone as in a batch, with a scale of its own or a shared one."""
    p = prepared(n, k * 16, seed)
    x = torch.randn(m, k * 16, generator=torch.Generator().manual_seed(seed)).bfloat16()
    for act_scale in (None, torch.tensor([scale])):
        together = multiply(x, p, quantized=True, act_scale=act_scale)
        assert bool(torch.isfinite(together).all())
        for row in range(m):
            alone = multiply(x[row : row + 1], p, quantized=True, act_scale=act_scale)[0]
            torch.testing.assert_close(
                alone, together[row], rtol=1e-5, atol=1e-5 * float(together.abs().max())
            )


@FUZZ
@given(width=st.integers(0, 100), k=groups_of_16, groups=st.integers(1, 3), seed=seeds)
def test_x_of_another_width_is_refused(width, k, groups, seed):
    p = prepared(3 * groups, 16 * k, seed)
    x = torch.zeros(2, width, dtype=torch.bfloat16)
    if width == groups * 16 * k:
        assert multiply(x, p, groups).shape == (2, 3 * groups)
    else:
        with pytest.raises(ValueError, match=rf"\[M, {groups} \* {16 * k}\], got \(2, {width}\)"):
            multiply(x, p, groups)


@FUZZ
@given(
    codes=st.lists(st.integers(0, 20), min_size=2, max_size=2),
    scales=st.lists(st.integers(0, 5), min_size=2, max_size=2),
)
@example(codes=[4, 0], scales=[4, 0])
@example(codes=[0, 8], scales=[0, 1])
def test_prepare_takes_matching_shapes_only(codes, scales):
    n, half_k = codes
    operands = torch.zeros(codes, dtype=torch.uint8), torch.ones(scales).to(torch.float8_e4m3fn)

    def prepare():
        return prepare_linear(*operands, torch.tensor(1.0), [n], layout=Layout.PLAIN, name=NAME)

    if half_k and half_k % 8 == 0 and scales == [n, half_k // 8]:
        assert (prepare().n, prepare().k) == (n, 2 * half_k)
    else:
        with pytest.raises(ValueError, match=rf"^{NAME}: .*({EXPORT_AGAIN}|pad the tensor)"):
            prepare()


# --- scales ---

valid_scale = st.floats(min_value=2.0**-100, max_value=2.0**100, width=32)
invalid_scale = st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan]) | st.floats(
    min_value=-(2.0**100), max_value=-(2.0**-100), width=32
)


@FUZZ
@given(good=valid_scale, bad=invalid_scale, first=st.booleans())
def test_global_scale(good, bad, first):
    codes, scales = weight(8, 32, seed=0)

    def prepare(*values: float) -> PreparedLinear:
        return prepare_linear(codes, scales, torch.tensor(values), [4, 4], layout=Layout.PLAIN, name=NAME)

    assert prepare(good, 1.0).row_scale.tolist() == [good] * 4 + [1.0] * 4
    with pytest.raises(ValueError, match=rf"^{NAME}: global scale must be finite and positive, got .*Export"):
        prepare(*((bad, good) if first else (good, bad)))


@FUZZ
@given(bad=invalid_scale)
def test_global_scale_stored_as_a_divisor(bad):
    with pytest.raises(ValueError, match="divisor must be finite and positive"):
        global_scale_from_divisor(torch.tensor([1.0, bad]))


@FUZZ
@given(bad=invalid_scale, expert=st.integers(0, 2), matrix=st.integers(0, 2))
def test_global_scale_of_an_expert(bad, expert, matrix):
    w13, w2 = weight(3, 64, 16, seed=1), weight(3, 16, 32, seed=2)
    w13_scales, w2_scales = torch.ones(3, 2), torch.ones(3)
    if matrix < 2:
        w13_scales[expert, matrix] = bad
    else:
        w2_scales[expert] = bad
    with pytest.raises(ValueError, match=rf"^{NAME}\.{'w13' if matrix < 2 else 'w2'}: global scale must be"):
        prepare_experts(*w13, w13_scales, *w2, w2_scales, layout=Layout.PLAIN, name=NAME)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bfloat16, torch.float32])
def test_codes_of_another_dtype(dtype):
    codes, scales = weight(8, 32, seed=0)
    with pytest.raises(
        ValueError, match=rf"^{NAME}: packed codes must be uint8, got {dtype}.*{EXPORT_AGAIN}"
    ):
        prepare_linear(codes.to(dtype), scales, torch.tensor(1.0), [8], layout=Layout.PLAIN, name=NAME)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e5m2, torch.bfloat16, torch.float32])
def test_block_scales_of_another_dtype(dtype):
    codes, scales = weight(8, 32, seed=0)
    with pytest.raises(ValueError, match=rf"^{NAME}: block scales must be .*e4m3fn, got {dtype}"):
        prepare_linear(
            codes, scales.float().to(dtype), torch.tensor(1.0), [8], layout=Layout.PLAIN, name=NAME
        )


# --- flipped bits in tensor data: seen where a value becomes invalid, and only there ---


@FUZZ
@given(seed=seeds, where=st.integers(0, 15), bit=st.integers(0, 7))
def test_a_bit_flipped_in_block_scales(seed, where, bit):
    """Seen where the scale becomes NaN or negative: the sign bit always, others from one neighbour of NaN."""
    codes, scales = weight(8, 32, seed=seed)
    raw = scales.view(torch.uint8).view(-1)
    raw[where] ^= 1 << bit
    value = scales.float().view(-1)[where].item()

    def prepare() -> PreparedLinear:
        return prepare_linear(codes, scales, torch.tensor(1.0), [8], layout=Layout.PLAIN, name=NAME)

    if math.isnan(value) or value < 0:
        with pytest.raises(ValueError, match=rf"^{NAME}: block scale at \[{where // 2}, {where % 2}\] is"):
            prepare()
    else:
        assert prepare().block_scales is scales


@FUZZ
@given(seed=seeds, where=st.integers(0, 127), bit=st.integers(0, 7))
def test_a_bit_flipped_in_codes_is_another_valid_weight(seed, where, bit):
    codes, scales = weight(8, 32, seed=seed)
    flipped = codes.clone()
    flipped.view(-1)[where] ^= 1 << bit
    p = prepare_linear(flipped, scales, torch.tensor(1.0), [8], layout=Layout.PLAIN, name=NAME)
    changed = reference.dequantize(p.codes, scales) != reference.dequantize(codes, scales)
    assert int(changed.sum()) <= 1


assert ops  # registers torch.ops.cutedsl
