"""scripts/inspect_checkpoint.py and the header reader under it: what is found, and what is refused."""

import json
import os
import random
import struct
from io import BytesIO
from pathlib import Path

import pytest
from safetensors import deserialize

from cutedsl_nvfp4.checkpoint import config as checkpoint_config
from cutedsl_nvfp4.checkpoint.folder import Folder, read_checkpoint, read_index
from cutedsl_nvfp4.checkpoint.headers import CheckpointError, read_header
from cutedsl_nvfp4.checkpoint.inspect import inspect, main
from cutedsl_nvfp4.checkpoint.written_config import native_config
from tests.support.checkpoints import dialects as checkpoints
from tests.support.checkpoints import headers, small
from tests.support.paths import DEMO


def with_header(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def read(contents: bytes) -> dict:
    return read_header(BytesIO(contents), len(contents), "x.safetensors")


def entry(shape: list, offsets: list, dtype: str = "U8") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


VALID = {"a": entry([2, 3], [0, 6]), "b": entry([2], [6, 10], "BF16"), "__metadata__": {"format": "pt"}}


def test_valid_header_is_read():
    tensors = read(with_header(json.dumps(VALID).encode(), bytes(10)))
    assert tensors["b"].shape == (2,) and tensors["b"].nbytes == 4
    assert tensors["b"].offset == 8 + len(json.dumps(VALID)) + 6


@pytest.mark.parametrize(
    "contents, words",
    [
        (b"", "0 bytes, too few"),
        (with_header(b"{}", length=10**12), "its header claims 1000000000000 bytes"),
        (with_header(b"{}", length=3), "its header claims 3 bytes"),
        (with_header(b"{"), "is not valid JSON"),
        (with_header(b"\xff\xfe"), "is not valid JSON"),
        (with_header(b"[" * 100_000), "is not valid JSON"),
        (with_header(b"[]"), "a JSON list"),
        (with_header(b'{"a": 1, "a": 2}'), "'a' occurs twice"),
        (with_header(b'{"a": 1}'), "lacks dtype, shape or data_offsets"),
        (with_header(json.dumps({"a": entry([1], [0, 1], "F3")}).encode(), b"x"), "dtype 'F3'"),
        (with_header(json.dumps({"a": entry([-1], [0, 1])}).encode(), b"x"), "shape"),
        (with_header(json.dumps({"a": entry([True], [0, 1])}).encode(), b"x"), "shape"),
        (with_header(json.dumps({"a": entry([1], [0])}).encode(), b"x"), "data_offsets"),
        (with_header(json.dumps({"a": entry([1], [1, 0])}).encode(), b"x"), "bytes 1 to 0"),
        (with_header(json.dumps({"a": entry([2], [0, 2])}).encode(), b"x"), "cut off or damaged"),
        (with_header(json.dumps({"a": entry([2], [0, 1])}).encode(), b"x"), "needs 2 bytes"),
        (with_header(json.dumps({"a": entry([10**30], [0, 1])}).encode(), b"x"), "needs 1000"),
        (with_header(json.dumps({"a": entry([2], [0, 2]), "b": entry([2], [1, 3])}).encode(), bytes(3)), "overlaps"),
        (with_header(json.dumps({"a": entry([1], [1, 2])}).encode(), bytes(2)), "leaves a gap"),
        (with_header(json.dumps({"a": entry([1], [0, 1])}).encode(), bytes(2)), "belong to none"),
        (with_header(json.dumps({"__metadata__": {"a": 1}}).encode()), "not a map of strings"),
    ],
)  # fmt: skip
def test_damaged_header_is_named(contents, words):
    with pytest.raises(CheckpointError, match=words):
        read(contents)


def _mutate(header: dict, text: bytearray, chance: random.Random) -> bytes:
    """One damaged file: a changed value in the header, or changed bytes, or a wrong length."""
    kind = chance.randrange(5)
    if kind == 0:
        for _ in range(chance.randint(1, 8)):
            text[chance.randrange(len(text))] = chance.randrange(256)
        return with_header(bytes(text), bytes(10))
    if kind == 1:
        return with_header(
            bytes(text), bytes(10), chance.choice([0, 1, 2**40, 2**63, 2**64 - 1, chance.randrange(2**64)])
        )
    if kind == 2:
        whole = with_header(bytes(text), bytes(10))
        return whole[: chance.randrange(len(whole))]
    odd = [
        None,
        -1,
        0,
        1,
        2**31,
        2**64,
        10**400,
        1.5,
        "",
        "F32",
        [],
        [0],
        [0, 6],
        [6, 0],
        [[0], 6],
        {},
        True,
        "a" * 500,
    ]
    victim = header[chance.choice(["a", "b"])]
    if kind == 3:
        victim[chance.choice(list(victim))] = chance.choice(odd)
    else:
        header[chance.choice(["a", "b", "c", "", "__metadata__", "../x"])] = chance.choice(
            [*odd, dict(victim)]
        )
    return with_header(json.dumps(header).encode(), bytes(10))


def test_ten_thousand_damaged_headers_are_read_or_refused():
    """Nothing but CheckpointError escapes; it always says something about the file. The library reads what we read."""
    chance = random.Random(11)
    messages = []
    for _ in range(10_000):
        contents = _mutate(json.loads(json.dumps(VALID)), bytearray(json.dumps(VALID).encode()), chance)
        try:
            tensors = read(contents)
        except CheckpointError as error:
            messages.append(str(error))
        else:
            assert all(tensor.offset + tensor.nbytes <= len(contents) for tensor in tensors.values())
            theirs = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in deserialize(contents)}
            assert theirs == {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    assert len(messages) > 8000
    assert all("x.safetensors" in message and len(message) < 1000 for message in messages)


@pytest.mark.parametrize(
    "target", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", ".", "a\\b.safetensors",
               "x.safetensors\0", 7, None, ["x"], "x.bin", "absent.safetensors"]
)  # fmt: skip
def test_index_cannot_point_elsewhere(target):
    with pytest.raises(CheckpointError, match=r"points to|which is missing"):
        read_index({"weight_map": {"a": target}}, {"x.safetensors": 1, "x.bin": 1})


@pytest.mark.parametrize("weight_map", [None, [], {}, "x", 1])
def test_index_without_a_map_is_refused(weight_map):
    with pytest.raises(CheckpointError, match="no weight_map"):
        read_index({"weight_map": weight_map}, {})


# --- whole checkpoints ---


@pytest.mark.parametrize(
    "encoder, line",
    [
        (
            None,
            "release: 0731/0813, or a preview with DSpark attached; there is no encoding/encoding_dsv4.py",
        ),
        ("def encode(): ...", "release: 0731/0813, or a preview with DSpark attached"),
        ("REASONING_EFFORT_MAX = 'x'", "release: a preview, by its chat encoder"),
        ("REASONING_EFFORT_PROMPTS = {}", "release: 0731/0813, by its chat encoder"),
    ],
)
def test_release_is_told_where_it_can_be(encoder, line, tmp_path, capsys):
    tensors = headers.demo() | headers.dspark("fp8", "mxfp4", experts_count=1)
    folder = headers.write(tmp_path / "src", tensors, headers.demo_config(**headers.DSPARK_FIELDS))
    if encoder is not None:
        (folder / "encoding").mkdir()
        (folder / "encoding/encoding_dsv4.py").write_text(encoder)
    assert main([str(folder), "--json", str(tmp_path / "report.json")]) == 0
    assert f"  {line}" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["draft"]["kind"], report["draft"]["layers"], report["draft"]["block_size"]) == (
        "DSpark",
        3,
        5,
    )
    assert report["draft"]["formats"]["0.ffn.experts"] == ["mxfp4"]
    assert (report["release"] is None) is line.startswith("release: 0731/0813, or")


def test_release_of_an_mtp_head_and_a_head_that_contradicts_its_config(tmp_path):
    tensors = headers.demo() | headers.mtp("fp8", "mxfp4")
    folder = headers.write(tmp_path / "preview", tensors, headers.demo_config(**headers.MTP_FIELDS))
    report = inspect(str(folder))
    assert (report.release, report.problems) == ("preview", [])
    assert "release: a preview, by its MTP head" in report.serving
    folder = headers.write(tmp_path / "mixed", tensors, headers.demo_config(**headers.DSPARK_FIELDS))
    assert "the draft head is MTP, and config.json has the fields of DSpark" in problems(folder)


@pytest.fixture
def native(tmp_path) -> Path:
    tensors = small.native(small.demo_values())
    return small.write(tmp_path / "src", tensors, small.config(small.NATIVE_QUANTIZATION), shards=2)


def test_demo_is_all_nvfp4_and_without_problems():
    report = inspect(str(DEMO))
    assert report.problems == []
    assert {row.kind: list(row.formats) for row in report.rows if row.kind in ("attention", "experts")} == {
        "attention": ["NVFP4"], "experts": ["NVFP4"]
    }  # fmt: skip
    file = os.path.getsize(DEMO / "model.safetensors")
    assert 0 < file - report.nbytes < 300_000, "everything but the header is counted"
    assert any("every NVFP4 layer has an input_scale" in line for line in report.serving)


def test_native_checkpoint(native):
    report = inspect(str(native))
    formats = {row.kind: set(row.formats) for row in report.rows}
    assert formats["experts"] == {"MXFP4"} and formats["shared"] == {"FP8 blocks"}
    assert formats["indexer"] == {"FP8 blocks", "BF16"} and report.problems == []


def problems(folder: Path) -> str:
    return "\n".join(f"{problem.what} -> {problem.remedy}" for problem in inspect(str(folder)).problems)


def test_missing_expert_is_a_problem(tmp_path):
    tensors = small.native(small.demo_values())
    for leaf in ("weight", "scale"):
        del tensors[f"layers.2.ffn.experts.17.w3.{leaf}"]
    small.write(tmp_path / "src", tensors, small.config(small.NATIVE_QUANTIZATION))
    assert "1 linears are missing: layers.2.ffn.experts.17.w3" in problems(tmp_path / "src")


def test_config_of_another_model_is_a_problem(tmp_path, demo_tensors):
    contents = {
        **json.loads((DEMO / "config.json").read_text()),
        "q_lora_rank": 96,
        "compress_ratios": [0, 0, 128],
    }
    small.write(tmp_path / "src", demo_tensors, contents)
    found = problems(tmp_path / "src")
    assert "6 linears fit no layer of config.json: layers.1.attn.compressor.wgate" in found
    assert (
        "6 linears have another shape than config.json says: layers.0.attn.wq_a, layers.0.attn.wq_b" in found
    )


def test_wrong_quantization_config_is_a_problem(tmp_path, demo_tensors):
    small.write(tmp_path / "src", demo_tensors, small.config(small.NATIVE_QUANTIZATION))
    assert "quant_method is 'fp8'" in problems(tmp_path / "src")
    (tmp_path / "src/config.json").write_text(json.dumps(small.config(None)))
    assert "no quantization_config" in problems(tmp_path / "src")


def test_config_that_cannot_be_completed_is_a_problem(tmp_path, demo_tensors):
    contents = json.loads((DEMO / "config.json").read_text())
    del contents["compress_ratios"]
    small.write(tmp_path / "src", demo_tensors, contents)
    found = problems(tmp_path / "src")
    assert "lacks compress_ratios, and nothing in it tells" in found and "original model" in found


@pytest.mark.parametrize("change, words", checkpoints.BEYOND_REPAIR)
def test_config_the_server_refuses_is_refused(change, words):
    contents = json.loads(json.dumps(checkpoints.transformers_names(*checkpoints.demo())[1]))
    change(contents)
    with pytest.raises(CheckpointError, match=words):
        native_config(contents)


def test_config_is_repaired_as_the_server_repairs_it():
    contents = checkpoints.transformers_names(*checkpoints.demo())[1]
    theirs = checkpoint_config.native_config(contents)
    assert native_config(contents) == {key: value for key, value in theirs.items() if key != "topk_method"}
    contents["compress_rates"] = {**contents["compress_rates"], "compressed_sparse_attention": 8}
    assert native_config(contents)["compress_ratios"] == [0, 8, 128]


def test_foreign_names_and_layouts_are_told(tmp_path, demo_tensors):
    tensors = {}
    leaves = {
        "weight": "weight_packed",
        "weight_scale_2": "weight_global_scale",
        "input_scale": "input_global_scale",
    }
    quantized = {
        name.removesuffix(".weight_scale") for name in demo_tensors if name.endswith(".weight_scale")
    }
    for name, tensor in demo_tensors.items():
        linear, _, leaf = name.rpartition(".")
        tensors[f"{linear}.{leaves.get(leaf, leaf)}" if linear in quantized else name] = tensor
    tensors["model.layers.0.self_attn.sinks"] = tensors.pop("layers.0.attn.attn_sink")
    small.write(tmp_path / "src", tensors, json.loads((DEMO / "config.json").read_text()))
    serving = "\n".join(inspect(str(tmp_path / "src")).serving)
    assert "names: transformers'" in serving and "divisors" in serving


def test_missing_scales_are_refused_by_name(tmp_path, demo_tensors):
    tensors = dict(demo_tensors)
    del tensors["layers.0.attn.wq_b.weight_scale_2"], tensors["layers.0.attn.wq_b.weight_scale"]
    small.write(tmp_path / "src", tensors, json.loads((DEMO / "config.json").read_text()))
    with pytest.raises(CheckpointError, match=r"layers\.0\.attn\.wq_b is U8 without block scales"):
        inspect(str(tmp_path / "src"))


@pytest.fixture(scope="module")
def demo_tensors() -> dict:
    from recipe import export

    return export.load_checkpoint(DEMO)


def test_mixed_downloads_are_refused(native):
    index = json.loads((native / "model.safetensors.index.json").read_text())
    name, file = next(iter(index["weight_map"].items()))
    other = next(f for f in index["weight_map"].values() if f != file)
    index["weight_map"][name] = other
    (native / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="files of two exports are mixed"):
        read_checkpoint(Folder(native))


def test_foreign_tensor_is_named(tmp_path, demo_tensors):
    import torch

    tensors = {**demo_tensors, "layers.0.self_attn.k_proj.weight": torch.zeros(2, 2)}
    small.write(tmp_path / "src", tensors, json.loads((DEMO / "config.json").read_text()))
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.self_attn\.k_proj\.weight' is not one of DeepSeek-V4's"
    ):
        inspect(str(tmp_path / "src"))


def test_command_prints_table_and_json(native, tmp_path, capsys):
    assert main([str(native), "--json", str(tmp_path / "report.json")]) == 0
    out = capsys.readouterr().out
    assert "MXFP4" in out and "no problems found" in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["nbytes"] == sum(row["nbytes"] for row in report["rows"])


def test_unwritable_report_is_an_error_not_a_traceback(native, tmp_path, capsys):
    assert main([str(native), "--json", str(tmp_path / "nowhere/report.json")]) == 1
    assert "inspect_checkpoint: " in capsys.readouterr().err


def test_command_fails_with_a_reason(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "has no config.json" in capsys.readouterr().err
