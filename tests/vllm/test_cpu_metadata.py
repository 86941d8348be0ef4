"""vllm/cpu.py: torch metadata kernels against loops written line by line after vLLM's Triton kernels."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.models.deepseek_v4 import cpu
from vllm.triton_utils.dispatcher import _kernel_arg_names, _resolve_kernel

from cutedsl_nvfp4.vllm.cpu.metadata import metadata_kernels

PAD = -1
UNTOUCHED = -777  # what outputs hold before, so that a store too few or too many shows


def kernel(name: str):
    found = [function for qualified, function in metadata_kernels().items() if name in qualified]
    assert len(found) == 1, f"{name}: {len(found)} kernels"
    return found[0]


def int32(values) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


def starts_of(lengths: list[int]) -> list[int]:
    return [sum(lengths[:request]) for request in range(len(lengths) + 1)]


# Requests as (query length, tokens before the query).
batches = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), min_size=1, max_size=6)


@pytest.mark.parametrize("name", metadata_kernels())
def test_each_stands_in_for_a_kernel_that_vllm_launches(name):
    """Same parameters in the same order; a launch option may follow."""
    host, attribute = _resolve_kernel(name)
    theirs = _kernel_arg_names(getattr(host, attribute))
    ours = _kernel_arg_names(metadata_kernels()[name])
    assert ours[: len(theirs)] == theirs and set(ours[len(theirs) :]) <= {"num_warps", "num_stages"}


# --- token -> request ---


def token_request_mapping_loop(query_start_loc, num_reqs, num_mapped, num_tokens):
    output = []
    for token in range(num_tokens):
        low, high = 0, num_reqs
        while low < high:
            middle = (low + high) // 2
            if query_start_loc[middle + 1] <= token:
                low = middle + 1
            else:
                high = middle
        output.append(min(low, num_reqs - 1) if token < num_mapped else 0)
    return output


@settings(deadline=None, max_examples=60)
@given(batches, st.integers(0, 5), st.integers(0, 5), st.sampled_from([torch.int32, torch.int64]))
def test_token_request_mapping(batch, padding, unmapped, dtype):
    starts = starts_of([length for length, _ in batch])
    num_tokens = starts[-1] + padding
    num_mapped = max(0, starts[-1] - unmapped)
    output = torch.full((num_tokens + 3,), UNTOUCHED, dtype=torch.int32)
    kernel("_token_request_mapping")(
        torch.tensor(starts, dtype=dtype), output, len(batch), num_mapped, num_tokens, num_warps=4
    )
    expected = token_request_mapping_loop(starts, len(batch), num_mapped, num_tokens)
    assert output.tolist() == expected + [UNTOUCHED] * 3


# --- tokens each prefill gathers ---


@settings(deadline=None, max_examples=60)
@given(
    batches,
    st.integers(0, 3),
    st.integers(1, 130),
    st.lists(st.integers(0, 30), min_size=6, max_size=6),
)
def test_prefill_gather_lengths(batch, num_decodes, window_size, replay_starts):
    num_decodes = min(num_decodes, len(batch) - 1)
    num_prefills = len(batch) - num_decodes
    starts = starts_of([length for length, _ in batch])
    seq_lens = [length + before for length, before in batch]
    expected = []
    for offset in range(num_prefills):
        request = num_decodes + offset
        query_len = starts[request + 1] - starts[request]
        prefix_len = seq_lens[request] - query_len
        visible_prefix = max(prefix_len - replay_starts[request], 0)
        expected.append(query_len + min(visible_prefix, window_size - 1))
    output = torch.full((num_prefills + 2,), UNTOUCHED, dtype=torch.int32)
    kernel("ComputePrefillMetadata")(
        prefill_gather_lens_ptr=output, seq_lens_ptr=int32(seq_lens), query_start_loc_ptr=int32(starts),
        replay_start_ptr=int32(replay_starts), num_prefills=num_prefills, num_decodes=num_decodes,
        window_size=window_size, BLOCK_SIZE=8,
    )  # fmt: skip
    assert output.tolist() == expected + [UNTOUCHED] * 2


# --- slots of compressed states ---


def compressed_slot_mapping_loop(output, slots, starts, seq_lens, block_table, block_size, ratio):
    for request, row in enumerate(block_table):
        query_len = starts[request + 1] - starts[request]
        start_pos = seq_lens[request] - query_len
        for offset in range(query_len):
            position = start_pos + offset
            is_valid = (position + 1) % ratio == 0 and slots[starts[request] + offset] != PAD
            if is_valid:
                after = position // ratio
                slot = row[after // block_size] * block_size + after % block_size
            output[starts[request] + offset] = slot if is_valid else PAD
    return output


@settings(deadline=None, max_examples=60)
@given(batches, st.sampled_from([1, 2, 4, 8, 128]), st.sampled_from([1, 2, 4, 16]), st.integers(0, 2**31))
def test_compressed_slot_mapping(batch, ratio, block_size, seed):
    generator = torch.Generator().manual_seed(seed)
    starts = starts_of([length for length, _ in batch])
    seq_lens = [length + before for length, before in batch]
    num_blocks = max(1, -(-(max(seq_lens) // ratio + 1) // block_size))
    block_table = torch.randint(0, 10_000, (len(batch), num_blocks), dtype=torch.int32, generator=generator)
    slots = torch.randint(0, 1000, (starts[-1],), dtype=torch.int64, generator=generator)
    slots[torch.rand(starts[-1], generator=generator) < 0.2] = PAD
    output = torch.full((starts[-1] + 3,), UNTOUCHED, dtype=torch.int64)
    expected = compressed_slot_mapping_loop(
        output.tolist(), slots.tolist(), starts, seq_lens, block_table.tolist(), block_size, ratio
    )
    kernel("CompressedSlotMapping")(
        compressed_slot_mapping_ptr=output, slot_mapping_ptr=slots, query_start_loc_ptr=int32(starts),
        seq_lens_ptr=int32(seq_lens), block_table_ptr=block_table, block_table_stride=block_table.stride(0),
        block_size=block_size, dcp_world_size=1, cp_interleave=1, COMPRESS_RATIO=ratio, PAD_ID=PAD,
        TRITON_BLOCK_SIZE=1024,
    )  # fmt: skip
    assert output.tolist() == expected


def test_compressed_slots_exceed_32_bits():
    output = torch.full((1,), UNTOUCHED, dtype=torch.int64)
    kernel("CompressedSlotMapping")(
        output, torch.zeros(1, dtype=torch.int64), int32([0, 1]), int32([4]),
        int32([2**30]).view(1, 1), 1, 64, 1, 1, COMPRESS_RATIO=4, PAD_ID=PAD,
    )  # fmt: skip
    assert output.tolist() == [2**36]


# --- chunks of the indexer's prefill ---


def prefill_chunk_loop(
    starts, seq_lens, compressed_starts, row_starts, start, stop, ratio, token_to_seq, ks, ke
):
    for request, seq_len in enumerate(seq_lens):
        query_start, query_len = starts[request], starts[request + 1] - starts[request]
        start_pos = seq_len - query_len
        for offset in range(query_len):
            absolute = query_start + offset
            if start <= absolute < stop:
                ks[absolute - start] = row_starts[request]
                ke[absolute - start] = row_starts[request] + (start_pos + 1 + offset) // ratio
        for offset in range(compressed_starts[request + 1] - compressed_starts[request]):
            token_to_seq[compressed_starts[request] + offset] = request
    return token_to_seq, ks, ke


@settings(deadline=None, max_examples=60)
@given(batches, st.sampled_from([1, 4, 128]), st.integers(0, 20), st.integers(0, 60), st.booleans())
def test_prefill_chunk_metadata(batch, ratio, start, width, own_row_starts):
    starts = starts_of([length for length, _ in batch])
    seq_lens = [length + before for length, before in batch]
    compressed_starts = starts_of([seq_len // ratio for seq_len in seq_lens])
    row_starts = [7 * value + 1 for value in compressed_starts] if own_row_starts else compressed_starts
    start = min(start, starts[-1])
    stop = min(start + width, starts[-1])
    outputs = [
        torch.full((size + 2,), UNTOUCHED, dtype=torch.int32)
        for size in (compressed_starts[-1], stop - start, stop - start)
    ]
    expected = prefill_chunk_loop(
        starts,
        seq_lens,
        compressed_starts,
        row_starts,
        start,
        stop,
        ratio,
        *(output.tolist() for output in outputs),
    )
    kernel("BuildPrefillChunkMetadata")(
        query_start_loc_ptr=int32(starts), uncompressed_seq_lens_ptr=int32(seq_lens),
        cu_compressed_seq_lens_ptr=int32(compressed_starts),
        row_start_cu_compressed_seq_lens_ptr=int32(row_starts), token_to_seq_ptr=outputs[0],
        cu_compressed_seq_len_ks_ptr=outputs[1], cu_compressed_seq_len_ke_ptr=outputs[2],
        query_slice_start=start, query_slice_stop=stop, DCP_RANK=0, DCP_WORLD=1, DCP_INTERLEAVE=1,
        BLOCK_SIZE=1024, COMPRESS_RATIO=ratio,
    )  # fmt: skip
    assert [output.tolist() for output in outputs] == list(expected)


# --- what the CPU refuses, and what it need not compute ---


def test_several_decode_tokens_are_refused():
    with pytest.raises(RuntimeError, match=r"speculative decoding.* not supported on the CPU"):
        kernel("PrepareUniformDecode")(None, None, None, 0, None, 0, None, 2)


@pytest.mark.parametrize(
    "name, argument", [("CompressedSlotMapping", "dcp_world_size"), ("BuildPrefillChunk", "DCP_WORLD")]
)
def test_decode_context_parallelism_is_refused(name, argument):
    function = kernel(name)
    empty = dict.fromkeys(_kernel_arg_names(function))
    with pytest.raises(AssertionError, match="decode context parallelism of 2 on the CPU"):
        function(**(empty | {argument: 2}))


def test_nothing_in_the_cpu_attention_reads_the_window_slots_left_uncomputed():
    """Outputs stay as they are; were they read on the CPU, this kernel would have to compute them."""
    indices, lengths = torch.full((4, 8), UNTOUCHED), torch.full((4,), UNTOUCHED)
    arguments = dict.fromkeys(_kernel_arg_names(kernel("ComputeSWAIndicesAndLens")))
    kernel("ComputeSWAIndicesAndLens")(**(arguments | {"swa_indices_ptr": indices, "swa_lens_ptr": lengths}))
    assert bool((indices == UNTOUCHED).all()) and bool((lengths == UNTOUCHED).all())
    sources = {path.name: path.read_text() for path in Path(cpu.__file__).parent.glob("*.py")}
    assert "SWA" in sources["cpu_sparse.py"]
    readers = [name for name, text in sources.items() if "swa_indices" in text or "swa_lens" in text]
    assert readers == []
