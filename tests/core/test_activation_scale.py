"""activation_scale.py: three policies, the guard on the checkpoint's scale, and what is refused."""

import logging

import pytest
import torch

from cutedsl_nvfp4.activation_scale import LOOSE, ActivationScales
from cutedsl_nvfp4.settings import ActivationScale

NAME = "model.layers.3.attn.wq_a"
LOGGER = "cutedsl_nvfp4.activation_scale"
CPU = torch.device("cpu")


def warmed(policy: ActivationScale, scale: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    """The scale that `policy` settles on for checkpoint scale `scale` after seeing `inputs`."""
    scales = ActivationScales.from_checkpoint(policy, {"x": scale}, NAME)
    scales.start_observing(CPU)
    for x in inputs:
        scales.observe(0, x)
    return scales.stop_observing({"x": scale})["x"]


# --- where scales come from ---


@pytest.mark.parametrize("policy", list(ActivationScale))
def test_policy_is_kept_where_the_checkpoint_has_scales(policy):
    scales = ActivationScales.from_checkpoint(policy, {"x": torch.tensor([0.5])}, NAME)
    assert scales.policy is policy and scales.inputs == ("x",)


@pytest.mark.parametrize("missing", [None, torch.tensor([float("nan")]), torch.tensor([0.5, float("nan")])])
def test_checkpoint_without_input_scale_is_dynamic_and_says_so(missing, caplog):
    with caplog.at_level(logging.INFO, LOGGER):
        scales = ActivationScales.from_checkpoint(
            ActivationScale.CHECKPOINT, {"w13 input": torch.tensor([0.5]), "w2 input": missing}, NAME
        )
    assert scales.policy is ActivationScale.DYNAMIC
    assert caplog.messages == [f"{NAME}: checkpoint has no input_scale for w2 input; using dynamic scales"]


@pytest.mark.parametrize("policy", [ActivationScale.WARMUP, ActivationScale.DYNAMIC])
@pytest.mark.parametrize("scale", [None, torch.tensor([float("nan")]), torch.tensor([0.0])])
def test_other_policies_do_not_read_the_checkpoints_scale(policy, scale, caplog):
    with caplog.at_level(logging.INFO, LOGGER):
        assert ActivationScales.from_checkpoint(policy, {"x": scale}, NAME).policy is policy
    assert not caplog.messages


@pytest.mark.parametrize("value", [0.0, -0.5, float("inf"), float("-inf")])
def test_unusable_checkpoint_scale_is_refused(value):
    with pytest.raises(ValueError) as error:
        ActivationScales.from_checkpoint(ActivationScale.CHECKPOINT, {"x": torch.tensor([0.5, value])}, NAME)
    message = str(error.value)
    assert message.startswith(f"{NAME}: input_scale of x must be finite and positive, got [0.5, {value}]")
    assert "CUTEDSL_NVFP4_ACTIVATION_SCALE=dynamic" in message


# --- checkpoint: the guard ---


def test_checkpoint_scale_that_suffices_is_left_alone(caplog):
    scale = torch.tensor([1.0])
    with caplog.at_level(logging.WARNING, LOGGER):
        settled = warmed(ActivationScale.CHECKPOINT, scale, torch.tensor([[2688.0, -2688.0]]))
    assert torch.equal(settled, scale) and not caplog.messages


def test_checkpoint_scale_that_would_saturate_is_raised_and_reported(caplog):
    with caplog.at_level(logging.WARNING, LOGGER):
        settled = warmed(
            ActivationScale.CHECKPOINT,
            torch.tensor([1.0]),
            torch.tensor([[5.0, -5376.0]]),
            torch.tensor([[7.0]]),
        )
    assert settled.tolist() == [2.0]
    assert len(caplog.records) == 1 and caplog.records[0].levelno == logging.WARNING
    message = caplog.messages[0]
    assert message.startswith(f"{NAME}: input_scale of x is 1, but the warm-up text needs 2, 2 times as much")
    assert "saturate" in message and "recalibrate" in message


def test_guard_raises_only_the_experts_that_need_it():
    settled = warmed(ActivationScale.CHECKPOINT, torch.tensor([0.5, 3.0, 2.0]), torch.tensor([[5376.0]]))
    assert settled.tolist() == [2.0, 3.0, 2.0]


def test_checkpoint_scale_survives_a_warmup_that_saw_nothing():
    assert warmed(ActivationScale.CHECKPOINT, torch.tensor([0.25])).tolist() == [0.25]
    assert warmed(ActivationScale.CHECKPOINT, torch.tensor([0.25]), torch.zeros(2, 4)).tolist() == [0.25]


def settled_experts(scale: list[float], rows: list[float], experts: list[int]) -> list[float]:
    """The scales of w2's input, one per expert, after expert experts[i] saw an amax of rows[i] * 2688."""
    exported = {"w13 input": torch.ones(1), "w2 input": torch.tensor(scale)}
    scales = ActivationScales.from_checkpoint(ActivationScale.CHECKPOINT, exported, NAME)
    scales.start_observing(CPU)
    scales.observe(0, torch.tensor([[2688.0]]))
    x = torch.tensor(rows).unsqueeze(1) * torch.tensor([[2688.0, -1344.0]])
    scales.observe(1, x, torch.tensor(experts))
    return scales.stop_observing(exported)["w2 input"].tolist()


def test_guard_compares_every_expert_with_what_it_saw_itself(caplog):
    with caplog.at_level(logging.WARNING, LOGGER):
        settled = settled_experts([1.0, 1.0, 4.0, 2.0], [3.0, 0.5, 3.5, 2.5, 0.1], [0, 1, 2, 3, 0])
    assert settled == [3.0, 1.0, 4.0, 2.5]
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(
        f"{NAME}: input_scale of w2 input of expert 0, the worst of 2 too small ones (0, 3), is 1, "
        f"but the warm-up text needs 3, 3 times as much"
    )


def test_experts_that_suffice_are_not_reported(caplog):
    with caplog.at_level(logging.WARNING, LOGGER):
        assert settled_experts([3.0, 1.0], [3.0, 0.5], [0, 1]) == [3.0, 1.0]
    assert not caplog.messages


def test_long_lists_of_experts_are_cut(caplog):
    settled_experts([1.0] * 12, [2.0] * 12, list(range(12)))
    assert "the worst of 12 too small ones (0, 1, 2, 3, 4, 5, 6, 7, ...)" in caplog.text


def test_scales_the_text_did_not_reach_are_counted(caplog):
    with caplog.at_level(logging.INFO, LOGGER):
        assert settled_experts([1.0, 0.25, 1.0], [0.5, 0.0], [0, 2]) == [1.0, 0.25, 1.0]
    assert [record.levelno for record in caplog.records] == [logging.INFO]
    assert caplog.messages[0].startswith(f"{NAME}: the warm-up text reached 1 of 3 scales of w2 input")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_activations_of_one_expert_are_refused(value):
    with pytest.raises(
        ValueError, match=rf"{NAME}: the warm-up text gave non-finite activations at w2 input"
    ):
        settled_experts([1.0, 1.0], [0.5, value], [0, 1])


@pytest.mark.parametrize("factor", [LOOSE / 2, LOOSE, 2 * LOOSE, 2688.0**2])
def test_a_scale_far_too_large_is_reported(factor, caplog):
    """2688 / amax where amax / 2688 is meant, for example."""
    scale = torch.tensor([factor])
    with caplog.at_level(logging.WARNING, LOGGER):
        assert torch.equal(warmed(ActivationScale.CHECKPOINT, scale, torch.tensor([[2688.0]])), scale)
    if factor > LOOSE:
        assert len(caplog.messages) == 1
        assert caplog.messages[0].startswith(
            f"{NAME}: input_scale of x is {factor:.6g}, {factor:.3g} times what"
        )
        assert "reciprocal" in caplog.messages[0]
    else:
        assert not caplog.messages


def test_a_twin_shares_what_it_has_seen():
    own, twin = (ActivationScales(ActivationScale.WARMUP, ("x",), NAME) for _ in range(2))
    own.observe_what(twin)  # neither observes: nothing happens
    own.start_observing(CPU)
    own.observe_what(twin)
    twin.start_observing(CPU)
    twin.observe(0, torch.tensor([[2688.0]]))
    own.observe_what(twin)
    assert own.stop_observing({"x": torch.ones(1)})["x"].tolist() == [1.0]


# --- warmup ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_warmup_takes_the_largest_magnitude_seen(dtype):
    inputs = [torch.tensor([[1.0, -1344.0]]), torch.zeros(0, 2), torch.tensor([[8.0, 0.0]])]
    settled = warmed(ActivationScale.WARMUP, torch.ones(1), *(x.to(dtype) for x in inputs))
    assert settled.dtype == torch.float32 and settled.tolist() == [0.5]


def test_warmup_lowers_a_scale_too():
    assert warmed(ActivationScale.WARMUP, torch.tensor([9.0, 9.0]), torch.tensor([[2688.0]])).tolist() == [
        1.0,
        1.0,
    ]


def test_warmup_keeps_inputs_apart():
    scales = ActivationScales(ActivationScale.WARMUP, ("w13 input", "w2 input"), NAME)
    scales.start_observing(CPU)
    scales.observe(1, torch.tensor([[2688.0]]))
    scales.observe(0, torch.tensor([[1344.0]]))
    settled = scales.stop_observing({"w13 input": torch.ones(1), "w2 input": torch.ones(3)})
    assert settled["w13 input"].tolist() == [0.5] and settled["w2 input"].tolist() == [1.0] * 3


@pytest.mark.parametrize("inputs", [[], [torch.zeros(3, 4)], [torch.zeros(0, 4)]])
def test_warmup_refuses_an_amax_of_zero(inputs):
    with pytest.raises(ValueError) as error:
        warmed(ActivationScale.WARMUP, torch.ones(1), *inputs)
    message = str(error.value)
    assert message.startswith(f"{NAME}: the warm-up text gave x an amax of 0")
    assert "CUTEDSL_NVFP4_ACTIVATION_SCALE=dynamic" in message


@pytest.mark.parametrize("policy", [ActivationScale.WARMUP, ActivationScale.CHECKPOINT])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_activations_are_refused_under_every_policy(policy, value):
    with pytest.raises(
        ValueError, match=rf"{NAME}: the warm-up text gave non-finite activations at x;.*damaged"
    ):
        warmed(policy, torch.ones(1), torch.tensor([[1.0, value]]), torch.tensor([[1.0, 2.0]]))


# --- observing ---


def test_observing_ends_with_stop():
    scales = ActivationScales(ActivationScale.WARMUP, ("x",), NAME)
    scales.observe(0, torch.tensor([[9e9]]))  # not observing yet
    for amax in (2688.0, 1344.0):
        scales.start_observing(CPU)
        scales.observe(0, torch.tensor([[amax]]))
        assert scales.stop_observing({"x": torch.ones(1)})["x"].tolist() == [amax / 2688]
        scales.observe(0, torch.tensor([[9e9]]))
    with pytest.raises(AssertionError, match=f"{NAME}: stop_observing without start_observing"):
        scales.stop_observing({"x": torch.ones(1)})
