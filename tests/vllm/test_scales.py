"""Scales on their way from vLLM's own loader to our operands: kept per segment, or refused; never merged."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.nn import Module, Parameter
from vllm.config import KernelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.kernels.linear.nvfp4.emulation import EmulationNvFp4LinearKernel
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

from cutedsl_nvfp4 import reference
from cutedsl_nvfp4.format import decode_e2m1
from cutedsl_nvfp4.settings import ActivationScale
from cutedsl_nvfp4.vllm.experts import CuTeDSLNvFp4Experts
from cutedsl_nvfp4.vllm.linear import CuTeDSLNvFp4LinearKernel, DequantizedGroupedLinearKernel
from cutedsl_nvfp4.vllm.scales import keep_segment_scales, require_input_scale, w13_global_scales
from tests.support.one_rank import one_rank

PREFIX = "model.layers.3.attn.fused_wqa_wkv"
EXPERTS_PREFIX = "model.layers.3.ffn.experts"
WIDTHS = [16, 32]
K = 64
NAN = float("nan")


@pytest.fixture(scope="module", autouse=True)
def _single_rank(tmp_path_factory) -> Iterator[None]:
    with one_rank(tmp_path_factory.mktemp("dist")):
        yield


@contextmanager
def building(linear_backend: str = "auto", moe_backend: str = "auto"):
    """vLLM as it is while a model is built, with these backends asked for."""
    config = VllmConfig(kernel_config=KernelConfig(linear_backend=linear_backend, moe_backend=moe_backend))
    with set_current_vllm_config(config):
        yield config


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def quantization(algo: str = "NVFP4") -> ModelOptNvFp4Config:
    return ModelOptNvFp4Config(algo, is_checkpoint_nvfp4_serialized=True)


# --- linear layers, built and loaded by vLLM ---


def fused_linear(backend: str = "auto", algo: str = "NVFP4", k: int = K) -> MergedColumnParallelLinear:
    with building(linear_backend=backend):
        return MergedColumnParallelLinear(
            k, WIDTHS, bias=False, quant_config=quantization(algo), prefix=PREFIX, params_dtype=torch.bfloat16
        )


def load(layer: Module, tensors: dict[str, torch.Tensor], global_scales, input_scales=()) -> None:
    """Hand the checkpoint's tensors to vLLM's weight loaders, one fused segment at a time."""
    for segment, rows in enumerate((slice(0, 16), slice(16, 48))):
        for name, tensor in tensors.items():
            layer.weight_loader_v2(getattr(layer, name), tensor[rows], segment)
    for name, values in (("weight_scale_2", global_scales), ("input_scale", input_scales)):
        for segment, value in enumerate(values):
            layer.weight_loader_v2(getattr(layer, name), torch.tensor(value), segment)


@pytest.fixture
def tensors(random_weight):
    codes, scales = random_weight(sum(WIDTHS), K)
    return {"weight": codes, "weight_scale": scales}


def expected_linear(tensors, global_scales, x, act_scale=None, quantized=False):
    row_scale = torch.tensor(global_scales).repeat_interleave(torch.tensor(WIDTHS))
    return reference.linear(
        x, tensors["weight"], tensors["weight_scale"], row_scale, act_scale,
        quantize_activations=quantized, out_dtype=x.dtype,
    )  # fmt: skip


@pytest.mark.parametrize("algo", ["NVFP4", "W4A16_NVFP4"])
def test_fused_segments_keep_their_scales_from_checkpoint_to_output(tensors, algo):
    layer = fused_linear(algo=algo)
    assert type(layer.quant_method.kernel) is CuTeDSLNvFp4LinearKernel
    load(layer, tensors, [0.5, 0.003], [0.01, 0.02] if algo == "NVFP4" else ())
    layer.quant_method.process_weights_after_loading(layer)
    x = gaussian(5, K)
    out = layer(x)[0]
    assert torch.equal(out, expected_linear(tensors, [0.5, 0.003], x))
    assert not torch.allclose(
        out, expected_linear(tensors, [0.5, 0.5], x), rtol=0.1
    )  # what the maximum would give
    assert layer.row_scale.tolist() == torch.tensor([0.5] * 16 + [0.003] * 32).tolist()
    left = {name for name, _ in layer.named_parameters()}
    assert left == {"weight", "weight_scale", "row_scale"}
    assert not any(hasattr(layer, name) for name in ("weight_scale_2", "weight_global_scale", "alpha"))


def test_linear_keeps_leading_dimensions_and_returns_float32_on_request(tensors):
    layer = fused_linear()
    load(layer, tensors, [0.5, 0.003], [0.01, 0.02])
    layer.quant_method.process_weights_after_loading(layer)
    x = gaussian(6, K)
    flat = layer(x)[0]
    assert torch.equal(layer(x.view(2, 3, K))[0], flat.view(2, 3, -1))
    assert layer(x[:0])[0].shape == (0, 48)
    layer.nvfp4_out_dtype = torch.float32
    assert layer(x)[0].dtype == torch.float32 and torch.equal(layer(x)[0].bfloat16(), flat)


@pytest.mark.parametrize("global_scales", [[0.5, NAN], [NAN, NAN]])
@pytest.mark.parametrize("backend", ["auto", "emulation"])
def test_weight_scale_2_that_was_never_loaded(tensors, global_scales, backend):
    layer = fused_linear(backend)
    load(layer, tensors, [value for value in global_scales if value == value], [0.01, 0.02])
    missing = sum(value != value for value in global_scales)
    with pytest.raises(ValueError) as error:
        layer.quant_method.process_weights_after_loading(layer)
    message = str(error.value)
    assert message.startswith(
        f"{PREFIX}: weight_scale_2 is missing from the checkpoint ({missing} of 2 values"
    )
    assert "quantization_config.ignore" in message


def test_weight_scale_that_was_never_loaded_names_the_layer(tensors):
    layer = fused_linear()
    load(layer, {"weight": tensors["weight"]}, [0.5, 0.5], [0.01, 0.02])
    with pytest.raises((ValueError, RuntimeError), match=r"weight_scale.*never (loaded|written)") as error:
        layer.quant_method.process_weights_after_loading(layer)
    assert PREFIX in str(error.value)


def test_negative_block_scale_from_the_loader(tensors):
    tensors["weight_scale"].view(torch.uint8)[20, 3] = 0xB8
    layer = fused_linear()
    load(layer, tensors, [0.5, 0.5], [0.01, 0.02])
    with pytest.raises(ValueError, match=rf"{PREFIX}: block scale at \[20, 3\] is -1\.0"):
        layer.quant_method.process_weights_after_loading(layer)


def test_k_that_is_not_a_multiple_of_the_group_names_the_layer():
    with pytest.raises(ValueError) as error:
        fused_linear(k=24)
    message = str(error.value)
    assert PREFIX in message and "24" in message and "multiple of 16" in message


def test_kernel_with_one_global_scale_refuses_segments_that_differ(tensors):
    layer = fused_linear("emulation")
    assert type(layer.quant_method.kernel) is EmulationNvFp4LinearKernel
    load(layer, tensors, [0.5, 0.25], [0.01, 0.01])
    with pytest.raises(ValueError) as error:
        layer.quant_method.process_weights_after_loading(layer)
    message = str(error.value)
    assert message.startswith(f"{PREFIX}: the fused segments have different global scales ([0.5, 0.25])")
    assert "EmulationNvFp4LinearKernel" in message and "--linear-backend cutedsl" in message


def test_kernel_with_one_global_scale_takes_segments_that_agree(tensors):
    """On activations that NVFP4 holds exactly, the two kernels compute the same sums."""
    layer = fused_linear("emulation")
    load(layer, tensors, [0.5, 0.5], [2.0**-5, 2.0**-5])
    layer.quant_method.process_weights_after_loading(layer)
    codes = torch.randint(0, 16, (5, K), generator=torch.Generator().manual_seed(0))
    codes[:, ::16] = 7
    x = decode_e2m1(codes, torch.bfloat16)
    expected = expected_linear(tensors, [0.5, 0.5], x, torch.tensor([2.0**-5]), quantized=True)
    torch.testing.assert_close(layer(x)[0], expected, rtol=2.0**-7, atol=0)


def test_kernel_that_needs_input_scale_refuses_a_checkpoint_without(tensors):
    layer = fused_linear("emulation")
    load(layer, tensors, [0.5, 0.5], [0.01])
    with pytest.raises(
        ValueError, match=rf"{PREFIX}: input_scale is missing from the checkpoint \(1 of 2 values"
    ):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize(
    "policy, input_scales, settled, act_scale",
    [
        ("checkpoint", [0.01, 0.02], ActivationScale.CHECKPOINT, 0.02),
        ("checkpoint", [0.01], ActivationScale.DYNAMIC, None),
        ("checkpoint", [], ActivationScale.DYNAMIC, None),
        ("dynamic", [0.01, 0.02], ActivationScale.DYNAMIC, None),
        ("warmup", [], ActivationScale.WARMUP, 1.0),
    ],
)
def test_activation_scales_under_w4a4(tensors, monkeypatch, policy, input_scales, settled, act_scale):
    monkeypatch.setenv("CUTEDSL_NVFP4_ACTIVATIONS", "nvfp4")
    monkeypatch.setenv("CUTEDSL_NVFP4_ACTIVATION_SCALE", policy)
    layer = fused_linear()
    load(layer, tensors, [0.5, 0.003], input_scales)
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.act_scales.policy is settled
    scale = None if act_scale is None else torch.tensor([act_scale])
    assert layer.act_scale is None if scale is None else torch.equal(layer.act_scale, scale)
    x = gaussian(5, K)
    assert torch.equal(layer(x)[0], expected_linear(tensors, [0.5, 0.003], x, scale, quantized=True))


def test_w4a4_of_a_weight_only_checkpoint_is_dynamic(tensors, monkeypatch):
    monkeypatch.setenv("CUTEDSL_NVFP4_ACTIVATIONS", "nvfp4")
    layer = fused_linear(algo="W4A16_NVFP4")
    load(layer, tensors, [0.5, 0.003])
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.act_scales.policy is ActivationScale.DYNAMIC


def test_observing_sees_the_input_and_answers_in_w4a16(tensors, monkeypatch):
    monkeypatch.setenv("CUTEDSL_NVFP4_ACTIVATIONS", "nvfp4")
    monkeypatch.setenv("CUTEDSL_NVFP4_ACTIVATION_SCALE", "warmup")
    layer = fused_linear()
    load(layer, tensors, [0.5, 0.003])
    layer.quant_method.process_weights_after_loading(layer)
    x = gaussian(5, K)
    layer.act_scales.start_observing(x.device)
    assert torch.equal(layer(x)[0], expected_linear(tensors, [0.5, 0.003], x))
    settled = layer.act_scales.stop_observing({"x": layer.act_scale})["x"]
    assert torch.equal(settled, x.abs().amax().float().reshape(1) / 2688)


def test_reloading_into_prepared_operands_is_refused(tensors):
    layer = fused_linear()
    load(layer, tensors, [0.5, 0.5], [0.01, 0.01])
    layer.quant_method.process_weights_after_loading(layer)
    layer.segment_global_scales = Parameter(torch.ones(2), requires_grad=False)
    with pytest.raises(
        ValueError, match=rf"{PREFIX}: reloading weights .* not supported; restart the server"
    ):
        layer.quant_method.kernel.process_weights_after_loading(layer)


def grouped_wo_a(backend: str) -> ColumnParallelLinear:
    from cutedsl_nvfp4.vllm.deepseek_v4 import require_grouped_nvfp4

    with building(linear_backend=backend):
        layer = ColumnParallelLinear(
            32, 48, bias=False, quant_config=quantization(), prefix="model.layers.3.attn.wo_a",
            params_dtype=torch.bfloat16,
        )  # fmt: skip
    layer.is_bmm, layer.bmm_batch_size = True, 3
    require_grouped_nvfp4(layer)
    return layer


@pytest.mark.parametrize("backend", ["auto", "emulation"])
def test_grouped_wo_a_is_block_diagonal_or_dequantized(random_weight, backend):
    codes, scales = random_weight(48, 32)
    layer = grouped_wo_a(backend)
    for name, tensor in (("weight", codes), ("weight_scale", scales)):
        layer.weight_loader_v2(getattr(layer, name), tensor)
    layer.weight_loader_v2(layer.weight_scale_2, torch.tensor(0.25))
    layer.weight_loader_v2(layer.input_scale, torch.tensor(0.01))
    layer.quant_method.process_weights_after_loading(layer)
    weight = reference.dequantize(codes, scales, 0.25, torch.bfloat16)
    if backend == "emulation":
        assert type(layer.quant_method.kernel) is DequantizedGroupedLinearKernel
        assert torch.equal(layer.weight, weight)
        with pytest.raises(
            RuntimeError, match=r"model\.layers\.3\.attn\.wo_a is served by vLLM's output projection"
        ):
            layer(gaussian(5, 32))
        return
    x = gaussian(5, 3 * 32)
    out = layer.quant_method.apply(layer, x, None)
    exact = torch.cat(
        [x[:, 32 * g : 32 * (g + 1)].float() @ weight[16 * g : 16 * (g + 1)].float().T for g in range(3)], 1
    )
    torch.testing.assert_close(out.float(), exact, rtol=2**-7, atol=1e-3)


# --- experts, built and loaded by vLLM ---

NUM_EXPERTS, HIDDEN, INTERMEDIATE = 8, 64, 32


def build_experts(moe_backend: str = "auto", algo: str = "NVFP4") -> Module:
    with building(moe_backend=moe_backend):
        runner = FusedMoEFactory(
            num_experts=NUM_EXPERTS, top_k=2, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE,
            params_dtype=torch.bfloat16, quant_config=quantization(algo), prefix=EXPERTS_PREFIX,
            swiglu_limit=10.0,
        )  # fmt: skip
    return runner.routed_experts


@pytest.fixture
def expert_tensors(random_weight):
    w13_codes, w13_scales = random_weight(NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN, seed=1)
    w2_codes, w2_scales = random_weight(NUM_EXPERTS, HIDDEN, INTERMEDIATE, seed=2)
    generator = torch.Generator().manual_seed(3)
    return {
        "w13_weight": w13_codes, "w13_weight_scale": w13_scales,
        "w13_weight_scale_2": torch.rand(NUM_EXPERTS, 2, generator=generator) * 0.05 + 0.001,
        "w13_input_scale": torch.full((NUM_EXPERTS, 2), 0.002),
        "w2_weight": w2_codes, "w2_weight_scale": w2_scales,
        "w2_weight_scale_2": torch.rand(NUM_EXPERTS, generator=generator) * 0.05 + 0.001,
        "w2_input_scale": torch.rand(NUM_EXPERTS, generator=generator) * 0.001 + 0.001,
    }  # fmt: skip


def load_experts(layer: Module, tensors: dict[str, torch.Tensor], skip=frozenset()) -> None:
    """Each expert's w1, w2, w3 through vLLM's loader, except any (parameter, expert, shard) in `skip`."""
    for name, tensor in tensors.items():
        parameter = getattr(layer, name)
        for expert in range(NUM_EXPERTS):
            shards = (
                zip(("w1", "w3"), tensor[expert].chunk(2))
                if name.startswith("w13")
                else [("w2", tensor[expert])]
            )
            for shard, value in shards:
                if (name, expert, shard) not in skip:
                    layer.weight_loader(
                        parameter, value.squeeze() if "scale_2" in name or "input" in name else value,
                        f"{EXPERTS_PREFIX}.{expert}.{shard}.{name.split('_', 1)[1]}", shard, expert,
                    )  # fmt: skip


def routed(layer: Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(output, topk_weights, topk_ids) of `layer` as vLLM's runner calls it."""
    scores = torch.rand(x.shape[0], NUM_EXPERTS, generator=torch.Generator().manual_seed(4))
    weights, ids = scores.topk(2, dim=-1)
    ids = ids.to(torch.int32)
    return layer.quant_method.apply(layer, x, weights, ids, None, None), weights, ids


def expected_experts(tensors, x, weights, ids, *act_scales, quantized=False):
    w13_row_scale = tensors["w13_weight_scale_2"].repeat_interleave(INTERMEDIATE, dim=1)
    w2_row_scale = tensors["w2_weight_scale_2"].unsqueeze(1).expand(-1, HIDDEN)
    return reference.experts(
        x, tensors["w13_weight"], tensors["w13_weight_scale"], w13_row_scale,
        tensors["w2_weight"], tensors["w2_weight_scale"], w2_row_scale, weights, ids, *act_scales,
        quantize_activations=quantized, swiglu_limit=10.0, out_dtype=x.dtype,
    )  # fmt: skip


@pytest.mark.parametrize("algo", ["NVFP4", "W4A16_NVFP4"])
@pytest.mark.parametrize("m", [0, 1, 6])
def test_experts_keep_w1s_and_w3s_scales_from_checkpoint_to_output(expert_tensors, algo, m):
    layer = build_experts(algo=algo)
    load_experts(layer, expert_tensors)
    layer.quant_method.process_weights_after_loading(layer)
    assert type(layer.quant_method.moe_kernel.fused_experts) is CuTeDSLNvFp4Experts
    x = gaussian(m, HIDDEN)
    out, weights, ids = routed(layer, x)
    assert torch.equal(out, expected_experts(expert_tensors, x, weights, ids))
    if m:
        w1_for_both = expert_tensors | {
            "w13_weight_scale_2": expert_tensors["w13_weight_scale_2"][:, :1].expand(-1, 2)
        }
        wrong = expected_experts(w1_for_both, x, weights, ids)
        assert not torch.allclose(out, wrong, rtol=0.1, atol=0.1 * out.abs().max().item())


@pytest.mark.parametrize("policy", ["checkpoint", "dynamic", "warmup"])
def test_experts_activation_scales_under_w4a4(expert_tensors, monkeypatch, policy):
    monkeypatch.setenv("CUTEDSL_NVFP4_ACTIVATIONS", "nvfp4")
    monkeypatch.setenv("CUTEDSL_NVFP4_ACTIVATION_SCALE", policy)
    layer = build_experts()
    load_experts(layer, expert_tensors)
    layer.quant_method.process_weights_after_loading(layer)
    scales = {
        "checkpoint": (torch.tensor([0.002]), expert_tensors["w2_input_scale"]),
        "dynamic": (None, None),
        "warmup": (torch.ones(1), torch.ones(NUM_EXPERTS)),
    }[policy]
    x = gaussian(6, HIDDEN)
    out, weights, ids = routed(layer, x)
    assert torch.equal(out, expected_experts(expert_tensors, x, weights, ids, *scales, quantized=True))


def test_observing_experts_sees_both_inputs(expert_tensors, monkeypatch):
    monkeypatch.setenv("CUTEDSL_NVFP4_ACTIVATIONS", "nvfp4")
    monkeypatch.setenv("CUTEDSL_NVFP4_ACTIVATION_SCALE", "warmup")
    layer = build_experts()
    load_experts(layer, expert_tensors)
    layer.quant_method.process_weights_after_loading(layer)
    x = gaussian(6, HIDDEN)
    layer.act_scales.start_observing(x.device)
    out, weights, ids = routed(layer, x)
    assert torch.equal(out, expected_experts(expert_tensors, x, weights, ids))
    of_input, of_experts = layer.act_scales.observed
    assert of_input == x.abs().amax()
    assert set((of_experts > 0).nonzero().flatten().tolist()) == set(ids.flatten().tolist())


@pytest.mark.parametrize(
    "skipped, message",
    [
        (
            ("w13_weight_scale_2", 5, "w1"),
            r"w1 or w3 weight_scale_2 is missing from the checkpoint \(1 of 16",
        ),
        (
            ("w13_weight_scale_2", 5, "w3"),
            r"w1 or w3 weight_scale_2 is missing from the checkpoint \(1 of 16",
        ),
        (("w2_weight_scale_2", 5, "w2"), r"w2 weight_scale_2 is missing from the checkpoint \(1 of 8"),
    ],
)
def test_expert_without_a_global_scale(expert_tensors, skipped, message):
    layer = build_experts()
    load_experts(layer, expert_tensors, skip={skipped})
    with pytest.raises(ValueError, match=rf"{EXPERTS_PREFIX}.*: {message}"):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("name", ["w13_weight_scale", "w2_weight_scale"])
def test_expert_block_scales_start_as_nan_so_that_a_missing_one_is_found(expert_tensors, name):
    layer = build_experts()
    unmarked = int((~getattr(layer, name).float().isnan()).sum())
    assert unmarked == 0, f"{unmarked} values of {name} start as whatever the memory held"
    load_experts(layer, expert_tensors, skip={(name, 5, shard) for shard in ("w1", "w2", "w3")})
    with pytest.raises(ValueError, match=rf"{EXPERTS_PREFIX}.*block scale at \[5, 0, 0\] is nan"):
        layer.quant_method.process_weights_after_loading(layer)


def test_experts_without_input_scales_are_dynamic(expert_tensors, monkeypatch):
    monkeypatch.setenv("CUTEDSL_NVFP4_ACTIVATIONS", "nvfp4")
    layer = build_experts()
    load_experts(layer, expert_tensors, skip={("w2_input_scale", 5, "w2")})
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.act_scales.policy is ActivationScale.DYNAMIC
    assert layer.act_scale_13 is None and layer.act_scale_2 is None


# --- the functions themselves, for kernels this machine cannot run ---


class OneScaleKernel:
    pass


class RowScaleKernel:
    scales_each_row = True


class Stub(Module):
    """A layer as the scale functions see it."""

    def __init__(self, kernel: object = None, **tensors: torch.Tensor):
        super().__init__()
        self.prefix = PREFIX
        self.quant_method = type("Method", (), {"kernel": kernel})()
        for name, tensor in tensors.items():
            self.register_parameter(name, Parameter(tensor, requires_grad=False))


def test_keep_segment_scales_copies():
    layer = Stub(RowScaleKernel(), weight_scale_2=torch.tensor([0.5, 0.25]))
    keep_segment_scales(layer)
    layer.weight_scale_2.fill_(9)
    assert layer.segment_global_scales.tolist() == [0.5, 0.25]


def test_keep_segment_scales_leaves_a_single_scale_to_the_kernel():
    layer = Stub(OneScaleKernel(), weight_scale_2=torch.tensor([0.5, 0.5]))
    keep_segment_scales(layer)
    assert not hasattr(layer, "segment_global_scales")
    with pytest.raises(ValueError, match=rf"{PREFIX}: the fused segments .*\[0\.5, 0\.25\].*OneScaleKernel"):
        keep_segment_scales(Stub(OneScaleKernel(), weight_scale_2=torch.tensor([0.5, 0.25])))


def test_require_input_scale_asks_only_kernels_that_need_it():
    require_input_scale(Stub(RowScaleKernel(), input_scale=torch.tensor([NAN])))
    require_input_scale(Stub(OneScaleKernel(), input_scale=torch.tensor([0.5])))
    with pytest.raises(ValueError, match=f"{PREFIX}: input_scale is missing from the checkpoint"):
        require_input_scale(Stub(OneScaleKernel(), input_scale=torch.tensor([0.5, NAN])))


def test_w13_global_scales_by_what_the_experts_class_can_scale():
    differing, equal = torch.tensor([[0.5, 0.5], [0.5, 0.25]]), torch.tensor([[0.5, 0.5], [2.0, 2.0]])
    w2 = torch.ones(2)
    assert torch.equal(
        w13_global_scales(Stub(w13_weight_scale_2=differing, w2_weight_scale_2=w2), RowScaleKernel, True),
        differing,
    )
    got = w13_global_scales(Stub(w13_weight_scale_2=equal, w2_weight_scale_2=w2), OneScaleKernel, True)
    assert got.tolist() == [0.5, 2.0] and got.is_contiguous()
    ungated = Stub(w13_weight_scale_2=torch.tensor([[0.5], [2.0]]), w2_weight_scale_2=w2)
    assert w13_global_scales(ungated, OneScaleKernel, False).tolist() == [0.5, 2.0]
    with pytest.raises(ValueError) as error:
        w13_global_scales(Stub(w13_weight_scale_2=differing, w2_weight_scale_2=w2), OneScaleKernel, True)
    message = str(error.value)
    assert message.startswith(f"{PREFIX}: w1 and w3 of expert 1 have different global scales ([0.5, 0.25])")
    assert "OneScaleKernel" in message and "--moe-backend cutedsl" in message


@pytest.mark.parametrize("kernel", [OneScaleKernel, RowScaleKernel])
def test_w13_global_scales_refuse_what_was_never_loaded(kernel):
    whole = {"w13_weight_scale_2": torch.ones(2, 2), "w2_weight_scale_2": torch.ones(2)}
    for name, message in (
        ("w13_weight_scale_2", "w1 or w3 weight_scale_2"),
        ("w2_weight_scale_2", "w2 weight_scale_2"),
    ):
        damaged = whole[name].clone()
        damaged.view(-1)[-1] = NAN
        with pytest.raises(ValueError, match=rf"{PREFIX}: {message} is missing from the checkpoint \(1 of"):
            w13_global_scales(Stub(**(whole | {name: damaged})), kernel, True)
