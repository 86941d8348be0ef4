"""What vLLM does only on some processors. Tests of it are skipped elsewhere, at one line and for one reason."""

import pytest
import torch


def has_avx512_bf16() -> bool:
    """What vLLM asks before it loads its larger library: bf16 weights, and operators of its own."""
    return torch.cpu._is_avx512_bf16_supported()


def has_block_fp8() -> bool:
    return torch.cpu._is_amx_tile_supported() or has_avx512_bf16()


def need(there: bool) -> None:
    """Skip the test unless what it needs of vLLM is there."""
    if not there:
        pytest.skip("vLLM does this only on processors with AVX512-BF16 (block FP8: or with AMX)")
