"""CuTeDSLNvFp4Experts: vLLM's NVFP4 mixture of experts on torch.ops.cutedsl.nvfp4_experts."""

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch.nn import Module, Parameter
from vllm import envs
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    FusedMoEQuantConfig,
    RoutingMethodType,
)
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    QuantKey,
    kNvfp4Dynamic,
    kNvfp4Static,
)
from vllm.model_executor.utils import replace_parameter

from .. import ops, reference, settings, support  # noqa: F401  ops registers torch.ops.cutedsl
from ..activation_scale import ActivationScales
from ..prepare import PreparedExperts, plain_experts, prepare_experts
from .backend import W2_INPUT, W13_INPUT, current_support, refuse_second_preparation
from .refusals import refuse_unsupported


class CuTeDSLNvFp4Experts(mk.FusedMoEExpertsModular):
    """First in vLLM's NVFP4 MoE list wherever this build has a kernel; standard activation format."""

    scales_each_row = True  # w1 and w3 keep their own global scale (scales.py)

    def __init__(self, moe_config: FusedMoEConfig, quant_config: FusedMoEQuantConfig):
        super().__init__(moe_config, quant_config)
        vllm_config = get_current_vllm_config_or_none()
        if vllm_config is not None:
            refuse_unsupported(vllm_config, type(self).__name__, current_support(support.experts).layout)
        self.support = current_support(support.experts)
        self.layout = str(self.support.layout)  # a plain string: what torch.compile hands to the op
        self.quantize_activations = support.quantizes_activations(self.support)
        self.batch_invariant = envs.VLLM_BATCH_INVARIANT and self._supports_batch_invariance()
        self.layer: Module | None = None

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def is_supported_config(
        cls: type[mk.FusedMoEExperts],  # noqa: PLW0211
        moe_config: FusedMoEConfig,
        weight_key: QuantKey | None,
        activation_key: QuantKey | None,
        activation_format: mk.FusedMoEActivationFormat,
    ) -> tuple[bool, str | None]:
        found = current_support(support.experts)
        if not found:
            return False, found.reason
        return mk.FusedMoEExperts.is_supported_config(
            cls, moe_config, weight_key, activation_key, activation_format
        )

    @staticmethod
    def _supports_current_device() -> bool:
        return bool(current_support(support.experts))

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation is MoEActivation.SILU

    @staticmethod
    def _supports_quant_scheme(weight_key: QuantKey | None, activation_key: QuantKey | None) -> bool:
        return weight_key == kNvfp4Static and activation_key in (kNvfp4Dynamic, None)

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: FusedMoEParallelConfig) -> bool:
        return True

    @staticmethod
    def _supports_batch_invariance() -> bool:
        return current_support(support.experts).batch_invariant

    @staticmethod
    def _supports_routing_method(
        routing_method: RoutingMethodType, weight_key: QuantKey | None, activation_key: QuantKey | None
    ) -> bool:
        return True  # routing is done before; the op takes ids and weights

    def process_weights_after_loading(self, layer: Module) -> None:
        """Checkpoint parameters of `layer` -> operands; all experts at once."""
        name = layer.layer_name
        refuse_second_preparation(layer, name)
        prepared = prepare_experts(
            layer.w13_weight.data, layer.w13_weight_scale.data, layer.w13_weight_scale_2.data,
            layer.w2_weight.data, layer.w2_weight_scale.data, layer.w2_weight_scale_2.data,
            layout=self.support.layout, name=name,
        )  # fmt: skip
        replace_parameter(layer, "w13_weight", prepared.w13_codes)
        replace_parameter(layer, "w13_weight_scale", prepared.w13_block_scales)
        replace_parameter(layer, "w2_weight", prepared.w2_codes)
        replace_parameter(layer, "w2_weight_scale", prepared.w2_block_scales)
        layer.w13_row_scale = Parameter(prepared.w13_row_scale, requires_grad=False)
        layer.w2_row_scale = Parameter(prepared.w2_row_scale, requires_grad=False)
        layer.act_scales = layer.act_scale_13 = layer.act_scale_2 = None
        if self.quantize_activations:
            self._prepare_activation_scales(layer, name)
        self.layer = layer

    def _prepare_activation_scales(self, layer: Module, name: str) -> None:
        """One scale for the input of w13 (every expert reads the same rows), one per expert for w2's."""
        scales = {
            W13_INPUT: layer.w13_input_scale.data.float().amax().reshape(1),
            W2_INPUT: layer.w2_input_scale.data.float().reshape(-1),
        }
        layer.act_scales = ActivationScales.from_checkpoint(settings.activation_scale(), scales, name)
        if layer.act_scales.policy is settings.ActivationScale.DYNAMIC:
            return
        if layer.act_scales.policy is settings.ActivationScale.WARMUP:
            scales = {key: torch.ones_like(scale) for key, scale in scales.items()}
        layer.act_scale_13 = Parameter(scales[W13_INPUT], requires_grad=False)
        layer.act_scale_2 = Parameter(scales[W2_INPUT], requires_grad=False)

    def _plain(self, operands: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The op's operands as reference.experts takes them: weights as in the checkpoint, scales copied."""
        x, *weights, topk_weights, topk_ids = operands
        w13_codes, w13_scales, w2_codes, w2_scales = plain_experts(
            PreparedExperts(*weights, self.support.layout)
        )
        return x, w13_codes, w13_scales, weights[2], w2_codes, w2_scales, weights[5], topk_weights, topk_ids

    def moe_problem_size(
        self, a1: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, topk_ids: torch.Tensor
    ) -> tuple[int, int, int, int, int]:
        """(E, M, 2I, H, T): not to be read off packed weights."""
        assert self.layer is not None, "experts called before their weights were prepared"
        experts, two_i = self.layer.w13_row_scale.shape
        return experts, a1.shape[0], two_i, a1.shape[1], topk_ids.shape[1]

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        activation: MoEActivation,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        return (0,), (0,), (M, K)

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        return TopKWeightAndReduceNoOP()

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        layer = self.layer
        assert layer is not None, "experts called before their weights were prepared"
        if apply_router_weight_on_input:
            topk_weights = torch.ones_like(topk_weights)  # vLLM already multiplied them into hidden_states
        operands = (
            hidden_states, w1, layer.w13_weight_scale, layer.w13_row_scale,
            w2, layer.w2_weight_scale, layer.w2_row_scale, topk_weights, topk_ids,
        )  # fmt: skip
        limit = self.quant_config.gemm1_clamp_limit
        if layer.act_scales is not None and layer.act_scales.observed is not None:
            # The op does not show its intermediate; the reference does.
            result = reference.experts(
                *self._plain(operands), expert_map=expert_map, swiglu_limit=limit, out_dtype=output.dtype,
                observe=layer.act_scales.observe,
            )  # fmt: skip
        else:
            result = torch.ops.cutedsl.nvfp4_experts(
                *operands, layer.act_scale_13, layer.act_scale_2, expert_map,
                self.quantize_activations, limit, output.dtype, self.layout, self.batch_invariant,
            )  # fmt: skip
        output.copy_(result)
