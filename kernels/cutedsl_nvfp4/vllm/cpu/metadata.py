"""vLLM's CPU build without Triton: torch versions of the metadata kernels DeepSeek-V4 launches.

Each function takes the arguments of the Triton kernel it stands in for, by the same names; the kernels'
own comments in vLLM say what each tensor is.
"""

from collections.abc import Callable

import torch


def _token_request_mapping(query_start_loc, output, num_reqs, num_mapped, num_tokens, num_warps=None):
    token = torch.arange(num_tokens, device=output.device, dtype=query_start_loc.dtype)
    ends = query_start_loc[1 : num_reqs + 1].contiguous()
    request = torch.searchsorted(ends, token, right=True).clamp(max=num_reqs - 1)
    output[:num_tokens] = torch.where(token < num_mapped, request, 0).to(output.dtype)


def _compute_prefill_metadata(
    prefill_gather_lens_ptr, seq_lens_ptr, query_start_loc_ptr, replay_start_ptr,
    num_prefills, num_decodes, window_size, BLOCK_SIZE=None,
):  # fmt: skip
    prefills = slice(num_decodes, num_decodes + num_prefills)
    bounds = query_start_loc_ptr[num_decodes : num_decodes + num_prefills + 1]
    query_len = bounds[1:] - bounds[:-1]
    visible_prefix = (seq_lens_ptr[prefills] - query_len - replay_start_ptr[prefills]).clamp(min=0)
    gather_len = query_len + visible_prefix.clamp(max=window_size - 1)
    prefill_gather_lens_ptr[:num_prefills] = gather_len.to(prefill_gather_lens_ptr.dtype)


def _compute_swa_indices_and_lens(
    swa_indices_ptr, swa_indices_stride, swa_lens_ptr, window_size, index_width, left_visible_ptr,
    right_visible_ptr, query_start_loc_ptr, seq_lens_ptr, token_to_req_indices_ptr, is_valid_token_ptr,
    block_table_ptr, block_table_stride, block_size, replay_start_ptr, token_offset, HAS_IMAGE=None,
    TRITON_BLOCK_SIZE=None,
):  # fmt: skip
    """Nothing to do: the CPU attention derives its window slots from positions and never reads these."""


def _compressed_slot_mapping(
    compressed_slot_mapping_ptr, slot_mapping_ptr, query_start_loc_ptr, seq_lens_ptr, block_table_ptr,
    block_table_stride, block_size, dcp_world_size, cp_interleave, COMPRESS_RATIO, PAD_ID,
    TRITON_BLOCK_SIZE=None,
):  # fmt: skip
    assert dcp_world_size == 1, f"decode context parallelism of {dcp_world_size} on the CPU"
    num_reqs = block_table_ptr.shape[0]
    starts = query_start_loc_ptr[: num_reqs + 1].tolist()
    for request, seq_len in enumerate(seq_lens_ptr[:num_reqs].tolist()):
        start, end = starts[request], starts[request + 1]
        if end <= start:
            continue
        position = torch.arange(seq_len - (end - start), seq_len, dtype=torch.int64)
        closes_window = (position + 1) % COMPRESS_RATIO == 0
        valid = closes_window & (slot_mapping_ptr[start:end] != PAD_ID)
        compressed = position // COMPRESS_RATIO
        block = (compressed // block_size).clamp(max=block_table_ptr.shape[1] - 1)
        slot = block_table_ptr[request].to(torch.int64)[block] * block_size + compressed % block_size
        compressed_slot_mapping_ptr[start:end] = torch.where(valid, slot, PAD_ID)


def _build_prefill_chunk_metadata(
    query_start_loc_ptr, uncompressed_seq_lens_ptr, cu_compressed_seq_lens_ptr,
    row_start_cu_compressed_seq_lens_ptr, token_to_seq_ptr, cu_compressed_seq_len_ks_ptr,
    cu_compressed_seq_len_ke_ptr, query_slice_start, query_slice_stop, DCP_RANK, DCP_WORLD, DCP_INTERLEAVE,
    BLOCK_SIZE, COMPRESS_RATIO,
):  # fmt: skip
    assert DCP_WORLD == 1, f"decode context parallelism of {DCP_WORLD} on the CPU"
    starts = query_start_loc_ptr.tolist()
    compressed_starts = cu_compressed_seq_lens_ptr.tolist()
    row_starts = row_start_cu_compressed_seq_lens_ptr.tolist()
    for request, seq_len in enumerate(uncompressed_seq_lens_ptr.tolist()):
        query_len = starts[request + 1] - starts[request]
        offset = torch.arange(query_len)
        absolute = starts[request] + offset
        inside = (absolute >= query_slice_start) & (absolute < query_slice_stop)
        row = (absolute - query_slice_start)[inside]
        context = seq_len - query_len + 1 + offset[inside]
        cu_compressed_seq_len_ks_ptr[row] = row_starts[request]
        key_end = row_starts[request] + context // COMPRESS_RATIO
        cu_compressed_seq_len_ke_ptr[row] = key_end.to(cu_compressed_seq_len_ke_ptr.dtype)
        token_to_seq_ptr[compressed_starts[request] : compressed_starts[request + 1]] = request


def _prepare_uniform_decode(
    seq_lens_ptr, decode_seq_lens_ptr, block_table_ptr, block_table_stride, expanded_block_table_ptr,
    expanded_bt_stride, decode_lens_ptr, max_decode_len, BLOCK_SIZE=None,
):  # fmt: skip
    raise RuntimeError("several tokens per decode step (speculative decoding) are not supported on the CPU")


def metadata_kernels() -> dict[str, Callable[..., None]]:
    """{qualified name of vLLM's Triton kernel: its torch version}, for dispatcher.register_kernels."""
    mla = "vllm.v1.attention.backends.mla"
    return {
        "vllm.v1.attention.ops.metadata._token_request_mapping_kernel": _token_request_mapping,
        f"{mla}.sparse_swa.ComputePrefillMetadataKernel.kernel": _compute_prefill_metadata,
        f"{mla}.sparse_swa.ComputeSWAIndicesAndLensKernel.kernel": _compute_swa_indices_and_lens,
        f"{mla}.compressor_utils.CompressedSlotMappingKernel.kernel": _compressed_slot_mapping,
        f"{mla}.indexer.BuildPrefillChunkMetadataKernel.kernel": _build_prefill_chunk_metadata,
        f"{mla}.indexer.PrepareUniformDecodeKernel.kernel": _prepare_uniform_decode,
    }
