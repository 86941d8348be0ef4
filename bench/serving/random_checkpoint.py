"""Write an all-NVFP4 DeepSeek-V4 checkpoint of full width and few layers, with valid random operands.

    PYTHONPATH=kernels python3 -m bench.serving.random_checkpoint OUT [--model flash] [--layers 4] [--experts 64]

With --experts-only all but the routed experts is bf16: what stock vLLM can serve, too. For timing and for comparing
kernels on shapes that are served, where no trained checkpoint is needed: unlike `--load-format dummy`, every code
occurs and no block scale is zero or negative. Weights have the size that keeps activations near one. All layers are
hash-routed, so that two servers route alike. Uses the GPU if there is one.
"""

import argparse
import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

DEMO = Path(__file__).parent.parent / "demo"
CODE_RMS, SCALE_RMS = 2.93, 2.32  # of uniform e2m1 codes, and of the block scales drawn here
HC = 4

MODELS = {
    "flash": {
        "hidden_size": 4096, "num_attention_heads": 64, "q_lora_rank": 1024, "o_lora_rank": 1024, "o_groups": 8,
        "n_routed_experts": 256, "moe_intermediate_size": 2048, "index_topk": 512, "routed_scaling_factor": 1.5,
    },
    "pro": {
        "hidden_size": 7168, "num_attention_heads": 128, "q_lora_rank": 1536, "o_lora_rank": 1024, "o_groups": 16,
        "n_routed_experts": 384, "moe_intermediate_size": 3072, "index_topk": 1024, "routed_scaling_factor": 2.5,
    },
}  # fmt: skip


def config(model: str, layers: int, experts: int | None, vocab: int) -> dict:
    """The demo's configuration with `model`'s width."""
    found = json.loads((DEMO / "config.json").read_text()) | MODELS[model]
    ratios = ([0, 4, 128] if model == "flash" else [128, 4, 128])[:layers]
    ratios += [(4, 128)[i % 2] for i in range(layers - len(ratios))]
    found |= {"num_hidden_layers": layers, "compress_ratios": ratios, "num_hash_layers": layers,
              "index_n_heads": 64, "vocab_size": vocab}  # fmt: skip
    if experts:
        found["n_routed_experts"] = experts
    return found


class Writer:
    """Random tensors by name, and one safetensors file for each layer."""

    def __init__(self, folder: Path, device: str, experts_only: bool):
        self.folder, self.device, self.experts_only = folder, device, experts_only
        self.generator = torch.Generator(device).manual_seed(0)
        self.tensors: dict[str, torch.Tensor] = {}
        self.index: dict[str, str] = {}

    def normal(
        self, name: str, *shape: int, std: float = 1.0, mean: float = 0.0, dtype=torch.bfloat16
    ) -> None:
        values = torch.randn(shape, generator=self.generator, device=self.device) * std + mean
        self.tensors[name] = values.to(dtype)

    def nvfp4(self, name: str, n: int, k: int) -> None:
        def integers(low: int, high: int, *shape: int) -> torch.Tensor:
            return torch.randint(
                low, high, shape, dtype=torch.uint8, device=self.device, generator=self.generator
            )

        self.tensors[f"{name}.weight"] = integers(0, 256, n, k // 2)
        self.tensors[f"{name}.weight_scale"] = integers(0x38, 0x48, n, k // 16).view(torch.float8_e4m3fn)
        self.tensors[f"{name}.weight_scale_2"] = torch.tensor(1 / (CODE_RMS * SCALE_RMS * math.sqrt(k)))

    def linear(self, name: str, n: int, k: int) -> None:
        """A layer that is not a routed expert."""
        if self.experts_only:
            self.normal(f"{name}.weight", n, k, std=k**-0.5)
        else:
            self.nvfp4(name, n, k)

    def flush(self, file: str) -> None:
        save_file({n: t.cpu().contiguous() for n, t in self.tensors.items()}, self.folder / file)
        self.index |= dict.fromkeys(self.tensors, file)
        self.tensors = {}


def write_layer(writer: Writer, c: dict, layer: int) -> None:
    hidden, heads, ratio = c["hidden_size"], c["num_attention_heads"], c["compress_ratios"][layer]
    prefix = f"layers.{layer}"
    attn, ffn = f"{prefix}.attn", f"{prefix}.ffn"
    for norm, size in ((f"{prefix}.attn_norm", hidden), (f"{prefix}.ffn_norm", hidden),
                       (f"{attn}.q_norm", c["q_lora_rank"]), (f"{attn}.kv_norm", 512)):  # fmt: skip
        writer.normal(f"{norm}.weight", size, std=0.1, mean=1.0)
    for part in ("attn", "ffn"):
        writer.normal(f"{prefix}.hc_{part}_fn", HC * (HC + 2), HC * hidden, std=0.02, dtype=torch.float32)
        writer.normal(f"{prefix}.hc_{part}_base", HC * (HC + 2), std=0.5, dtype=torch.float32)
        writer.normal(f"{prefix}.hc_{part}_scale", 3, std=0.1, mean=0.5, dtype=torch.float32)
    writer.normal(f"{attn}.attn_sink", heads, std=0.5, dtype=torch.float32)
    writer.linear(f"{attn}.wq_a", c["q_lora_rank"], hidden)
    writer.linear(f"{attn}.wkv", 512, hidden)
    writer.linear(f"{attn}.wq_b", heads * 512, c["q_lora_rank"])
    writer.linear(f"{attn}.wo_a", c["o_groups"] * c["o_lora_rank"], heads * 512 // c["o_groups"])
    writer.linear(f"{attn}.wo_b", hidden, c["o_groups"] * c["o_lora_rank"])
    compressors = [(f"{attn}.compressor", 512 if ratio == 128 else 1024, 512)] if ratio else []
    if ratio == 4:
        compressors.append((f"{attn}.indexer.compressor", 256, 128))
        writer.linear(f"{attn}.indexer.wq_b", c["index_n_heads"] * 128, c["q_lora_rank"])
        writer.linear(f"{attn}.indexer.weights_proj", c["index_n_heads"], hidden)
    for name, rows, norm in compressors:
        writer.linear(f"{name}.wkv", rows, hidden)
        writer.linear(f"{name}.wgate", rows, hidden)
        writer.normal(f"{name}.ape", ratio, rows, std=0.5, dtype=torch.float32)
        writer.normal(f"{name}.norm.weight", norm, std=0.1, mean=1.0)
    inner, experts = c["moe_intermediate_size"], c["n_routed_experts"]
    writer.normal(f"{ffn}.gate.weight", experts, hidden, std=hidden**-0.5)
    choices = torch.rand(c["vocab_size"], experts, generator=writer.generator, device=writer.device)
    writer.tensors[f"{ffn}.gate.tid2eid"] = choices.topk(c["num_experts_per_tok"]).indices.to(torch.int32)
    shared = f"{ffn}.shared_experts"
    routed = [f"{ffn}.experts.{e}" for e in range(experts)]
    for name, write in ((shared, writer.linear), *((name, writer.nvfp4) for name in routed)):
        write(f"{name}.w1", inner, hidden)
        write(f"{name}.w3", inner, hidden)
        write(f"{name}.w2", hidden, inner)
    writer.flush(f"layer-{layer:03}.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=MODELS, default="flash")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, help="routed experts of a layer (default: the model's)")
    parser.add_argument("--vocab", type=int, default=129280)
    parser.add_argument("--experts-only", action="store_true", help="quantize only the routed experts")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    c = config(arguments.model, arguments.layers, arguments.experts, arguments.vocab)
    if arguments.experts_only:
        c["quantization_config"]["ignore"] += ["*.attn.*", "*.ffn.shared_experts*"]
    writer = Writer(arguments.out, "cuda" if torch.cuda.is_available() else "cpu", arguments.experts_only)
    hidden = c["hidden_size"]
    writer.normal("embed.weight", c["vocab_size"], hidden)
    writer.normal("head.weight", c["vocab_size"], hidden, std=2 * hidden**-0.5)
    writer.normal("norm.weight", hidden, std=0.1, mean=1.0)
    writer.normal("hc_head_fn", HC, HC * hidden, std=0.02, dtype=torch.float32)
    writer.normal("hc_head_base", HC, std=0.5, dtype=torch.float32)
    writer.normal("hc_head_scale", 1, mean=0.5, std=0.1, dtype=torch.float32)
    writer.flush("model.safetensors")
    for layer in range(arguments.layers):
        write_layer(writer, c, layer)
    sizes = sum(file.stat().st_size for file in arguments.out.iterdir())
    index = {"metadata": {"total_size": sizes}, "weight_map": writer.index}
    (arguments.out / "model.safetensors.index.json").write_text(json.dumps(index))
    (arguments.out / "config.json").write_text(json.dumps(c, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(DEMO / name, arguments.out / name)
    print(f"{arguments.out}: {arguments.layers} layers of {arguments.model}, {sizes / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
