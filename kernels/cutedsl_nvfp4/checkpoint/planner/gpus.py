"""GPUs the planner knows: their memory as CUDA reports it, and vLLM's defaults for them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..headers import CheckpointError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """`memory_gib` is what torch.cuda.mem_get_info calls total; drivers differ by a few hundred MiB."""

    name: str
    memory_gib: float
    unified: bool = False  # the memory is the whole machine's

    @property
    def memory(self) -> int:
        return int(self.memory_gib * GIB)

    @property
    def default_batched_tokens(self) -> int:
        """`vllm serve`'s --max-num-batched-tokens (engine/arg_utils.py:2923-2952)."""
        return 16384 if self.memory_gib >= 160 else 8192 if self.memory_gib >= 70 else 2048

    @property
    def default_seqs(self) -> int:
        """`vllm serve`'s --max-num-seqs (the same lines)."""
        return 1024 if self.memory_gib >= 70 else 256


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H100", 79.1),
        Gpu("H200", 139.8),
        Gpu("B200", 178.3),
        Gpu("B300", 267.6),
        Gpu("GB200", 184.0),
        Gpu("RTXPRO6000", 94.9),
        Gpu("DGXSPARK", 119.6, unified=True),
    )
}


def parse_gpus(text: str) -> tuple[int, Gpu]:
    """`8xH200` -> (8, H200); the count may be left out, blanks and dashes in the name do not count."""
    found = re.fullmatch(r"(?:(\d{1,4})\s*[xX*]\s*)?(.+)", text.strip())
    name = re.sub(r"[\s_-]", "", found.group(2)).upper() if found else ""
    if name not in GPUS or int(found.group(1) or 1) < 1:
        raise CheckpointError(f"GPUS = {text!r}: expected something like 8xH200; known are {', '.join(GPUS)}")
    return int(found.group(1) or 1), GPUS[name]
