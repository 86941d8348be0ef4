"""scripts/plan_memory.py: caches as vLLM's own code lays them out, weights as the checkpoint has them."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.models.deepseek_v4.attention import DeepseekV4Attention, DeepseekV4IndexerCache
from vllm.models.deepseek_v4.compressor import CompressorStateCache
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backends.mla.sparse_swa import DeepseekV4SWACache
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import KVCacheLayout
from vllm.v1.worker.block_table import get_block_table_width

from cutedsl_nvfp4.checkpoint.dialects import read_contents
from cutedsl_nvfp4.checkpoint.folder import Folder, read_checkpoint
from cutedsl_nvfp4.checkpoint.headers import CheckpointError
from cutedsl_nvfp4.checkpoint.planner import caches, model
from cutedsl_nvfp4.checkpoint.planner.budget import (
    Request,
    budget_of,
    largest_that_auto_takes,
    longest_context,
)
from cutedsl_nvfp4.checkpoint.planner.gpus import GIB, GPUS, gpu_of_driver, parse_gpus
from cutedsl_nvfp4.checkpoint.planner.plan import load_model, main
from devtools.image import fit
from recipe import export
from tests.support.checkpoints import dialects, small
from tests.support.paths import DEMO

KNOWN = model.KNOWN
PRO, FLASH = KNOWN["pro"], KNOWN["flash"]
H200 = GPUS["H200"]
DEMO_CONFIG = json.loads((DEMO / "config.json").read_text())


def with_ratios(*ratios: int) -> dict:
    return {**FLASH, "num_hidden_layers": len(ratios), "compress_ratios": list(ratios)}


CONFIGS = {
    "pro": PRO,
    "flash": FLASH,
    "demo": DEMO_CONFIG,
    "only window": with_ratios(0, 0, 0),
    "only 4": with_ratios(4, 4, 4),
    "only 128": with_ratios(128, 128, 128),
    "window and 128": with_ratios(0, 128, 0, 128, 0),
    "few of 4": with_ratios(0, 0, 0, 0, 4, 128, 128),
}


# --- caches, against vLLM ---


def vllm_specs(config: dict, fp4: bool = False) -> dict:
    """What vLLM's layers return as their cache specs, in the order in which they are registered."""
    settings = SimpleNamespace(cache_config=SimpleNamespace(block_size=256, cache_dtype="fp8_ds_mla"))
    common = {"cache_config": settings.cache_config, "kv_cache_dtype": "fp8_ds_mla", "head_dim": 512}

    def spec(layer: type, **attributes: object):
        return layer.get_kv_cache_spec(SimpleNamespace(**{**common, **attributes}), settings)

    specs = {}
    for layer, ratio in enumerate(config["compress_ratios"][: config["num_hidden_layers"]]):
        prefix = f"model.layers.{layer}.attn"
        specs[f"{prefix}.swa_cache"] = spec(
            DeepseekV4SWACache, dtype=torch.uint8, block_size=64, window_size=128, bounded_replay=False,
            packed_bytes_per_token=584, packed_page_alignment=576,
        )  # fmt: skip
        if ratio > 1:
            overlap = 2 if ratio == 4 else 1
            state = {
                "block_size": 4 if ratio == 4 else 8,
                "dtype": torch.float32,
                "sliding_window": overlap * ratio,
            }
            specs[prefix] = spec(DeepseekV4Attention, compress_ratio=ratio)
            specs[f"{prefix}.compressor.state_cache"] = spec(
                CompressorStateCache, state_dim=2 * overlap * 512, **state
            )
        if ratio == 4:
            width = 68 if fp4 else 132
            specs[f"{prefix}.indexer.k_cache"] = spec(
                DeepseekV4IndexerCache, head_dim=width, dtype=torch.uint8, compress_ratio=4
            )
            specs[f"{prefix}.indexer.compressor.state_cache"] = spec(
                CompressorStateCache, state_dim=2 * overlap * 128, **state
            )
    return specs


def vllm_config(length: int, in_flight: int) -> SimpleNamespace:
    return SimpleNamespace(
        model_config=SimpleNamespace(
            max_model_len=length, hf_config=SimpleNamespace(model_type="deepseek_v4")
        ),
        cache_config=SimpleNamespace(
            get_resolved_kv_cache_layout=lambda: KVCacheLayout.BLHNC,
            num_gpu_blocks_override=None,
            prefix_cache_retention_interval=None,
        ),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        attention_config=SimpleNamespace(hisparse_config=None),
        speculative_config=None,
        max_in_flight_tokens=in_flight,
    )


@pytest.mark.parametrize("fp4", [False, True], ids=["fp8", "fp4"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("length, in_flight", [(1, 16384), (5000, 4096), (131072, 16384), (1048576, 16384)])
def test_blocks_are_vllms(config, length, in_flight, fp4):
    settings = vllm_config(length, in_flight)
    groups = kv_cache_utils.get_kv_cache_groups(settings, vllm_specs(config, fp4))
    pool = caches.pool_of(config, fp4)
    assert sorted(group.page for group in pool.groups) == sorted(
        group.kv_cache_spec.page_size_bytes
        * (1 if hasattr(group.kv_cache_spec, "kv_cache_specs") else len(group.layer_names))
        for group in groups
    )
    assert pool.block_bytes == kv_cache_utils._pool_bytes_per_block(settings, groups)
    needed = pool.block_bytes * pool.request_blocks(length, in_flight)
    assert needed == kv_cache_utils._max_memory_usage_bytes_from_groups(settings, groups)
    available = 9 * 2**30 + 12345
    theirs = kv_cache_utils.get_kv_cache_config_from_groups(settings, groups, available)
    blocks, concurrency, tokens = pool.capacity(available, length, in_flight)
    assert blocks == theirs.num_blocks
    assert (tokens, concurrency) == kv_cache_utils.get_kv_cache_capacity(settings, theirs)


@pytest.mark.parametrize("config", [PRO, DEMO_CONFIG], ids=["pro", "demo"])
def test_block_tables_are_as_wide_as_vllms(config):
    settings = vllm_config(1_000_001, 16384)
    groups = kv_cache_utils.get_kv_cache_groups(settings, vllm_specs(config))
    widths = [
        get_block_table_width(
            group.kv_cache_spec.max_num_blocks_per_req(settings, 1_000_001), group.kv_cache_spec.block_size
        )
        for group in groups
    ]
    pool = caches.pool_of(config)
    assert sorted(group.table_width(1_000_001) for group in pool.groups) == sorted(widths)


def test_auto_length_is_vllms():
    request = Request(1048576, 8192, 1024, 0.88)
    budget = budget_of(PRO, None, H200, model.Parallel(8), request)
    settings = vllm_config(1048576, request.in_flight)
    groups = kv_cache_utils.get_kv_cache_groups(settings, vllm_specs(PRO))
    usable = budget.kv_bytes - budget.pool.block_bytes
    theirs = kv_cache_utils._estimate_max_model_len_from_groups(settings, groups, usable)
    assert largest_that_auto_takes(budget) == theirs < 1048576


# --- weights, against the demo's files ---


def test_shapes_from_config_are_the_checkpoints():
    checkpoint = read_checkpoint(Folder(DEMO))
    contents = read_contents(checkpoint.tensors, checkpoint.num_layers)
    shapes = {}
    for name, (n, k, count) in model.linear_shapes(DEMO_CONFIG).items():
        for expert in range(count):
            shapes[name.replace("*", str(expert))] = (n, k)
    assert shapes == {name: (linear.n, linear.k) for name, linear in contents.linears.items()}
    stored = sum(tensor.nbytes for tensor in contents.parameters.values())
    assert sum(model.parameter_bytes(DEMO_CONFIG).values()) == stored
    one = model.Parallel(1)
    by_config, by_headers = (model.weight_bytes(DEMO_CONFIG, found, one) for found in (None, contents))
    scalars = 8 * len(contents.linears)  # weight_scale_2 and input_scale, which by_config leaves out
    assert sum(by_headers.values()) - sum(by_config.values()) == scalars


@pytest.mark.parametrize("dialect", [dialects.native, dialects.experts_only], ids=lambda d: d.__name__)
def test_formats_from_config_are_the_checkpoints(dialect, tmp_path):
    """Of DeepSeek's own checkpoints, and of those with NVFP4 experts, as releases are: a layer with an indexer."""
    layer = re.compile(r"layers\.1\.(?!ffn\.experts\.([2-9]|\d\d))")
    stored = {name: tensor for name, tensor in export.load_checkpoint(DEMO).items() if layer.match(name)}
    tensors, config = dialect(export.dequantized(stored), {**DEMO_CONFIG, "n_routed_experts": 2})
    checkpoint = read_checkpoint(Folder(small.write(tmp_path / "checkpoint", tensors, config)))
    linears = read_contents(checkpoint.tensors, checkpoint.num_layers).linears
    config, formats = model.complete(checkpoint.config), set()
    for name, (n, k, count) in model.linear_shapes(config).items():
        if not name.startswith("layers.1."):
            continue
        for linear in (linears.pop(name.replace("*", str(expert))) for expert in range(count)):
            stored_format = model.stored_format(config, name)
            formats.add(stored_format)
            assert linear.format == stored_format, name
            # an NVFP4 checkpoint has one global scale, the GPU one a row
            rows = 4 * n - 4 if stored_format == "nvfp4" else 0
            assert model.linear_bytes(stored_format, n, k) == linear.nbytes + rows, name
    assert not linears and formats == {
        "bf16",
        "fp8",
        "nvfp4" if dialect is dialects.experts_only else "mxfp4",
    }


def test_releases_are_known_without_the_hub(capsys):
    for release in model.RELEASES:
        name, config, contents = load_model(release)
        assert name == f"{release}, experts in NVFP4, other layers in FP8 and BF16" and contents is None
        preset = KNOWN["pro" if "Pro" in release else "flash"]
        release_bytes, all_nvfp4 = (
            sum(model.weight_bytes(found, None, model.Parallel(1)).values()) for found in (config, preset)
        )
        assert 1.01 < release_bytes / all_nvfp4 < 1.03


def test_sizes_of_the_real_models():
    """Parameters as published: 1,598.8 B and 284 B without MTP's share."""
    for config, billions in ((PRO, 1598.8), (FLASH, 284)):
        count = sum(n * k * times for n, k, times in model.linear_shapes(config).values())
        count += 2 * config["vocab_size"] * config["hidden_size"]
        assert count / 1e9 == pytest.approx(billions, rel=0.025)


def test_parallel_ranks_hold_their_share():
    whole, tensor = (model.weight_bytes(PRO, None, model.Parallel(tp)) for tp in (1, 8))
    assert tensor["experts"] == whole["experts"] // 8
    assert tensor["compressor"] == whole["compressor"] and tensor["indexer"] == whole["indexer"]
    experts = model.weight_bytes(PRO, None, model.Parallel(1, 8, True))
    assert experts["experts"] == whole["experts"] // 8
    assert experts["attention"] == whole["attention"] and experts["shared"] == whole["shared"]


@pytest.mark.parametrize(
    "config, parallel, words",
    [
        (PRO, model.Parallel(3), "num_attention_heads = 128 cannot be cut into 3"),
        (FLASH, model.Parallel(16), "o_groups = 8 cannot be cut into 16"),
        (PRO, model.Parallel(1, 5, True), "384 experts cannot be dealt to 5"),
        (DEMO_CONFIG, model.Parallel(2, 4), "moe_intermediate_size = 64 cut into 8"),
    ],
)
def test_impossible_cuts_are_refused(config, parallel, words):
    with pytest.raises(CheckpointError, match=words):
        model.check_parallel(config, parallel)


# --- budget ---


def test_longest_context_is_the_longest():
    request = Request(1048576, 8192, 1024, 0.88)
    longest = longest_context(PRO, None, H200, model.Parallel(8), request)
    assert 500_000 < longest < 1048576
    budgets = [
        budget_of(PRO, None, H200, model.Parallel(8), replace(request, max_model_len=n))
        for n in (longest, longest + 1)
    ]
    assert budgets[0].fits and budgets[0].shortfall == 0
    assert not budgets[1].fits and budgets[1].shortfall > 0


def test_budget_adds_up():
    budget = budget_of(PRO, None, H200, model.Parallel(8), Request(1048576, 8192, 1024, 0.9))
    used = sum(item.nbytes for item in (*budget.managed, *budget.unmanaged))
    assert used + budget.kv_bytes + budget.slack == H200.memory


REPORTED = [  # layers, tensor parallel, expert parallel, utilization, max_model_len; GiB loaded and KV tokens by vLLM
    (4, 1, False, 0.92, 1048576, 16.37, 72_800_369),
    (12, 1, False, 0.92, 262144, 44.11, 5_425_187),
    (43, 2, False, 0.9, 262144, 76.51, 865_830),
    (43, 2, True, 0.9, 524288, 76.42, 1_609_018),
]


@pytest.mark.parametrize("layers, tp, ep, utilization, length, loaded, tokens", REPORTED)
def test_predictions_hold_against_what_vllm_reported(layers, tp, ep, utilization, length, loaded, tokens):
    """On H200s, of models of bench/serving/random_checkpoint.py and repeat_layers.py: docs/results/h200_serving.md."""
    ratios = [0, 4, 128] + [(4, 128)[i % 2] for i in range(layers - 3)]
    config = {**FLASH, "num_hidden_layers": layers, "compress_ratios": ratios, "num_hash_layers": layers}
    request = Request(length, 16384, 64, utilization)
    budget = budget_of(config, None, H200, model.Parallel(tp, 1, ep), request)
    weights = sum(
        i.nbytes for i in budget.managed if i.name.startswith("weights") or i.name == "rotary tables"
    )
    assert weights / GIB == pytest.approx(loaded, rel=0.01)
    predicted = budget.pool.capacity(budget.kv_bytes, length, request.in_flight)[2]
    assert 0.95 * tokens < predicted < tokens


@pytest.mark.parametrize("text", ["8xH200", "8 x h200", "8XH200", "8*H200"])
def test_gpus_are_parsed(text):
    assert parse_gpus(text) == (8, H200)


@pytest.mark.parametrize("text", ["", "8xA100", "0xH200", "x", "H200x8", "-1xH200"])
def test_unknown_gpus_are_refused(text):
    with pytest.raises(CheckpointError, match="expected something like 8xH200"):
        parse_gpus(text)


@pytest.mark.parametrize(
    "name, mib, known",
    [
        ("NVIDIA H100 80GB HBM3", 81559, "H100"),
        ("NVIDIA H100 PCIe", 81559, "H100"),
        ("NVIDIA H200", 143771, "H200"),
        ("NVIDIA H200 NVL", 143771, "H200"),
        ("NVIDIA H20", 97871, "H20"),
        ("NVIDIA B200", 183359, "B200"),
        ("NVIDIA B300 SXM6 AC", 275040, "B300"),
        ("NVIDIA GB200", 189471, "GB200"),
        ("NVIDIA GB300", 284208, "GB300"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 97887, "RTXPRO6000"),
        ("NVIDIA GB10", None, "DGXSPARK"),
    ],
)
def test_gpus_are_known_by_the_drivers_name(name, mib, known):
    assert gpu_of_driver(name, mib) is GPUS[known]
    if mib:
        assert 1.003 < mib / 1024 / GPUS[known].memory_gib < 1.008


@pytest.mark.parametrize(
    "name, mib, gib",
    [
        ("NVIDIA H100 NVL", 95830, 92.9),  # an H100 by name, not by memory
        ("NVIDIA H20-3e", 143771, 139.4),
        ("NVIDIA GH200 480GB", 97871, 94.9),
        ("NVIDIA H2000", 97871, 94.9),
    ],
)
def test_other_gpus_have_the_memory_that_the_driver_reports(name, mib, gib):
    gpu = gpu_of_driver(name, mib)
    assert f"NVIDIA {gpu.name}" == name and gpu not in GPUS.values() and not gpu.fp4_indexer
    assert gpu.memory_gib == pytest.approx(gib, abs=0.1)


def test_a_gpu_of_unknown_memory_is_refused():
    with pytest.raises(
        CheckpointError, match="no memory for 'NVIDIA Thor', and the planner does not know it"
    ):
        gpu_of_driver("NVIDIA Thor", None)


def test_any_gpu_is_planned_with_its_memory(capsys):
    count, gpu = parse_gpus("2xH100 NVL", 93.1)
    assert (count, gpu.name, gpu.memory_gib, gpu.default_batched_tokens) == (2, "H100 NVL", 93.1, 8192)
    assert parse_gpus("2xB200", 170) == (2, replace(GPUS["B200"], memory_gib=170))
    assert main(["flash", "4xH100 NVL", "--gpu-memory-gib", "93.1"]) == 0
    assert "on 4 x H100 NVL, GiB per GPU; 90% of 93.1 is vLLM's" in capsys.readouterr().out


def test_every_gpu_has_a_verdict(capsys):
    for name in GPUS:
        fits = main(["flash", f"4x{name}"]) == 0
        assert ("such requests at once" if fits else "does not fit") in capsys.readouterr().out
    assert parse_gpus("RTX PRO 6000")[1].name == "RTXPRO6000" and parse_gpus("2xDGX Spark")[1].unified


def test_what_does_not_fit_is_refused_with_the_shortfall(capsys):
    assert main(["pro", "4xH200"]) == 1
    out = capsys.readouterr().out
    assert "does not fit: one request of 1,048,576 tokens lacks 103" in out and "8 of these GPUs" in out
    assert "lacks 103.17 GiB per GPU (needs 228.99, has 125.82); " in out


def test_what_lies_outside_vllms_share_is_told_apart(capsys):
    assert main(["flash", "2xH200", "--gpu-memory-utilization", "1", "--max-model-len", "1048576"]) == 1
    assert (
        "lacks 5.91 GiB per GPU (needs 5.91, has 0.00 outside vLLM's share); it fits with --gpu-memory-utilization 0.9"
        in capsys.readouterr().out
    )


def test_flags_are_ready_to_paste(capsys):
    assert main(["flash", "2xH200", "--max-num-seqs", "64", "--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["flags"] == (
        "--tensor-parallel-size 2 --gpu-memory-utilization 0.9 --max-model-len 1048576 --max-num-seqs 64"
    )


def test_every_choice_is_in_the_flags_and_vllm_takes_them(capsys):
    arguments = (
        "pro 16xB200 --tp 8 --dp 2 --ep --indexer-fp4 --max-num-batched-tokens 4096 --max-num-seqs 64 --json"
    )
    assert main([*arguments.split(), "--gpu-memory-utilization", "0.85", "--max-model-len", "131072"]) == 0
    flags = json.loads(capsys.readouterr().out)["flags"]
    assert flags == (
        "--tensor-parallel-size 8 --data-parallel-size 2 --enable-expert-parallel --gpu-memory-utilization 0.85 "
        "--max-model-len 131072 --max-num-batched-tokens 4096 --max-num-seqs 64 "
        "--attention-config.indexer_kv_dtype=mxfp4"
    )
    taken = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(flags.split())
    assert (taken.tensor_parallel_size, taken.max_model_len, taken.max_num_seqs) == (8, 131072, 64)
    assert taken.enable_expert_parallel and taken.attention_config.indexer_kv_dtype == "mxfp4"


def test_flags_of_a_server_are_read_as_vllm_reads_them():
    """By the check of `make up`, of what compose is to start."""
    flags = "-tp 2 -dp=2 --max_model_len 128K --max-num-seqs 4 --max-num-batched-tokens 25.6k -ep --max-num-seqs=16"
    request, automatic = (served := fit.served_by([next(iter(model.RELEASES)), *flags.split()])).request(H200)
    taken = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(flags.split())
    assert served.parallel == model.Parallel(
        taken.tensor_parallel_size, taken.data_parallel_size, taken.enable_expert_parallel
    )
    assert (request.max_model_len, request.batched_tokens) == (
        taken.max_model_len,
        taken.max_num_batched_tokens,
    )
    assert request.seqs == taken.max_num_seqs == 16 and not automatic
    for automatic in ("auto", "-1"):
        flags = ["--max-model-len", automatic]
        assert AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(flags).max_model_len == -1
        assert fit.served_by([next(iter(model.RELEASES)), *flags]).request(H200)[1]


def test_wrong_questions_are_errors(capsys):
    for arguments, words in (
        (["pro", "8xH200", "--tp", "3"], "--tp 3 and --dp 1 do not make 8 GPUs"),
        (["pro", "8xH200", "--tp", "0"], "--tp 0 and --dp 1 do not make 8 GPUs"),
        (["pro", "8xH200", "--dp", "3"], "plan_memory: --dp 3 does not make 8 GPUs"),
        (["pro", "8xH200", "--max-model-len", "0"], "--max-model-len = 0; the model's range is 1 to"),
        (["pro", "8xH200", "--max-num-seqs", "0"], "--max-num-seqs must be at least 1"),
        (["pro", "8xH200", "--max-num-batched-tokens", "0"], "--max-num-seqs must be at least 1"),
        (["pro", "8xH200", "--gpu-memory-gib", "0"], "--gpu-memory-gib = 0"),
        (["pro", "8xH200", "--gpu-memory-gib", "nan"], "--gpu-memory-gib = nan; it must be above 0"),
        (["pro", "8xH200", "--gpu-memory-gib", "inf"], "--gpu-memory-gib = inf"),
        (["pro", "8xA100"], "and any other with --gpu-memory-gib"),
        (
            ["pro", "8xH200", "--indexer-fp4"],
            "has that cache on B200, B300, GB200, GB300 alone, not on H200; leave",
        ),
        (["pro", "8xA100", "--gpu-memory-gib", "79", "--indexer-fp4"], "not on A100; leave it out"),
        (["pro", "8xH200", "--max-model-len", "2000000"], "the model's range is 1 to 1048576"),
        (["pro", "8xH200", "--gpu-memory-utilization", "90"], "it is a share"),
        (["/nowhere", "8xH200"], "neither a folder nor the id"),
    ):
        assert main(arguments) == 1
        assert words in capsys.readouterr().err


def test_config_alone_is_enough(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DEMO_CONFIG))
    name, config, contents = load_model(str(tmp_path))
    assert "config only" in name and contents is None and config["hidden_size"] == 256
