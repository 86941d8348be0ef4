"""Damaged demo checkpoints through vLLM's own loader, in this process and served: every refusal names the culprit."""

import json
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.config import set_current_vllm_config
from vllm.config.load import LoadConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model

from cutedsl_nvfp4.checkpoint.files import INDEX
from tests.support.faults.checkpoint import Tensors, plant
from tests.support.one_rank import one_rank
from tests.support.paths import DEMO
from tests.support.servers.vllm import Server, ServerDied

WEIGHTS = "model.safetensors"
in_one_process = pytest.mark.xdist_group("damaged")  # the model is built once
WQ_B, EXPERT = "layers.0.attn.wq_b", "layers.1.ffn.experts.3"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The demo's model as vLLM builds it on the CPU; every case loads into it anew."""
    arguments = EngineArgs(model=str(DEMO), max_model_len=4096, max_num_batched_tokens=4096)
    with one_rank(tmp_path_factory.mktemp("dist")):
        config = arguments.create_engine_config()
        with set_current_vllm_config(config), mock.patch("torch.cuda.Event"):
            yield initialize_model(config)


def load(model, checkpoint: Path, monkeypatch) -> None:
    """Load `checkpoint` into `model` with vLLM's default loader, without its expert and encoder filters."""
    loader = DefaultModelLoader(LoadConfig())
    monkeypatch.setattr(loader, "_init_ep_weight_filter", lambda config: None)
    monkeypatch.setattr(loader, "_init_mm_encoder_only_weight_filter", lambda model, config: None)
    loader.counter_before_loading_weights = 0.0
    loader.load_weights(
        model, SimpleNamespace(model=str(checkpoint), revision=None, quantization="modelopt_fp4")
    )


def refusal(model, checkpoint: Path, monkeypatch) -> str:
    """Everything that the log would show of the error that stops `checkpoint`."""
    with pytest.raises(Exception) as error:
        load(model, checkpoint, monkeypatch)
    return "".join(traceback.format_exception_only(error.value))


def sharded(into: Path) -> Path:
    """The demo in two files with an index."""
    into.mkdir()
    for file in DEMO.glob("*.json"):
        shutil.copy(file, into / file.name)
    tensors = load_file(DEMO / WEIGHTS)
    names = sorted(tensors)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    weight_map = {}
    for number, half in enumerate(halves, 1):
        save_file({name: tensors[name] for name in half}, into / f"{number}.safetensors")
        weight_map.update(dict.fromkeys(half, f"{number}.safetensors"))
    (into / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return into


@in_one_process
def test_sound_checkpoints_load(model, tmp_path, monkeypatch):
    load(model, DEMO, monkeypatch)
    load(model, sharded(tmp_path / "sharded"), monkeypatch)


# --- files and index ---


def _truncated(folder: Path) -> None:
    file = folder / "2.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _in_the_wrong_shard(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["embed.weight"] = "2.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def _shard_missing(folder: Path) -> None:
    (folder / "2.safetensors").unlink()


def _index_cut(folder: Path) -> None:
    (folder / INDEX).write_bytes((folder / INDEX).read_bytes()[:-100])


def _index_out_of_its_folder(folder: Path) -> None:
    shutil.move(folder / "2.safetensors", folder.parent / "2.safetensors")
    (folder / INDEX).write_text((folder / INDEX).read_text().replace('"2.safetensors', '"../2.safetensors'))


@in_one_process
@pytest.mark.parametrize(
    "damage, words",
    [
        (_truncated, ("2.safetensors", "is not a whole safetensors file")),
        (_in_the_wrong_shard, (INDEX, "puts embed.weight into 2.safetensors, but it is in 1.safetensors")),
        (_shard_missing, (INDEX, "2.safetensors")),
        (_index_cut, (INDEX, "not a readable index")),
        (_index_out_of_its_folder, (INDEX, "'../2.safetensors'", "same folder")),
    ],
)
def test_damaged_files(model, tmp_path, monkeypatch, damage, words):
    checkpoint = sharded(tmp_path / "checkpoint")
    damage(checkpoint)
    before = model.model.norm.weight.clone()
    message = refusal(model, checkpoint, monkeypatch)
    assert all(word in message for word in words), message
    assert torch.equal(model.model.norm.weight, before)


# --- tensors ---


def _rows_missing(linear: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for leaf in ("weight", "weight_scale"):
            tensors[f"{linear}.{leaf}"] = tensors[f"{linear}.{leaf}"][:-16].clone()

    return change


def _changed(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: function(tensors[name]).contiguous()})


TENSORS = {
    "linear_rows": (_rows_missing(WQ_B), f"{WQ_B}.weight"),
    "fused_rows": (_rows_missing("layers.0.attn.wkv"), "layers.0.attn.wkv.weight"),
    "scale_bytes": (_changed(f"{WQ_B}.weight_scale", lambda t: t.view(torch.uint8)), f"{WQ_B}.weight_scale"),
    "scale_f32": (
        _changed(f"{EXPERT}.w2.weight_scale", lambda t: t.float()),
        f"{EXPERT}.w2.weight_scale",
    ),
    "two_scales": (
        _changed(f"{EXPERT}.w1.weight_scale_2", lambda t: torch.stack([t, t])),
        f"{EXPERT}.w1.weight_scale_2",
    ),
    "norm_rows": (_changed("layers.0.attn_norm.weight", lambda t: t[:-16]), "layers.0.attn_norm.weight"),
    "sink_rows": (_changed("layers.1.attn.attn_sink", lambda t: t[:-1]), "layers.1.attn.attn_sink"),
    "embed_rows": (_changed("embed.weight", lambda t: t[:-1]), "embed.weight"),
    "integer_norm": (_changed("norm.weight", lambda t: t.int()), "norm.weight"),
    "float_table": (
        _changed("layers.0.ffn.gate.tid2eid", lambda t: t.bfloat16()),
        "layers.0.ffn.gate.tid2eid",
    ),
}


@in_one_process
@pytest.mark.parametrize("case", TENSORS)
def test_tensor_that_does_not_fit(model, tmp_path, monkeypatch, case):
    change, culprit = TENSORS[case]
    message = refusal(model, plant(DEMO, tmp_path / "checkpoint", change), monkeypatch)
    assert culprit in message and "checkpoint" in message, message


# --- served ---


def _served(checkpoint: Path, log: Path) -> str:
    with pytest.raises(ServerDied) as died, Server(checkpoint, log):
        pass
    return died.value.log


@pytest.mark.serving
def test_truncated_file_stops_the_server_by_name(tmp_path):
    checkpoint = sharded(tmp_path / "checkpoint")
    _truncated(checkpoint)
    log = _served(checkpoint, tmp_path / "server.log")
    assert f"{checkpoint}/2.safetensors" in log and "is not a whole safetensors file" in log


@pytest.mark.serving
def test_expert_with_too_few_rows_stops_the_server_by_name(tmp_path):
    """vLLM's loader fills what there is; the scales that stay unwritten are found when operands are prepared."""
    checkpoint = plant(DEMO, tmp_path / "checkpoint", _rows_missing(f"{EXPERT}.w1"))
    log = _served(checkpoint, tmp_path / "server.log")
    assert "layers.1.ffn.experts" in log and "block scale at [3, 48, 0] is nan" in log
