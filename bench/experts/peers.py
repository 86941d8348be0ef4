"""The experts' peers: how each prepares a layer and is called.

A peer gives `prepare(case, w13, w2, global_scale) -> weights`, `route(case, ids, weights) -> routing` (not
timed) and `call(x, weights, routing, topk_weights) -> out [M, H]`. One whose package is missing raises
ImportError in its constructor; the bench names it in its output. What a peer's call leaves out is in its
docstring. One that `compiles` does so at its first call, for bench/warm.py.
"""

import json

import torch

from bench import peers
from bench.shapes import ExpertCase
from cutedsl_nvfp4.reference import dequantize, swiglu

LIMIT = 10.0


class GroupedBf16:
    """bf16 weights through torch's grouped GEMM; sorting the pairs by expert is not timed."""

    name = "grouped_mm_bf16"
    compiles = False

    def prepare(self, case: ExpertCase, w13, w2, global_scale: float):
        def dense(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
            parts = [
                dequantize(c, s, global_scale, torch.bfloat16) for c, s in zip(codes, scales, strict=True)
            ]
            return torch.stack(parts).transpose(1, 2)  # [E, K, N], K-major

        return dense(*w13), dense(*w2)

    def route(self, case: ExpertCase, ids: torch.Tensor, weights):
        local = torch.where(ids < case.experts, ids, case.experts).flatten().long()
        order = local.argsort(stable=True)
        order = order[local[order] < case.experts]
        counts = torch.bincount(local, minlength=case.experts + 1)[: case.experts]
        return order, order // case.topk, counts.cumsum(0).to(torch.int32)

    def call(self, x: torch.Tensor, weights, routing, topk_weights: torch.Tensor) -> torch.Tensor:
        order, tokens, ends = routing
        both = torch._grouped_mm(x[tokens], weights[0], offs=ends)
        gate, up = both.chunk(2, dim=-1)
        y = torch._grouped_mm(swiglu(gate, up, LIMIT), weights[1], offs=ends)
        y = y * topk_weights.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(x, dtype=torch.float32).index_add_(0, tokens, y.float()).to(x.dtype)


class Humming(peers.Humming):
    """Its indexed GEMMs and activation, as vLLM calls them without expert parallelism.

    Aligning the routing and the weighted sum, which vLLM's own kernels do, are left out: its real time is longer.
    It is given its own choice of tiles for the number of pairs at hand, and does not compile those for others.
    """

    def __init__(self):
        from humming.config import GemmType
        from humming.forward import may_process_input
        from humming.testing.data import generate_moe_tensors

        super().__init__()
        self._activate, self._align, self._indexed = may_process_input, generate_moe_tensors, GemmType.INDEXED
        self._compute = json.dumps(
            {"use_batch_invariant": False, "use_f16_accum": False, "gemm_type": GemmType.INDEXED.value}
        )
        self._swiglu = (
            f"[](float a, float b) {{ const float g = fminf(a, {LIMIT}f); "
            f"return g / (1.f + expf(-g)) * fmaxf(fminf(b, {LIMIT}f), -{LIMIT}f); }}(a, b)"
        )

    def prepare(self, case: ExpertCase, w13, w2, global_scale: float):
        layers = []
        for codes, scales in (w13, w2):
            config, prepared, _ = self._transformed(codes, scales, global_scale)
            layers.append((config, prepared, self._heuristics(layer_config=config, gemm_type=self._indexed)))
        return layers

    def route(self, case: ExpertCase, ids: torch.Tensor, weights):
        pairs = -(-ids.numel() * case.experts // case.known)
        routing = []
        for _, _, tuning in weights:
            tiles = next(config for low, high, config in tuning if low < pairs <= high)
            block = tiles["block_shape"][0]
            _, _, sorted_ids, expert_ids, padded = self._align(ids, case.experts, self._indexed, block)
            routing.append(
                {
                    "sorted_ids": sorted_ids,
                    "expert_ids": expert_ids,
                    "num_tokens_padded": padded,
                    "compute_config": self._compute,
                    "tuning_config": json.dumps(tiles),
                    "valid_shape_m": pairs,
                }
            )
        return ids.shape[1], routing

    def call(self, x: torch.Tensor, weights, routing, topk_weights: torch.Tensor) -> torch.Tensor:
        topk, kwargs = routing
        both = self._product(x, weights[0], kwargs[0], topk, x.shape[0] * topk)
        config = weights[1][0]
        h = torch.empty(both.shape[0], both.shape[1] // 2, dtype=x.dtype, device=x.device)
        h, _, _ = self._activate(
            config,
            inputs=both,
            outputs=h,
            activation_type="binary_split",
            activation_impl=self._swiglu,
        )
        return self._product(h, weights[1], kwargs[1], 1, h.shape[0])

    def _product(self, x: torch.Tensor, layer, kwargs: dict, topk: int, rows: int) -> torch.Tensor:
        config, tensors, _ = layer
        out = torch.empty(rows, config.shape_n - config.pad_shape_n, dtype=x.dtype, device=x.device)
        return self._forward(
            config,
            inputs=x,
            weight=tensors["weight"],
            weight_scale=tensors.get("weight_scale"),
            weight_scale_2=tensors.get("weight_scale_2"),
            outputs=out,
            locks=self._locks,
            top_k=topk,
            **kwargs,
        )

    @staticmethod
    def finish(y: torch.Tensor, ids: torch.Tensor, topk_weights: torch.Tensor, case: ExpertCase):
        """The sum that `call` leaves out, for the check of its result."""
        y = y.view(*ids.shape, -1).float() * topk_weights.unsqueeze(-1)
        return torch.where((ids < case.experts).unsqueeze(-1), y, 0).sum(1)


class Marlin(peers.Marlin):
    """Its MoE, whole, called as vLLM's MarlinExperts calls it."""

    def __init__(self):
        from vllm import _custom_ops
        from vllm.model_executor.layers.fused_moe.activation import ApplyMoEActivationConfig, MoEActivation
        from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
        from vllm.model_executor.layers.quantization.utils.marlin_utils_fp4 import (
            prepare_nvfp4_moe_layer_for_marlin,
        )
        from vllm.scalar_type import scalar_types

        super().__init__()
        self._ops = _custom_ops
        self._prepare, self._run = prepare_nvfp4_moe_layer_for_marlin, fused_marlin_moe
        self._activation, self._type = MoEActivation.SILU, scalar_types.float4_e2m1f.id
        self._limit = ApplyMoEActivationConfig(clamp_limit=LIMIT)

    def prepare(self, case: ExpertCase, w13, w2, global_scale: float):
        from types import SimpleNamespace

        layer = SimpleNamespace(
            num_experts=case.experts,
            hidden_size=case.hidden,
            intermediate_size_per_partition=case.intermediate,
            params_dtype=torch.bfloat16,
        )
        scale = torch.full((case.experts,), global_scale, device=w13[0].device)
        with self._context():
            return self._prepare(
                layer,
                w13[0].clone(),
                w13[1].clone(),
                scale.clone(),
                w2[0].clone(),
                w2[1].clone(),
                scale,
                True,
            )

    def route(self, case: ExpertCase, ids: torch.Tensor, weights):
        if case.known == case.experts:
            return ids, None
        expert_map = torch.full((case.known,), -1, dtype=torch.int32, device=ids.device)
        expert_map[: case.experts] = torch.arange(case.experts, dtype=torch.int32, device=ids.device)
        return ids, expert_map

    def call(self, x: torch.Tensor, weights, routing, topk_weights: torch.Tensor) -> torch.Tensor:
        ids, expert_map = routing
        a, a_scale, a_global, b, b_scale, b_global = weights
        return self._run(
            x,
            a,
            b,
            None,
            None,
            a_scale,
            b_scale,
            topk_weights,
            ids,
            self._type,
            global_scale1=a_global,
            global_scale2=b_global,
            activation=self._activation,
            moe_sum=self._sum,
            expert_map=expert_map,
            global_num_experts=-1 if expert_map is None else expert_map.shape[0],
            workspace=self._locks,
            activation_config=self._limit,
        )

    def _sum(self, rows: torch.Tensor, out: torch.Tensor, ids: torch.Tensor, expert_map) -> torch.Tensor:
        self._ops.moe_sum(rows, out, *(() if expert_map is None else (ids, expert_map)))
        return out


EXPERT_PEERS = (Humming, Marlin, GroupedBf16)
