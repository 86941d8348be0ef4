"""The committed demo checkpoint: valid NVFP4, every layer kind, dimensions that vLLM accepts, its text."""

import importlib
import json
import re

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from cutedsl_nvfp4 import format as nvfp4
from devtools.setup import demo_server
from tests.support.paths import DEMO

names = importlib.import_module("recipe.names")

SIZE_LIMIT = 9 * 2**20
CLEARLY_APART = 1.3  # a careless engine that shares one scale in a fused group must give visibly wrong text


@pytest.fixture(scope="module")
def config() -> dict:
    return json.loads((DEMO / "config.json").read_text())


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(DEMO / "model.safetensors")


@pytest.fixture(scope="module")
def expected() -> dict:
    return json.loads((DEMO / "expected.json").read_text())


def quantized_linears(tensors: dict[str, torch.Tensor]) -> list[str]:
    return [name.removesuffix(".weight") for name in tensors if names.QUANTIZED.search(name)]


def test_fits_into_the_repository():
    size = sum(
        file.stat().st_size for file in DEMO.rglob("*") if "__pycache__" not in file.parts and file.is_file()
    )
    assert size <= SIZE_LIMIT


def test_every_linear_is_valid_nvfp4(tensors):
    linears = quantized_linears(tensors)
    assert len(linears) > 500
    for linear in linears:
        codes, block_scales = tensors[f"{linear}.weight"], tensors[f"{linear}.weight_scale"]
        assert codes.dtype == torch.uint8, linear
        rows, half_k = codes.shape
        nvfp4.check_k(2 * half_k, linear)
        assert block_scales.shape == (rows, 2 * half_k // nvfp4.GROUP_SIZE), linear
        nvfp4.check_block_scales(block_scales, linear)
        assert block_scales.float().amax() == nvfp4.E4M3_MAX, (
            f"{linear}: global scale is not amax / (6 * 448)"
        )
        assert nvfp4.unpack_codes(codes).unique().numel() == 16, f"{linear}: some codes never occur"
        for scale in ("weight_scale_2", "input_scale"):
            value = tensors[f"{linear}.{scale}"]
            assert value.dtype == torch.float32 and value.dim() == 0, f"{linear}.{scale}"
            nvfp4.check_global_scale(value, f"{linear}.{scale}")


def test_nothing_else_is_quantized(tensors):
    quantized = set(quantized_linears(tensors))
    for name, value in tensors.items():
        owner = re.sub(r"\.(weight|weight_scale|weight_scale_2|input_scale)$", "", name)
        if owner not in quantized:
            assert value.dtype == names.native_dtype(name), name


def test_every_layer_kind_is_present(config, tensors):
    assert set(config["compress_ratios"]) == {0, 4, 128}
    assert len(config["compress_ratios"]) == config["num_hidden_layers"]
    for layer, ratio in enumerate(config["compress_ratios"]):
        prefix = f"layers.{layer}."
        assert (f"{prefix}attn.compressor.wkv.weight" in tensors) == (ratio > 0)
        assert (f"{prefix}attn.indexer.wq_b.weight" in tensors) == (ratio == 4)
        is_hash = layer < config["num_hash_layers"]
        assert (f"{prefix}ffn.gate.tid2eid" in tensors) == is_hash
        assert (f"{prefix}ffn.gate.bias" in tensors) != is_hash
        assert tensors[f"{prefix}hc_attn_base"].numel() == config["hc_mult"] * (config["hc_mult"] + 2)
    assert 0 < config["num_hash_layers"] < config["num_hidden_layers"]


def test_transformers_knows_every_tensor(config, tensors):
    """Names and shapes, without running anything: the dequantized shape of each tensor fits its parameter."""
    from recipe.export import dequantized
    from recipe.model import empty_model

    state = names.to_transformers(dequantized(tensors), config["n_routed_experts"])
    with torch.device("meta"):
        wanted = {name: value.shape for name, value in empty_model(config).state_dict().items()}
    assert {name: value.shape for name, value in state.items()} == wanted


def test_vllm_accepts_the_dimensions(config):
    assert config["head_dim"] == 512 and config["qk_rope_head_dim"] == 64
    assert config["index_n_heads"] in (32, 64) and config["index_head_dim"] == 128
    assert config["index_topk"] == 512
    assert config["hidden_size"] % 128 == 0 and config["hc_mult"] in (2, 4)
    assert config["sliding_window"] % 64 == 0
    assert config["n_routed_experts"] in (64, 128, 256, 384) and config["num_experts_per_tok"] in (6, 8)
    assert config["topk_method"] == "noaux_tc"
    assert config["quantization_config"]["quant_algo"] == "NVFP4"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("attn.wq_a", "attn.wkv"),
        ("attn.compressor.wgate", "attn.compressor.wkv"),
        ("attn.indexer.compressor.wgate", "attn.indexer.compressor.wkv"),
        ("ffn.shared_experts.w1", "ffn.shared_experts.w3"),
    ],
)
def test_fused_neighbours_have_different_global_scales(tensors, config, first, second):
    ratios = []
    for layer in range(config["num_hidden_layers"]):
        name = f"layers.{layer}.{first}.weight_scale_2"
        if name in tensors:
            other = tensors[f"layers.{layer}.{second}.weight_scale_2"]
            ratios.append((tensors[name] / other).item())
    assert ratios and all(max(ratio, 1 / ratio) > CLEARLY_APART for ratio in ratios), ratios


def test_w1_and_w3_of_most_experts_have_different_global_scales(tensors, config):
    apart = 0
    for layer in range(config["num_hidden_layers"]):
        for expert in range(config["n_routed_experts"]):
            prefix = f"layers.{layer}.ffn.experts.{expert}"
            ratio = (tensors[f"{prefix}.w1.weight_scale_2"] / tensors[f"{prefix}.w3.weight_scale_2"]).item()
            apart += max(ratio, 1 / ratio) > CLEARLY_APART
    assert apart > config["num_hidden_layers"] * config["n_routed_experts"] / 2


def test_tokenizer_is_one_token_per_byte(config):
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    text = "Dock A: ümlaut, 12.\n"
    ids = tokenizer.encode(text).ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_to_id("<｜end▁of▁sentence｜>") == config["eos_token_id"]
    assert tokenizer.get_vocab_size() <= config["vocab_size"]


@pytest.mark.parametrize("group", ["documents", "long"])
def test_expected_texts_fit_tokenizer_and_logprobs(expected, group):
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    assert len(expected[group]) >= 2
    for document in expected[group]:
        ids = tokenizer.encode(document["prompt"] + document["text"]).ids
        assert ids == document["token_ids"]
        assert document["logprobs_from"] >= 1
        assert len(document["logprobs"]) == len(ids) - document["logprobs_from"]
        assert all(logprob <= 0 for logprob in document["logprobs"])
        answer = len(tokenizer.encode(document["text"]).ids)
        assert document["max_tokens"] == answer + 1
        assert answer <= len(document["logprobs"])
        assert min(document["logprobs"][-answer:]) > -0.7, "greedy text whose tokens are not the likeliest"


def test_texts_depend_on_the_key(expected):
    for group in ("documents", "long"):
        assert len({document["text"] for document in expected[group]}) == len(expected[group])


def test_long_answers_lie_beyond_what_the_indexer_may_skip(expected, config):
    reach = config["index_topk"] * 4
    for document in expected["long"]:
        prompt, island = document["prompt"], document["key"].upper()
        assert prompt.count(island) == 1, "the key must be nowhere else"
        distance = len(prompt) - prompt.index(island) - len(island)
        assert distance > reach + 4, f"{island} is only {distance} tokens before the answer"


def test_conversation_is_the_recipes_as_the_server_renders_it(expected, config):
    """Requests, messages and lengths of prompts; transformers said the rest when the file was written."""
    from vllm.tokenizers.deepseek_v4 import DeepseekV4Tokenizer

    tokenizer = DeepseekV4Tokenizer.from_pretrained(DEMO)
    recipe = importlib.import_module("recipe.expected")
    assert [turn["key"] for turn in expected["chat"]] == [turn.key for turn in recipe.ASKED]
    for turn, wanted in zip(expected["chat"], recipe.ASKED, strict=True):
        request = turn["request"]
        assert (request["messages"], turn["message"]) == (list(wanted.messages), wanted.message)
        arguments = {"tools": request.get("tools"), **request["chat_template_kwargs"]}
        ids = tokenizer.apply_chat_template(request["messages"], **arguments)
        assert len(ids) == turn["prompt_tokens"] and ids[0] == config["bos_token_id"]
    assert expected["chat"][0]["request"]["messages"][0]["content"] == demo_server.QUESTION
