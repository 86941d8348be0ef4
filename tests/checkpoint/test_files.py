"""checkpoint/files.py: whatever is wrong with files, index, dtypes or shapes is an error that names it."""

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cutedsl_nvfp4.checkpoint.files import (
    INDEX,
    check_whole_parameters,
    naming_the_tensor,
    read_checkpoint,
    read_header,
    read_index,
)
from cutedsl_nvfp4.checkpoint.headers import BITS_OF

FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LAYER = "layers.0.attn.wq_b"


def nvfp4_layer(n: int = 4, k: int = 64) -> dict[str, torch.Tensor]:
    return {
        f"{LAYER}.weight": torch.zeros(n, k // 2, dtype=torch.uint8),
        f"{LAYER}.weight_scale": torch.ones(n, k // 16).to(torch.float8_e4m3fn),
        f"{LAYER}.weight_scale_2": torch.tensor(0.5),
        f"{LAYER}.input_scale": torch.tensor(0.01),
    }


def write(folder: Path, *shards: dict[str, torch.Tensor], indexed: bool = True) -> list[Path]:
    """Shards as files of a checkpoint in `folder`, with their index."""
    files = []
    for number, shard in enumerate(shards, 1):
        files.append(folder / f"model-{number}.safetensors")
        save_file(shard, files[-1], metadata={"format": "pt"})
    if indexed:
        weight_map = {name: file.name for file, shard in zip(files, shards) for name in shard}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return files


@pytest.fixture
def two_shards(tmp_path) -> list[Path]:
    return write(tmp_path, nvfp4_layer(), {"norm.weight": torch.zeros(8), "head.weight": torch.zeros(2, 8)})


def with_header(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with `header`, JSON or raw bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def refused(file: Path, content: bytes) -> str:
    """The message with which `content` as `file` is refused; it must name the file and a remedy."""
    file.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_header(file)
    message = str(error.value)
    assert str(file) in message and "download it again" in message
    return message


@pytest.mark.parametrize("dtype", BITS_OF)
def test_every_dtype_of_the_library_is_read_as_the_library_reads_it(tmp_path, dtype):
    file = tmp_path / "dtype.safetensors"
    entry = {"dtype": dtype, "shape": [2, 8], "data_offsets": [0, 2 * BITS_OF[dtype]]}
    file.write_bytes(with_header({"a": entry}, bytes(2 * BITS_OF[dtype])))
    with safe_open(file, "pt") as library:
        assert library.get_slice("a").get_dtype() == dtype and library.get_slice("a").get_shape() == [2, 8]
    assert [(tensor.dtype, tensor.shape) for tensor in read_header(file).values()] == [(dtype, (2, 8))]


def test_a_dtype_that_the_library_lacks(tmp_path):
    """Its message lists what it knows; so does ours, and neither list is longer."""
    file = tmp_path / "dtype.safetensors"
    message = refused(file, with_header({"a": {"dtype": "F99", "shape": [], "data_offsets": [0, 0]}}))
    with pytest.raises(SafetensorError) as error, safe_open(file, "pt"):
        pass
    known = set(re.findall(r"`([A-Z]+\d*\w*)`", str(error.value))) - {"F99"}
    assert known == set(BITS_OF) and "known are F4, " in message


def test_a_pointer_of_git_lfs_is_told_from_a_file(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    assert "`git lfs pull`" in refused(tmp_path / "pointer.safetensors", pointer)


def test_names_dtypes_and_shapes(two_shards):
    tensors = read_checkpoint(two_shards)
    assert tensors[f"{LAYER}.weight"].dtype == "U8" and tensors[f"{LAYER}.weight"].shape == (4, 32)
    assert tensors["norm.weight"].file == two_shards[1] and tensors[f"{LAYER}.weight_scale_2"].shape == ()
    assert len(tensors) == 6


# --- files ---


@FUZZ
@given(data=st.data())
def test_a_file_cut_anywhere(two_shards, tmp_path, data):
    whole = two_shards[0].read_bytes()
    cut = data.draw(st.integers(0, len(whole) - 1))
    assert f"({cut:,} bytes)" in refused(tmp_path / "cut.safetensors", whole[:cut])


def test_a_file_with_bytes_to_spare(two_shards, tmp_path):
    refused(tmp_path / "long.safetensors", two_shards[0].read_bytes() + b"\0")


@FUZZ
@given(length=st.integers(0, 2**64 - 1))
@example(2**63)
@example(100_000_001)
def test_a_header_length_that_lies(two_shards, tmp_path, length):
    whole = two_shards[0].read_bytes()
    if length != struct.unpack("<Q", whole[:8])[0]:
        refused(tmp_path / "length.safetensors", struct.pack("<Q", length) + whole[8:])


@FUZZ
@given(content=st.binary(max_size=200))
@example(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
def test_a_file_of_anything(tmp_path, content):
    refused(tmp_path / "any.safetensors", content)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@FUZZ
@given(header=JSON.filter(lambda header: header != {}))
@example({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}})
@example({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}})
@example({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}})
@example({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}})
def test_a_header_of_anything(tmp_path, header):
    refused(tmp_path / "header.safetensors", with_header(header, bytes(4)))


def test_a_name_that_occurs_twice(tmp_path):
    entry = b'"a": {"dtype": "%s", "shape": [1], "data_offsets": [0, 4]}'
    twice = b"{" + entry % b"F32" + b", " + entry % b"I32" + b"}"
    assert "'a' occurs twice" in refused(tmp_path / "twice.safetensors", with_header(twice, bytes(4)))


@FUZZ
@given(data=st.data())
def test_a_bit_flipped_in_a_header(two_shards, tmp_path, data):
    """Refused; or a tensor has another name, which coverage reports; or it hit metadata or padding."""
    whole = bytearray(two_shards[0].read_bytes())
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    original = {name: (t.dtype, t.shape) for name, t in read_header(two_shards[0]).items()}
    whole[data.draw(st.integers(0, end - 1))] ^= 1 << data.draw(st.integers(0, 7))
    flipped = tmp_path / "flipped.safetensors"
    flipped.write_bytes(whole)
    message, tensors = "", {}
    try:
        tensors = {name: (t.dtype, t.shape) for name, t in read_header(flipped).items()}
    except ValueError as error:
        message = str(error)
    assert str(flipped) in message or tensors == original or tensors.keys() - original.keys()


def test_a_file_that_is_missing_or_a_folder(tmp_path):
    for file in (tmp_path / "gone.safetensors", tmp_path):
        with pytest.raises(ValueError, match=r"\(not a file\) is not a whole safetensors file") as error:
            read_header(file)
        assert str(file) in str(error.value)


def test_a_tensor_in_two_files(tmp_path):
    files = write(tmp_path, {"a": torch.zeros(1)}, {"a": torch.ones(1)}, indexed=False)
    with pytest.raises(ValueError, match="a is in both") as error:
        read_checkpoint(files)
    assert all(str(file) in str(error.value) for file in files)


# --- the index ---


def index_refused(files: list[Path], change: Callable[[dict], None]) -> str:
    file = files[0].parent / INDEX
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError) as error:
        read_checkpoint(files)
    assert str(file) in str(error.value)
    return str(error.value)


def test_index_names_a_missing_file(two_shards):
    message = index_refused(two_shards, lambda index: index.update({"x": "model-3.safetensors"}))
    assert "model-3.safetensors" in message and "incomplete" in message


@pytest.mark.parametrize(
    "target",
    ["../model-1.safetensors", "/etc/passwd", "sub/model-1.safetensors", "./model-1.safetensors", "..", "", ".",
     "..\\model-1.safetensors", 1, None, ["model-1.safetensors"]],
)  # fmt: skip
def test_index_points_out_of_its_folder_or_nowhere(two_shards, target):
    outside = two_shards[0].parent.parent / two_shards[0].name
    outside.write_bytes(two_shards[0].read_bytes())
    message = index_refused(two_shards, lambda index: index.update({"norm.weight": target}))
    assert f"puts norm.weight into {target!r}, which is not the name of a file in the same folder" in message


def test_index_puts_a_tensor_into_the_wrong_shard(two_shards):
    message = index_refused(two_shards, lambda index: index.update({"norm.weight": "model-1.safetensors"}))
    assert "puts norm.weight into model-1.safetensors, but it is in model-2.safetensors" in message


def test_index_lists_a_tensor_that_no_file_has(two_shards):
    message = index_refused(two_shards, lambda index: index.update({"x.weight": "model-2.safetensors"}))
    assert "x.weight should be in model-2.safetensors" in message


def test_index_that_leaves_a_tensor_out_is_reported(two_shards, caplog):
    file = two_shards[0].parent / INDEX
    index = json.loads(file.read_text())
    del index["weight_map"]["norm.weight"]
    file.write_text(json.dumps(index))
    assert "norm.weight" in read_checkpoint(two_shards)
    assert "does not list 1 tensors" in caplog.text and "norm.weight" in caplog.text


@FUZZ
@given(index=JSON)
@example({"weight_map": {}})
@example({"weight_map": {"a": "\ud800"}})
def test_an_index_of_anything(tmp_path, index):
    file = tmp_path / INDEX
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError) as error:
        read_index(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"[" * 100_000, b'{"weight_map": {"a": "1", "a": "2"}}']
)
def test_an_index_that_is_no_json(tmp_path, content):
    file = tmp_path / INDEX
    file.write_bytes(content)
    with pytest.raises(ValueError, match="not a readable index") as error:
        read_index(file)
    assert str(file) in str(error.value) and "download it again" in str(error.value)


# --- dtypes and shapes of NVFP4 layers ---


WRONG = {
    "weight": [torch.zeros(4, 32, dtype=torch.int32), torch.zeros(4, 32, dtype=torch.bfloat16)],
    "weight_scale": [
        torch.ones(4, 4), torch.ones(4, 4).to(torch.float8_e5m2), torch.full((4, 4), 127, dtype=torch.uint8)
    ],
    "weight_scale_2": [torch.tensor(1), torch.tensor(True)],
    "input_scale": [torch.tensor(1)],
}  # fmt: skip


@pytest.mark.parametrize("leaf, tensor", [(leaf, tensor) for leaf in WRONG for tensor in WRONG[leaf]])
def test_wrong_dtype(tmp_path, leaf, tensor):
    files = write(tmp_path, nvfp4_layer() | {f"{LAYER}.{leaf}": tensor})
    with pytest.raises(ValueError, match=rf"{LAYER}\.{leaf} in .* has dtype \w+, but .* needs") as error:
        read_checkpoint(files)
    assert str(files[0]) in str(error.value) and "export the checkpoint again" in str(error.value)


def test_wrong_dtype_under_compressed_tensors_names(tmp_path):
    layer = {
        f"{LAYER}.weight_packed": torch.zeros(4, 32, dtype=torch.uint8),
        f"{LAYER}.weight_scale": torch.ones(4, 4),
        f"{LAYER}.weight_global_scale": torch.tensor([2.0]),
    }
    with pytest.raises(
        ValueError, match=rf"{LAYER}\.weight_scale in .* has dtype F32, but weight_global_scale"
    ):
        read_checkpoint(write(tmp_path, layer))


SHAPES = st.lists(st.integers(0, 40), max_size=3).map(tuple)


@FUZZ
@given(codes=SHAPES, scales=SHAPES)
@example((4, 32), (4, 4))
@example((4, 32), (4, 2))
@example((1, 8), (1, 1))
def test_shapes(tmp_path, codes, scales):
    layer = nvfp4_layer() | {
        f"{LAYER}.weight": torch.zeros(codes, dtype=torch.uint8),
        f"{LAYER}.weight_scale": torch.ones(scales).to(torch.float8_e4m3fn),
    }
    files = write(tmp_path, layer)
    valid = (
        len(codes) >= 2 and 0 not in codes and codes[-1] % 8 == 0 and scales == (*codes[:-1], codes[-1] // 8)
    )
    if valid:
        assert read_checkpoint(files)[f"{LAYER}.weight"].shape == codes
    else:
        with pytest.raises(ValueError, match=rf"{LAYER}\.weight(_scale)? in ") as error:
            read_checkpoint(files)
        assert str(codes) in str(error.value)


@pytest.mark.parametrize("leaf", ["weight_scale_2", "input_scale"])
@pytest.mark.parametrize("count", [0, 2])
def test_one_global_scale_per_tensor(tmp_path, leaf, count):
    files = write(tmp_path, nvfp4_layer() | {f"{LAYER}.{leaf}": torch.ones(count)})
    with pytest.raises(
        ValueError, match=rf"{LAYER}\.{leaf} in .*shape \({count},\).* one global scale per tensor"
    ):
        read_checkpoint(files)


# --- against the model's parameters ---


@pytest.mark.parametrize(
    "stored, parameter, ranks, message",
    [
        (torch.zeros(8), torch.zeros(8, dtype=torch.bfloat16), 1, None),
        (torch.zeros(16, 8), torch.zeros(8, 8), 2, None),
        (torch.tensor(1.0), torch.zeros(1), 1, None),
        (torch.zeros(8, dtype=torch.int64), torch.zeros(8, dtype=torch.int32), 1, None),
        (torch.zeros(7), torch.zeros(8), 1, r"has shape \(7,\), but the model needs \(8,\)"),
        (torch.zeros(8, 2), torch.zeros(8), 1, r"has shape \(8, 2\)"),
        (torch.zeros(12, 8), torch.zeros(8, 8), 2, "on each of 2 ranks"),
        (
            torch.zeros(8, dtype=torch.int8),
            torch.zeros(8),
            1,
            "has dtype I8, but the model keeps it as torch.float32",
        ),
        (
            torch.zeros(8),
            torch.zeros(8, dtype=torch.int32),
            1,
            "has dtype F32, but the model keeps it as torch.int32",
        ),
    ],
)
def test_tensor_and_parameter(tmp_path, stored, parameter, ranks, message):
    tensors = read_checkpoint(write(tmp_path, {"norm.weight": stored}))

    def check():
        check_whole_parameters(tensors, lambda name: (parameter, tuple(parameter.shape)), ranks)

    if message is None:
        check()
    else:
        with pytest.raises(ValueError, match=message) as error:
            check()
        assert "norm.weight in " in str(error.value) and "model-1.safetensors" in str(error.value)


def test_an_error_while_loading_names_the_tensor():
    weights = [("a", torch.zeros(2)), ("b.weight", torch.zeros(3, 4)), ("c", torch.zeros(5))]

    def load(limit: int) -> list[str]:
        loaded = []
        with naming_the_tensor(weights) as named:
            for name, tensor in named:
                assert tensor.numel() <= limit
                loaded.append(name)
        return loaded

    with pytest.raises(AssertionError) as error:
        load(5)
    assert "while loading b.weight (torch.float32, shape (3, 4))" in error.value.__notes__[0]
    assert load(12) == ["a", "b.weight", "c"]
