"""DeepSeek-V4's CPU operators in torch, for processors that vLLM's C++ versions were not built for.

vLLM ships them only in its AVX512-BF16 library. Where that library cannot load, these define the same
operators (`torch.ops._C.*_cpu`), each of the schema and meaning of its C++ namesake:

    fp8_ds_mla cache block of B tokens, one per row:
        [0, 576 B)            per token 448 e4m3 values, then 64 bf16 values (rotary part)
        [576 B, 576 B + 8 B)  per token 7 e8m0 scales, one per 64 e4m3 values, and a pad byte
    indexer cache block of B tokens: [0, 128 B) e4m3 values, [128 B, 132 B) one f32 scale per token

Rotary embedding is GPT-J style (interleaved pairs) on the last 64 dimensions throughout.
"""

import torch
import torch.nn.functional as F
from vllm.logger import init_logger

logger = init_logger(__name__)

HEAD_DIM = 512
ROPE_DIM = 64
NOPE_DIM = HEAD_DIM - ROPE_DIM
QUANT_BLOCK = 64
TOKEN_BYTES = NOPE_DIM + 2 * ROPE_DIM
SCALE_BYTES = NOPE_DIM // QUANT_BLOCK + 1
INDEX_DIM = 128
FP8_MAX = 448.0
SMALLEST_AMAX = 1e-4
ATTENTION_CHUNK = 256  # query tokens whose keys are decoded together


def _rms_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _rotate(
    x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, inverse: bool = False
) -> torch.Tensor:
    """Rotate the last ROPE_DIM of x [T, ..., D] f32 by `positions` [T]; the rest passes through."""
    cos, sin = cos_sin[positions].float().chunk(2, dim=-1)  # [T, 32] each
    if inverse:
        sin = -sin
    broadcast = (x.shape[0], *([1] * (x.dim() - 2)), ROPE_DIM // 2)
    cos, sin = cos.view(broadcast), sin.view(broadcast)
    rope = x[..., -ROPE_DIM:]
    even, odd = rope[..., 0::2], rope[..., 1::2]
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((x[..., :-ROPE_DIM], rotated), dim=-1)


def _e8m0_exponent(amax: torch.Tensor) -> torch.Tensor:
    """Smallest power of two that keeps amax / 2^e within e4m3, as the exponent e (f32)."""
    return torch.ceil(torch.log2(amax.clamp(min=SMALLEST_AMAX) / FP8_MAX))


def _to_fp8_bytes(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def _store_rows(
    cache: torch.Tensor, slots: torch.Tensor, block_size: int, offset: int, rows: torch.Tensor
) -> None:
    """cache [blocks, bytes]: write rows [T, W] at byte `offset` + (slot % block_size) * W of their blocks."""
    width = rows.shape[1]
    start = offset + (slots % block_size) * width
    columns = start.unsqueeze(1) + torch.arange(width)
    cache[(slots // block_size).unsqueeze(1), columns] = rows


def _load_rows(
    cache: torch.Tensor, slots: torch.Tensor, block_size: int, offset: int, width: int
) -> torch.Tensor:
    """The inverse of `_store_rows` -> uint8 [T, width]."""
    start = offset + (slots % block_size) * width
    columns = start.unsqueeze(1) + torch.arange(width)
    return cache[(slots // block_size).unsqueeze(1), columns]


def _store_mla(
    cache: torch.Tensor, slots: torch.Tensor, block_size: int, nope: torch.Tensor, rope: torch.Tensor
) -> None:
    """Quantize nope [T, 448] and write it with rope [T, 64] into an fp8_ds_mla cache."""
    blocks = nope.bfloat16().float().unflatten(-1, (-1, QUANT_BLOCK))
    exponent = _e8m0_exponent(blocks.abs().amax(-1))
    values = _to_fp8_bytes(blocks * torch.exp2(-exponent).unsqueeze(-1)).flatten(-2)
    token = torch.cat((values, rope.bfloat16().contiguous().view(torch.uint8)), dim=-1)
    scales = F.pad((exponent + 127).clamp(0, 255).to(torch.uint8), (0, 1))
    _store_rows(cache, slots, block_size, 0, token)
    _store_rows(cache, slots, block_size, block_size * TOKEN_BYTES, scales)


def _load_mla(cache: torch.Tensor, slots: torch.Tensor, block_size: int) -> torch.Tensor:
    """Keys (which are the values too) at `slots` [U] of an fp8_ds_mla cache -> f32 [U, 512]."""
    token = _load_rows(cache, slots, block_size, 0, TOKEN_BYTES)
    scales = _load_rows(cache, slots, block_size, block_size * TOKEN_BYTES, SCALE_BYTES)[:, :-1]
    step = torch.exp2(scales.float() - 127)
    nope = token[:, :NOPE_DIM].contiguous().view(torch.float8_e4m3fn).float().unflatten(-1, (-1, QUANT_BLOCK))
    rope = token[:, NOPE_DIM:].contiguous().view(torch.bfloat16).float()
    return torch.cat(((nope * step.unsqueeze(-1)).flatten(-2), rope), dim=-1)


def hc_pre_fused_cpu(x, hc_fn, hc_scale, hc_base, hc_mult, sinkhorn_iters, rms_eps, hc_eps):
    """x [T, hc, D] -> (layer input [T, D], post mix [T, hc], combination matrix [T, hc, hc])."""
    flat = x.flatten(1).float()
    mixes = F.linear(flat, hc_fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + rms_eps)
    pre, post, comb = mixes.split((hc_mult, hc_mult, hc_mult * hc_mult), dim=-1)
    base_pre, base_post, base_comb = hc_base.split((hc_mult, hc_mult, hc_mult * hc_mult))
    pre = torch.sigmoid(pre * hc_scale[0] + base_pre) + hc_eps
    post = torch.sigmoid(post * hc_scale[1] + base_post) * 2.0
    comb = (comb * hc_scale[2] + base_comb).unflatten(-1, (hc_mult, hc_mult))
    comb = torch.softmax(comb, dim=-1) + hc_eps
    comb = comb / (comb.sum(-2, keepdim=True) + hc_eps)
    for _ in range(sinkhorn_iters - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + hc_eps)
        comb = comb / (comb.sum(-2, keepdim=True) + hc_eps)
    layer_input = (pre.unsqueeze(-1) * x.float()).sum(1).to(x.dtype)
    return layer_input, post, comb


def hc_post_fused_cpu(x, residual, post, comb):
    """x [T, D], residual [T, hc, D] -> post * x + comb^T residual, [T, hc, D]."""
    mixed = torch.matmul(comb.transpose(-1, -2), residual.float())
    return (mixed + post.unsqueeze(-1) * x.unsqueeze(1).float()).to(residual.dtype)


def hc_head_fused_cpu(x, hc_fn, hc_scale, hc_base, hc_eps, norm_eps):
    """x [T, hc, D] -> the streams' weighted sum [T, D]."""
    flat = x.flatten(1).float()
    mixes = F.linear(flat, hc_fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    pre = torch.sigmoid(mixes * hc_scale + hc_base) + hc_eps
    return (pre.unsqueeze(-1) * x.float()).sum(1).to(x.dtype)


def fused_qnorm_rope_kv_insert_cpu(
    q, kv, positions, swa_kv_cache_2d, slot_mapping, cos_sin_cache, q_head_padded, eps, cache_block_size
):
    """q [T, H, 512] -> per-head RMSNorm and RoPE, padded to [T, q_head_padded, 512]; kv [T, 512] -> cache."""
    query = _rotate(_rms_norm(q.float(), eps), positions, cos_sin_cache).to(q.dtype)
    slots = slot_mapping.long()
    valid = (slots >= 0).nonzero().squeeze(1)
    rotated = _rotate(kv[valid].float(), positions[valid], cos_sin_cache)
    _store_mla(swa_kv_cache_2d, slots[valid], cache_block_size, rotated[:, :NOPE_DIM], rotated[:, NOPE_DIM:])
    return F.pad(query, (0, 0, 0, q_head_padded - q.shape[1]))


def _attend(q, keys, index, valid, sink, scale):
    """q [t, H, 512] f32 over keys [U, 512] selected by index, valid [t, S], with a sink logit per head.

    A token without keys gives zero, even where the sink is -inf.
    """
    scores = torch.einsum("thd,ud->thu", q, keys) * scale
    picked = index.unsqueeze(1).expand(-1, q.shape[1], -1)
    scores = scores.gather(2, picked).masked_fill(~valid.unsqueeze(1), float("-inf"))
    with_sink = torch.cat((scores, sink.view(1, -1, 1).expand(q.shape[0], -1, 1)), dim=-1)
    weights = torch.softmax(with_sink, dim=-1)[..., :-1]
    weights[~valid.any(1)] = 0.0
    dense = torch.zeros(*q.shape[:2], keys.shape[0]).scatter_add_(2, picked, weights)
    return torch.einsum("thu,ud->thd", dense, keys)


def flash_mla_with_kvcache_cpu(
    out, q, window_cache_2d, window_slots, window_block_size, compressed_cache_2d, compressed_slots,
    compressed_block_size, attn_sink, scale,
):  # fmt: skip
    """Attention of q [T, H, 512] over the window's and the compressed keys into out; -1 slots are masked."""
    sink = attn_sink[: q.shape[1]].float()
    for start in range(0, q.shape[0], ATTENTION_CHUNK):
        rows = slice(start, min(start + ATTENTION_CHUNK, q.shape[0]))
        keys, indices, valids, offset = [], [], [], 0
        for cache, slots, block_size in (
            (window_cache_2d, window_slots[rows], window_block_size),
            (compressed_cache_2d, compressed_slots[rows], compressed_block_size),
        ):
            valid = slots >= 0
            used = torch.unique(slots[valid])
            if used.numel() == 0:
                continue
            # Only what a token chose is read: weight 0 times the NaN of an unwritten slot would be NaN.
            keys.append(_load_mla(cache, used, block_size))
            indices.append(torch.searchsorted(used, slots) + offset)
            valids.append(valid)
            offset += used.numel()
        if not keys:
            out[rows] = 0
            continue
        out[rows] = _attend(
            q[rows].float(), torch.cat(keys), torch.cat(indices, 1), torch.cat(valids, 1), sink, scale
        ).to(out.dtype)


def save_partial_states_cpu(kv, score, ape, positions, state_cache, slot_mapping):
    """Write [kv, score + ape[position % ratio]] of every token with a slot into the compressor's state."""
    slots = slot_mapping.long()
    valid = (slots >= 0).nonzero().squeeze(1)
    block_size, ratio = state_cache.shape[1], ape.shape[0]
    rows = torch.cat((kv[valid], score[valid] + ape[positions[valid] % ratio]), dim=-1)
    state_cache[slots[valid] // block_size, slots[valid] % block_size] = rows.to(state_cache.dtype)


def _compress(state_cache, gather_slots, rows, head_dim, ratio):
    """Softmax-pool the state of `rows`' windows -> f32 [R, head_dim].

    With overlap the window holds two groups: the first reads the state's first half, the second its second.
    """
    slots = gather_slots[rows].long()
    window = slots.shape[1]
    block_size = state_cache.shape[1]
    safe = slots.clamp(min=0)
    state = state_cache[safe // block_size, safe % block_size].float()  # [R, window, 2 * width]
    kv, score = state.chunk(2, dim=-1)
    if window > ratio:
        first, second = slice(0, head_dim), slice(head_dim, 2 * head_dim)
        kv = torch.cat((kv[:, :ratio, first], kv[:, ratio:, second]), dim=1)
        score = torch.cat((score[:, :ratio, first], score[:, ratio:, second]), dim=1)
    missing = (slots < 0).unsqueeze(-1)
    weights = torch.softmax(score.masked_fill(missing, float("-inf")), dim=1)
    return (kv.masked_fill(missing, 0.0) * weights).sum(1)


def _compressed_keys(
    state_cache, gather_slots, positions, kv_slot_mapping, weight, eps, cos_sin_cache, head_dim, ratio
):
    """Rows that close a window and have a cache slot -> (their slots [R], normed and rotated keys [R, D])."""
    num_tokens = kv_slot_mapping.shape[0]
    closes = (positions[:num_tokens] + 1) % ratio == 0
    rows = (closes & (kv_slot_mapping >= 0)).nonzero().squeeze(1)
    normed = _rms_norm(_compress(state_cache, gather_slots, rows, head_dim, ratio), eps) * weight
    first_position = positions[rows] // ratio * ratio
    return kv_slot_mapping[rows].long(), _rotate(normed, first_position, cos_sin_cache)


def compress_norm_rope_store_cpu(
    state_cache, gather_slots, positions, kv_slot_mapping, rms_norm_weight, rms_norm_eps, cos_sin_cache,
    kv_cache_2d, kv_cache_block_size, compress_ratio,
):  # fmt: skip
    """Compressed keys of the main attention -> fp8_ds_mla cache."""
    slots, keys = _compressed_keys(
        state_cache, gather_slots, positions, kv_slot_mapping, rms_norm_weight, rms_norm_eps, cos_sin_cache,
        HEAD_DIM, compress_ratio,
    )  # fmt: skip
    _store_mla(kv_cache_2d, slots, kv_cache_block_size, keys[:, :NOPE_DIM], keys[:, NOPE_DIM:])


def compress_norm_rope_store_indexer_cpu(
    state_cache, gather_slots, positions, kv_slot_mapping, rms_norm_weight, rms_norm_eps, cos_sin_cache,
    kv_cache_2d, kv_cache_block_size, compress_ratio,
):  # fmt: skip
    """Compressed keys of the indexer -> its cache, e4m3 with one power-of-two scale per key."""
    slots, keys = _compressed_keys(
        state_cache, gather_slots, positions, kv_slot_mapping, rms_norm_weight, rms_norm_eps, cos_sin_cache,
        INDEX_DIM, compress_ratio,
    )  # fmt: skip
    keys = keys.bfloat16().float()
    step = torch.exp2(_e8m0_exponent(keys.abs().amax(-1, keepdim=True)))
    _store_rows(kv_cache_2d, slots, kv_cache_block_size, 0, _to_fp8_bytes(keys / step))
    _store_rows(
        kv_cache_2d, slots, kv_cache_block_size, kv_cache_block_size * INDEX_DIM, step.view(torch.uint8)
    )


def fused_indexer_q_rope_quant_cpu(
    positions, index_q, index_q_cos_sin_cache, index_q_fp8, index_weights, index_weights_softmax_scale,
    index_weights_head_scale, index_weights_out,
):  # fmt: skip
    """index_q [T, H, 128] -> rotated e4m3, its scale folded into the head weights [T, H]."""
    rotated = _rotate(index_q.float(), positions, index_q_cos_sin_cache)
    rotated[..., -ROPE_DIM:] = rotated[..., -ROPE_DIM:].bfloat16().float()
    step = torch.exp2(_e8m0_exponent(rotated.abs().amax(-1, keepdim=True)))
    index_q_fp8.copy_(_to_fp8_bytes(rotated / step).view(torch.float8_e4m3fn))
    folded = index_weights_softmax_scale * index_weights_head_scale
    index_weights_out.copy_(index_weights * step.squeeze(-1) * folded)


def fp8_paged_mqa_logits_cpu(q_fp8, kvcache_fp8, weight, seq_lens, page_table, block_size, max_seq_len):
    """Index scores sum_h weight[h] * relu(q_h . k), f32 [T, max_seq_len]; -inf at and beyond seq_lens."""
    num_tokens = q_fp8.shape[0]
    logits = torch.full((num_tokens, max_seq_len), float("-inf"))
    query = q_fp8.float()
    lens = seq_lens.reshape(-1).tolist()
    pages, owner = torch.unique(page_table, dim=0, return_inverse=True)
    for request, table in enumerate(pages):
        rows = (owner == request).nonzero().squeeze(1)
        length = max(lens[row] for row in rows.tolist())
        if length == 0:
            continue
        position = torch.arange(length)
        slots = table[position // block_size].long() * block_size + position % block_size
        keys = _load_rows(kvcache_fp8, slots, block_size, 0, INDEX_DIM).view(torch.float8_e4m3fn).float()
        scale = _load_rows(kvcache_fp8, slots, block_size, block_size * INDEX_DIM, 4).view(torch.float32)
        for part in rows.split(ATTENTION_CHUNK):
            scores = torch.einsum("thd,sd->ths", query[part], keys * scale).relu_()
            logits[part, :length] = torch.einsum("ths,th->ts", scores, weight[part].float())
    beyond = torch.arange(max_seq_len) >= seq_lens.reshape(-1, 1)
    return logits.masked_fill_(beyond, float("-inf"))


def topk_transform_512_cpu(scores, seq_lens, page_tables, out_page_indices, page_size, out_raw_indices):
    """Positions of the 512 largest of each row's first seq_lens scores, -1 where there are fewer; in any order."""
    width = out_page_indices.shape[1]
    count = min(width, scores.shape[1])
    chosen = torch.full((scores.shape[0], width), -1, dtype=torch.int64)
    beyond = torch.arange(scores.shape[1]) >= seq_lens.reshape(-1, 1)
    values, index = scores.masked_fill(beyond, float("-inf")).topk(count, dim=-1)
    chosen[:, :count] = torch.where(values == float("-inf"), -1, index)
    page = page_tables.gather(1, chosen.clamp(min=0) // page_size).long()
    slots = page * page_size + chosen.clamp(min=0) % page_size
    out_page_indices.copy_(torch.where(chosen >= 0, slots, -1).to(out_page_indices.dtype))
    if out_raw_indices is not None:
        out_raw_indices.copy_(chosen.to(out_raw_indices.dtype))


def _routing_weights(gating_output, ids, scoring_func, scaling):
    assert scoring_func == "sqrtsoftplus", f"routing score {scoring_func!r}"
    scores = F.softplus(gating_output.float()).sqrt()
    picked = scores.gather(1, ids)
    return picked / picked.sum(-1, keepdim=True) * scaling


def biased_topk_cpu(
    hidden_states, gating_output, correction_bias, topk, renormalize, scoring_func,
    num_fused_shared_experts, routed_scaling_factor, apply_routed_scaling_factor_on_output,
):  # fmt: skip
    """Experts by biased score, weights by the unbiased one -> (f32 [T, topk], int32 [T, topk])."""
    assert renormalize and apply_routed_scaling_factor_on_output and num_fused_shared_experts == 0
    scores = F.softplus(gating_output.float()).sqrt()
    ids = (scores + correction_bias.float()).topk(topk, dim=-1).indices
    return _routing_weights(gating_output, ids, scoring_func, routed_scaling_factor), ids.to(torch.int32)


def hash_topk_cpu(
    gating_output, tid2eid, topk, scoring_func, num_fused_shared_experts, num_experts, routed_scaling_factor
):
    """Experts by the token's row of the hash table [T, topk], weights by the score."""
    assert num_fused_shared_experts == 0 and tid2eid.shape[1] == topk
    ids = tid2eid.long()
    return _routing_weights(gating_output, ids, scoring_func, routed_scaling_factor), ids.to(torch.int32)


def inverse_gptj_rope_o_proj_cpu(o, positions, cos_sin_cache, rope_dim):
    """Undo the query's rotation on the attention output [T, H, D] -> f32."""
    assert rope_dim == ROPE_DIM
    return _rotate(o.float(), positions, cos_sin_cache, inverse=True)


_SCHEMAS = {
    hc_pre_fused_cpu: "(Tensor x, Tensor hc_fn, Tensor hc_scale, Tensor hc_base, int hc_mult, "
    "int sinkhorn_iters, float rms_eps, float hc_eps) -> (Tensor, Tensor, Tensor)",
    hc_post_fused_cpu: "(Tensor x, Tensor residual, Tensor post, Tensor comb) -> Tensor",
    hc_head_fused_cpu: "(Tensor x, Tensor hc_fn, Tensor hc_scale, Tensor hc_base, float hc_eps, "
    "float norm_eps) -> Tensor",
    fused_qnorm_rope_kv_insert_cpu: "(Tensor q, Tensor kv, Tensor positions, Tensor(a!) swa_kv_cache_2d, "
    "Tensor slot_mapping, Tensor cos_sin_cache, int q_head_padded, float eps, int cache_block_size) -> Tensor",
    flash_mla_with_kvcache_cpu: "(Tensor(a!) out, Tensor q, Tensor window_cache_2d, Tensor window_slots, "
    "int window_block_size, Tensor compressed_cache_2d, Tensor compressed_slots, int compressed_block_size, "
    "Tensor attn_sink, float scale) -> ()",
    save_partial_states_cpu: "(Tensor kv, Tensor score, Tensor ape, Tensor positions, "
    "Tensor(a!) state_cache, Tensor slot_mapping) -> ()",
    compress_norm_rope_store_cpu: "(Tensor state_cache, Tensor gather_slots, Tensor positions, "
    "Tensor kv_slot_mapping, Tensor rms_norm_weight, float rms_norm_eps, Tensor cos_sin_cache, "
    "Tensor(a!) kv_cache_2d, int kv_cache_block_size, int compress_ratio) -> ()",
    compress_norm_rope_store_indexer_cpu: "(Tensor state_cache, Tensor gather_slots, Tensor positions, "
    "Tensor kv_slot_mapping, Tensor rms_norm_weight, float rms_norm_eps, Tensor cos_sin_cache, "
    "Tensor(a!) kv_cache_2d, int kv_cache_block_size, int compress_ratio) -> ()",
    fused_indexer_q_rope_quant_cpu: "(Tensor positions, Tensor index_q, Tensor index_q_cos_sin_cache, "
    "Tensor(a!) index_q_fp8, Tensor index_weights, float index_weights_softmax_scale, "
    "float index_weights_head_scale, Tensor(b!) index_weights_out) -> ()",
    fp8_paged_mqa_logits_cpu: "(Tensor q_fp8, Tensor kvcache_fp8, Tensor weight, Tensor seq_lens, "
    "Tensor page_table, int block_size, int max_seq_len) -> Tensor",
    topk_transform_512_cpu: "(Tensor scores, Tensor seq_lens, Tensor page_tables, "
    "Tensor(a!) out_page_indices, int page_size, Tensor(b!)? out_raw_indices) -> ()",
    biased_topk_cpu: "(Tensor hidden_states, Tensor gating_output, Tensor correction_bias, int topk, "
    "bool renormalize, str scoring_func, int num_fused_shared_experts, float? routed_scaling_factor, "
    "bool apply_routed_scaling_factor_on_output) -> (Tensor, Tensor)",
    hash_topk_cpu: "(Tensor gating_output, Tensor tid2eid, int topk, str scoring_func, "
    "int num_fused_shared_experts, int num_experts, float routed_scaling_factor) -> (Tensor, Tensor)",
    inverse_gptj_rope_o_proj_cpu: "(Tensor o, Tensor positions, Tensor cos_sin_cache, int rope_dim) -> Tensor",
}

_libraries: list[torch.library.Library] = []  # kept alive: a collected library takes its operators with it


def are_defined() -> bool:
    """Whether operators of this module stand in for vLLM's: after `define_missing`, where it found any missing."""
    return bool(_libraries)


def define_missing() -> list[str]:
    """Define the operators vLLM's CPU library for this processor lacks; their names. Safe to call again."""
    missing = [function for function in _SCHEMAS if not hasattr(torch.ops._C, function.__name__)]
    if not missing:
        return []
    library = torch.library.Library("_C", "FRAGMENT")
    _libraries.append(library)
    for function in missing:
        library.define(function.__name__ + _SCHEMAS[function])
        library.impl(function.__name__, function, "CPU")
    names = [function.__name__ for function in missing]
    logger.warning_once(
        "vLLM's CPU library for this processor has no DeepSeek-V4 operators (it needs AVX512-BF16); "
        "%d of them run in torch instead, correct but slower", len(names),
    )  # fmt: skip
    return names
