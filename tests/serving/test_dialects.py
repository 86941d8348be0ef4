"""Every dialect in which DeepSeek-V4 checkpoints come: config repaired, names translated, coverage, and served."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.transformers_utils.config import get_config

from cutedsl_nvfp4.checkpoint import config as checkpoint_config
from cutedsl_nvfp4.checkpoint.compressed_tensors import as_native
from cutedsl_nvfp4.checkpoint.config import native_config, native_quantization
from cutedsl_nvfp4.checkpoint.layers import quantizable
from cutedsl_nvfp4.checkpoint.names import native_name
from cutedsl_nvfp4.vllm.coverage import check_coverage, check_weight_coverage
from recipe import names as recipe_names
from recipe.expected import token_logprobs
from recipe.model import empty_model
from tests.support.checkpoints import dialects as checkpoints
from tests.support.checkpoints import small
from tests.support.one_rank import one_rank
from tests.support.parity.distances import mean_distance
from tests.support.paths import DEMO
from tests.support.processor import has_avx512_bf16, has_block_fp8, need
from tests.support.servers.vllm import Server, ServerDied

DOCUMENTS = json.loads((DEMO / "expected.json").read_text())["documents"]


def made(*dialects: checkpoints.Dialect) -> checkpoints.Checkpoint:
    """The demo after `dialects`, from the first to the last."""
    tensors, config = checkpoints.demo()
    for dialect in dialects:
        tensors, config = dialect(tensors, config)
    return tensors, config


DIALECTS = {
    "native": (),
    "o_a-bf16-weight-only": (checkpoints.o_a_in_bf16, checkpoints.weight_only),
    "transformers": (checkpoints.transformers_names,),
    "transformers-o_a-bf16": (checkpoints.o_a_in_bf16, checkpoints.transformers_names),
    "compressed-tensors-o_a-bf16": (checkpoints.o_a_in_bf16, checkpoints.compressed_tensors),
    "compressed-tensors-transformers-weight-only": (
        checkpoints.weight_only,
        checkpoints.transformers_names,
        checkpoints.compressed_tensors,
    ),
    "experts-only-fp8": (checkpoints.widened, checkpoints.experts_only),
    "compressed-tensors-experts-only-fp8": (checkpoints.widened, checkpoints.experts_only_compressed),
    "mxfp4-fp8": (checkpoints.widened, checkpoints.native),
}


# --- config.json ---


def repaired(config: dict, tmp_path: Path):
    """`config` as vLLM reads it from a config.json."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    return get_config(str(tmp_path), trust_remote_code=False)


def test_what_transformers_writes_reads_as_deepseeks_own(tmp_path):
    _, theirs = made(checkpoints.transformers_names)
    assert theirs.keys().isdisjoint(
        {
            "compress_ratios",
            "num_hash_layers",
            "rope_theta",
            "rope_scaling",
            "topk_method",
            "qk_rope_head_dim",
        }
    )
    ours = get_config(str(DEMO), trust_remote_code=False)
    read = repaired(theirs, tmp_path)
    elsewhere = {"quantization_config", "expert_dtype", "torch_dtype", "rope_scaling"}
    for field in checkpoints.demo()[1].keys() - elsewhere:
        assert getattr(read, field, None) == getattr(ours, field, None), field
    scaling = {key: value for key, value in ours.rope_parameters.items() if key != "type"}
    assert {key: value for key, value in read.rope_parameters.items() if key in scaling} == scaling
    assert (
        "attention_factor" not in read.rope_parameters and "partial_rotary_factor" not in read.rope_parameters
    )
    assert read.dtype is ours.dtype is torch.bfloat16


def test_deepseeks_own_config_is_left_alone(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(checkpoint_config, "_reported", set())
    config = checkpoints.demo()[1]
    with caplog.at_level(logging.INFO, "cutedsl_nvfp4"):
        assert native_config(config) == config
        read = repaired(config, tmp_path)
    assert read.quantization_config == config["quantization_config"]
    assert not caplog.records


def test_every_repair_is_logged_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(checkpoint_config, "_reported", set())
    _, theirs = made(checkpoints.o_a_in_bf16, checkpoints.transformers_names)
    with caplog.at_level(logging.INFO, "cutedsl_nvfp4"):
        for _ in range(2):
            repaired(theirs, tmp_path)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(set(lines))
    for field in ("compress_ratios", "num_hash_layers", "rope_theta", "compress_rope_theta", "rope_scaling",
                  "qk_rope_head_dim", "topk_method", "quantization_config.ignore"):  # fmt: skip
        assert sum(line.startswith(f"config.json: {field}") for line in lines) == 1, field


@pytest.mark.parametrize("change, words", checkpoints.BEYOND_REPAIR)
def test_what_cannot_be_repaired_is_refused(change, words):
    _, config = made(checkpoints.transformers_names)
    config = json.loads(json.dumps(config))
    change(config)
    with pytest.raises(ValueError, match=words):
        native_config(config)


def test_lost_partial_rotary_factor_is_found_in_the_rope_parameters():
    _, config = made(checkpoints.transformers_names)
    del config["partial_rotary_factor"]
    assert native_config(config)["qk_rope_head_dim"] == 64


@pytest.mark.parametrize("expert_dtype, expected", [("fp4", "ue8m0"), ("fp8", None)])
def test_lost_scale_format_follows_from_the_experts(expert_dtype, expected, tmp_path, monkeypatch):
    monkeypatch.setenv(
        "VLLM_USE_DEEP_GEMM_E8M0", "1"
    )  # set here, so that get_config's own setting goes with it
    _, config = made(checkpoints.widened, checkpoints.native)
    del config["quantization_config"]["scale_fmt"]
    read = repaired({**config, "expert_dtype": expert_dtype}, tmp_path)
    assert read.quantization_config.get("scale_fmt") == expected


# --- lists of layers in quantization_config ---


def ignored(patterns: list[str], tmp_path: Path) -> list[str]:
    _, config = made(checkpoints.transformers_names)
    config["quantization_config"]["ignore"] = patterns
    return repaired(config, tmp_path).quantization_config["ignore"]


COMPRESSOR_1 = {f"layers.1.attn.compressor.{leaf}" for leaf in ("wkv", "wgate")}
INDEXER_1 = {f"layers.1.attn.indexer.{leaf}"
             for leaf in ("wq_b", "weights_proj", "compressor.wkv", "compressor.wgate")}  # fmt: skip


@pytest.mark.parametrize(
    "patterns, layers",
    [
        (["*.self_attn.o_a_proj"], {f"layers.{n}.attn.wo_a" for n in range(3)}),
        (["model.layers.1.self_attn.compressor*"], COMPRESSOR_1 | INDEXER_1),
        (["layers.1.self_attn.compressor.indexer"], INDEXER_1),
        (["model.layers.2.mlp.experts*"], {"layers.2.ffn.experts"}),
        (["model.layers.2.mlp.shared_experts.gate_proj"], {"layers.2.ffn.shared_experts.w1"}),
        (["lm_head", "*.mlp.gate"], set()),
    ],
)
def test_ignore_lists_in_transformers_names(patterns, layers, tmp_path):
    assert set(ignored(patterns, tmp_path)) == layers


def test_ignore_lists_in_deepseeks_names_are_left_alone(tmp_path):
    patterns = ["head", "*.ffn.gate", "model.layers.1.attn.wo_a", "lm_head"]
    assert ignored(patterns, tmp_path) == patterns


def test_ignore_list_in_a_file_of_its_own(tmp_path):
    _, config = made(checkpoints.transformers_names)
    del config["quantization_config"]
    quantization = {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": None,
                    "exclude_modules": ["lm_head", "*.self_attn.o_a_proj"]}  # fmt: skip
    content = {"producer": {"name": "modelopt"}, "quantization": quantization}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(content))
    read = repaired(config, tmp_path).quantization_config["quantization"]
    assert read["exclude_modules"] == [f"layers.{n}.attn.wo_a" for n in range(3)]


def test_experts_ignored_in_part_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"some of the matrices of layers\.0\.ffn\.experts"):
        ignored(["model.layers.0.mlp.experts.*.down_proj"], tmp_path)


def compressed(tmp_path: Path, **changes) -> dict:
    _, config = made(checkpoints.o_a_in_bf16, checkpoints.compressed_tensors)
    config["quantization_config"].update(changes)
    return repaired(config, tmp_path).quantization_config


def _group(**changes) -> dict:
    _, config = made(checkpoints.compressed_tensors)
    return {"group_0": {**config["quantization_config"]["config_groups"]["group_0"], **changes}}


FP8_GROUP = {
    "targets": ["Linear"],
    "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
}


def test_compressed_tensors_groups_become_one_ignore_list(tmp_path):
    read = compressed(tmp_path)
    assert (read["quant_method"], read["quant_algo"]) == ("modelopt", "NVFP4")
    assert read["ignore"] == [f"layers.{n}.attn.wo_a" for n in range(3)]
    assert compressed(tmp_path, config_groups=_group(targets=["Linear"]))["ignore"] == read["ignore"]
    assert compressed(tmp_path, config_groups=_group(input_activations=None))["quant_algo"] == "W4A16_NVFP4"
    experts = compressed(tmp_path, config_groups=_group(targets=[r"re:.*\.experts\..*"]))["ignore"]
    everything = {layer.name for layer in quantizable(get_config(str(DEMO), False))}
    assert set(experts) == {name for name in everything if not name.endswith("ffn.experts")}


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"config_groups": _group(weights={"num_bits": 4, "type": "int", "strategy": "group"})},
            "group_0 has weights",
        ),
        ({"config_groups": {**_group(targets=["re:.*wq_b"]), "group_1": FP8_GROUP}}, "would have to be FP8"),
        ({"config_groups": {"group_1": FP8_GROUP}}, r"layers\.0\.ffn\.experts.* would have to be NVFP4"),
        ({"config_groups": _group(targets=["re:.*qkv_proj"])}, "target no layer"),
        ({"config_groups": {}}, "target no layer"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "transform_config: not served"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config: not served"),
    ],
)
def test_what_compressed_tensors_cannot_have_is_refused(changes, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        compressed(tmp_path, **changes)


def test_other_models_keep_their_quantization_config():
    quantization = {
        "quant_method": "compressed-tensors",
        "config_groups": {"g": {"weights": {"num_bits": 8}}},
    }
    assert native_quantization(mock.Mock(model_type="llama"), quantization) is quantization


def test_divisors_come_out_inverted():
    tensors, _ = made(checkpoints.compressed_tensors)
    original, _ = made()
    read = {native_name(name): value for name, value in as_native(tensors.items())}
    assert read.keys() == original.keys()
    for name, value in original.items():
        assert torch.equal(read[name].reshape(value.shape), value), name


@pytest.mark.parametrize("bad", [0.0, -3.0, float("nan"), float("inf")])
def test_bad_divisors_are_refused_by_name(bad):
    name = "layers.0.attn.wq_a.weight_global_scale"
    with pytest.raises(ValueError, match=f"{name}: global scale divisor must be finite and positive"):
        dict(as_native([(name, torch.tensor([bad]))]))


def test_fp8_scales_come_out_in_e8m0_or_not_at_all():
    tensors, _ = made(checkpoints.widened, checkpoints.experts_only_compressed)
    original, _ = made(checkpoints.widened, checkpoints.experts_only)
    read = {native_name(name): value for name, value in as_native(tensors.items())}
    assert read.keys() == original.keys()
    for name, value in original.items():
        assert read[name].dtype == value.dtype and torch.equal(read[name].reshape(value.shape), value), name
    name = "layers.0.attn.wq_b.weight_scale"
    with pytest.raises(ValueError, match=f"{name}: FP8 block scales must be powers of two .* 0.75"):
        dict(as_native([(name, torch.tensor([[0.5, 0.75]]))]))


# --- names ---


def mappers() -> dict:
    from vllm.models.deepseek_v4.cpu import model as cpu
    from vllm.models.deepseek_v4.nvidia import model as nvidia

    return {
        name: module._make_deepseek_v4_weights_mapper("fp4")
        for name, module in (("cpu", cpu), ("cuda", nvidia))
    }


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dialect", ["transformers", "compressed-tensors-transformers-weight-only"])
def test_foreign_names_map_to_what_native_names_map_to(device, dialect):
    mapper = mappers()[device]
    native = made(checkpoints.weight_only)[0] if "weight-only" in dialect else made()[0]
    foreign = made(*DIALECTS[dialect])[0]
    assert len(foreign) == len(native)
    assert mapper.apply_list(list(foreign)) == mapper.apply_list(list(native))


def test_native_names_pass_unchanged():
    for dialect in ("native", "mxfp4-fp8", "experts-only-fp8"):
        for name in made(*DIALECTS[dialect])[0]:
            assert native_name(name) == name


def test_the_names_agree_with_the_demo_recipes():
    for native, theirs in recipe_names.TOP_LEVEL.items():
        assert native_name(theirs) == native
    for native, theirs in recipe_names.IN_LAYER.items():
        assert native_name(f"model.layers.7.{theirs}") == f"layers.7.{native}"
        assert native_name(f"layers.7.{theirs}") == f"layers.7.{native}"
    indexer = "self_attn.compressor.indexer.weights_proj"  # as some exporters write it
    assert native_name(f"model.layers.7.{indexer}.weight") == "layers.7.attn.indexer.weights_proj.weight"


# --- coverage ---


@pytest.fixture(scope="module")
def single_rank(tmp_path_factory) -> Iterator[None]:
    with one_rank(tmp_path_factory.mktemp("dist")):
        yield


def built(folder: Path):
    """The model vLLM builds for the checkpoint in `folder`, before any weight is loaded."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    arguments = EngineArgs(model=str(folder), max_model_len=4096, max_num_batched_tokens=4096)
    config = arguments.create_engine_config()
    with set_current_vllm_config(config), mock.patch("torch.cuda.Event"):
        return initialize_model(config)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_coverage(dialect, tmp_path, single_rank):
    """The whole checkpoint passes; without one tensor of each kind, or with a stray one, it is refused by name."""
    need(has_block_fp8() or not dialect.endswith("fp8"))
    tensors, config = made(*DIALECTS[dialect])
    model = built(small.write(tmp_path / "checkpoint", tensors, config))
    file = tmp_path / "checkpoint" / "model.safetensors"
    check_weight_coverage(model, [file])

    optional = ("input_scale", "input_global_scale")
    of_a_kind = {native_name(name).split(".", 2)[-1].replace(".63.", ".0."): name for name in tensors}
    missing = {name for name in of_a_kind.values() if not name.endswith(optional)}
    stray = {
        "layers.0.attn.wq_c.weight",
        "layers.0.ffn.experts.64.w1.weight",
        "model.layers.0.self_attn.q_b_proj.pre_quant_scale",
    }
    names = (tensors.keys() - missing) | stray
    parameters = {name for name, parameter in model.named_parameters() if parameter.numel()}
    with pytest.raises(ValueError, match=f" {len(missing)} parameters would stay unwritten") as error:
        check_coverage(
            names, parameters, model.hf_to_vllm_mapper, config["n_routed_experts"], lambda name: False
        )
    listed = f"3 tensors of the checkpoint have no place in the model: {', '.join(sorted(stray))}."
    assert listed in str(error.value)


def test_wrong_ignore_lists_are_refused_with_the_remedy(tmp_path, single_rank):
    plain, config = made(checkpoints.o_a_in_bf16, checkpoints.transformers_names)
    quantized, all_quantized = made(checkpoints.transformers_names)
    unlisted = small.write(tmp_path / "unlisted", plain, all_quantized)
    with pytest.raises(ValueError, match=r"add to quantization_config\.ignore what is stored unquantized: "
                                         r"model\.layers\.0\.self_attn\.o_a_proj"):  # fmt: skip
        check_weight_coverage(built(unlisted), [unlisted / "model.safetensors"])
    listed = small.write(tmp_path / "listed", quantized, config)
    with pytest.raises(ValueError, match=r"take off quantization_config\.ignore what is stored quantized: "
                                         r"model\.layers\.0\.self_attn\.o_a_proj"):  # fmt: skip
        check_weight_coverage(built(listed), [listed / "model.safetensors"])


def test_a_tensor_by_two_names_is_refused(tmp_path, single_rank):
    tensors, config = made()
    tensors["model.norm.weight"] = tensors["norm.weight"].clone()
    folder = small.write(tmp_path / "checkpoint", tensors, config)
    with pytest.raises(ValueError, match=r"norm\.weight, which are the same tensor by two names"):
        check_weight_coverage(built(folder), [folder / "model.safetensors"])


# --- served ---


def scored(server: Server) -> list[list[float]]:
    """The server's log-probabilities of the demo's texts, after it has recited the beginning of one."""
    tale = DOCUMENTS[0]
    assert server.complete(prompt=tale["prompt"], max_tokens=32)["choices"][0]["text"] == tale["text"][:32]
    rows = []
    for document in DOCUMENTS:
        ids = document["token_ids"]
        choice = server.complete(prompt=ids, max_tokens=1, prompt_logprobs=1)["choices"][0]
        rows.append([entry[str(i)]["logprob"] for entry, i in list(zip(choice["prompt_logprobs"], ids))[1:]])
    return rows


def distance(rows: list[list[float]], others: list[list[float]]) -> float:
    """Of the worst text."""
    return max(mean_distance(torch.tensor(row), torch.tensor(other)) for row, other in zip(rows, others))


@pytest.fixture(scope="class")
def served(tmp_path_factory):
    """Dialect -> its log-probabilities; each dialect is served once."""
    done: dict[str, list[list[float]]] = {}

    def serve(dialect: str) -> list[list[float]]:
        if dialect not in done:
            folder = tmp_path_factory.mktemp("dialect")
            checkpoint = small.write(folder / "checkpoint", *made(*DIALECTS[dialect]))
            with Server(checkpoint, folder / "server.log") as server:
                done[dialect] = scored(server)
        return done[dialect]

    return serve


@pytest.mark.serving
@pytest.mark.xdist_group("dialects")
class TestServed:
    def test_o_a_in_bf16_without_input_scales(self, served):
        """Against transformers on the same weights, wo_a in NVFP4: bf16 rounds it once more."""
        need(has_avx512_bf16())
        expected = [document["logprobs"] for document in DOCUMENTS]
        assert distance(served("o_a-bf16-weight-only"), expected) < 0.005

    @pytest.mark.parametrize("dialect", ["transformers-o_a-bf16", "compressed-tensors-o_a-bf16"])
    def test_the_same_numbers_give_the_same_log_probabilities(self, served, dialect):
        need(has_avx512_bf16())
        assert served(dialect) == served("o_a-bf16-weight-only")

    def test_fp8_attention_by_compressed_tensors(self, served):
        need(has_block_fp8())
        assert served("compressed-tensors-experts-only-fp8") == served("experts-only-fp8")

    @pytest.mark.parametrize("dialect", ["experts-only-fp8", "mxfp4-fp8"])
    def test_fp8_attention(self, served, dialect, tmp_path):
        if not has_block_fp8():
            with pytest.raises(ServerDied) as died:
                served(dialect)
            assert "CPUFp8BlockScaledMMKernel requires AMX or AVX512-BF16." in died.value.log
            return
        plain, config = made(checkpoints.widened)
        model = empty_model(config)
        state = recipe_names.to_transformers(checkpoints.what_native_holds(plain), config["n_routed_experts"])
        model.load_state_dict(state)
        expected = [token_logprobs(model.eval(), document["token_ids"]).tolist() for document in DOCUMENTS]
        assert distance(served(dialect), expected) < 0.005

    def test_a_stray_tensor_stops_the_server(self, tmp_path):
        tensors, config = made(checkpoints.transformers_names)
        stray = "model.layers.0.self_attn.q_b_proj.pre_quant_scale"
        tensors[stray] = torch.ones(64)
        checkpoint = small.write(tmp_path / "checkpoint", tensors, config)
        with pytest.raises(ServerDied) as died, Server(checkpoint, tmp_path / "server.log"):
            pass
        assert f"1 tensors of the checkpoint have no place in the model: {stray}" in died.value.log
