"""What an implementation can get wrong about DeepSeek-V4, planted into transformers' model.

Each is a context manager of the model: inside it the reference is wrong, afterwards it is as before.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

from tests.support.parity.reference_model import replaced


@contextmanager
def _changed(model, part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Inside, every parameter or buffer whose name contains `part` is `change` of itself."""
    tensors = {name: t for name, t in [*model.named_parameters(), *model.named_buffers()] if part in name}
    if not tensors:
        raise ValueError(f"no parameter name contains {part!r}; the planted error would change nothing")
    before = {name: t.detach().clone() for name, t in tensors.items()}
    with torch.no_grad():
        for t in tensors.values():
            t.copy_(change(t))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, t in tensors.items():
                t.copy_(before[name])


@contextmanager
def _set(model, kinds: tuple[type, ...], attribute: str, value) -> Iterator[None]:
    """Inside, `attribute` of every module of `kinds` is `value`."""
    with ExitStack() as stack:
        modules = [module for module in model.modules() if isinstance(module, kinds)]
        if not modules:
            raise ValueError(f"the model has no {kinds}; the planted error would change nothing")
        for module in modules:
            stack.enter_context(replaced(module, attribute, value))
        yield


def _compressor_removed(layer_type: str):
    def plant(model):
        layer = model.config.layer_types.index(layer_type)
        return _changed(model, f"layers.{layer}.self_attn.compressor.kv_norm.weight", torch.zeros_like)

    return plant


def _half_style_rope(model):
    """Pairs (i, i + 32) instead of (2i, 2i + 1)."""

    def rotate(x):
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)

    return replaced(modeling, "rotate_half", rotate)


def _no_yarn(model):
    rope = model.config.rope_parameters["compress"]
    dim = int(model.config.head_dim * rope["partial_rotary_factor"])
    plain = rope["rope_theta"] ** -(torch.arange(0, dim, 2) / dim)
    return _changed(model, "compress_inv_freq", lambda _: plain)


def _comb_transposed(model):
    forward = modeling.DeepseekV4HyperConnection.forward

    def transposed(module, streams):
        post, comb, collapsed = forward(module, streams)
        return post, comb.transpose(-1, -2), collapsed

    return replaced(modeling.DeepseekV4HyperConnection, "forward", transposed)


def _noise_like(bias: torch.Tensor) -> torch.Tensor:
    return torch.randn(bias.shape, generator=torch.Generator().manual_seed(1)) * 0.1


GATES = (modeling.DeepseekV4TopKRouter, modeling.DeepseekV4HashRouter)
FEED_FORWARDS = (modeling.DeepseekV4MLP, modeling.DeepseekV4Experts)

PLANTED = {
    "w1 and w3 swapped": lambda m: _changed(
        m, "experts.gate_up_proj", lambda w: torch.cat(w.chunk(2, dim=1)[::-1], dim=1)
    ),
    "CSA removed": _compressor_removed("compressed_sparse_attention"),
    "HCA removed": _compressor_removed("heavily_compressed_attention"),
    "half-style rope": _half_style_rope,
    "ape zeroed": lambda m: _changed(m, "position_bias", torch.zeros_like),
    "sinks removed": lambda m: _changed(m, "sinks", lambda s: torch.full_like(s, -1e4)),
    "no YaRN": _no_yarn,
    "hyper-connection comb transposed": _comb_transposed,
    "SwiGLU clamp off": lambda m: _set(m, FEED_FORWARDS, "limit", float("inf")),
    "routed scaling 1.0": lambda m: _set(m, GATES, "routed_scaling_factor", 1.0),
    "gate bias is noise": lambda m: _changed(m, "e_score_correction_bias", _noise_like),
    "indexer chooses wrong blocks": lambda m: _changed(m, "scorer.weights_proj", torch.neg),
}
