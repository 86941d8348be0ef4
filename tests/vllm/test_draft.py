"""vllm/draft.py: the MTP head that was asked for is the one the checkpoint has, whole, built as it is stored."""

from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.utils.torch_utils import set_default_torch_dtype

from cutedsl_nvfp4.vllm import draft as drafts
from tests.support import processor
from tests.support.checkpoints import draft, headers, small
from tests.support.checkpoints.headers import Headers
from tests.support.one_rank import one_rank

FORMATS = [("nvfp4", "nvfp4"), ("fp8", "mxfp4"), ("fp8", "nvfp4"), ("bf16", "bf16"), ("bf16", "nvfp4")]
DSPARK = {"dspark_block_size": 5, "dspark_target_layer_ids": [0, 1, 2]}


@pytest.fixture(scope="module", autouse=True)
def _single_rank(tmp_path_factory):
    with one_rank(tmp_path_factory.mktemp("dist")):
        yield


# --- what config.json declares ---


def request(method: str = "mtp", tokens: int = 1, pipeline_stages: int = 1, **fields) -> SimpleNamespace:
    """A SpeculativeConfig as far as `check_request` reads it, for the demo with other `fields` in config.json."""
    hf_config = SimpleNamespace(**draft.config(**fields))
    return SimpleNamespace(
        method=method, num_speculative_tokens=tokens,
        target_model_config=SimpleNamespace(hf_config=hf_config, model="demo", model_weights=None),
        draft_model_config=SimpleNamespace(hf_config=hf_config, model="demo"),
        target_parallel_config=SimpleNamespace(pipeline_parallel_size=pipeline_stages),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"num_nextn_predict_layers": 0},
            r"has no draft head, by config.json, and not MTP's.*ngram needs no head",
        ),
        (DSPARK, r"has DSpark's draft head \(3 layers, blocks of 5\), by config.json, and not MTP's"),
        ({"method": "dspark"}, r"has MTP's draft head \(1 layer\), by config.json, and not DSpark's"),
        (
            {"num_nextn_predict_layers": 2, "tokens": 3},
            r"num_speculative_tokens 3 cannot be drafted.*\(2 layers\)",
        ),
        ({"pipeline_stages": 2}, "last pipeline stage.*--tensor-parallel-size"),
    ],
)
def test_what_config_json_does_not_declare_is_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        drafts.check_request(request(**asked))


def test_a_head_of_another_checkpoint_is_refused():
    asked = request()
    asked.draft_model_config.model = "another"
    with pytest.raises(
        ValueError, match=r"model 'another' is not the target's checkpoint.*Leave `model` out"
    ):
        drafts.check_request(asked)
    asked.target_model_config.hf_config.model_type = "deepseek_v3"  # other models' heads are vLLM's business
    drafts.check_request(asked)


@pytest.mark.parametrize(("layers", "tokens"), [(1, 1), (1, 3), (2, 1), (2, 4)])
def test_numbers_of_tokens_that_a_head_can_draft(layers, tokens):
    drafts.check_request(request(num_nextn_predict_layers=layers, tokens=tokens))


# --- what the headers hold ---


def noted(stored: Headers, method: str = "mtp", **fields) -> dict:
    """What `check_head` notes for building the draft, of a checkpoint with these headers."""
    draft_config = SimpleNamespace()
    speculative = SimpleNamespace(method=method, draft_model_config=SimpleNamespace(hf_config=draft_config))
    tensors = {name: SimpleNamespace(dtype=dtype, shape=shape) for name, (dtype, shape) in stored.items()}
    drafts.check_head(SimpleNamespace(**draft.config(**fields)), tensors, speculative)
    return vars(draft_config)


def whole(*formats: str, prefix: str = "mtp.0.") -> Headers:
    """Headers of a head that fits the demo."""
    stored = headers.of(draft.head(*formats))
    return {name.replace("mtp.0.", prefix, 1): entry for name, entry in stored.items()}


@pytest.mark.parametrize(("linears", "experts"), FORMATS)
def test_a_whole_head_passes_in_every_format(linears, experts):
    assert noted(whole(linears, experts))


@pytest.mark.parametrize("prefix", ["model.mtp.0.", "layers.3.", "model.layers.3."])
def test_a_head_by_other_names_passes(prefix):
    assert noted(whole(prefix=prefix))


def test_nothing_is_asked_of_a_checkpoint_without_speculation():
    assert not noted({}, method="ngram")
    drafts.check_head(SimpleNamespace(), {}, None)


@pytest.mark.parametrize(
    "missing",
    ["enorm.weight", "hc_head_fn", "h_proj.weight_scale", "attn.wo_a.weight", "ffn.experts.63.w2.weight"],
)
def test_a_missing_tensor_is_named(missing):
    stored = whole()
    del stored[f"mtp.0.{missing}"]
    with pytest.raises(
        ValueError, match=rf"MTP head lacks 1 tensors: mtp\.0\.{missing}; .*--speculative-config out"
    ):
        noted(stored)


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("hnorm.weight", ("BF16", (128,)), r"has shape \[128\], expected \[256\]"),
        ("e_proj.weight", ("U8", (128, 64)), r"has shape \[128, 64\], expected \[256, 128\]"),
        ("ffn.experts.7.w1.weight", ("U8", (64, 64)), r"has shape \[64, 64\], expected \[64, 128\]"),
    ],
)
def test_a_head_of_another_width_is_refused(name, entry, message):
    with pytest.raises(
        ValueError,
        match=rf"not this model's \(hidden_size 256\), 1 tensors do not fit: mtp\.0\.{name} {message}",
    ):
        noted(whole() | {f"mtp.0.{name}": entry})


def test_block_scales_that_vllm_would_round_are_refused():
    stored = whole("fp8", "mxfp4") | {"mtp.0.attn.wo_b.scale": ("F32", (2, 1))}
    with pytest.raises(ValueError, match=r"mtp\.0\.attn\.wo_b\.scale has dtype F32, expected F8_E8M0"):
        noted(stored)


@pytest.mark.parametrize("formats", [("nvfp4", "mxfp4"), ("mxfp4", "mxfp4"), ("bf16", "fp8")])
def test_a_mix_that_vllm_has_no_layers_for_is_refused(formats):
    linears, experts = formats
    with pytest.raises(
        ValueError, match=f"cannot be served as it is stored: linears in {linears}, experts in {experts}"
    ):
        noted(whole(*formats))


def test_two_formats_in_one_layer_of_vllm_are_refused():
    stored = {name: entry for name, entry in whole().items() if ".attn.wkv." not in name}
    stored |= headers.linear("mtp.0.attn.wkv", 512, 256, "bf16")
    with pytest.raises(ValueError, match=r"several of these in model\.layers\.3\.attn\.fused_wqa_wkv"):
        noted(stored)


def test_a_head_of_another_kind_or_count_is_refused():
    with pytest.raises(ValueError, match=r"has no draft head, by its tensors, and not MTP's"):
        noted({})
    with pytest.raises(
        ValueError, match=r"has DSpark's draft head \(3 layers\), by its tensors, and not MTP's"
    ):
        noted(headers.dspark("fp8", "mxfp4"))
    message = r"config.json declares MTP's draft head \(2 layers\), and the checkpoint has MTP's draft head \(1 layer\)"
    with pytest.raises(ValueError, match=message):
        noted(whole(), num_nextn_predict_layers=2)


# --- built and loaded as stored ---


def configured(folder, tensors):
    """vLLM's configuration for drafting with a checkpoint of these tensors alone, whose headers were checked."""
    small.write(folder, tensors, draft.config())
    config = EngineArgs(
        model=str(folder),
        max_model_len=4096,
        speculative_config={"method": "mtp", "num_speculative_tokens": 1},
    ).create_engine_config()
    stored = {
        name: SimpleNamespace(dtype=dtype, shape=shape)
        for name, (dtype, shape) in headers.of(tensors).items()
    }
    drafts.check_head(config.model_config.hf_config, stored, config.speculative_config)
    return config


@contextmanager
def building(config):
    with (
        set_current_vllm_config(config),
        set_default_torch_dtype(config.model_config.dtype),
        mock.patch("torch.cuda.Event"),
    ):
        yield config.speculative_config.draft_model_config


def built(folder, tensors) -> torch.nn.Module:
    """The CPU's draft for these tensors, before any is loaded."""
    config = configured(folder, tensors)
    with building(config) as draft_config:
        return initialize_model(config, model_config=draft_config)


def loaded(folder, tensors) -> torch.nn.Module:
    """The CPU's draft of a checkpoint, loaded by vLLM as after its target."""
    config = configured(folder, tensors)
    with building(config) as draft_config:
        model = initialize_model(config, model_config=draft_config)
        DefaultModelLoader(config.load_config).load_weights(model, draft_config)
        process_weights_after_loading(model, draft_config, torch.device("cpu"))
    return model


@pytest.mark.parametrize(("linears", "experts"), FORMATS)
def test_every_format_is_built_and_loaded(tmp_path, linears, experts):
    """The products of some linears, and the whole of the experts, are those of the weights that were stored."""
    processor.need("fp8" not in linears or processor.has_block_fp8())
    tensors = draft.head(linears, experts)
    model = loaded(tmp_path / "model", tensors)
    layer = model.model.layers["3"]
    x = torch.randn(5, 256, dtype=torch.bfloat16)
    for name in ("e_proj", "h_proj"):
        out = getattr(layer, name)(x)
        expected = x.float() @ draft.plain(tensors, f"mtp.0.{name}").T
        torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
    assert torch.equal(layer.mtp_block.ffn.gate.e_score_correction_bias, tensors["mtp.0.ffn.gate.bias"])
    assert torch.equal(layer.shared_head.norm.weight, tensors["mtp.0.norm.weight"])


def test_what_the_head_shares_with_its_target_stays_unread(tmp_path):
    shared = {"mtp.0.emb.tok_emb.weight": torch.randn(320, 256), "mtp.0.head.weight": torch.randn(320, 256)}
    assert loaded(tmp_path / "model", draft.head() | shared)


def test_a_tensor_of_the_head_without_a_place_is_refused(tmp_path):
    surplus = {"mtp.0.attn.indexer.wq_b.weight": torch.zeros(8, 8, dtype=torch.bfloat16)}
    with pytest.raises(
        ValueError, match=r"1 tensors of the checkpoint have no place in the model: mtp\.0\.attn\.indexer"
    ):
        loaded(tmp_path / "model", draft.head() | surplus)


def filled(model: torch.nn.Module, load_weights, tensors) -> dict[str, torch.Tensor]:
    """`model`'s parameters after `load_weights`, those that it does not write being zero."""
    for parameter in model.parameters():
        parameter.data.zero_()
    load_weights(model, iter(tensors.items()))
    return {name: parameter.data.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("linears", "experts"), FORMATS)
def test_nvidias_loader_fills_the_same_parameters(tmp_path, linears, experts):
    """Its layers need a GPU, its loader does not: on the CPU's, which have the same names."""
    from vllm.models.deepseek_v4.nvidia import mtp

    tensors = draft.head(linears, experts)
    model = built(tmp_path / "model", tensors)
    ours = filled(model, type(model).load_weights, tensors)
    model.pad_shared_expert = False
    model.model.mtp_start_layer_idx, model.model.num_mtp_layers = 3, 1
    model.model.layers["3"].mtp_block.ffn.use_native_mega_moe = False
    for method in ("_to_spec_layer_name", "_rewrite_spec_layer_name"):
        setattr(model, method, partial(getattr(mtp.DeepSeekV4MTP, method), model))
    model.process_weights_after_loading = lambda: None
    theirs = filled(model, mtp.DeepSeekV4MTP.load_weights, tensors)
    for name in ours.keys() | theirs.keys():
        assert torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8)), name
