"""Two stand-ins used while training only: a banded attention, and an indexer that learns.

transformers' eager attention multiplies every query with every key and masks afterwards; for 4,200 tokens
that is several times the work of the 128-token band plus the compressed entries. Its indexer gets no gradient,
because top-k has none; here it is taught which entries to rank first. Evaluation always uses transformers'
own code.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Indexer, apply_rotary_pos_emb

BAND = 128  # the sliding window; one block of queries sees its own block and the one before


@dataclass
class Curriculum:
    """What the training loop switches on and off between forward passes, and what it reads back."""

    hide_heavily_compressed: bool = False  # mask the ratio-128 entries: recall must use the ratio-4 layer
    exchange_heavily_compressed: bool = False  # give each row another row's ratio-128 entries: they mislead
    select_everything: bool = False  # ignore the indexer's choice while it is still untrained
    scored_queries: torch.Tensor | None = None  # int [Q] positions where the indexer is taught, or None
    key_entries: slice | None = None  # the entries it must rank first there
    indexer_losses: list[torch.Tensor] = field(default_factory=list)

    def clear(self) -> None:
        self.__init__()


curriculum = Curriculum()


def banded_attention(module, query, key, value, attention_mask, scaling, **_):
    """query [B, H, S, D], key = value [B, 1, S + T, D] -> (output [B, S, H, D], None).

    Equal to eager attention with a causal window of 128 over the first S keys, and the bias of
    `attention_mask` [B, 1, S, S + T] over the T compressed entries.
    """
    batch, heads, length, dim = query.shape
    blocks = -(-length // BAND)
    padded = blocks * BAND
    local, compressed = key[:, 0, :length], key[:, 0, length:]
    heavily = module.layer_type == "heavily_compressed_attention"
    if heavily and curriculum.exchange_heavily_compressed:
        compressed = compressed.roll(1, dims=0)
    local = F.pad(local, (0, 0, BAND, padded - length))
    window = local.unfold(1, 2 * BAND, BAND).transpose(-1, -2)  # [B, blocks, 2 * BAND, D]
    queries = F.pad(query, (0, 0, 0, padded - length)).view(batch, heads, blocks, BAND, dim)

    row = torch.arange(BAND).view(-1, 1) + BAND
    column = torch.arange(2 * BAND).view(1, -1)
    visible = (column <= row) & (column > row - BAND)
    visible = visible.repeat(blocks, 1, 1)
    visible[0, :, :BAND] = False
    band_bias = torch.zeros(visible.shape).masked_fill_(~visible, float("-inf"))

    near = torch.einsum("bhnqd,bnkd->bhnqk", queries, window) * scaling + band_bias
    near = near.reshape(batch, heads, padded, 2 * BAND)[:, :, :length]
    sink = module.sinks.view(1, -1, 1, 1).expand(batch, -1, length, 1)
    far = torch.matmul(query, compressed.unsqueeze(1).transpose(-1, -2)) * scaling
    if compressed.shape[1]:
        far = far + attention_mask[..., length:]
        if heavily and curriculum.hide_heavily_compressed:
            far = far + float("-inf")
    probabilities = torch.cat((near, far, sink), dim=-1).softmax(dim=-1)
    near_mass = F.pad(probabilities[..., : 2 * BAND], (0, 0, 0, padded - length))
    far_mass = probabilities[..., 2 * BAND : -1]
    near_out = torch.einsum(
        "bhnqk,bnkd->bhnqd", near_mass.view(batch, heads, blocks, BAND, 2 * BAND), window
    ).reshape(batch, heads, padded, dim)[:, :, :length]
    out = near_out + torch.matmul(far_mass, compressed.unsqueeze(1))
    return out.transpose(1, 2).contiguous(), None


def _index_keys(indexer, hidden):
    """hidden [B, S, H] -> the indexer's compressed keys [B, T, index_head_dim], T = S // 4."""
    ratio, dim = indexer.compress_rate, indexer.head_dim
    batch, windows = hidden.shape[0], hidden.shape[1] // ratio
    usable = hidden[:, : windows * ratio]
    kv = indexer.kv_proj(usable).view(batch, windows, ratio, 2 * dim)
    gate = indexer.gate_proj(usable).view(batch, windows, ratio, 2 * dim) + indexer.position_bias
    previous_kv = F.pad(kv[:, :-1, :, :dim], (0, 0, 0, 0, 1, 0))
    previous_gate = F.pad(gate[:, :-1, :, :dim], (0, 0, 0, 0, 1, 0), value=float("-inf"))
    kv = torch.cat((previous_kv, kv[..., dim:]), dim=2)
    gate = torch.cat((previous_gate, gate[..., dim:]), dim=2)
    keys = indexer.kv_norm((kv * gate.softmax(dim=2)).sum(dim=2))
    positions = (torch.arange(windows) * ratio).unsqueeze(0).expand(batch, -1)
    cos, sin = indexer.rotary_emb(keys, position_ids=positions, layer_type=indexer.rope_layer_type)
    return apply_rotary_pos_emb(keys.unsqueeze(1), cos, sin).squeeze(1)


def index_scores(indexer, hidden, q_residual, queries):
    """Differentiable index scores of query positions `queries` [Q] -> [B, Q, T], future entries -inf."""
    keys = _index_keys(indexer, hidden)
    batch = hidden.shape[0]
    positions = queries.unsqueeze(0).expand(batch, -1)
    cos, sin = indexer.rotary_emb(hidden, position_ids=positions, layer_type=indexer.rope_layer_type)
    q = indexer.q_b_proj(q_residual[:, queries]).view(batch, len(queries), -1, indexer.head_dim)
    q = apply_rotary_pos_emb(q.transpose(1, 2), cos, sin).transpose(1, 2)
    scores = indexer.scorer(q, keys, hidden[:, queries])
    entries = torch.arange(keys.shape[1])
    return scores.masked_fill(
        entries >= (positions + 1).unsqueeze(-1) // indexer.compress_rate, float("-inf")
    )


def _choose(indexer, hidden_states, q_residual, position_ids, past_key_values, layer_idx):
    """Training replacement of DeepseekV4Indexer.forward: the same indices, without building a graph."""
    length, entries = hidden_states.shape[1], hidden_states.shape[1] // indexer.compress_rate
    ready = (position_ids + 1) // indexer.compress_rate
    everything = torch.arange(entries).expand(hidden_states.shape[0], length, -1)
    everything = torch.where(everything < ready.unsqueeze(-1), everything, -1)
    if curriculum.select_everything or entries <= indexer.index_topk:
        return everything
    chosen = everything[..., : indexer.index_topk].clone()
    first = indexer.index_topk * indexer.compress_rate  # earlier queries keep all their entries
    with torch.no_grad():
        for start in range(first, length, 256):  # [256 queries, 32 heads, T] at a time
            queries = torch.arange(start, min(start + 256, length))
            scores = index_scores(indexer, hidden_states, q_residual, queries)
            chosen[:, queries] = scores.topk(indexer.index_topk, dim=-1).indices
    return torch.where(chosen < ready.unsqueeze(-1), chosen, -1)


def _teach(attention, args, kwargs, output):
    """Forward hook of a ratio-4 attention: pull the index scores towards the entries that matter."""
    if curriculum.scored_queries is None:
        return
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    hidden = hidden.detach()
    with torch.no_grad():
        q_residual = attention.q_a_norm(attention.q_a_proj(hidden))
    scores = index_scores(attention.compressor.indexer, hidden, q_residual, curriculum.scored_queries)
    log_choice = scores.log_softmax(-1)[..., curriculum.key_entries]
    curriculum.indexer_losses.append(-log_choice.logsumexp(-1).mean())


def install(model) -> None:
    """Make `model` train with the banded attention and a learning indexer; undo with `uninstall`."""
    ALL_ATTENTION_FUNCTIONS.register("banded", banded_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("banded", eager_mask)
    model.config._attn_implementation = "banded"
    for layer in model.model.layers:
        if layer.self_attn.layer_type == "compressed_sparse_attention":
            indexer = layer.self_attn.compressor.indexer
            indexer.forward = _choose.__get__(indexer, DeepseekV4Indexer)
            layer.self_attn.register_forward_hook(_teach, with_kwargs=True)


def uninstall(model) -> None:
    """Back to transformers' own attention and indexer."""
    model.config._attn_implementation = "eager"
    for layer in model.model.layers:
        layer.self_attn._forward_hooks.clear()
        layer.self_attn._forward_hooks_with_kwargs.clear()
        if layer.self_attn.layer_type == "compressed_sparse_attention":
            del layer.self_attn.compressor.indexer.forward
