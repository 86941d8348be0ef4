"""The memory budget of one GPU: weights, caches, workspaces and overheads, and the longest context that fits.

vLLM takes `gpu_memory_utilization` of the GPU, subtracts what loading and a profile run used, and makes the KV cache
of the rest. It counts from after CUDA's context and NCCL's buffers exist (v1/worker/gpu_worker.py:506-537): these, and
block tables and C128's index buffers, which come after the cache, lie in the share it does not manage. What is
computed from vLLM's code says where; what is an estimate is marked so in the output.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..dialects import Contents
from ..headers import CheckpointError
from .caches import Pool, ceil_div, pool_of
from .gpus import GIB, GPUS, Gpu
from .model import Parallel, weight_bytes

MIB = 2**20
PREFILL_CHUNK = 4  # models/deepseek_v4/attention.py:156
INDEXER_LOGITS = 512 * MIB  # VLLM_SPARSE_INDEXER_MAX_LOGITS_MB
C128_ALIGNMENT = 128  # models/deepseek_v4/sparse_mla.py, _C128A_TOPK_ALIGNMENT
CONCURRENT_BATCHES = 2  # asynchronous scheduling, config/vllm.py:577-587

# Not derivable from code. vLLM prints the true numbers at start; docs/results/h200_serving.md has those of H200s.
ESTIMATED_CONTEXT = 0.5 * GIB
ESTIMATED_COLLECTIVES = 1.5 * GIB  # NCCL's buffers, where there are several GPUs
ESTIMATED_KERNELS = 0.3 * GIB  # modules and the libraries' workspaces: measured 0.15 to 0.3
ESTIMATED_GRAPHS = 1.0 * GIB  # measured 0.2 to 0.3 for four sizes; vLLM's own list has 51, or 83 on B200


@dataclass(frozen=True)
class Request:
    """What is to be served, and how."""

    max_model_len: int
    batched_tokens: int
    seqs: int
    utilization: float
    indexer_fp4: bool = False

    @property
    def in_flight(self) -> int:
        return CONCURRENT_BATCHES * self.batched_tokens


@dataclass(frozen=True)
class Item:
    """A line of the budget."""

    name: str
    nbytes: int
    estimated: bool = False


@dataclass(frozen=True)
class Budget:
    """One GPU's memory under a Request. `unmanaged` lies in what vLLM leaves."""

    gpu: Gpu
    request: Request
    pool: Pool
    managed: tuple[Item, ...]
    unmanaged: tuple[Item, ...]

    @property
    def requested(self) -> int:
        return int(self.gpu.memory * self.request.utilization)

    @property
    def kv_bytes(self) -> int:
        """Bytes left for the KV cache; negative by as much as is lacking."""
        return self.requested - sum(item.nbytes for item in self.managed)

    @property
    def slack(self) -> int:
        """What is left of the memory vLLM does not manage; negative means it runs out after start."""
        return self.gpu.memory - self.requested - sum(item.nbytes for item in self.unmanaged)

    @property
    def fits(self) -> bool:
        return (
            self.pool.fits(self.kv_bytes, self.request.max_model_len, self.request.in_flight)
            and self.slack >= 0
        )

    @property
    def needed(self) -> int:
        """Bytes of vLLM's share that one request of max_model_len takes, with all that is there before it."""
        blocks = self.pool.request_blocks(self.request.max_model_len, self.request.in_flight) + 1
        return sum(item.nbytes for item in self.managed) + self.pool.block_bytes * blocks

    @property
    def shortfall(self) -> int:
        """Bytes lacking for one request of max_model_len; 0 if it fits."""
        return max(0, self.needed - self.requested, -self.slack)


def _workspace(config: dict, request: Request) -> int:
    """The shared workspace: the larger of the sparse attention's and the indexer's.

    models/deepseek_v4/nvidia/flashmla.py:104-129; model_executor/layers/sparse_attn_indexer.py:443-461 with
    v1/attention/backends/mla/indexer.py:918-929 (factor 5 up to 256k tokens, else 2: config/vllm.py:1790-1798).
    """
    ratios = {max(1, ratio) for ratio in config["compress_ratios"][: config["num_hidden_layers"]]}
    length, tokens = request.max_model_len, request.batched_tokens
    finest = min((ratio for ratio in ratios if ratio > 1), default=0)
    rows = (ceil_div(length, finest) if finest else 0) + config["sliding_window"] + tokens
    top_k = ceil_div(config["index_topk"] + config["sliding_window"], 128) * 128
    attention = PREFILL_CHUNK * rows * config["head_dim"] * 2 + tokens * (top_k + 1) * 4
    if 4 not in ratios:
        return attention
    factor = 5 if length <= 256 * 1024 else 2
    indexer = length * (576 * 2 // 132) * factor // 4 * (config["index_head_dim"] + 4) + MIB
    return max(attention, indexer)


def _activations(config: dict, request: Request, parallel: Parallel) -> int:
    """Estimated peak of a profile run of `batched_tokens`: the larger of attention and experts, beside the residual.

    The factors are fitted to Flash on one H200 and on two.
    """
    tokens, hidden = request.batched_tokens, config["hidden_size"]
    # streams and hidden states, in and out; queries, queries of padded heads, results
    residual = tokens * (2 * config["hc_mult"] + 2) * hidden * 2
    heads = ceil_div(config["num_attention_heads"], parallel.tp)
    attention = tokens * (heads + 2 * max(64, heads)) * config["head_dim"] * 2
    inter = config["moe_intermediate_size"] // (1 if parallel.expert_parallel else parallel.tp)
    experts = tokens * parallel.dp * config["num_experts_per_tok"] * (3 * inter + hidden) * 2
    logits = request.seqs * config["vocab_size"] * (2 + 3 * 4)
    return residual + max(attention, experts, logits)


def budget_of(
    config: dict, contents: Contents | None, gpu: Gpu, parallel: Parallel, request: Request
) -> Budget:
    """Every byte of one GPU."""
    pool = pool_of(config, request.indexer_fp4)
    tokens, length = request.batched_tokens, request.max_model_len
    managed = [
        Item(f"weights: {kind}", n) for kind, n in weight_bytes(config, contents, parallel).items() if n
    ]
    # two tables (plain and compressed rope), f32 [positions, 64]: rotary_embedding/deepseek_scaling_rope.py:241-262
    managed.append(
        Item("rotary tables", 2 * config["max_position_embeddings"] * config["qk_rope_head_dim"] * 4)
    )
    managed.append(Item("index buffer", tokens * config["index_topk"] * 4))
    managed.append(Item("attention and indexer workspace", _workspace(config, request)))
    if 4 in config["compress_ratios"]:
        managed.append(Item("indexer logits", INDEXER_LOGITS))
    managed.append(Item("activations", _activations(config, request, parallel), True))
    managed.append(Item("kernels, libraries", int(ESTIMATED_KERNELS), True))
    managed.append(Item("CUDA graphs", int(ESTIMATED_GRAPHS), True))
    unmanaged = [Item("CUDA context", int(ESTIMATED_CONTEXT), True)]
    if parallel.gpus > 1:
        unmanaged.append(Item("collectives", int(ESTIMATED_COLLECTIVES), True))
    unmanaged.append(Item("block tables", pool.table_bytes(length, request.seqs)))
    if 128 in config["compress_ratios"]:
        width = ceil_div(ceil_div(length, 128), C128_ALIGNMENT) * C128_ALIGNMENT
        # models/deepseek_v4/sparse_mla.py:155-183
        unmanaged.append(Item("C128 index buffers", 2 * tokens * width * 4))
    if 4 in config["compress_ratios"]:  # v1/attention/backends/mla/indexer.py:1091-1095
        unmanaged.append(Item("indexer block table", tokens * ceil_div(length, 256) * 4))
    return Budget(gpu, request, pool, tuple(managed), tuple(unmanaged))


def _with_length(request: Request, length: int) -> Request:
    return Request(length, request.batched_tokens, request.seqs, request.utilization, request.indexer_fp4)


def longest_context(
    config: dict, contents: Contents | None, gpu: Gpu, parallel: Parallel, request: Request
) -> int:
    """Largest max_model_len, up to the request's, at which one request fits; 0 if none does."""

    def fits(length: int) -> bool:
        return budget_of(config, contents, gpu, parallel, _with_length(request, length)).fits

    if not fits(1):
        return 0
    low, high = 1, request.max_model_len
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def largest_that_auto_takes(budget: Budget) -> int:
    """What `--max-model-len auto` (-1) settles on: workspaces stay sized for the model's full length."""
    low, high = 0, budget.request.max_model_len
    while low < high:
        middle = (low + high + 1) // 2
        fits = budget.pool.fits(budget.kv_bytes, middle, budget.request.in_flight)
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def check_request(request: Request, config: dict, gpu: Gpu) -> None:
    """CheckpointError for what the model or vLLM refuses."""
    limit = config["max_position_embeddings"]
    if not 1 <= request.max_model_len <= limit:
        raise CheckpointError(f"--max-model-len = {request.max_model_len}; the model's range is 1 to {limit}")
    if not 0 < request.utilization <= 1:
        raise CheckpointError(f"--gpu-memory-utilization = {request.utilization}; it is a share, 0 to 1")
    if request.batched_tokens < 1 or request.seqs < 1:
        raise CheckpointError("--max-num-batched-tokens and --max-num-seqs must be at least 1")
    if request.indexer_fp4 and not gpu.fp4_indexer:
        known = ", ".join(found.name for found in GPUS.values() if found.fp4_indexer)
        raise CheckpointError(
            f"--indexer-fp4, vLLM's indexer_kv_dtype=mxfp4: it has that cache on {known} alone, not on {gpu.name}; "
            f"leave it out"
        )
