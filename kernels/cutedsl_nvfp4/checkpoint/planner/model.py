"""A DeepSeek-V4 model's tensors by config alone, and how many of their bytes each GPU holds."""

from __future__ import annotations

from dataclasses import dataclass

from .. import names
from ..dialects import Contents
from ..headers import CheckpointError
from ..written_config import native_config

PRO = {
    "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128, "q_lora_rank": 1536,
    "o_lora_rank": 1024, "o_groups": 16, "n_routed_experts": 384, "moe_intermediate_size": 3072, "index_topk": 1024,
    "compress_ratios": [128, 128] + [4, 128] * 29 + [4, 0],
}  # fmt: skip
FLASH = {
    "hidden_size": 4096, "num_hidden_layers": 43, "num_attention_heads": 64, "q_lora_rank": 1024,
    "o_lora_rank": 1024, "o_groups": 8, "n_routed_experts": 256, "moe_intermediate_size": 2048, "index_topk": 512,
    "compress_ratios": [0, 0] + [4, 128] * 20 + [4, 0],
}  # fmt: skip
_BOTH = {
    "head_dim": 512, "qk_rope_head_dim": 64, "num_experts_per_tok": 6, "n_shared_experts": 1, "index_n_heads": 64,
    "index_head_dim": 128, "num_hash_layers": 3, "hc_mult": 4, "sliding_window": 128, "vocab_size": 129280,
    "max_position_embeddings": 1048576, "rope_theta": 10000,
}  # fmt: skip
KNOWN = {"pro": {**_BOTH, **PRO}, "flash": {**_BOTH, **FLASH}}
# NVIDIA's checkpoints, by their published configs; the current ones last
RELEASES = {
    f"nvidia/DeepSeek-V4-{release}-NVFP4": {
        **KNOWN[preset],
        "quantization_config": {"quant_method": "fp8", "moe_quant_algo": "NVFP4"},
    }
    for release, preset in (("Flash", "flash"), ("Pro", "pro"), ("Flash-0731", "flash"), ("Pro-0813", "pro"))
}
ROW_SCALE_BYTES = 4  # our operands carry one f32 per output row


@dataclass(frozen=True)
class Parallel:
    """How the model is cut: tensor parallel ranks, data parallel replicas, experts whole (EP) or cut."""

    tp: int
    dp: int = 1
    expert_parallel: bool = False

    @property
    def gpus(self) -> int:
        return self.tp * self.dp

    @property
    def shared_is_replicated(self) -> bool:
        """Sequence-parallel MoE: EP with both DP and TP."""
        return self.expert_parallel and self.tp > 1 and self.dp > 1


def complete(config: dict) -> dict:
    """A checkpoint's config with native keys, checked for what the planner computes with."""
    config = native_config(config)
    missing = sorted(KNOWN["pro"].keys() - config.keys() - {"rope_theta"})
    if missing:
        raise CheckpointError(f"config.json lacks {', '.join(missing)}; take it from the original model")
    return config


def ratios(config: dict) -> list[int]:
    """Compression ratio of every layer but MTP: 0 or 1 for sliding window alone, 4, or 128."""
    found = config["compress_ratios"][: config["num_hidden_layers"]]
    if len(found) < config["num_hidden_layers"] or any(ratio not in (0, 1, 4, 128) for ratio in found):
        raise CheckpointError(f"compress_ratios must name 0, 1, 4 or 128 for every layer; got {found}")
    return found


def linear_shapes(config: dict) -> dict[str, tuple[int, int, int]]:
    """Native name -> (N, K, how many of them); the experts of a layer are one entry per matrix."""
    hidden, heads, head_dim = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    q_lora, o_rows = config["q_lora_rank"], config["o_groups"] * config["o_lora_rank"]
    inter, experts = config["moe_intermediate_size"], config["n_routed_experts"]
    shapes = {}
    for layer, ratio in enumerate(ratios(config)):
        found = {
            "attn.wq_a": (q_lora, hidden, 1),
            "attn.wkv": (head_dim, hidden, 1),
            "attn.wq_b": (heads * head_dim, q_lora, 1),
            "attn.wo_a": (o_rows, heads * head_dim // config["o_groups"], 1),
            "attn.wo_b": (hidden, o_rows, 1),
        }
        if ratio > 1:
            width = head_dim * (2 if ratio == 4 else 1)
            found.update({f"attn.compressor.{part}": (width, hidden, 1) for part in ("wkv", "wgate")})
        if ratio == 4:
            found["attn.indexer.wq_b"] = (config["index_n_heads"] * config["index_head_dim"], q_lora, 1)
            found["attn.indexer.weights_proj"] = (config["index_n_heads"], hidden, 1)
            width = 2 * config["index_head_dim"]
            found.update({f"attn.indexer.compressor.{part}": (width, hidden, 1) for part in ("wkv", "wgate")})
        shared = inter * config["n_shared_experts"]
        for where, rows, count in (("shared_experts", shared, 1), ("experts.*", inter, experts)):
            found[f"ffn.{where}.w1"] = found[f"ffn.{where}.w3"] = (rows, hidden, count)
            found[f"ffn.{where}.w2"] = (hidden, rows, count)
        shapes.update({f"layers.{layer}.{name}": shape for name, shape in found.items()})
    return shapes


def stored_format(config: dict, linear: str) -> str:
    """nvfp4, mxfp4, fp8 or bf16: as what a checkpoint with this config.json stores `linear` (a native name).

    `quant_method: fp8` leaves linears as DeepSeek stores them, but for routed experts where moe_quant_algo is NVFP4
    (vllm/models/deepseek_v4/quant_config.py:181-196). Any other config is taken as all NVFP4.
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "fp8":
        return "nvfp4"
    rest = names.split_layer(linear)[1]
    if rest.startswith("ffn.experts."):
        return "nvfp4" if str(quantization.get("moe_quant_algo")).upper() == "NVFP4" else "mxfp4"
    return "bf16" if ".compressor." in f".{rest}" or rest.endswith(".weights_proj") else "fp8"


def linear_bytes(stored: str, n: int, k: int) -> int:
    """Bytes on a GPU of an [n, k] weight in this format, with its block scales."""
    return {
        "nvfp4": n * k // 2 + n * k // 16 + ROW_SCALE_BYTES * n,
        "mxfp4": n * k // 2 + n * k // 32,
        "fp8": n * k + -(-n // 128) * -(-k // 128),
        "bf16": 2 * n * k,
    }[stored]


def parameter_bytes(config: dict) -> dict[str, int]:
    """Bytes of what is never quantized: `embeddings`, and the `rest` (norms, gates, hyper-connections, sinks)."""
    hidden, hc = config["hidden_size"], config["hc_mult"]
    rest = hidden * 2 + 4 * (hc * hc * hidden + hc + 1)  # final norm, hc_head
    for layer, ratio in enumerate(ratios(config)):
        rest += 2 * (2 * hidden + config["q_lora_rank"] + config["head_dim"])  # norms
        rest += 2 * config["n_routed_experts"] * hidden + 4 * config["num_attention_heads"]  # gate, sinks
        rest += 2 * 4 * (hc * (hc + 2) * (hc * hidden + 1) + 3)  # two hyper-connections
        if layer < config["num_hash_layers"]:
            rest += 4 * config["vocab_size"] * config["num_experts_per_tok"]
        else:
            rest += 4 * config["n_routed_experts"]
        if ratio > 1:
            rest += 4 * ratio * config["head_dim"] * (2 if ratio == 4 else 1) + 2 * config["head_dim"]
        if ratio == 4:
            rest += 4 * ratio * 2 * config["index_head_dim"] + 2 * config["index_head_dim"]
    return {"embeddings": 2 * 2 * config["vocab_size"] * hidden, "rest": rest}


def shards_of(linear: str, parallel: Parallel) -> int:
    """Over how many GPUs a linear's bytes are spread.

    fused_wqa_wkv and the compressors are built with disable_tp, the indexer's linears are ReplicatedLinear
    (vllm/models/deepseek_v4/attention.py:248-294, 961-988, compressor.py:273); wq_b, wo_a and wo_b are cut;
    experts are cut or dealt out over all TP x DP ranks (fused_moe's flattened parallelism).
    """
    rest = names.split_layer(linear)[1]
    if rest.startswith("ffn.experts."):
        return parallel.gpus
    if rest.startswith("ffn.shared_experts."):
        return 1 if parallel.shared_is_replicated else parallel.tp
    return parallel.tp if rest in ("attn.wq_b", "attn.wo_a", "attn.wo_b") else 1


def weight_bytes(config: dict, contents: Contents | None, parallel: Parallel) -> dict[str, int]:
    """Bytes of weights on each GPU, by kind of module; by config alone where there are no headers (`contents` None)."""
    found: dict[str, float] = dict.fromkeys((*names.KINDS, "embeddings", "rest"), 0)
    if contents is None:
        for name, (n, k, count) in linear_shapes(config).items():
            nbytes = count * linear_bytes(stored_format(config, name), n, k)
            found[names.kind_of(name)] += nbytes / shards_of(name, parallel)
        plain = parameter_bytes(config)
    else:
        for name, linear in contents.linears.items():
            nbytes = linear.nbytes + (ROW_SCALE_BYTES * linear.n if linear.format == "nvfp4" else 0)
            found[linear.kind] += nbytes / shards_of(name, parallel)
        plain = {"embeddings": 0, "rest": 0}
        for name, tensor in contents.parameters.items():
            plain["embeddings" if name in ("embed.weight", "head.weight") else "rest"] += tensor.nbytes
    found["embeddings"] += plain["embeddings"] / parallel.tp
    found["rest"] += plain["rest"]
    return {kind: int(nbytes) for kind, nbytes in found.items()}


def check_parallel(config: dict, parallel: Parallel) -> None:
    """CheckpointError where the model cannot be cut like this."""
    tp, inter = parallel.tp, config["moe_intermediate_size"]
    for key in ("num_attention_heads", "o_groups"):
        if config[key] % tp:
            raise CheckpointError(
                f"{key} = {config[key]} cannot be cut into {tp}; choose a tensor parallel size among its divisors"
            )
    cut = tp if parallel.expert_parallel else parallel.gpus
    if parallel.expert_parallel and config["n_routed_experts"] % parallel.gpus:
        raise CheckpointError(
            f"{config['n_routed_experts']} experts cannot be dealt to {parallel.gpus} GPUs evenly"
        )
    if not parallel.expert_parallel and inter % (cut * 16):
        raise CheckpointError(
            f"moe_intermediate_size = {inter} cut into {cut} is not a multiple of 16, the NVFP4 group; use --ep"
        )
