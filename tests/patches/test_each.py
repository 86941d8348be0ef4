"""One test per patch, each failing without it (patches/README.md lists the pairs)."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.kernels import linear as kernel_lists
from vllm.model_executor.kernels.linear.nvfp4.emulation import EmulationNvFp4LinearKernel
from vllm.model_executor.layers.linear import MergedColumnParallelLinear
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config
from vllm.platforms import current_platform
from vllm.platforms.interface import PlatformEnum

from cutedsl_nvfp4 import reference
from cutedsl_nvfp4.vllm import plugin
from cutedsl_nvfp4.vllm.experts import CuTeDSLNvFp4Experts
from cutedsl_nvfp4.vllm.linear import CuTeDSLNvFp4LinearKernel
from tests.support.one_rank import one_rank
from tests.support.paths import ROOT

K, SEGMENTS = 32, (16, 48)


@pytest.fixture(scope="module", autouse=True)
def _single_rank(tmp_path_factory) -> Iterator[None]:
    with one_rank(tmp_path_factory.mktemp("dist")):
        yield


@pytest.fixture
def fused_layer(random_weight) -> MergedColumnParallelLinear:
    """A fused NVFP4 layer on the CPU, its checkpoint tensors loaded but not prepared; scales differ 8-fold."""
    config = ModelOptNvFp4Config("NVFP4", is_checkpoint_nvfp4_serialized=True)
    with set_current_vllm_config(VllmConfig()):
        layer = MergedColumnParallelLinear(
            K, list(SEGMENTS), bias=False, quant_config=config, prefix="fused", disable_tp=True,
            params_dtype=torch.bfloat16,
        )  # fmt: skip
    codes, scales = random_weight(sum(SEGMENTS), K)
    layer.weight.data.copy_(codes)
    layer.weight_scale.data.copy_(scales)
    layer.weight_scale_2.data.copy_(torch.tensor([0.25, 2.0]))
    layer.input_scale.data.fill_(0.01)
    return layer


def test_linear_kernel_list_is_open(monkeypatch):
    class Kernel(EmulationNvFp4LinearKernel):
        pass

    monkeypatch.setattr(
        kernel_lists, "_POSSIBLE_NVFP4_KERNELS", {PlatformEnum.CPU: [EmulationNvFp4LinearKernel]}
    )
    monkeypatch.setattr(kernel_lists, "_PREFERRED_NVFP4_KERNELS", [])
    monkeypatch.setattr(kernel_lists, "_LINEAR_BACKEND_KERNEL_MAP", {})
    kernel_lists.register_linear_kernel(Kernel, PlatformEnum.CPU, "nvfp4", first=True, backend="mine")
    assert kernel_lists._POSSIBLE_NVFP4_KERNELS[PlatformEnum.CPU] == [Kernel, EmulationNvFp4LinearKernel]
    assert {"mine": {Kernel}} == kernel_lists._LINEAR_BACKEND_KERNEL_MAP
    for use_a16 in (False, True):
        with set_current_vllm_config(VllmConfig()):
            assert type(kernel_lists.init_nvfp4_linear_kernel(use_a16=use_a16)) is Kernel


def test_moe_oracle_is_open():
    from vllm.model_executor.layers.fused_moe.oracle import nvfp4

    assert nvfp4.map_nvfp4_backend("cutedsl") is nvfp4.AUTO_NVFP4_BACKENDS[0]
    assert nvfp4.backend_to_kernel_cls(nvfp4.AUTO_NVFP4_BACKENDS[0]) == [CuTeDSLNvFp4Experts]


def test_fused_segments_keep_their_scales(fused_layer, random_weight):
    codes, scales = random_weight(sum(SEGMENTS), K)
    fused_layer.quant_method.process_weights_after_loading(fused_layer)
    x = torch.randn(5, K, dtype=torch.bfloat16)
    out, _ = fused_layer(x)
    weight = reference.dequantize(codes, scales)
    weight[: SEGMENTS[0]] *= 0.25
    weight[SEGMENTS[0] :] *= 2.0
    torch.testing.assert_close(out.float(), x.float() @ weight.T, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("missing", ["weight_scale_2", "input_scale"])
def test_absent_scales_are_told_from_loaded_ones(missing):
    config = ModelOptNvFp4Config("NVFP4", is_checkpoint_nvfp4_serialized=True)
    with set_current_vllm_config(VllmConfig()):
        layer = MergedColumnParallelLinear(
            K, list(SEGMENTS), bias=False, quant_config=config, prefix="fused", disable_tp=True
        )
    assert torch.isnan(getattr(layer, missing)).all()


@pytest.fixture(scope="module")
def demo_model():
    """The demo's model as vLLM builds it on the CPU, before any weight is loaded."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    demo = ROOT / "demo"
    config = EngineArgs(
        model=str(demo), max_model_len=4096, max_num_batched_tokens=4096
    ).create_engine_config()
    with set_current_vllm_config(config), mock.patch("torch.cuda.Event"):
        return initialize_model(config)


def _attention(model, ratio: int):
    return next(layer.attn for layer in model.model.layers if layer.attn.compress_ratio == ratio)


def test_compressor_and_indexer_are_quantized(demo_model):
    attention = _attention(demo_model, 4)
    indexer = attention.indexer
    for layer in (
        attention.compressor.fused_wkv_wgate,
        indexer.compressor.fused_wkv_wgate,
        indexer.weights_proj,
        indexer.wq_b,
    ):
        assert type(layer.quant_method.kernel) is CuTeDSLNvFp4LinearKernel, layer.prefix
    assert attention.compressor.fused_wkv_wgate.nvfp4_out_dtype is torch.float32
    assert indexer.wq_b.nvfp4_input_twin == (attention.wq_b,)


def test_compressor_scores_go_through_the_layer(fused_layer):
    """The GPU path's input projections: a quantized compressor is called, not multiplied by hand."""
    from vllm.models.deepseek_v4.attention import DeepseekV4Attention

    fused_layer.nvfp4_out_dtype = torch.float32
    fused_layer.return_bias = False
    fused_layer.quant_method.process_weights_after_loading(fused_layer)
    attention = SimpleNamespace(
        aux_stream_list=None,
        compressor=SimpleNamespace(fused_wkv_wgate=fused_layer),
        indexer=None,
        ln_events=[None] * 4,
        _fused_wqa_wkv_gemm=lambda hidden: hidden,
    )
    x = torch.randn(3, K, dtype=torch.bfloat16)
    _, scores, _, _ = DeepseekV4Attention._run_parallel_input_projections(attention, x)
    assert scores.dtype is torch.float32
    torch.testing.assert_close(scores, fused_layer(x))


def test_wo_a_is_quantized(demo_model, monkeypatch):
    attention = _attention(demo_model, 128)
    assert type(attention.wo_a.quant_method.kernel) is CuTeDSLNvFp4LinearKernel
    process = attention.wo_a.quant_method.process_weights_after_loading
    assert process.__name__ == "process_weights_after_loading"  # not the CPU layer's bf16 repacking

    from vllm.models.deepseek_v4.nvidia.ops import o_proj

    groups, width = 2, 4
    monkeypatch.setattr(
        o_proj,
        "fused_inv_rope_fp8_quant",
        lambda o, *args, quantize, **kwargs: (o.float(), None) if not quantize else 1 / 0,
    )

    class GroupedNvfp4(torch.nn.Module):
        weight = torch.zeros(1, dtype=torch.uint8)
        quant_method = attention.wo_a.quant_method

        def forward(self, x):
            return 2 * x

    o = torch.randn(3, groups, width)
    out = o_proj.deep_gemm_fp8_o_proj(
        o, None, None, GroupedNvfp4(), lambda z: z + 1, n_groups=groups, heads_per_group=1, nope_dim=0,
        rope_dim=0, o_lora_rank=width, einsum_recipe=(1, 128, 128), tma_aligned_scales=False,
    )  # fmt: skip
    torch.testing.assert_close(out, 2 * o.flatten(1) + 1)


def test_metadata_kernels_run_without_triton():
    from vllm.triton_utils import HAS_TRITON, dispatcher

    if HAS_TRITON:
        pytest.skip("this environment has a Triton for the CPU, which runs the kernels natively")
    type(current_platform).register_triton_kernel_overrides()
    mla = "vllm.v1.attention.backends.mla"
    assert {
        "vllm.v1.attention.ops.metadata._token_request_mapping_kernel",
        f"{mla}.sparse_swa.ComputePrefillMetadataKernel.kernel",
        f"{mla}.compressor_utils.CompressedSlotMappingKernel.kernel",
        f"{mla}.indexer.BuildPrefillChunkMetadataKernel.kernel",
    } <= set(dispatcher._registry)


@pytest.mark.parametrize("capturing", [True, False])
def test_captured_graphs_write_ratio_128_entries(monkeypatch, capturing):
    """As the runner captures: under mode NONE, with a dummy batch that ends no block of 128."""
    from vllm.models.deepseek_v4 import compressor

    ran = []
    store = "vllm.models.deepseek_v4.nvidia.ops.sparse_attn_compress_cutedsl"
    fake = SimpleNamespace(_SPARSE_ATTN_COMPRESSOR_CUTEDSL_KERNEL=lambda **_: ran.append("compressed"))
    monkeypatch.setitem(sys.modules, store, fake)
    monkeypatch.setattr(compressor, "_SAVE_PARTIAL_STATES_KERNEL", lambda **_: ran.append("saved"))
    monkeypatch.setattr(compressor, "current_platform", SimpleNamespace(
        is_cuda=lambda: True, is_rocm=lambda: False, is_xpu=lambda: False
    ))  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    empty = torch.empty(1)
    metadata = SimpleNamespace(
        token_to_req_indices=empty, slot_mapping=empty, block_table=empty, block_size=8, c128_boundary=False
    )
    monkeypatch.setattr(compressor, "get_forward_context", lambda: SimpleNamespace(
        attn_metadata={"state": metadata, "cache": metadata},
        cudagraph_runtime_mode=compressor.CUDAGraphMode.NONE,
    ))  # fmt: skip
    layer = SimpleNamespace(
        coff=1, head_dim=512, compress_ratio=128, ape=empty, rope_head_dim=64, overlap=False, use_fp4_cache=False,
        norm=SimpleNamespace(weight=empty), rms_norm_eps=1e-6, _quant_block=64, _token_stride=576, _scale_dim=8,
        state_cache=SimpleNamespace(prefix="state", kv_cache=torch.empty(1, 8, 1024)), k_cache_prefix="cache",
        _static_forward_context={"cache": SimpleNamespace(kv_cache=torch.empty(1, dtype=torch.uint8))},
    )  # fmt: skip
    rotary = SimpleNamespace(cos_sin_cache=empty)
    compressor.DeepseekCompressor.forward(layer, torch.empty(1, 1024), empty, rotary)
    assert ran == (["saved", "compressed"] if capturing else ["saved"])


def test_cpu_tile_scheduler_has_every_layer_type():
    from vllm.models.deepseek_v4.cpu.cpu_mla import DeepseekV4CPUSparseSWAMetadataBuilder as Builder

    assert {"c1a", "c2a", "c4a", "c128a"} <= set(Builder.build_tile_scheduler(None, 1))


def test_cpu_mapper_keeps_modelopt_names():
    from vllm.models.deepseek_v4.cpu.model import _make_deepseek_v4_weights_mapper

    mapper = _make_deepseek_v4_weights_mapper("fp4")
    names = ["layers.0.attn.wq_b.weight_scale", "layers.0.attn.wq_b.input_scale", "layers.0.attn.wq_b.scale"]
    assert mapper.apply_list(names) == [
        "model.layers.0.attn.wq_b.weight_scale",
        "model.layers.0.attn.wq_b.input_scale",
        "model.layers.0.attn.wq_b.weight_scale_inv",
    ]


def test_command_line_starts():
    run = subprocess.run([Path(sys.executable).parent / "vllm", "--version"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().endswith(plugin.VLLM_VERSION)


def test_workers_check_kernels_after_loading(monkeypatch):
    from contextlib import nullcontext

    from vllm.v1.worker import gpu_worker

    done = []
    monkeypatch.setattr("cutedsl_nvfp4.vllm.selfcheck.check_kernels", done.append)
    worker = SimpleNamespace(
        _maybe_get_memory_pool_context=lambda tag: nullcontext(),
        _scoped_allocator_max_split=lambda max_split_size_mb: nullcontext(),
        model_runner=SimpleNamespace(load_model=lambda load_dummy_weights: done.append("loaded")),
        vllm_config=SimpleNamespace(weight_transfer_config=None),
    )
    monkeypatch.setattr(gpu_worker, "set_current_vllm_config", lambda config: nullcontext())
    gpu_worker.Worker.load_model(worker)
    assert done == ["loaded", worker]


def test_workers_settle_activation_scales(monkeypatch):
    from vllm.config import CompilationMode
    from vllm.v1.worker import cpu_worker, gpu_worker

    settled = []
    monkeypatch.setattr("cutedsl_nvfp4.vllm.warmup.settle_activation_scales", settled.append)

    class GraphCapture(Exception):
        pass

    def kernel_warmup(worker):
        raise GraphCapture

    monkeypatch.setattr(gpu_worker, "kernel_warmup", kernel_warmup)
    worker = SimpleNamespace(
        model_runner=SimpleNamespace(
            kv_caches=[object()], maybe_remove_all_loras=lambda config: None, lora_config=None
        ),
        vllm_config=SimpleNamespace(compilation_config=SimpleNamespace(mode=CompilationMode.NONE)),
        compilation_config=SimpleNamespace(compilation_time=0.0, encoder_compilation_time=0.0),
        model_config=SimpleNamespace(seed=0),
        parallel_config=SimpleNamespace(data_parallel_index=0),
        _should_warm_up_model=lambda: False,
    )
    cpu_worker.CPUWorker.compile_or_warm_up_model(worker)
    assert settled == [worker]
    with pytest.raises(GraphCapture):
        gpu_worker.Worker.compile_or_warm_up_model(worker)
    assert settled == [worker, worker]


def test_reload_is_refused_before_anything_is_lost(fused_layer):
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

    fused_layer.quant_method.process_weights_after_loading(fused_layer)
    model = torch.nn.Sequential(fused_layer)
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match="reloading weights into prepared NVFP4 operands"):
        initialize_layerwise_reload(model)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is before[name] for name in before)


def test_weight_coverage_is_checked_before_loading(demo_model, monkeypatch):
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    checked = []
    monkeypatch.setattr(
        "cutedsl_nvfp4.vllm.coverage.check_weight_coverage",
        lambda model, files: checked.append((model, files)),
    )
    monkeypatch.setattr(
        type(demo_model), "load_weights", lambda self, weights: len(checked) or pytest.fail("too late")
    )
    demo = ROOT / "demo"
    config = SimpleNamespace(model=str(demo), revision=None, quantization="modelopt_fp4")
    loader = DefaultModelLoader(LoadConfig())
    monkeypatch.setattr(loader, "_init_ep_weight_filter", lambda config: None)
    monkeypatch.setattr(loader, "_init_mm_encoder_only_weight_filter", lambda model, config: None)
    loader.counter_before_loading_weights = 0.0
    loader.load_weights(demo_model, config)
    assert checked == [(demo_model, [str(demo / "model.safetensors")])]


def test_unchecked_loading_is_refused_with_the_configuration():
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor import model_loader

    arguments = EngineArgs(model=str(ROOT / "demo"), load_format="sharded_state", max_model_len=4096)
    made = mock.Mock(side_effect=AssertionError("a loader was made"))
    with (
        mock.patch.dict(model_loader._LOAD_FORMAT_TO_MODEL_LOADER, {"sharded_state": made}),
        pytest.raises(ValueError, match="NVFP4 layers is not served with --load-format sharded_state: "),
    ):
        arguments.create_engine_config()


def test_streamed_weights_are_checked_and_translated(demo_model, monkeypatch):
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import runai_streamer_loader, weight_utils

    stored = {"a.weight_global_scale": torch.tensor([4.0])}
    files, checked = ["s3://bucket/model.safetensors"], []
    streamer = mock.MagicMock(files_to_tensors_metadata={0: []}, get_tensors=lambda: iter(stored.items()))
    streamer.__enter__.return_value = streamer
    monkeypatch.setattr(weight_utils, "SafetensorsStreamer", lambda: streamer)
    monkeypatch.setattr(runai_streamer_loader, "list_safetensors", lambda path: files)
    monkeypatch.setattr("cutedsl_nvfp4.vllm.coverage.check_streamed", lambda *found: checked.append(found))
    loader = runai_streamer_loader.RunaiModelStreamerLoader(LoadConfig(load_format="runai_streamer"))
    config = SimpleNamespace(model="", model_weights="s3://bucket", revision=None)
    read = dict(loader.get_all_weights(config, demo_model))
    assert checked == [(demo_model, files, {0: []})]
    assert read["a.weight_global_scale"].item() == 0.25
    assert dict(loader.get_all_weights(config, torch.nn.Linear(1, 1)))["a.weight_global_scale"].item() == 4.0


def test_damaged_index_is_named(tmp_path):
    from vllm.model_executor.model_loader.weight_utils import filter_duplicate_safetensors_files

    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": ')
    with pytest.raises(ValueError, match="not a readable index") as error:
        filter_duplicate_safetensors_files([str(tmp_path / "1.safetensors")], str(tmp_path), index.name)
    assert str(index) in str(error.value)


def test_mappers_accept_foreign_names():
    from vllm.models.deepseek_v4.cpu import model as cpu
    from vllm.models.deepseek_v4.nvidia import model as nvidia

    theirs = [
        "model.layers.3.self_attn.q_a_proj.weight",
        "lm_head.weight",
        "layers.3.attn.wq_b.weight_global_scale",
    ]
    ours = ["layers.3.attn.wq_a.weight", "head.weight", "layers.3.attn.wq_b.weight_scale_2"]
    for mapper in (
        cpu._make_deepseek_v4_weights_mapper("fp4"),
        nvidia._make_deepseek_v4_weights_mapper("fp4"),
    ):
        assert mapper.apply_list(theirs) == mapper.apply_list(ours)


def test_config_is_repaired(tmp_path):
    from vllm.transformers_utils.config import get_config

    demo = ROOT / "demo"
    config = json.loads((demo / "config.json").read_text())
    del config["compress_ratios"]
    config["layer_types"] = [
        "sliding_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
    ]
    config["compress_rates"] = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
    config["quantization_config"]["ignore"] = ["*.self_attn.o_a_proj"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = get_config(str(tmp_path), trust_remote_code=False)
    assert read.compress_ratios == [0, 4, 128]
    assert read.quantization_config["ignore"] == [f"layers.{layer}.attn.wo_a" for layer in range(3)]


def test_divisors_are_inverted_as_they_are_read(demo_model, monkeypatch):
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    stored = {"a.weight_global_scale": torch.tensor([4.0]), "a.weight_scale_2": torch.tensor(4.0)}
    loader = DefaultModelLoader(LoadConfig())
    monkeypatch.setattr(loader, "_get_weights_iterator", lambda source: iter(stored.items()))
    read = dict(loader.get_all_weights(SimpleNamespace(model="demo", revision=None), demo_model))
    assert (read["a.weight_global_scale"].item(), read["a.weight_scale_2"].item()) == (0.25, 4.0)
    other = dict(loader.get_all_weights(SimpleNamespace(model="demo", revision=None), torch.nn.Linear(1, 1)))
    assert other["a.weight_global_scale"].item() == 4.0


def test_fp8_and_mxfp4_need_no_amx(monkeypatch):
    from vllm import _custom_ops
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsMxfp4

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(_custom_ops, "_supports_cpu_fp8_w8a16", True)
    for has_bf16 in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has_bf16: has)
        assert CPUFp8BlockScaledMMKernel.is_supported()[0] is has_bf16
        assert CPUExpertsMxfp4._supports_current_device() is has_bf16


def test_chat_arguments_follow_from_the_model(monkeypatch):
    from vllm.entrypoints.launchers import launcher
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", str(ROOT / "demo")])
    monkeypatch.setattr(launcher, "create_server_socket", mock.Mock())
    launcher.setup_server(args, reuse_port=False)
    assert (args.tool_call_parser, args.enable_auto_tool_choice) == ("deepseek_v4", True)
    args.tool_call_parser = "no such parser"
    with pytest.raises(ValueError, match="--tool-call-parser no such parser: there is no such parser"):
        launcher.setup_server(args, reuse_port=False)


def test_preview_has_its_own_efforts():
    from vllm.tokenizers.deepseek_v4 import DeepseekV4Tokenizer

    tokenizer = DeepseekV4Tokenizer.from_pretrained(ROOT / "demo")
    asked = [{"role": "user", "content": "Hi"}]

    def text(**arguments) -> str:
        return tokenizer.apply_chat_template(asked, tokenize=False, **arguments)

    assert text(reasoning_effort="max", effort_table="preview") == text(reasoning_effort="high")
    assert text(effort_table="preview") == text(reasoning_effort="low")
