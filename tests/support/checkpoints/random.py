"""A small random all-NVFP4 DeepSeek-V4 in which every mechanism matters, and its bf16 twin.

Position biases as large as the gates, sinks that take about half of the attention, activations beyond the SwiGLU
clamp if asked for, YaRN from position 512 on: an engine that drops one of them computes something visibly different.
"""

import copy
import json
import math
from pathlib import Path

import torch

from recipe import export
from recipe.model import CONFIG, empty_model
from tests.support.checkpoints import small
from tests.support.parity.reference_model import decoded, load_tensors

INPUT_SCALE = 0.01
YARN_FROM = 512


def random_config(hash_layers: int) -> dict:
    """The demo's dimensions; the first `hash_layers` of three layers route by token, the others by top-k."""
    config = copy.deepcopy(CONFIG) | {"num_hash_layers": hash_layers, "swiglu_limit": 7.0}
    config["rope_scaling"]["original_max_position_embeddings"] = YARN_FROM
    config["max_position_embeddings"] = YARN_FROM * config["rope_scaling"]["factor"]
    return config


@torch.no_grad()
def random_model(config: dict, gate_gain: float, seed: int = 0):
    """transformers model of `config` with random weights.

    What enters SwiGLU has a deviation of about `gate_gain`: with 1 the clamp at 7 is out of reach, with 4 it acts.
    """
    torch.manual_seed(seed)
    model = empty_model(config)
    for name, p in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        width = 1 / math.sqrt(p.shape[-1])
        if "norm" in name:
            p.normal_(1, 0.1)
        elif leaf == "sinks":
            p.normal_(6, 1)
        elif leaf in ("base", "hc_base", "scale", "hc_scale"):
            p.normal_(0, 1)
        elif leaf in ("fn", "hc_fn"):
            p.normal_(0, 0.02)
        elif leaf == "position_bias":
            p.normal_(0, 1)
        elif "embed_tokens" in name:
            p.normal_(0, 0.5)
        elif "lm_head" in name:
            p.normal_(0, 2 * width)
        elif "experts" in name:
            p.normal_(0, 2 * width / gate_gain**2 if "down_proj" in name else gate_gain * width)
        else:
            p.normal_(0, width)
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):
            vocabulary, top_k = buffer.shape
            chosen = torch.rand(vocabulary, config["n_routed_experts"]).topk(top_k, dim=-1).indices
            buffer.copy_(chosen)
        elif name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.1)
    return model


class _SameInputScale(dict):
    def __missing__(self, linear: str) -> float:
        return INPUT_SCALE


def write_random(folder: Path, hash_layers: int, gate_gain: float, seed: int = 0) -> Path:
    """Write an all-NVFP4 checkpoint into the new `folder`; returns it. Its input_scale is for W4A16: unused."""
    config = random_config(hash_layers)
    tensors = export.checkpoint_tensors(random_model(config, gate_gain, seed), _SameInputScale())
    return small.write(folder, tensors, config)


def write_bf16_twin(checkpoint: Path, folder: Path) -> Path:
    """Write the same dequantized values as a bf16 checkpoint into the new `folder`; returns it."""
    config = json.loads((checkpoint / "config.json").read_text())
    del config["quantization_config"]
    quantized = load_tensors(checkpoint)
    plain = decoded(quantized)
    twin = {
        name: value.bfloat16() if f"{name}_scale" in quantized else value for name, value in plain.items()
    }
    return small.write(folder, twin, config)
