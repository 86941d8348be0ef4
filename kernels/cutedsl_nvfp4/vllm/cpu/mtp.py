"""DeepSeek-V4's MTP draft for vLLM's CPU build, which has none: after vLLM's own for NVIDIA GPUs, in torch.

Token t of a step holds the embedding of the token after it, and the model's hyper-connection streams at it; the logits
are of the token after that. models/deepseek_v4/cpu/mtp.py hands on `DeepSeekV4MTP`.
"""

from collections.abc import Iterable

import torch
from torch.nn import Module, ModuleDict, Parameter
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mhc import HCHeadOp
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.deepseek_mtp import SharedHead
from vllm.model_executor.models.utils import maybe_prefix
from vllm.models.deepseek_v4.cpu.model import DeepseekV4DecoderLayer, DeepseekV4Model

from ...checkpoint.names import draft_index
from ..draft import DraftNames, with_stored_format


class DraftLayer(Module):
    """One layer of the head: a layer of the model, and the way in and out of it."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config = vllm_config.speculative_config.draft_model_config.hf_config
        self.hidden_size, self.hc_mult = config.hidden_size, config.hc_mult
        self.eps, self.hc_eps = config.rms_norm_eps, config.hc_eps
        self.enorm = RMSNorm(self.hidden_size, self.eps)
        self.hnorm = RMSNorm(self.hidden_size, self.eps)
        self.e_proj, self.h_proj = (
            ReplicatedLinear(
                self.hidden_size,
                self.hidden_size,
                bias=False,
                return_bias=False,
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.{name}",
            )
            for name in ("e_proj", "h_proj")
        )
        for name, shape in (
            ("fn", (self.hc_mult, self.hc_mult * self.hidden_size)), ("base", (self.hc_mult,)), ("scale", (1,)),
        ):  # fmt: skip
            setattr(
                self,
                f"hc_head_{name}",
                Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False),
            )
        self.hc_head = HCHeadOp()
        self.shared_head = SharedHead(config=config, prefix=prefix, quant_config=vllm_config.quant_config)
        self.mtp_block = DeepseekV4DecoderLayer(vllm_config, prefix)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        streams: torch.Tensor,
        embeddings: torch.Tensor,
    ) -> torch.Tensor:
        """streams [T, hc_mult * H], embeddings [T, H] -> streams after this layer, [T, hc_mult * H]."""
        embeddings = torch.where(
            (positions == 0).unsqueeze(-1), 0, embeddings
        )  # the first token predicts none
        x = self.h_proj(self.hnorm(streams.reshape(-1, self.hidden_size))).view(
            -1, self.hc_mult, self.hidden_size
        )
        x = x + self.e_proj(self.enorm(embeddings)).unsqueeze(-2)
        x, residual, post_mix, res_mix = self.mtp_block(x, positions, input_ids)
        if residual is not None:
            x = self.mtp_block.hc_post(x, residual, post_mix, res_mix)
        return x.flatten(1)

    def last_hidden(self, streams: torch.Tensor) -> torch.Tensor:
        """streams [T, hc_mult * H] -> what the model's head takes, [T, H]."""
        hidden = self.hc_head(
            streams.view(-1, self.hc_mult, self.hidden_size),
            self.hc_head_fn, self.hc_head_scale, self.hc_head_base, self.eps, self.hc_eps,
        )  # fmt: skip
        return self.shared_head(hidden)


class Draft(Module):
    """The layers of the head. vLLM puts the target's embedding and head in the place of its own."""

    is_fused_shared_expert_enabled = False
    load_weights = DeepseekV4Model.load_weights
    get_expert_mapping = DeepseekV4Model.get_expert_mapping

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.first_layer, self.num_layers = (
            self.config.num_hidden_layers,
            self.config.num_nextn_predict_layers,
        )
        self.layers = ModuleDict(
            {
                str(index): DraftLayer(vllm_config, f"{prefix}.layers.{index}")
                for index in range(self.first_layer, self.first_layer + self.num_layers)
            }
        )
        self.embed_tokens = VocabParallelEmbedding(
            self.config.vocab_size, self.config.hidden_size, prefix=f"{prefix}.embed_tokens"
        )

    def layer_of(self, step: int) -> DraftLayer:
        """The layer that drafts token `step` of a round."""
        return self.layers[str(self.first_layer + step % self.num_layers)]


class DeepSeekV4MTP(Module):
    """What vLLM's proposer calls; the arguments' names are its own."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        vllm_config = with_stored_format(vllm_config)
        self.config = vllm_config.model_config.hf_config
        self.quant_config = vllm_config.quant_config
        self.names = DraftNames(self.config.num_hidden_layers)
        self.model = Draft(vllm_config, maybe_prefix(prefix, "model"))
        self.logits_processor = LogitsProcessor(self.config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: torch.Tensor | None = None,
        spec_step_idx: int = 0,
    ) -> torch.Tensor:
        if inputs_embeds is None:
            inputs_embeds = self.embed_input_ids(input_ids)
        return self.model.layer_of(spec_step_idx)(input_ids, positions, hidden_states, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor, spec_step_idx: int = 0) -> torch.Tensor | None:
        layer = self.model.layer_of(spec_step_idx)
        return self.logits_processor(layer.shared_head.head, layer.last_hidden(hidden_states))

    def is_unused_checkpoint_weight(self, name: str) -> bool:
        return draft_index(name, self.config.num_hidden_layers) is None

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """`weights` by DeepSeek's names -> the names of the parameters that were filled."""
        named = (
            (renamed.removeprefix("model."), tensor)
            for name, tensor in weights
            for renamed in self.names.apply_list([name])
        )
        return {f"model.{name}" for name in self.model.load_weights(named)}
