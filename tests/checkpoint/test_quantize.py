"""The converter's arithmetic: equal to the reference bit for bit, and right for a decoder that is not ours."""

import pytest
import torch
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype

from cutedsl_nvfp4 import reference
from cutedsl_nvfp4.checkpoint import quantize
from cutedsl_nvfp4.checkpoint.dialects import Linear
from cutedsl_nvfp4.checkpoint.headers import CheckpointError, Tensor
from cutedsl_nvfp4.format import E2M1_VALUES, GROUP_SIZE


def heavy_tailed(*shape: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x * x.abs() ** 2


def linear(format: str, n: int, k: int, scale_dtype: str = "F8_E8M0") -> Linear:
    dtype = {"bf16": "BF16", "f32": "F32", "fp8": "F8_E4M3", "mxfp4": "I8"}[format]
    scale = Tensor("f", scale_dtype, (), 0, 0) if format in ("fp8", "mxfp4") else None
    return Linear("layers.0.attn.wq_b", "attention", format, n, k, Tensor("f", dtype, (n, k), 0, 0), scale)


def with_awkward_groups(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[0, :16] = 0
    x[1, :16] = -0.0
    x[2, :16] *= 1e-6  # its scale underflows to zero, or to a subnormal
    x[3, :16] *= 1e-4
    x[4, :16] = torch.tensor(
        [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, 6]
    )
    return x


@pytest.mark.parametrize("shape", [(8, 16), (7, 48), (130, 272), (40, 7168)], ids=str)
@pytest.mark.parametrize("spread", [1.0, 3.7e-5, 2.0**-9])
def test_chunks_equal_the_reference(shape, spread):
    x = with_awkward_groups(heavy_tailed(*shape)) if shape[0] > 7 else heavy_tailed(*shape)
    rows = quantize.Rows(linear("bf16", *shape), (x * spread).bfloat16(), None)
    scale = quantize.global_scale(rows.amax())
    chunks = [quantize.quantize_chunk(values, scale, False) for _, values in rows.chunks()]
    codes, scales = reference.quantize((x * spread).bfloat16().float(), scale)
    assert torch.equal(torch.cat([c for c, _ in chunks]), codes)
    assert torch.equal(torch.cat([s for _, s in chunks]), scales.view(torch.uint8))


def test_every_fp8_value_widens_exactly():
    every = torch.arange(256, dtype=torch.uint8)
    every[[0x7F, 0xFF]] = 0
    weight = every.view(torch.float8_e4m3fn).view(2, 128).repeat(65, 1)  # two block rows, the second ragged
    scale = torch.tensor([[100], [140]], dtype=torch.uint8)
    rows = quantize.Rows(linear("fp8", 130, 128), weight, scale)
    values = torch.cat([chunk for _, chunk in rows.chunks()])
    expected = weight.float() * torch.tensor([2.0**-27] * 128 + [2.0**13] * 2)[:, None]
    assert torch.equal(values, expected)
    assert rows.amax() == 448 * 2.0**13


def test_fp8_with_f32_scales_and_ragged_columns():
    weight = torch.randn(3, 200, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scale = torch.tensor([[0.3, 0.7]])
    rows = quantize.Rows(linear("fp8", 3, 200, "F32"), weight, scale)
    expected = weight.float() * torch.tensor([0.3] * 128 + [0.7] * 72)
    torch.testing.assert_close(next(rows.chunks())[1], expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_fp8_nan_is_refused(byte):
    weight = torch.zeros(1, 16, dtype=torch.uint8)
    weight[0, 3] = byte
    rows = quantize.Rows(
        linear("fp8", 1, 16), weight.view(torch.float8_e4m3fn), torch.tensor([[127]], dtype=torch.uint8)
    )
    with pytest.raises(CheckpointError, match=r"attn\.wq_b holds NaN"):
        rows.amax()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_wide_nan_and_infinity_are_refused(value):
    weight = torch.zeros(1, 16)
    weight[0, 5] = value
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        quantize.Rows(linear("f32", 1, 16), weight, None).amax()


def test_all_zero_weights_have_a_finite_scale():
    scale = quantize.global_scale(0.0)
    codes, scales = quantize.quantize_chunk(torch.zeros(2, 32), scale, False)
    assert scale.item() == 1 and not codes.any() and not scales.any()


def test_round_trip_error_is_the_quantizers_own():
    """A foreign decoder reads back, for every element, one of the nearest values that its group's scale offers."""
    x = heavy_tailed(64, 512, seed=3)
    scale = quantize.global_scale(x.abs().max().item())
    codes, scales = quantize.quantize_chunk(x, scale, False)
    decoded = dequantize_to_dtype(
        codes, scales.view(torch.float8_e4m3fn), scale, torch.float32, swizzle=False
    )
    step = (scales.view(torch.float8_e4m3fn).float() * scale).repeat_interleave(GROUP_SIZE, 1)
    distances = (x.unsqueeze(-1) - torch.tensor(E2M1_VALUES) * step.unsqueeze(-1)).abs().amin(-1)
    torch.testing.assert_close((decoded - x).abs(), distances, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_searched_scales_never_lose(seed):
    x = heavy_tailed(16, 512, seed=seed)
    scale = quantize.global_scale(x.abs().max().item())

    def error(search: bool) -> torch.Tensor:
        values = quantize.dequantize_chunk(*quantize.quantize_chunk(x, scale, search), scale)
        return (values - x).square().unflatten(-1, (-1, GROUP_SIZE)).sum(-1)

    plain, searched = error(False), error(True)
    assert bool((searched <= plain * (1 + 1e-5) + 1e-12).all())
    assert searched.sum() < 0.95 * plain.sum()


# --- MXFP4 ---


def mxfp4_values(codes: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    nibbles = torch.stack((codes & 0xF, codes >> 4), -1).flatten(-2)
    values = torch.tensor(E2M1_VALUES, dtype=torch.float64)[nibbles.int()]
    return values * (2.0 ** (exponents.double() - 127)).repeat_interleave(32, -1)


def relabelled(codes: torch.Tensor, exponents: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Values after conversion, by a foreign decoder, and the number of codes that were rounded."""
    power = quantize.mxfp4_global_power(quantize.check_mxfp4(linear("mxfp4", *codes.shape), exponents))
    shifted, lossy = quantize.shift_codes(codes, exponents, power)
    scales = quantize.relabel_scales(exponents, power).view(torch.float8_e4m3fn)
    assert scales.shape == (codes.shape[0], codes.shape[1] // 8)
    return dequantize_to_dtype(shifted, scales, torch.tensor(2.0**power), torch.float32, swizzle=False), lossy


def random_codes(rows: int, k: int) -> torch.Tensor:
    return torch.randint(
        0, 256, (rows, k // 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


@pytest.mark.parametrize("lowest", [105, 60, 1, 220])
def test_mxfp4_is_relabelled_without_loss(lowest):
    """18 consecutive exponents, as many as e4m3 has powers of two."""
    exponents = torch.arange(lowest, lowest + 18, dtype=torch.uint8).repeat(4, 1)
    codes = random_codes(4, 18 * 32)
    values, lossy = relabelled(codes, exponents)
    assert lossy == 0
    assert torch.equal(values.double(), mxfp4_values(codes, exponents))


def test_mxfp4_beyond_e4m3s_range_is_rounded_and_counted():
    exponents = torch.arange(100, 124, dtype=torch.uint8).repeat(4, 1)  # 24: six too many
    codes = random_codes(4, 24 * 32)
    values, lossy = relabelled(codes, exponents)
    exact = mxfp4_values(codes, exponents)
    wrong = values.double() != exact
    assert lossy == int(wrong.sum()) > 0
    smallest_step = 2.0 ** (123 - 127 - 17)
    assert (values.double() - exact).abs().max() <= smallest_step / 4 + 0.0
    assert not wrong[:, 6 * 32 :].any()


def test_mxfp4_zero_blocks_below_the_range_cost_nothing():
    exponents = torch.tensor([[0, 127]], dtype=torch.uint8)
    codes = random_codes(1, 64)
    codes[:, :16] = 0
    values, lossy = relabelled(codes, exponents)
    assert lossy == 0 and torch.equal(values.double(), mxfp4_values(codes, exponents))


def test_mxfp4_nan_scale_is_refused():
    with pytest.raises(CheckpointError, match="byte 255"):
        quantize.check_mxfp4(linear("mxfp4", 1, 32), torch.tensor([[255]], dtype=torch.uint8))
