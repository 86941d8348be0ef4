"""prepare.py: operands are the checkpoint's bytes with a scale per row; damaged input is refused by name."""

import pytest
import torch

from cutedsl_nvfp4.family import Layout
from cutedsl_nvfp4.format import padded_k, swizzle_128x4
from cutedsl_nvfp4.prepare import (
    plain_experts,
    plain_linear,
    prepare_experts,
    prepare_linear,
    segment_row_scale,
)
from cutedsl_nvfp4.sm90.layout import pack_in_place, pack_linear

NAME = "model.layers.3.attn.wq_a"


def prepare(codes, scales, global_scales=(0.01,), segments=None, name=NAME):
    global_scales = torch.tensor(global_scales)
    return prepare_linear(
        codes, scales, global_scales, segments or [codes.shape[0]], layout=Layout.PLAIN, name=name
    )


def assert_names(error: pytest.ExceptionInfo, *parts: str) -> None:
    message = str(error.value)
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} not in: {message}"


# --- linear ---


def test_linear_keeps_the_bytes_and_scales_each_segment(random_weight):
    codes, scales = random_weight(48, 64)
    prepared = prepare(codes, scales, (0.5, 0.25, 2.0), [16, 8, 24])
    assert torch.equal(prepared.codes, codes)
    assert torch.equal(prepared.block_scales.view(torch.uint8), scales.view(torch.uint8))
    assert (prepared.n, prepared.k, prepared.layout) == (48, 64, Layout.PLAIN)
    assert prepared.row_scale.dtype == torch.float32
    assert prepared.row_scale.tolist() == [0.5] * 16 + [0.25] * 8 + [2.0] * 24


# --- Hopper's layout ---


@pytest.mark.parametrize("chunk", [64 * 128, 5 * 64 * 128, 1 << 23])
@pytest.mark.parametrize("shape", [(256, 128), (3, 128, 128), (4, 64, 192)], ids=str)
def test_packing_a_chunk_at_a_time_takes_the_operands_own_storage(random_weight, shape, chunk):
    codes, scales = random_weight(*shape)
    expected = pack_linear(codes, scales)
    packed = pack_in_place(codes, scales, chunk)
    for got, source, want in zip(packed, (codes, scales), expected, strict=True):
        assert torch.equal(got, want) and got.data_ptr() == source.data_ptr()


@pytest.mark.parametrize("shape", [(200, 144), (2, 70, 128), (64, 80)], ids=str)
def test_ragged_operands_are_packed_into_new_storage(random_weight, shape):
    codes, scales = random_weight(*shape)
    before = codes.clone()
    packed = pack_in_place(codes, scales, 64 * 144)
    for got, want in zip(packed, pack_linear(codes, scales), strict=True):
        assert torch.equal(got, want)
    assert torch.equal(codes, before)


def test_groups_start_panels_of_their_own(random_weight):
    codes, scales = random_weight(80, 64)
    expected = pack_linear(codes.clone().view(2, 40, -1), scales.clone().view(2, 40, -1))
    prepared = prepare_linear(
        codes, scales, torch.tensor([0.5]), [80], layout=Layout.SM90, groups=2, name=NAME
    )
    assert (prepared.n, prepared.k, prepared.groups) == (80, 64, 2) and prepared.row_scale.shape == (80,)
    assert torch.equal(prepared.codes, expected[0].flatten(0, 1))
    assert torch.equal(prepared.block_scales, expected[1].flatten(0, 1))
    with pytest.raises(ValueError) as error:
        prepare_linear(codes, scales, torch.tensor([0.5]), [80], layout=Layout.PLAIN, groups=3, name=NAME)
    assert_names(error, NAME, "N = 80", "3 groups")


# --- Blackwell's layout ---


@pytest.mark.parametrize("n, k, groups", [(80, 80, 1), (80, 80, 2), (256, 128, 2), (1, 16, 1)])
def test_blackwell_keeps_the_codes_and_tiles_the_scales(random_weight, n, k, groups):
    codes, scales = random_weight(n, k)
    before = codes.clone(), scales.view(torch.uint8).clone()
    of_groups = [swizzle_128x4(part) for part in scales.clone().chunk(groups)]
    prepared = prepare_linear(
        codes, scales, torch.tensor([0.5]), [n], layout=Layout.BLOCK_SCALED, groups=groups, name=NAME
    )
    padding = padded_k(k) // 2 - k // 2
    assert torch.equal(prepared.codes, torch.nn.functional.pad(before[0], (0, padding)))
    assert (prepared.codes.data_ptr() == codes.data_ptr()) is (padding == 0)
    tiles = prepared.block_scales
    assert tiles.shape == (groups * -(-n // groups // 128), -(-k // 64), 32, 16)
    assert tiles.dtype == torch.uint8 and tiles.is_contiguous()
    assert torch.equal(tiles.flatten(), torch.cat([t.view(torch.uint8).flatten() for t in of_groups]))
    in_place = n // groups % 128 == 0 and k % 64 == 0
    assert (tiles.data_ptr() == scales.data_ptr()) is in_place
    back = plain_linear(prepared)
    assert torch.equal(back[0], before[0]) and torch.equal(back[1].view(torch.uint8), before[1])


def test_blackwells_scales_have_no_sign(random_weight):
    codes, scales = random_weight(4, 32)
    scales.view(torch.uint8)[0, 0] = 0x80
    prepared = prepare_linear(codes, scales, torch.tensor([0.5]), [4], layout=Layout.BLOCK_SCALED, name=NAME)
    assert prepared.block_scales.max() < 0x80 and plain_linear(prepared)[1].view(torch.uint8)[0, 0] == 0


@pytest.mark.parametrize("hidden, intermediate", [(128, 64), (144, 80)])
def test_blackwells_experts_are_tiled_each_on_its_own(random_weight, hidden, intermediate):
    w13, w2 = random_weight(3, 2 * intermediate, hidden), random_weight(3, hidden, intermediate)
    before = [t.view(torch.uint8).clone() for t in (*w13, *w2)]
    prepared = prepare_experts(
        *w13, torch.ones(3, 2), *w2, torch.ones(3), layout=Layout.BLOCK_SCALED, name="layers.3.experts"
    )
    assert prepared.w13_block_scales.shape == (3, 2 * -(-intermediate // 128), -(-hidden // 64), 32, 16)
    assert prepared.w2_block_scales.shape == (3, -(-hidden // 128), -(-intermediate // 64), 32, 16)
    gate_and_up = [swizzle_128x4(rows).flatten() for rows in before[1][2].chunk(2)]
    assert torch.equal(prepared.w13_block_scales[2].flatten(), torch.cat(gate_and_up))
    for got, want in zip(plain_experts(prepared), before, strict=True):
        assert torch.equal(got.view(torch.uint8), want)


# --- scales of segments ---


@pytest.mark.parametrize("global_scale", [torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[0.5]])])
def test_one_global_scale_serves_every_segment(global_scale):
    row_scale = segment_row_scale(global_scale, [3, 2], NAME)
    assert row_scale.tolist() == [0.5] * 5 and row_scale.is_contiguous()


def test_negative_zero_block_scales_are_zero(random_weight):
    codes, scales = random_weight(4, 32)
    scales.view(torch.uint8)[0, 0] = 0x80
    assert torch.equal(prepare(codes, scales).block_scales.view(torch.uint8), scales.view(torch.uint8))


def test_codes_of_another_dtype(random_weight):
    codes, scales = random_weight(4, 32)
    with pytest.raises(ValueError) as error:
        prepare(codes.to(torch.int32), scales)
    assert_names(error, NAME, "uint8", "got torch.int32", "export")


def test_k_that_is_not_a_multiple_of_the_group(random_weight):
    codes, scales = random_weight(4, 32)
    with pytest.raises(ValueError) as error:
        prepare(codes[:, :12], scales)
    assert_names(error, f"{NAME}: K = 24", "multiple of 16", "pad the tensor", "unquantized")


@pytest.mark.parametrize("shape", [(4, 4), (5, 2), (4, 1), (2,), (1, 4, 2)])
def test_block_scales_of_another_shape(random_weight, shape):
    codes, _ = random_weight(4, 32)
    scales = torch.ones(shape).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError) as error:
        prepare(codes, scales)
    assert_names(error, NAME, "(4, 16)", "must be (4, 2)", f"got {shape}", "export")


@pytest.mark.parametrize("bits, value", [(0x7F, "nan"), (0xFF, "nan"), (0xB8, "-1.0")])
def test_damaged_block_scales(random_weight, bits, value):
    codes, scales = random_weight(4, 32)
    scales.view(torch.uint8)[2, 1] = bits
    with pytest.raises(ValueError) as error:
        prepare(codes, scales)
    assert_names(error, NAME, "[2, 1]", f"is {value}", "export the checkpoint again")


def test_block_scales_of_another_dtype(random_weight):
    codes, scales = random_weight(4, 32)
    with pytest.raises(ValueError) as error:
        prepare(codes, scales.float())
    assert_names(error, NAME, "torch.float8_e4m3fn", "got torch.float32")


@pytest.mark.parametrize("value", [0.0, -0.5, float("nan"), float("inf")])
def test_damaged_global_scale(random_weight, value):
    codes, scales = random_weight(4, 32)
    with pytest.raises(ValueError) as error:
        prepare(codes, scales, (0.5, value), [2, 2])
    assert_names(error, NAME, f"got {value}", "1 of 2", "Export it again")


def test_global_scales_that_do_not_match_the_segments(random_weight):
    codes, scales = random_weight(4, 32)
    with pytest.raises(ValueError) as error:
        prepare(codes, scales, (0.5, 0.5, 0.5), [2, 2])
    assert_names(error, NAME, "3 global scales", "2 fused segments")


@pytest.mark.parametrize("global_scales", [(0.5,), (0.5, 0.25)])
def test_segments_that_do_not_add_up(random_weight, global_scales):
    codes, scales = random_weight(4, 32)
    with pytest.raises(ValueError) as error:
        prepare(codes, scales, global_scales, [2, 3])
    assert_names(error, NAME, "[2, 3]", "N = 4")


# --- experts ---


@pytest.fixture
def experts_tensors(random_weight):
    """E = 3, H = 64, I = 32, in prepare_experts' order."""
    generator = torch.Generator().manual_seed(0)
    return {
        "w13_codes": random_weight(3, 64, 64, seed=1)[0],
        "w13_block_scales": random_weight(3, 64, 64, seed=1)[1],
        "w13_global_scales": torch.rand(3, 2, generator=generator) + 0.1,
        "w2_codes": random_weight(3, 64, 32, seed=2)[0],
        "w2_block_scales": random_weight(3, 64, 32, seed=2)[1],
        "w2_global_scales": torch.rand(3, generator=generator) + 0.1,
    }


def prepare_all(tensors):
    return prepare_experts(*tensors.values(), layout=Layout.PLAIN, name="layers.3.experts")


def test_experts_scale_w1_and_w3_apart(experts_tensors):
    prepared = prepare_all(experts_tensors)
    assert torch.equal(prepared.w13_codes, experts_tensors["w13_codes"])
    assert torch.equal(prepared.w2_codes, experts_tensors["w2_codes"])
    for expert in range(3):
        gate, up = experts_tensors["w13_global_scales"][expert].tolist()
        assert prepared.w13_row_scale[expert].tolist() == [gate] * 32 + [up] * 32
        assert (
            prepared.w2_row_scale[expert].tolist()
            == [experts_tensors["w2_global_scales"][expert].item()] * 64
        )
    for operand in (prepared.w13_row_scale, prepared.w2_row_scale):
        assert operand.dtype == torch.float32 and operand.is_contiguous()


@pytest.mark.parametrize("matrix", ["w13", "w2"])
def test_damaged_expert_scales_name_the_matrix(experts_tensors, matrix):
    experts_tensors[f"{matrix}_block_scales"].view(torch.uint8)[1, 5, 0] = 0x7F
    with pytest.raises(ValueError) as error:
        prepare_all(experts_tensors)
    assert_names(error, f"layers.3.experts.{matrix}", "[1, 5, 0]", "nan", "export the checkpoint again")


@pytest.mark.parametrize("matrix, index", [("w13", (2, 1)), ("w2", (2,))])
@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_damaged_expert_global_scales_name_the_matrix(experts_tensors, matrix, index, value):
    experts_tensors[f"{matrix}_global_scales"][index] = value
    with pytest.raises(ValueError) as error:
        prepare_all(experts_tensors)
    assert_names(error, f"layers.3.experts.{matrix}", f"got {value}", "Export it again")


@pytest.mark.parametrize("axis", ["experts", "intermediate", "hidden"])
def test_w13_and_w2_of_different_experts(experts_tensors, random_weight, axis):
    shape = {"experts": (2, 64, 32), "intermediate": (3, 64, 48), "hidden": (3, 48, 32)}[axis]
    experts_tensors["w2_codes"], experts_tensors["w2_block_scales"] = random_weight(*shape)
    with pytest.raises(ValueError) as error:
        prepare_all(experts_tensors)
    packed = (*shape[:2], shape[2] // 2)
    assert_names(
        error, "layers.3.experts", "(3, 64, 32)", str(packed), "expected w13 [E, 2I, H/2] and w2 [E, H, I/2]"
    )


@pytest.mark.parametrize("matrix, shape", [("w13", (3,)), ("w13", (2, 2)), ("w2", (2,)), ("w2", (3, 2))])
def test_expert_global_scales_of_another_shape(experts_tensors, matrix, shape):
    experts_tensors[f"{matrix}_global_scales"] = torch.ones(shape)
    with pytest.raises(ValueError) as error:
        prepare_all(experts_tensors)
    assert_names(error, f"layers.3.experts.{matrix}", "global scales", str(shape))
