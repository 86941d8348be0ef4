"""The trained model -> demo/: NVFP4 tensors under DeepSeek's names, config, tokenizer; and back again."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from cutedsl_nvfp4 import format as nvfp4
from cutedsl_nvfp4 import reference
from recipe import names, rounding
from recipe.model import BOS, CONFIG, EOS, SPECIAL_TOKENS, empty_model, tokenizer

WEIGHTS = "model.safetensors"
INPUT_SCALE_HEADROOM = 1.05


@torch.no_grad()
def spread_global_scales(model) -> None:
    """Scale some matrices by powers of two and undo it downstream, so that fused neighbours differ in scale.

    wkv is followed by an RMSNorm, which forgets its factor. w3 enters SwiGLU linearly, so w2 takes the
    inverse; only where SwiGLU's clamp was active does the function change: training has to go on after it.
    """
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.kv_proj.weight.mul_(4)
        if attention.compressor is not None:
            attention.compressor.kv_proj.weight.mul_(4)
            indexer = getattr(attention.compressor, "indexer", None)
            if indexer is not None:
                indexer.kv_proj.weight.mul_(4)
        shared, experts = layer.mlp.shared_experts, layer.mlp.experts
        shared.up_proj.weight.mul_(0.5)
        shared.down_proj.weight.mul_(2)
        for expert in range(experts.num_experts):
            factor = 2.0 ** -(expert % 3)
            experts.gate_up_proj[expert, experts.intermediate_dim :].mul_(factor)
            experts.down_proj[expert].div_(factor)


def native_linear_names(linear: str) -> list[str]:
    """`rounding`'s name of a quantized linear's input -> DeepSeek's names of the linears that read it."""
    if ".mlp.experts." not in linear:
        rest = linear.removeprefix("model.layers.")
        layer, rest = rest.split(".", 1)
        return [f"layers.{layer}." + names.FROM_TRANSFORMERS[rest + ".weight"].removesuffix(".weight")]
    layer = linear.split(".")[2]
    projections = ("w1", "w3") if linear.endswith("w13") else ("w2",)
    return [
        f"layers.{layer}.ffn.experts.{expert}.{projection}"
        for expert in range(CONFIG["n_routed_experts"])
        for projection in projections
    ]


def input_scales(amax: dict[str, float]) -> dict[str, float]:
    """Largest |activation| by input name -> global scale of the input, with headroom, by DeepSeek's name."""
    scales = {}
    for linear, largest in amax.items():
        if largest <= 0:
            raise ValueError(
                f"{linear} saw no activation above 0 on the training texts; its input_scale is unknown"
            )
        scale = largest * INPUT_SCALE_HEADROOM / nvfp4.AMAX_PER_GLOBAL_SCALE
        scales.update(dict.fromkeys(native_linear_names(linear), scale))
    return scales


def checkpoint_tensors(model, scales: dict[str, float]) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint; each quantized weight has its own global scale amax / (6 * 448)."""
    tensors = {}
    for name, value in names.to_native(model.state_dict()).items():
        if not names.QUANTIZED.search(name):
            tensors[name] = value.to(names.native_dtype(name))
            continue
        linear = name.removesuffix(".weight")
        global_scale = nvfp4.global_scale_from_amax(value.abs().amax())
        codes, block_scales = reference.quantize(value, global_scale)
        tensors[name] = codes
        tensors[f"{linear}.weight_scale"] = block_scales
        tensors[f"{linear}.weight_scale_2"] = global_scale
        tensors[f"{linear}.input_scale"] = torch.tensor(scales[linear])
    return tensors


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write config, tokenizer, generation config and weights into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer().save(str(folder / "tokenizer.json"))
    bos, eos, pad = SPECIAL_TOKENS[:3]
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "add_bos_token": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    generation = {"bos_token_id": BOS, "eos_token_id": EOS, "do_sample": False}
    contents = {
        "config.json": CONFIG,
        "tokenizer_config.json": tokenizer_config,
        "generation_config.json": generation,
    }
    for file, content in contents.items():
        (folder / file).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def dequantized(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Checkpoint tensors -> one f32 (or integer) tensor per weight, under DeepSeek's names."""
    plain = {}
    for name, value in tensors.items():
        if name.endswith((".weight_scale", ".weight_scale_2", ".input_scale")):
            continue
        if value.dtype == torch.uint8:
            linear = name.removesuffix(".weight")
            block_scales, global_scale = (
                tensors[f"{linear}.weight_scale"],
                tensors[f"{linear}.weight_scale_2"],
            )
            nvfp4.check_block_scales(block_scales, name)
            nvfp4.check_global_scale(global_scale, name)
            value = reference.dequantize(value, block_scales, global_scale)
        plain[name] = value
    return plain


def model_of(tensors: dict[str, torch.Tensor], config: dict = CONFIG):
    """Checkpoint tensors -> transformers model, f32, eager: the independent reference."""
    model = empty_model(config)
    state = names.to_transformers(dequantized(tensors), config["n_routed_experts"])
    model.load_state_dict(state)
    return model.eval()


def load_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint in `folder`."""
    return load_file(folder / WEIGHTS)


def stored_input_scales(tensors: dict[str, torch.Tensor], model) -> dict[str, float]:
    """The checkpoint's input_scale by the linear names that `rounding.round_activations` uses."""
    return {
        linear: tensors[native_linear_names(linear)[0] + ".input_scale"].item()
        for linear in rounding.input_names(model)
    }
