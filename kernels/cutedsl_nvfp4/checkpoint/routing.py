"""How many routed experts vLLM 0.32.0 routes tokens among: its kernels are compiled for some counts alone.

Others load, and stop the engine at the first token. Pruned checkpoints have them (104, 144, 216 of 256).
"""

from __future__ import annotations

# device -> counts: topk_softplus_sqrt_kernels.cu, and hash_topk_cpu and biased_topk_cpu in sgl-kernels/topk.cpp
EXPERT_COUNTS = {
    "cuda": (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 576),
    "cpu": (64, 128, 256, 384),
}


REMEDY = "serve a checkpoint that has so many"


def refusal(experts: int, device: str) -> str | None:
    """Why a DeepSeek-V4 with `experts` routed experts cannot be served on `device`, "cuda" or "cpu"; None if it can."""
    counts = EXPERT_COUNTS[device]
    if experts in counts:
        return None
    return (
        f"n_routed_experts = {experts} in config.json: vLLM's routing kernel on {device} takes "
        f"{', '.join(map(str, counts[:-1]))} or {counts[-1]}"
    )
