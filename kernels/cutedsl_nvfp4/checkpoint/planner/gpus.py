"""GPUs the planner knows: their memory as CUDA reports it, and vLLM's defaults for them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ..headers import CheckpointError

GIB = 2**30
# nvidia-smi's memory.total over CUDA's total: 1.004 to 1.007 on every GPU of the table
DRIVER_SHARE = 0.993


@dataclass(frozen=True)
class Gpu:
    """`memory_gib` is what torch.cuda.mem_get_info calls total; drivers differ by a few hundred MiB.

    `driver_name` is how nvidia-smi's name begins, after "NVIDIA ". `fp4_indexer` says whether vLLM has its MXFP4
    indexer cache there: on sm_10x alone (v1/attention/backends/mla/indexer.py:90).
    """

    name: str
    memory_gib: float
    driver_name: str = ""
    fp4_indexer: bool = False
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
        Gpu("H100", 79.1, "H100"),
        Gpu("H200", 139.8, "H200"),
        Gpu("H20", 95.0, "H20"),
        Gpu("B200", 178.3, "B200", fp4_indexer=True),
        Gpu("B300", 267.6, "B300", fp4_indexer=True),
        Gpu("GB200", 184.0, "GB200", fp4_indexer=True),
        Gpu("GB300", 276.5, "GB300", fp4_indexer=True),
        Gpu("RTXPRO6000", 94.9, "RTX PRO 6000"),
        Gpu("DGXSPARK", 119.6, "GB10", unified=True),
    )
}


def parse_gpus(text: str, memory_gib: float | None = None) -> tuple[int, Gpu]:
    """`8xH200` -> (8, H200); the count may be left out, blanks and dashes in the name do not count.

    `memory_gib` replaces the table's; with it, any name will do. CheckpointError for what is neither.
    """
    if memory_gib is not None and not 0 < memory_gib < float("inf"):
        raise CheckpointError(f"--gpu-memory-gib = {memory_gib:g}; it must be above 0")
    found = re.fullmatch(r"(?:(\d{1,4})\s*[xX*]\s*)?(.+)", text.strip())
    count, typed = (int(found.group(1) or 1), found.group(2)) if found else (0, "")
    gpu = GPUS.get(re.sub(r"[\s_-]", "", typed).upper())
    if count < 1 or (gpu is None and memory_gib is None):
        raise CheckpointError(
            f"GPUS = {text!r}: expected something like 8xH200; known are {', '.join(GPUS)}, and any other with "
            f"--gpu-memory-gib"
        )
    if memory_gib is None:
        return count, gpu
    return count, replace(gpu or Gpu(typed, memory_gib), memory_gib=memory_gib)


def gpu_of_driver(name: str, mib: int | None) -> Gpu:
    """A GPU by nvidia-smi's name and memory.total (None where it reports none, as for DGX Spark).

    It is the table's if the name and, within 2%, the memory are; else a GPU of that name and memory. CheckpointError
    where neither is known.
    """
    words = name.strip().removeprefix("NVIDIA ")
    known = next((gpu for gpu in GPUS.values() if f"{words} ".startswith(f"{gpu.driver_name} ")), None)
    if mib is None:
        if known is None:
            raise CheckpointError(
                f"nvidia-smi reports no memory for {name!r}, and the planner does not know it"
            )
        return known
    gib = mib / 1024 * DRIVER_SHARE
    if known is not None and abs(gib / known.memory_gib - 1) < 0.02:
        return known
    return Gpu(words, gib)
