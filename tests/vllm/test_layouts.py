"""Layouts of current checkpoints, from headers alone: inspected, converted, read and covered, or refused by name."""

import json
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.models.deepseek_v4.cpu.model import DeepseekV4ForCausalLM
from vllm.transformers_utils.config import get_config

from cutedsl_nvfp4.checkpoint import routing
from cutedsl_nvfp4.checkpoint.conversion import Options, plan_conversion
from cutedsl_nvfp4.checkpoint.dialects import read_contents
from cutedsl_nvfp4.checkpoint.draft import draft_head
from cutedsl_nvfp4.checkpoint.folder import Folder, read_checkpoint
from cutedsl_nvfp4.checkpoint.headers import CheckpointError
from cutedsl_nvfp4.checkpoint.inspect import inspect
from cutedsl_nvfp4.checkpoint.names import KINDS
from cutedsl_nvfp4.checkpoint.written_config import modelopt_config, native_config
from cutedsl_nvfp4.vllm.coverage import check_weight_coverage, native_weights
from cutedsl_nvfp4.vllm.cpu import operators
from tests.support.checkpoints import dialects, headers
from tests.support.checkpoints.headers import DSPARK_FIELDS, MTP_FIELDS
from tests.support.one_rank import one_rank
from tests.support.paths import DEMO

Layout = tuple[headers.Headers, dict]


def modelopt(draft: headers.Headers, fields: dict, *ignored: str) -> Layout:
    """An all-NVFP4 trunk as ModelOpt writes it, in DeepSeek's names."""
    config = headers.demo_config(**fields)
    config["quantization_config"]["ignore"] += ignored
    return headers.demo() | draft, config


def exported(dialect: dialects.Dialect, draft: headers.Headers, fields: dict, *ignored: str) -> Layout:
    """The trunk in another exporter's words."""
    tensors, config = dialect(*dialects.demo())
    config["quantization_config"]["ignore"] += ignored
    return headers.of(tensors) | draft, config | fields


DSPARK_LINE = "draft head: DSpark, 3 layers, block size 5; routed experts {}; other linears {}; not read"
MTP_LINE = "draft head: MTP, 1 layer; routed experts {}; other linears {}; not read"
STORED = {"fp8": "FP8 blocks", "mxfp4": "MXFP4", "nvfp4": "NVFP4", "bf16": "BF16"}

# layout -> (headers and config.json, what inspect says, formats of its draft's linears and experts)
LAYOUTS = {
    "none": (modelopt({}, {}), "draft head: none", ()),
    "none-declared": (
        modelopt({}, MTP_FIELDS), "draft head: none; config.json declares MTP, and no tensor of it is here", (),
    ),
    "mtp": (modelopt(headers.mtp("fp8", "mxfp4"), MTP_FIELDS, "mtp*"), MTP_LINE, ("fp8", "mxfp4")),
    "mtp-bf16": (modelopt(headers.mtp("bf16", "bf16"), MTP_FIELDS, "mtp.0*"), MTP_LINE, ("bf16", "bf16")),
    "mtp-nvfp4": (modelopt(headers.mtp("nvfp4", "nvfp4"), MTP_FIELDS), MTP_LINE, ("nvfp4", "nvfp4")),
    "mtp-nvfp4-experts": (
        modelopt(headers.mtp("bf16", "nvfp4"), MTP_FIELDS, "mtp.*.attn*", "mtp.*.shared_experts*", "mtp.0.[eh]_proj"),
        MTP_LINE, ("bf16", "nvfp4"),
    ),
    "mtp-as-a-layer": (
        modelopt(headers.mtp("fp8", "mxfp4", "layers.3"), MTP_FIELDS, "layers.3.*"), MTP_LINE, ("fp8", "mxfp4"),
    ),
    "dspark": (modelopt(headers.dspark("fp8", "mxfp4"), DSPARK_FIELDS, "mtp.*"), DSPARK_LINE, ("fp8", "mxfp4")),
    "dspark-nvfp4": (modelopt(headers.dspark("nvfp4", "nvfp4"), DSPARK_FIELDS), DSPARK_LINE, ("nvfp4", "nvfp4")),
    "transformers-mtp": (
        exported(dialects.transformers_names, headers.mtp("bf16", "bf16"), MTP_FIELDS, "mtp*"),
        MTP_LINE, ("bf16", "bf16"),
    ),
    "compressed-tensors": (exported(dialects.compressed_tensors, {}, {}), "draft head: none", ()),
    "compressed-tensors-mtp": (
        exported(
            dialects.compressed_tensors, headers.mtp("bf16", "nvfp4-packed"), MTP_FIELDS,
            r"re:mtp\.\d+\.(attn|ffn\.shared|._proj).*",
        ),
        MTP_LINE, ("bf16", "nvfp4"),
    ),
    "compressed-tensors-dspark": (
        exported(dialects.compressed_tensors, headers.dspark("fp8", "mxfp4"), DSPARK_FIELDS, r"re:.*mtp\..*"),
        DSPARK_LINE, ("fp8", "mxfp4"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Iterator[DeepseekV4ForCausalLM]:
    """The demo's model as vLLM builds it, without memory: all layers NVFP4."""
    arguments = EngineArgs(model=str(DEMO), max_model_len=4096, max_num_batched_tokens=4096)
    with one_rank(tmp_path_factory.mktemp("dist")):
        config = arguments.create_engine_config()
        with set_current_vllm_config(config), mock.patch("torch.cuda.Event"), torch.device("meta"):
            built = initialize_model(config)
        yield built


@pytest.fixture(params=LAYOUTS)
def layout(request, tmp_path) -> tuple[Path, str, tuple[str, ...]]:
    """(folder, what inspect says of the draft head, formats of its linears and experts)."""
    (tensors, config), line, formats = LAYOUTS[request.param]
    line = line.format(*(STORED[fmt] for fmt in reversed(formats)))
    return headers.write(tmp_path / "checkpoint", tensors, config), line, formats


def test_inspect_says_which_head_there_is(layout):
    folder, line, _ = layout
    report = inspect(str(folder))
    assert report.problems == []
    assert any(said.startswith(line) for said in report.serving), report.serving


def test_convert_copies_the_head(layout):
    folder, *_ = layout
    checkpoint = read_checkpoint(Folder(folder))
    contents = read_contents(checkpoint.tensors, checkpoint.num_layers)
    conversion = plan_conversion(contents, Options())
    written = {
        output.name: (output.dtype, output.shape)
        for shard in conversion.shards
        for job in shard.jobs
        for output in job.outputs
    }
    drafted = {name: (found.dtype, found.shape) for name, found in contents.copied.items()}
    assert drafted.items() <= written.items()
    assert conversion.nvfp4 == {"attention", "compressor", "indexer", "shared", "experts"}


def test_the_model_takes_the_trunk_and_leaves_the_head(layout, model):
    folder, *_ = layout
    read = vars(get_config(str(folder), trust_remote_code=False))
    fields = {name: read.get(name, 0) for name in (*MTP_FIELDS, *DSPARK_FIELDS) if name in read}
    with mock.patch.dict(vars(model.config), fields):
        check_weight_coverage(model, [folder / "model.safetensors"])
        names = read_checkpoint(Folder(folder)).tensors
        # values that every leaf may have: the head must not come as far as the model
        ones = {False: torch.ones(1).to(torch.float8_e4m3fn), True: torch.ones(1)}
        weights = native_weights(model, ((name, ones["global_scale" in name]) for name in names))
        taken = {name for name, _ in model.hf_to_vllm_mapper.apply(weights)}
    assert not [name for name in taken if "mtp." in name or ".layers.3." in name]


def drafted_layers(kind: str) -> dict[str, bool]:
    """vLLM's linear layers of a draft head behind three layers -> whether they hold routed experts."""
    found = {}
    for number in (3,) if kind == "MTP" else (3, 4, 5):
        layer = f"model.layers.{number}"
        for path in ("attn.fused_wqa_wkv", "attn.wq_b", "attn.wo_a", "attn.wo_b", "ffn.shared_experts.gate_up_proj",
                     "ffn.shared_experts.down_proj", *(("e_proj", "h_proj") if kind == "MTP" else ())):  # fmt: skip
            found[f"{layer}.{path}"] = False
        found[f"{layer}.ffn.experts"] = found[f"{layer}.ffn.experts.routed_experts"] = True
    return found if kind == "MTP" else found | {"model.main_proj": False, "model.context_wkv_proj": False}


def excluded(quantization: dict, names: list[str]) -> set[str]:
    """Those of vLLM's layers `names` that `quantization` leaves unquantized, by vLLM's own rules."""
    config = ModelOptNvFp4Config.from_config(quantization)
    config.packed_modules_mapping = DeepseekV4ForCausalLM.packed_modules_mapping
    config.apply_vllm_mapper(DeepseekV4ForCausalLM.hf_to_vllm_mapper)
    return {name for name in names if config.is_layer_excluded(name)}


@pytest.mark.parametrize("converted", [False, True])
def test_draft_layers_are_quantized_exactly_where_they_are_stored_so(layout, converted):
    """In the server's reading of the export's lists, and in what the converter writes."""
    folder, line, formats = layout
    if not formats:
        return
    if converted:
        checkpoint = read_checkpoint(Folder(folder))
        native = native_config(checkpoint.config)
        head = draft_head(native, checkpoint.tensors)
        quantization = modelopt_config(native, set(KINDS), head)["quantization_config"]
    else:
        quantization = get_config(str(folder), trust_remote_code=False).quantization_config
    layers = drafted_layers("MTP" if "MTP" in line else "DSpark")
    unquantized = {name for name, experts in layers.items() if formats[experts] != "nvfp4"}
    assert excluded(quantization, list(layers)) == unquantized
    # of the trunk, nothing by mistake: a pattern without its dot would take layers 30 to 39 for layer 3
    assert not excluded(quantization, ["model.layers.2.attn.wq_b", "model.layers.33.attn.wq_b"])


# --- where the list stands ---


def quantization_of(model_config) -> dict:
    """What vLLM makes its quantization config from, after it has chosen the method."""
    assert model_config.quantization == "modelopt_fp4"
    return model_config.hf_config.quantization_config


@pytest.mark.parametrize("place", ["flat", "nested", "own file"])
def test_exclude_modules_is_read_wherever_it_stands(place, tmp_path):
    tensors, config = modelopt(headers.mtp("bf16", "bf16"), MTP_FIELDS)
    excludes = ["head", "lm_head", "*.ffn.gate", "*.attn.wo_a", "mtp*"]
    listed = {
        "quant_algo": "NVFP4",
        "group_size": 16,
        "kv_cache_quant_algo": None,
        "exclude_modules": excludes,
    }
    producer = {"producer": {"name": "modelopt", "version": "0.29.0"}}
    if place == "flat":
        config["quantization_config"] = {"quant_method": "modelopt", **listed, **producer}
    elif place == "nested":
        config["quantization_config"] = {"quant_method": "modelopt", "quantization": listed, **producer}
    else:
        del config["quantization_config"]
    for layer in range(3):
        for leaf in ("weight_scale", "weight_scale_2", "input_scale"):
            del tensors[f"layers.{layer}.attn.wo_a.{leaf}"]
        tensors[f"layers.{layer}.attn.wo_a.weight"] = ("BF16", (64, 512))
    folder = headers.write(tmp_path / "checkpoint", tensors, config)
    if place == "own file":
        (folder / "hf_quant_config.json").write_text(json.dumps({**producer, "quantization": listed}))
    found = quantization_of(EngineArgs(model=str(folder), tokenizer=str(DEMO)).create_model_config())
    names = ["model.layers.0.attn.wo_a", "model.layers.0.attn.wq_b", "model.layers.3.attn.wq_b"]
    assert excluded(found, names) == {"model.layers.0.attn.wo_a", "model.layers.3.attn.wq_b"}
    (problem,) = inspect(str(folder)).problems  # wo_a is bf16 on purpose, and the others of its kind are not
    assert problem.what == "attention: some linears are NVFP4, others BF16"


def test_two_lists_that_differ_are_refused(tmp_path):
    tensors, config = modelopt({}, {})
    config["quantization_config"]["exclude_modules"] = ["lm_head"]
    folder = headers.write(tmp_path / "checkpoint", tensors, config)
    with pytest.raises(ValueError, match="ignore and exclude_modules of quantization_config differ"):
        get_config(str(folder), trust_remote_code=False)


# --- experts that were pruned ---


def pruned(experts: int, folder: Path) -> Path:
    """The demo with another number of experts in each layer."""
    tensors = {}
    for name, (dtype, shape) in headers.demo().items():
        if ".ffn.experts." not in name:
            rows = experts if ".ffn.gate.weight" in name or ".ffn.gate.bias" in name else shape[:1]
            tensors[name] = (dtype, (rows, *shape[1:]) if isinstance(rows, int) else shape)
        elif ".experts.0." in name:
            tensors |= {name.replace(".experts.0.", f".experts.{e}."): (dtype, shape) for e in range(experts)}
    return headers.write(folder, tensors, headers.demo_config(n_routed_experts=experts))


def test_pruned_experts_are_refused_before_anything_is_read(tmp_path, monkeypatch):
    folder = pruned(104, tmp_path / "checkpoint")
    monkeypatch.setattr(operators, "are_defined", lambda: False)
    with pytest.raises(
        ValueError, match=r"n_routed_experts = 104 .* on cpu takes 64, 128, 256 or 384; serve"
    ):
        EngineArgs(model=str(folder), tokenizer=str(DEMO), max_model_len=4096).create_engine_config()
    # in torch, tokens are routed among any number
    monkeypatch.setattr(operators, "are_defined", lambda: True)
    EngineArgs(model=str(folder), tokenizer=str(DEMO), max_model_len=4096).create_engine_config()


def test_pruned_experts_are_told_by_inspect_and_converted(tmp_path):
    folder = pruned(104, tmp_path / "checkpoint")
    problems = [problem.what for problem in inspect(str(folder)).problems]
    assert len(problems) == 2
    for device, what in zip(routing.EXPERT_COUNTS, problems, strict=True):
        assert what.startswith(
            f"n_routed_experts = 104 in config.json: vLLM's routing kernel on {device} takes "
        )
    checkpoint = read_checkpoint(Folder(folder))
    plan_conversion(read_contents(checkpoint.tensors, checkpoint.num_layers), Options())
    assert inspect(str(pruned(128, tmp_path / "served"))).problems == []


def route_by_hash(logits: torch.Tensor, experts: int) -> None:
    table = torch.zeros(len(logits), 6, dtype=torch.int32)
    torch.ops._C.hash_topk_cpu(logits, table, 6, "sqrtsoftplus", 0, experts, 1.5)


def route_by_score(logits: torch.Tensor, experts: int) -> None:
    bias = torch.zeros(experts)
    torch.ops._C.biased_topk_cpu(logits, logits, bias, 6, True, "sqrtsoftplus", 0, 1.5, True)


@pytest.mark.skipif(
    operators.are_defined(), reason="the routing kernels are in vLLM's AVX512-BF16 library alone"
)
@pytest.mark.parametrize("route", [route_by_hash, route_by_score])
def test_the_counts_are_those_of_the_routing_kernels(route):
    for experts in (32, 64, 96, 104, 128, 160, 192, 256, 320, 384, 512):
        logits = torch.zeros(3, experts)
        if routing.refusal(experts, "cpu") is None:
            route(logits, experts)
        else:
            with pytest.raises(RuntimeError, match=f"unsupported num_experts {experts}"):
                route(logits, experts)


# --- V4.1 ---


def test_another_model_of_the_family_is_refused_by_the_tools(tmp_path):
    config = {"model_type": "deepseek_v41", "text_config": {"num_hidden_layers": 3}}
    folder = headers.write(tmp_path / "checkpoint", headers.demo(), config)
    with pytest.raises(CheckpointError, match=r"has model_type 'deepseek_v41'; these tools read deepseek_v4"):
        inspect(str(folder))
