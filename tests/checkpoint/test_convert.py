"""scripts/convert_checkpoint.py: every dialect becomes the same checkpoint, whatever happens on the way."""

import contextlib
import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config
from vllm.models.deepseek_v4.cpu.model import DeepseekV4ForCausalLM

from cutedsl_nvfp4 import reference
from cutedsl_nvfp4.checkpoint.config import native_config
from cutedsl_nvfp4.checkpoint.conversion import Options
from cutedsl_nvfp4.checkpoint.convert import convert
from cutedsl_nvfp4.checkpoint.headers import CheckpointError
from cutedsl_nvfp4.checkpoint.names import KINDS
from cutedsl_nvfp4.checkpoint.written_config import modelopt_config
from recipe import export
from tests.support.checkpoints import dialects as checkpoints
from tests.support.checkpoints import small
from tests.support.paths import ROOT
from tests.support.servers.vllm import Server

SMALL_SHARDS = 1_000_000


def read(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a finished conversion, by its index."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {}
    for file in sorted(set(weight_map.values())):
        tensors |= load_file(folder / file)
    assert tensors.keys() == weight_map.keys()
    return tensors


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], names=None) -> None:
    for name in names or theirs:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(
            ours[name].flatten().view(torch.uint8), theirs[name].flatten().view(torch.uint8)
        ), name


def value(tensors: dict[str, torch.Tensor], linear: str) -> torch.Tensor:
    parts = [tensors[f"{linear}.{leaf}"] for leaf in ("weight", "weight_scale", "weight_scale_2")]
    return reference.dequantize(*parts)


@pytest.fixture(scope="module")
def demo() -> dict[str, torch.Tensor]:
    return export.load_checkpoint(small.DEMO)


@pytest.fixture(scope="module")
def values() -> dict[str, torch.Tensor]:
    return small.demo_values()


@pytest.fixture(scope="module")
def layer_one(values) -> dict[str, torch.Tensor]:
    """Layer 1 of the demo, which has linears of every kind, with four experts, and what is outside the layers."""
    kept = re.compile(r"(?!layers\.)|layers\.1\.(?!ffn\.experts\.)|layers\.1\.ffn\.experts\.[0-3]\.")
    return {name: value for name, value in values.items() if kept.match(name)}


@pytest.fixture(scope="module")
def bf16(tmp_path_factory, values) -> Path:
    return small.write(
        tmp_path_factory.mktemp("bf16") / "src", small.native_dtypes(values), small.config(None)
    )


@pytest.fixture(scope="module")
def native(tmp_path_factory, layer_one) -> Path:
    folder = tmp_path_factory.mktemp("native") / "src"
    return small.write(folder, small.native(layer_one), small.config(small.NATIVE_QUANTIZATION), shards=2)


@pytest.fixture(scope="module")
def from_bf16(tmp_path_factory, bf16) -> Path:
    """The demo, widened to BF16 and converted with default options."""
    folder = tmp_path_factory.mktemp("converted") / "dst"
    convert(bf16, folder, Options(shard_bytes=SMALL_SHARDS))
    return folder


@pytest.fixture(scope="module")
def from_native(tmp_path_factory, native) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "dst"
    convert(native, folder, Options())
    return folder


# --- what comes out ---


def test_demo_from_bf16_is_the_demo_again(bf16, demo, tmp_path):
    """Codes and block scales bit for bit; a global scale only as exactly as BF16 kept the largest weight."""
    convert(bf16, tmp_path / "dst", Options(own_scales=True, shard_bytes=SMALL_SHARDS))
    ours = read(tmp_path / "dst")
    expected = {name for name in demo if not name.endswith(".input_scale")}
    assert ours.keys() == expected
    scales = {name for name in expected if name.endswith(".weight_scale_2")}
    assert_same(ours, demo, expected - scales)
    for name in scales:
        torch.testing.assert_close(ours[name], demo[name], rtol=2.0**-8, atol=0)


def test_fused_pairs_share_their_global_scale(from_bf16):
    ours = read(from_bf16)
    layer = "layers.1."
    for first, second in (("attn.wq_a", "attn.wkv"), ("attn.compressor.wkv", "attn.compressor.wgate"),
                          ("attn.indexer.compressor.wkv", "attn.indexer.compressor.wgate"),
                          ("ffn.shared_experts.w1", "ffn.shared_experts.w3"),
                          ("ffn.experts.5.w1", "ffn.experts.5.w3")):  # fmt: skip
        assert ours[f"{layer}{first}.weight_scale_2"] == ours[f"{layer}{second}.weight_scale_2"]
    assert ours[f"{layer}ffn.experts.5.w1.weight_scale_2"] != ours[f"{layer}ffn.experts.5.w2.weight_scale_2"]


def test_config_says_what_is_nvfp4(from_bf16):
    quantization = json.loads((from_bf16 / "config.json").read_text())["quantization_config"]
    assert (quantization["quant_method"], quantization["quant_algo"]) == ("modelopt", "NVFP4")
    excluded = json.loads((from_bf16 / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    assert excluded == quantization["ignore"]
    assert not any("attn." in pattern or "experts" in pattern for pattern in excluded)


def test_native_experts_are_relabelled_without_loss(native, from_native, layer_one):
    ours, theirs = read(from_native), {}
    for file in native.glob("*.safetensors"):
        theirs |= load_file(file)
    for linear in (name.removesuffix(".weight") for name in layer_one if ".ffn.experts." in name):
        assert torch.equal(ours[f"{linear}.weight"].view(torch.int8), theirs[f"{linear}.weight"])
        exponent = theirs[f"{linear}.scale"].view(torch.uint8).double() - 127
        nibbles = torch.tensor(
            [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64
        )
        codes = theirs[f"{linear}.weight"].view(torch.uint8)
        exact = nibbles[torch.stack((codes & 15, codes >> 4), -1).flatten(-2).int()]
        exact *= (2.0**exponent).repeat_interleave(32, -1)
        assert torch.equal(value(ours, linear).double(), exact)
    record = json.loads((from_native / "conversion.json").read_text())
    assert record["converted"]["experts"] == {"linears": 12, "snr_db": None, "mxfp4_codes_rounded": 0}


def test_parameters_stay_as_they_are(native, from_native):
    ours, theirs = read(from_native), {}
    for file in native.glob("*.safetensors"):
        theirs |= load_file(file)
    kept = [name for name in theirs if re.search(r"norm|hc_|ape$|sink|embed|head|ffn\.gate", name)]
    assert len(kept) > 15
    assert_same(ours, theirs, kept)


def test_measured_error_is_near_the_true_one(bf16, from_bf16):
    record = json.loads((from_bf16 / "conversion.json").read_text())["converted"]
    ours, source = read(from_bf16), load_file(bf16 / "model.safetensors")
    for kind, pattern in (("attention", r"attn\.w"), ("indexer", r"indexer\.(wq_b|weights|comp\w+\.w)")):
        linears = [n.removesuffix(".weight") for n in source if re.search(pattern + r"[\w.]*\.weight$", n)]
        signal = sum(float(source[f"{linear}.weight"].double().square().sum()) for linear in linears)
        noise = sum(
            float((value(ours, linear).double() - source[f"{linear}.weight"].double()).square().sum())
            for linear in linears
        )
        snr = 10 * torch.log10(torch.tensor(signal / noise)).item()
        assert record[kind]["snr_db"] == pytest.approx(snr, abs=1)


# --- dialects ---


def hf_names(tensors: dict[str, torch.Tensor], stacked: bool) -> dict[str, torch.Tensor]:
    from recipe import names

    result, experts = {}, {}
    matrices = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"layers\.(\d+)\.ffn\.experts\.(\d+)\.(w\d)\.weight", name)
        if found and stacked:
            experts[int(found[2]), found[3]] = tensor
        elif found:
            result[f"model.layers.{found[1]}.mlp.experts.{found[2]}.{matrices[found[3]]}.weight"] = tensor
        elif name in names.TOP_LEVEL:
            result[names.TOP_LEVEL[name]] = tensor
        else:
            _, layer, rest = name.split(".", 2)
            result[f"model.layers.{layer}.{names.IN_LAYER[rest]}"] = tensor
    if stacked:
        count = 1 + max(expert for expert, _ in experts)
        gate_up = [torch.cat((experts[e, "w1"], experts[e, "w3"])) for e in range(count)]
        result["model.layers.1.mlp.experts.gate_up_proj"] = torch.stack(gate_up)
        result["model.layers.1.mlp.experts.down_proj"] = torch.stack([experts[e, "w2"] for e in range(count)])
    return result


def hf_config() -> dict:
    """The demo's config as transformers writes it: ratios and rope only in derived keys."""
    from recipe import names

    contents = small.config(None)
    theirs = json.loads(json.dumps(names.transformers_config(contents).to_dict()))
    for key in ("compress_ratios", "num_hash_layers", "qk_rope_head_dim", "rope_scaling"):
        theirs.pop(key, None)
    return theirs


@pytest.mark.parametrize("stacked", [False, True], ids=["apart", "stacked"])
def test_hf_names_become_native(stacked, layer_one, tmp_path):
    tensors = small.native_dtypes(layer_one)
    small.write(tmp_path / "native", tensors, small.config(None))
    small.write(tmp_path / "hf", hf_names(tensors, stacked), hf_config())
    for source in ("native", "hf"):
        convert(tmp_path / source, tmp_path / f"{source}-dst", Options())
    assert_same(read(tmp_path / "hf-dst"), read(tmp_path / "native-dst"))
    ours, theirs = (json.loads((tmp_path / f"{s}-dst/config.json").read_text()) for s in ("hf", "native"))
    for key in (
        "compress_ratios",
        "num_hash_layers",
        "qk_rope_head_dim",
        "rope_theta",
        "compress_rope_theta",
    ):
        assert ours[key] == theirs[key], key
    scaling = ("type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
    assert [ours["rope_scaling"][key] for key in scaling] == [theirs["rope_scaling"][key] for key in scaling]


@pytest.mark.parametrize("divisors", [False, True], ids=["modelopt", "compressed-tensors"])
def test_nvfp4_experts_are_kept(divisors, layer_one, demo, tmp_path):
    """The vendor's experts-only checkpoints: NVFP4 experts beside FP8."""
    tensors = small.native(layer_one)
    for linear in [name.removesuffix(".weight") for name in layer_one if ".ffn.experts." in name]:
        del tensors[f"{linear}.scale"], tensors[f"{linear}.weight"]
        leaves = {
            leaf: demo[f"{linear}.{leaf}"]
            for leaf in ("weight", "weight_scale", "weight_scale_2", "input_scale")
        }
        if divisors:
            leaves = {
                "weight_packed": leaves["weight"],
                "weight_scale": leaves["weight_scale"],
                "weight_global_scale": (1 / leaves["weight_scale_2"]).view(1),
                "input_global_scale": (1 / leaves["input_scale"]).view(1),
            }
        tensors.update({f"{linear}.{leaf}": tensor for leaf, tensor in leaves.items()})
    small.write(
        tmp_path / "src", tensors, small.config({**small.NATIVE_QUANTIZATION, "moe_quant_algo": "NVFP4"})
    )
    convert(tmp_path / "src", tmp_path / "dst", Options())
    ours = read(tmp_path / "dst")
    for name in (name for name in demo if re.match(r"layers\.1\.ffn\.experts\.[0-3]\.", name)):
        if name.endswith(("_2", "input_scale")):
            torch.testing.assert_close(ours[name], demo[name], rtol=1e-6, atol=0)
        else:
            assert_same(ours, demo, [name])
    assert ours["layers.1.attn.wq_a.weight"].dtype == torch.uint8


def test_mtp_is_copied_untouched(layer_one, tmp_path):
    tensors = small.native(layer_one)
    draft = {
        name.replace("layers.1.", "mtp.0."): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith("layers.1.")
    }
    small.write(tmp_path / "src", tensors | draft, small.config(small.NATIVE_QUANTIZATION))
    convert(tmp_path / "src", tmp_path / "dst", Options())
    assert_same(read(tmp_path / "dst"), draft)
    ignored = json.loads((tmp_path / "dst/config.json").read_text())["quantization_config"]["ignore"]
    assert ignored[-2:] == ["mtp.*", "layers.3.*"]  # DeepSeek's name, and vLLM's behind three layers
    theirs = json.loads((tmp_path / "dst/hf_quant_config.json").read_text())["quantization"]
    assert theirs["exclude_modules"] == ignored


# --- choosing modules ---


def test_experts_only_keeps_fp8_and_its_config(native, tmp_path):
    convert(native, tmp_path / "dst", Options(kinds=("experts",)))
    ours = read(tmp_path / "dst")
    assert ours["layers.1.attn.wq_a.weight"].dtype == torch.float8_e4m3fn
    assert ours["layers.1.attn.wq_a.scale"].dtype == torch.float8_e8m0fnu
    quantization = json.loads((tmp_path / "dst/config.json").read_text())["quantization_config"]
    assert (quantization["quant_method"], quantization["moe_quant_algo"]) == ("fp8", "NVFP4")


def test_what_is_left_out_becomes_bf16_and_is_ignored(native, tmp_path, capsys):
    convert(native, tmp_path / "dst", Options(kinds=("attention", "shared", "experts")))
    assert "indexer: FP8 is written as BF16" in capsys.readouterr().err
    ours, source = read(tmp_path / "dst"), {}
    for file in native.glob("*.safetensors"):
        source |= load_file(file)
    name = "layers.1.attn.indexer.wq_b"
    scale = source[f"{name}.scale"].float().repeat_interleave(128, 0).repeat_interleave(128, 1)
    exact = source[f"{name}.weight"].float() * scale[:, : source[f"{name}.weight"].shape[1]]
    assert ours[f"{name}.weight"].dtype == torch.bfloat16
    assert torch.equal(ours[f"{name}.weight"].float(), exact)
    ignored = json.loads((tmp_path / "dst/config.json").read_text())["quantization_config"]["ignore"]
    assert "*.attn.indexer.*" in ignored and "*.attn.compressor.*" in ignored and "*.attn.wq_b" not in ignored


def test_vllm_quantizes_exactly_what_is_nvfp4():
    """`ignore` as vLLM itself resolves it, for every choice of modules."""
    layers = {
        "attention": ("attn.fused_wqa_wkv", "attn.wq_b", "attn.wo_a", "attn.wo_b"),
        "compressor": ("attn.compressor.fused_wkv_wgate",),
        "indexer": (
            "attn.indexer.wq_b",
            "attn.indexer.weights_proj",
            "attn.indexer.compressor.fused_wkv_wgate",
        ),
        "shared": ("ffn.shared_experts.gate_up_proj", "ffn.shared_experts.down_proj"),
        "experts": ("ffn.experts", "ffn.experts.routed_experts"),
    }
    for chosen in (set(choice) for size in range(1, 6) for choice in itertools.combinations(KINDS, size)):
        quantization = ModelOptNvFp4Config.from_config(
            modelopt_config(small.config(None), chosen)["quantization_config"]
        )
        quantization.packed_modules_mapping = DeepseekV4ForCausalLM.packed_modules_mapping
        quantization.apply_vllm_mapper(DeepseekV4ForCausalLM.hf_to_vllm_mapper)
        assert quantization.is_layer_excluded("lm_head")
        for kind, names in layers.items():
            for name in names:
                excluded = quantization.is_layer_excluded(f"model.layers.2.{name}")
                assert excluded == (kind not in chosen), (chosen, name)


def test_mxfp4_beside_nvfp4_is_refused(native, tmp_path):
    with pytest.raises(CheckpointError, match=r"MXFP4 and experts is not in --quantize.*Add experts"):
        convert(native, tmp_path / "dst", Options(kinds=("attention",)))
    assert not (tmp_path / "dst").exists()


# --- interrupted, restarted, refused ---


def test_workers_write_what_one_process_writes(bf16, from_bf16, tmp_path):
    command = [sys.executable, str(ROOT / "scripts/convert_checkpoint.py"), str(bf16), str(tmp_path / "dst")]
    run = subprocess.run(
        [*command, "--jobs", "2", "--device", "cpu", "--shard-gb", str(SMALL_SHARDS / 1e9)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert digest(tmp_path / "dst") == digest(from_bf16)
    assert "576 linears quantized" in run.stdout


LIMIT = 600  # seconds; reached only by what hangs
KILLS = 50
GRACE = 500  # events, about 2 ms


def _convert_and_tell(source: Path, destination: Path, last: int | None, says: Connection) -> None:
    """Run in a child: say when event `last` is reached, then how many there were.

    An event is a call of a function, in Python or C, or its return. Who has not been killed GRACE events after `last`
    kills itself.
    """
    done = 0

    def count(*_: object) -> None:
        nonlocal done
        done += 1
        if done == last:
            says.send(done)
        elif last is not None and done > last + GRACE:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    convert(source, destination, Options(shard_bytes=40_000))
    sys.setprofile(None)
    says.send(done)


def test_fifty_kills_change_nothing(layer_one, tmp_path, monkeypatch):
    """kill -9 at random events; whoever starts it again gets, bit for bit, what an undisturbed run writes."""
    few = {
        name: value
        for name, value in layer_one.items()
        if not re.search(r"embed|head|hc_|indexer\.wq_b", name)
    }
    source = small.write(
        tmp_path / "src", small.native(few), small.config(small.NATIVE_QUANTIZATION), shards=2
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # or its children import torch one by one
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])

    def run(destination: Path, last: int | None) -> tuple[int, int]:
        """Kill a conversion when it says that it is at `last` -> (what it said, its exit status)."""
        ours, theirs = context.Pipe()
        child = context.Process(target=_convert_and_tell, args=(source, destination, last, theirs))
        child.start()
        theirs.close()  # or a child that dies early leaves recv waiting for ever
        with contextlib.suppress(EOFError):  # of a child that failed
            said = ours.recv()
            if said == last:
                child.kill()
        child.join()
        ours.close()
        assert child.exitcode in (0, -signal.SIGKILL), (
            "the conversion failed by itself; its traceback is above"
        )
        return said, child.exitcode

    events, status = run(tmp_path / "undisturbed", None)
    expected = digest(tmp_path / "undisturbed")
    assert status == 0
    assert len(expected) > 12, "too few shards to be killed between"

    chance = random.Random(7)
    destination = tmp_path / "dst"
    kills, resumed, alone = 0, 0, 0
    while kills < KILLS:
        _, status = run(destination, chance.randrange(1, events * 4 // 5))
        killed = status == -signal.SIGKILL
        kills, alone = kills + killed, 0 if killed else alone + 1
        assert alone < 20, "conversions end before they can be killed"
        resumed += destination.exists() and any(destination.glob("*.safetensors"))
        if (destination / "config.json").exists():
            convert(source, destination, Options(shard_bytes=40_000))
            assert digest(destination) == expected
            shutil.rmtree(destination)
    convert(source, destination, Options(shard_bytes=40_000))
    assert digest(destination) == expected
    assert resumed > KILLS / 4, "the kills came too early to leave anything behind"


STALLS = """
import signal, sys
from cutedsl_nvfp4.checkpoint.convert import Journal, main

def stall(*_):
    print("a shard is written", flush=True)
    signal.pause()

Journal.add = stall
main(sys.argv[1:])
"""


def test_killed_workers_are_not_left_behind(bf16, from_bf16, tmp_path, monkeypatch):
    """kill -9 of the parent of two workers; what starts at once afterwards is not disturbed by them."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    destination = tmp_path / "dst"
    command = [sys.executable, "-c", STALLS, str(bf16), str(destination)]
    parent = subprocess.Popen(
        [*command, "--jobs", "2", "--shard-gb", str(SMALL_SHARDS / 1e9)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout.readline() == "a shard is written\n"
    workers = [pid for pid in os.listdir("/proc") if pid.isdigit() and _parent_of(pid) == parent.pid]
    parent.kill()
    parent.wait()
    convert(bf16, destination, Options(shard_bytes=SMALL_SHARDS))
    assert digest(destination) == digest(from_bf16)
    assert len(workers) >= 2
    deadline = time.monotonic() + LIMIT
    while left := [pid for pid in workers if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def _parent_of(pid: str) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def test_two_at_once_are_refused(native, tmp_path):
    destination = tmp_path / "dst"
    destination.mkdir()
    with (destination / ".conversion.jsonl").open("ab") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another process is converting"):
            convert(native, destination, Options())


def test_destination_is_no_checkpoint_before_the_end(native, tmp_path, monkeypatch):
    from cutedsl_nvfp4.checkpoint import convert as module

    monkeypatch.setattr(module, "_finish", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        convert(native, tmp_path / "dst", Options())
    assert not {"config.json", "model.safetensors.index.json"} & {
        path.name for path in (tmp_path / "dst").iterdir()
    }


def test_finished_shards_are_not_written_again(native, tmp_path, monkeypatch):
    from cutedsl_nvfp4.checkpoint import convert as module

    with monkeypatch.context() as patch:
        patch.setattr(module, "_finish", lambda *_: (_ for _ in ()).throw(OSError("pulled the plug")))
        with pytest.raises(OSError):
            convert(native, tmp_path / "dst", Options(shard_bytes=SMALL_SHARDS))
    monkeypatch.setattr(module, "_write_shard", None)  # would fail
    convert(native, tmp_path / "dst", Options(shard_bytes=SMALL_SHARDS))
    assert (tmp_path / "dst/config.json").exists()


def test_other_options_are_refused_where_something_was_begun(native, from_native):
    with pytest.raises(CheckpointError, match="another finished conversion"):
        convert(native, from_native, Options(own_scales=True))


def test_full_disk_is_refused_before_anything_is_written(native, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(CheckpointError, match=r"has 1\.0 MB free, the conversion needs .* MB more"):
        convert(native, tmp_path / "dst", Options())
    assert not (tmp_path / "dst").exists()


def test_foreign_folder_is_left_alone(native, tmp_path):
    (tmp_path / "thesis.tex").write_text("ten years of work")
    with pytest.raises(CheckpointError, match="not empty and holds no conversion"):
        convert(native, tmp_path, Options())
    with pytest.raises(CheckpointError, match="DST is SRC"):
        convert(native, native, Options())


def test_damaged_weight_is_refused_by_name(layer_one, tmp_path):
    tensors = small.native_dtypes(layer_one)
    tensors["layers.1.attn.wo_b.weight"][3, 3] = float("nan")
    small.write(tmp_path / "src", tensors, small.config(None))
    with pytest.raises(CheckpointError, match=r"layers\.1\.attn\.wo_b holds NaN or infinity"):
        convert(tmp_path / "src", tmp_path / "dst", Options())


def test_damaged_block_scales_are_refused_by_name(demo, tmp_path):
    """NVFP4 linears are copied, and checked as they are."""
    tensors = {name: tensor.clone() for name, tensor in demo.items()}
    tensors["layers.1.attn.wo_b.weight_scale"].view(torch.uint8)[3, 3] = 0x7F
    small.write(tmp_path / "src", tensors, json.loads((small.DEMO / "config.json").read_text()))
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.attn\.wo_b\.weight_scale: block scale at \[3, 3\] is nan"
    ):
        convert(tmp_path / "src", tmp_path / "dst", Options())


def test_damaged_fp8_that_is_kept_is_refused_by_name(layer_one, tmp_path):
    tensors = small.native(layer_one)
    tensors["layers.1.attn.wo_b.weight"].view(torch.uint8)[3, 3] = 0x7F
    small.write(tmp_path / "src", tensors, small.config(small.NATIVE_QUANTIZATION))
    with pytest.raises(CheckpointError, match=r"layers\.1\.attn\.wo_b holds NaN"):
        convert(tmp_path / "src", tmp_path / "dst", Options(kinds=("experts",)))


@pytest.mark.parametrize("dtype, stored", [(torch.float32, "F32"), (torch.bfloat16, "BF16")])
def test_fp8_whose_scales_are_no_powers_of_two_is_not_kept(dtype, stored, layer_one, tmp_path):
    tensors = small.native(layer_one)
    for name, tensor in tensors.items():
        if name.endswith(".scale") and ".ffn.experts." not in name:
            tensors[name] = (tensor.float() * 0.75).to(dtype)
    small.write(tmp_path / "src", tensors, small.config(small.NATIVE_QUANTIZATION))
    with pytest.raises(
        CheckpointError, match=rf"layers\.1\..* is FP8 with {stored} block scales.*powers of two"
    ):
        convert(tmp_path / "src", tmp_path / "dst", Options(kinds=("experts",)))
    assert not (tmp_path / "dst").exists()
    convert(tmp_path / "src", tmp_path / "dst", Options())


# --- config.json ---


@pytest.mark.parametrize("change, words", checkpoints.BEYOND_REPAIR)
def test_config_the_server_refuses_is_refused_before_any_work(change, words, layer_one, tmp_path):
    contents = json.loads(json.dumps(checkpoints.transformers_names(*checkpoints.demo())[1]))
    change(contents)
    small.write(tmp_path / "src", small.native_dtypes(layer_one), contents)
    with pytest.raises(CheckpointError, match=words):
        convert(tmp_path / "src", tmp_path / "dst", Options())
    assert not (tmp_path / "dst").exists()


def test_config_with_an_unknown_compression_is_refused(layer_one, tmp_path):
    contents = hf_config()
    contents["compress_rates"]["compressed_sparse_attention"] = 8
    small.write(tmp_path / "src", small.native_dtypes(layer_one), contents)
    with pytest.raises(CheckpointError, match=r"compress_ratios must name 0, 1, 4 or 128.*\[0, 8, 128\]"):
        convert(tmp_path / "src", tmp_path / "dst", Options())


def test_what_is_written_is_what_the_server_reads(layer_one, tmp_path):
    small.write(tmp_path / "src", small.native_dtypes(layer_one), hf_config())
    convert(tmp_path / "src", tmp_path / "dst", Options())
    written = json.loads((tmp_path / "dst/config.json").read_text())
    assert native_config(written) == written


# --- files beside the tensors ---


def test_other_files_are_copied_only_where_they_belong(layer_one, tmp_path, capsys):
    source = small.write(tmp_path / "src", small.native_dtypes(layer_one), small.config(None))
    for file in ("model.gguf", "pytorch_model.bin", "consolidated.pth"):
        (source / file).write_bytes(b"0" * 100)
    (source / "encoding/deep").mkdir(parents=True)
    (source / "encoding/deep/encode.py").write_text("pass")
    (source / "LICENSE").write_text("MIT")
    convert(source, tmp_path / "dst", Options())
    written = {str(path.relative_to(tmp_path / "dst")) for path in (tmp_path / "dst").rglob("*")}
    assert {"LICENSE", "encoding/deep/encode.py", "tokenizer.json"} <= written
    assert not {"model.gguf", "pytorch_model.bin", "consolidated.pth"} & written
    assert "not copied, no part of a checkpoint: consolidated.pth, model.gguf" in capsys.readouterr().err


def test_other_files_count_towards_the_disk(layer_one, tmp_path, monkeypatch):
    source = small.write(tmp_path / "src", small.native_dtypes(layer_one), small.config(None))
    with (source / "vocabulary.txt").open("wb") as file:
        file.truncate(10**8)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=150_000_000))
    with pytest.raises(CheckpointError, match=r"the conversion needs 1[67]\d\.\d MB more"):
        convert(source, tmp_path / "dst", Options())


def test_other_files_are_flushed_before_config_json(layer_one, tmp_path, monkeypatch):
    source = small.write(tmp_path / "src", small.native_dtypes(layer_one), small.config(None))
    flushed, fsync = [], os.fsync

    def note(descriptor: int) -> None:
        flushed.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    convert(source, tmp_path / "dst", Options())
    order = [name.removesuffix(".partial") for name in flushed]
    assert order.index("tokenizer.json") < order.index("config.json")


# --- served ---


@pytest.mark.serving
def test_converted_demo_says_the_same(from_bf16, tmp_path):
    with Server(from_bf16, tmp_path / "server.log") as server:
        report = server.smoke_test(
            "--only", "demo_text", "--only", "garbage", "--only", "kernels", "--require-ours"
        )
    assert report["status"] == 0, report["checks"]
