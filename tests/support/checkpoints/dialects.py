"""The demo checkpoint in every dialect that exporters write, made on the fly from its tensors and config.

A dialect is a function (tensors, config) -> (tensors, config); applied one after the other they combine.
Where two dialects hold the same numbers, a server must give the same log-probabilities for both.
"""

import json
from collections.abc import Callable

import torch
import torch.nn.functional as F
from cutedsl_nvfp4 import format as nvfp4
from cutedsl_nvfp4 import reference
from recipe import export, names
from tests.support.checkpoints import small
from tests.support.checkpoints.small import FP8_BLOCK, MXFP4_BLOCK, Tensors
from tests.support.paths import DEMO

Checkpoint = tuple[Tensors, dict]
Dialect = Callable[[Tensors, dict], Checkpoint]


def demo() -> Checkpoint:
    """The demo without its draft head, with global scales that survive as divisors: 1 / (1 / scale) == scale in f32."""
    tensors = export.load_checkpoint(DEMO)
    for name, value in tensors.items():
        if name.endswith((".weight_scale_2", ".input_scale")):
            tensors[name] = 1.0 / (1.0 / value)
    return tensors, {**json.loads((DEMO / "config.json").read_text()), "num_nextn_predict_layers": 0}


def linears(tensors: Tensors) -> list[str]:
    """Names, without leaf, of the layers stored as NVFP4."""
    return [name.removesuffix(".weight_scale_2") for name in tensors if name.endswith(".weight_scale_2")]


# --- all NVFP4 ---


def weight_only(tensors: Tensors, config: dict) -> Checkpoint:
    """No input_scale anywhere, and a config that says so."""
    quantization = json.loads(json.dumps(config["quantization_config"]))
    for group in quantization["config_groups"].values():
        group["input_activations"] = None
    kept = {name: value for name, value in tensors.items() if not name.endswith(".input_scale")}
    return kept, {**config, "quantization_config": quantization}


def o_a_in_bf16(tensors: Tensors, config: dict) -> Checkpoint:
    """wo_a dequantized and ignored: exporters that look for linear layers do not see a grouped one."""
    tensors, quantization = dict(tensors), dict(config["quantization_config"])
    layers = [layer for layer in linears(tensors) if layer.endswith(".wo_a")]
    for layer in layers:
        weight, scale = tensors[f"{layer}.weight"], tensors.pop(f"{layer}.weight_scale")
        tensors[f"{layer}.weight"] = reference.dequantize(
            weight, scale, tensors.pop(f"{layer}.weight_scale_2")
        ).bfloat16()
        tensors.pop(f"{layer}.input_scale", None)
    quantization["ignore"] = [*quantization["ignore"], *layers]
    return tensors, {**config, "quantization_config": quantization}


def _theirs(name: str) -> str:
    """DeepSeek's name of a tensor or layer -> transformers', by the demo recipe's table."""
    module, leaf = name, ""
    for scale in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
        if name.endswith(f".{scale}"):
            module, leaf = name.removesuffix(f".{scale}"), scale
    for known in (name, f"{module}.weight"):
        if known in names.TOP_LEVEL:
            return names.TOP_LEVEL[known]
    if ".ffn.experts." in module:
        before, expert, after = names.split_expert(f"{module}.weight")
        theirs = {".w1.weight": "gate_proj", ".w2.weight": "down_proj", ".w3.weight": "up_proj"}[after]
        renamed = f"model.{before.replace('.ffn.', '.mlp.')}{expert}.{theirs}"
    else:
        _, layer, rest = name.split(".", 2)
        if rest in names.IN_LAYER:
            return f"model.layers.{layer}.{names.IN_LAYER[rest]}"
        rest = names.IN_LAYER[module.split(".", 2)[2] + ".weight"].removesuffix(".weight")
        renamed = f"model.layers.{layer}.{rest}"
    return f"{renamed}.{leaf}" if leaf else renamed


def transformers_names(tensors: Tensors, config: dict) -> Checkpoint:
    """transformers' names, and the config.json that transformers itself writes for this model."""
    quantization = dict(config["quantization_config"])
    layers = {name.rpartition(".")[0] for name in tensors if name.startswith("layers.")}
    quantization["ignore"] = [
        _theirs(pattern) if pattern in layers else pattern.replace(".ffn.", ".mlp.")
        for pattern in quantization["ignore"]
    ]
    theirs = {
        **names.transformers_config(config).to_dict(), "architectures": config["architectures"],
        "dtype": config["torch_dtype"], "quantization_config": quantization,
    }  # fmt: skip
    for lost in ("qk_rope_head_dim", "rope_theta", "compress_rope_theta"):
        theirs.pop(lost, None)
    return {_theirs(name): value for name, value in tensors.items()}, theirs


def compressed_tensors(tensors: Tensors, config: dict) -> Checkpoint:
    """llm-compressor's layout: divisors, weight_packed, targets and ignores by regular expression and fused name."""
    renamed = {}
    for name, value in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf in ("weight_scale_2", "input_scale"):
            leaf = {"weight_scale_2": "weight_global_scale", "input_scale": "input_global_scale"}[leaf]
            value = (1.0 / value).reshape(1)
        elif leaf == "weight" and f"{layer}.weight_scale" in tensors:
            leaf = "weight_packed"
        renamed[f"{layer}.{leaf}" if layer else leaf] = value
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True,
               "dynamic": False}  # fmt: skip
    activations = {**weights, "dynamic": "local"} if any(".input_scale" in name for name in tensors) else None
    targets = [
        r"re:.*attn\.fused_wqa_wkv$", r"re:.*attn\.(indexer\.)?wq_b$", r"re:.*attn\.wo_[ab]$",
        r"re:.*compressor\.fused_wkv_wgate$", r"re:.*indexer\.weights_proj$",
        r"re:.*ffn\.shared_experts\.w[123]$", r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$",
    ]  # fmt: skip
    quantization = {
        "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed", "kv_cache_scheme": None,
        "ignore": ["head", r"re:.*ffn\.gate$"]
        + [layer for layer in config["quantization_config"]["ignore"] if layer.endswith((".wo_a", ".o_a_proj"))],
        "config_groups": {"group_0": {"targets": targets, "weights": weights, "input_activations": activations}},
    }  # fmt: skip
    return renamed, {**config, "quantization_config": quantization}


# --- FP8 attention ---


def widened(tensors: Tensors, config: dict) -> Checkpoint:
    """The demo dequantized (f32), its narrow dimensions filled with zeros to multiples of the FP8 block.

    The function stays: SwiGLU of zero rows is zero, and so is what zero columns read. Only q_norm sees its
    input's width: four times as wide, the root of the mean square halves, which q_norm.weight / 2 undoes.
    """
    wide = {**config, "q_lora_rank": 256, "o_lora_rank": 128, "moe_intermediate_size": 128}
    wide.pop("quantization_config")
    groups, o_rank = config["o_groups"], config["o_lora_rank"]
    plain = export.dequantized(tensors)
    assert wide["q_lora_rank"] == 4 * config["q_lora_rank"]

    def pad(value: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        return F.pad(value, (0, columns - value.shape[1], 0, rows - value.shape[0]))

    for name, value in plain.items():
        leaf = name.split(".", 2)[-1].removesuffix(".weight")
        if leaf == "attn.wq_a":
            plain[name] = pad(value, 256, value.shape[1])
        elif leaf in ("attn.wq_b", "attn.indexer.wq_b"):
            plain[name] = pad(value, value.shape[0], 256)
        elif leaf == "attn.q_norm":
            plain[name] = F.pad(value / 2, (0, 256 - value.shape[0]))
        elif leaf == "attn.wo_a":
            by_group = value.unflatten(0, (groups, o_rank))
            plain[name] = F.pad(by_group, (0, 0, 0, 128 - o_rank)).flatten(0, 1)
        elif leaf == "attn.wo_b":
            by_group = value.unflatten(1, (groups, o_rank))
            plain[name] = F.pad(by_group, (0, 128 - o_rank)).flatten(1)
        elif leaf.endswith((".w1", ".w3")):
            plain[name] = pad(value, 128, value.shape[1])
        elif leaf.endswith(".w2"):
            plain[name] = pad(value, value.shape[0], 128)
    return plain, wide


def native(plain: Tensors, config: dict) -> Checkpoint:
    """DeepSeek's own format, from `widened` weights: FP8 attention and shared experts, MXFP4 routed experts."""
    return small.native(plain), {**config, "quantization_config": dict(small.NATIVE_QUANTIZATION)}


def experts_only(plain: Tensors, config: dict) -> Checkpoint:
    """`native` with its routed experts in NVFP4, without loss: e8m0 scales as power-of-two global and e4m3 scales."""
    tensors, config = native(plain, config)
    for name in [name for name in tensors if ".ffn.experts." in name and name.endswith(".weight")]:
        layer = name.removesuffix(".weight")
        codes, exponent = small.mxfp4(plain[name])
        shift = exponent.amax() - 8  # 2^8 is e4m3's largest power of two, 2^-9 its smallest
        scales = (exponent - shift).exp2().repeat_interleave(2, 1)
        assert torch.equal(scales.to(torch.float8_e4m3fn).float(), scales), f"{name}: not lossless"
        del tensors[f"{layer}.scale"]
        tensors[name] = codes
        tensors[f"{layer}.weight_scale"] = scales.to(torch.float8_e4m3fn)
        tensors[f"{layer}.weight_scale_2"] = shift.exp2()
    quantization = {
        "quant_method": "fp8", "quant_algo": "MIXED_PRECISION", "moe_quant_algo": "NVFP4",
        "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
    }  # fmt: skip
    return tensors, {**config, "quantization_config": quantization}


def experts_only_compressed(plain: Tensors, config: dict) -> Checkpoint:
    """`experts_only` by compressed-tensors: NVFP4 experts with divisors, FP8 layers with f32 `weight_scale`."""
    tensors, config = experts_only(plain, config)
    nvfp4_group = compressed_tensors(tensors, {**config, "quantization_config": {"ignore": []}})
    renamed, quantization = nvfp4_group[0], nvfp4_group[1]["quantization_config"]
    for name in [name for name in renamed if name.endswith(".scale")]:
        renamed[name.removesuffix("scale") + "weight_scale"] = renamed.pop(name).float()
    fp8_weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [FP8_BLOCK, FP8_BLOCK],
                   "symmetric": True, "dynamic": False}  # fmt: skip
    fp8_activations = {
        "num_bits": 8,
        "type": "float",
        "strategy": "group",
        "group_size": 128,
        "dynamic": True,
    }
    experts = {**quantization["config_groups"]["group_0"], "targets": [r"re:.*ffn\.experts\.\d+\.w[123]$"]}
    targets = [
        r"re:.*attn\.(fused_wqa_wkv|wq_b|wo_a|wo_b)$",
        r"re:.*indexer\.wq_b$",
        r"re:.*shared_experts\.w\d$",
    ]
    others = {"targets": targets, "weights": fp8_weights, "input_activations": fp8_activations}
    groups = {"group_0": others, "group_1": experts}
    quantization = {**quantization, "format": "mixed-precision", "config_groups": groups}
    return renamed, {**config, "quantization_config": quantization}


def what_native_holds(plain: Tensors) -> Tensors:
    """The numbers in `native` and `experts_only`, f32 under DeepSeek's names: input of the transformers reference."""
    held = small.native_dtypes(plain)
    for name, value in plain.items():
        if ".ffn.experts." in name:
            codes, exponent = small.mxfp4(value)
            scale = exponent.exp2().repeat_interleave(MXFP4_BLOCK, 1)
            held[name] = nvfp4.decode_e2m1(nvfp4.unpack_codes(codes)) * scale
        elif name.removesuffix(".weight").endswith(small.IN_FP8):
            codes, _ = small.fp8(value)
            scale = small.fp8_exponents(value).exp2()
            held[name] = codes.float() * scale.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
    return held


# --- config.json ---


def _without(field: str):
    return lambda config: config.pop(field)


def _with(**fields):
    return lambda config: config.update(fields)


# What transformers writes, changed so that it cannot be repaired: (change, words of the refusal)
BEYOND_REPAIR = [
    (_without("layer_types"), "lacks compress_ratios"),
    (_without("compress_rates"), r"compress_rates says nothing about \['compressed_sparse_attention'"),
    (_with(layer_types=["sliding_attention", "full_attention", "sliding_attention"]), "unknown kinds"),
    (_with(compress_ratios=[0, 4, 4]), r"compress_ratios is \[0, 4, 4\], but layer_types .* gives \[0, 4, 128\]"),
    (_with(num_hidden_layers=4), "3 compress_ratios for 4 layers"),
    (_without("mlp_layer_types"), "lacks num_hash_layers"),
    (_with(mlp_layer_types=["moe", "hash_moe", "moe"]), "must be hash_moe layers followed by moe layers"),
    (_without("rope_parameters"), "lacks rope_theta, compress_rope_theta, rope_scaling"),
    (lambda config: config["rope_parameters"].pop("compress"), "must hold both main and compress"),
    (lambda config: config["rope_parameters"]["compress"].update(attention_factor=1.27), "factor is 1.27"),
    (_with(rope_scaling={"type": "yarn", "factor": 4}), "rope_scaling is .* but rope_parameters.compress gives"),
    (_with(rope_theta=5000.0), "rope_theta is 5000.0, but rope_parameters.main gives 10000.0"),
    (_with(qk_rope_head_dim=32), "qk_rope_head_dim is 32, but .* gives 64"),
]  # fmt: skip
