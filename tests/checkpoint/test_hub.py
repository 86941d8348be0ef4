"""The checkpoint tools' command lines on ids of models: the installed huggingface-hub against a hub on 127.0.0.1."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cutedsl_nvfp4.checkpoint.conversion import Options
from cutedsl_nvfp4.checkpoint.convert import convert
from cutedsl_nvfp4.checkpoint.hub import BLOCK_BYTES
from tests.support.checkpoints import small
from tests.support.paths import SCRIPTS
from tests.support.servers.hub import Hub
from tests.support.servers.vllm import free_port

ID = "owner/name"
INDEX = "model.safetensors.index.json"
SHARDS = tuple(f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3))
LIMIT = 600  # seconds; reached only by what hangs
pytestmark = pytest.mark.xdist_group("hub")  # the checkpoint is made and converted once


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The demo in BF16: three files of 8 MB, and beside them what belongs to a checkpoint and what does not."""
    folder = tmp_path_factory.mktemp("hub") / "source"
    small.write(folder, small.native_dtypes(small.demo_values()), small.config(None), shards=3)
    for file in ("encoding/encode.py", "original/part.safetensors", "consolidated.safetensors", "README.md"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(b"x" * 1000)
    return folder


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory) -> dict[str, bytes]:
    """What a conversion of `source` as a folder writes."""
    folder = tmp_path_factory.mktemp("converted") / "dst"
    convert(source, folder, Options())
    return contents(folder)


@pytest.fixture
def hub(source):
    with Hub() as hub:
        hub.add(ID, source)
        yield hub


class Machine:
    """Runs scripts as a user would who has an empty cache and no token; `run` and `start` take more variables."""

    def __init__(self, hub: Hub | str, home: Path):
        self.home = home
        self.url = hub if isinstance(hub, str) else hub.url
        self.cache = home / "hub" / f"models--{ID.replace('/', '--')}"

    def start(self, script: str, *arguments: object, **variables: str) -> subprocess.Popen:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        env = clean | {"HF_ENDPOINT": self.url, "HF_HOME": str(self.home)} | variables
        command = [sys.executable, str(SCRIPTS / f"{script}.py"), *map(str, arguments)]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, script: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess:
        process = self.start(script, *arguments, **variables)
        out, err = process.communicate(timeout=LIMIT)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def refused(self, script: str, *arguments: object, **variables: str) -> str:
        """The one line on stderr in which a run fails, progress bars left out."""
        run = self.run(script, *arguments, **variables)
        assert run.returncode == 1, run.stderr
        assert "Traceback" not in run.stderr
        last = run.stderr.rstrip("\n").rpartition("\n")[2]
        assert last.startswith(f"{script}: "), run.stderr
        return last


@pytest.fixture
def machine(hub, tmp_path) -> Machine:
    return Machine(hub, tmp_path / "home")


def contents(folder: Path) -> dict[str, bytes]:
    """Path -> bytes of a conversion; without the key in its record, which says what the source was."""
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    record = json.loads(found["conversion.json"])
    del record["key"]
    return found | {"conversion.json": json.dumps(record).encode()}


def fill_disk(folder: Path, free: int) -> dict[str, str]:
    """Variables under which a script finds `free` bytes free on every disk."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        f"import shutil\nusage = shutil.disk_usage('/')\n"
        f"shutil.disk_usage = lambda _: usage._replace(free={free})\n"
    )
    return {"PYTHONPATH": str(folder)}


# --- convert ---


def test_conversion_from_the_hub_is_that_of_the_folder(hub, machine, source, converted, tmp_path):
    run = machine.run("convert_checkpoint", ID, tmp_path / "dst", "--jobs", 1)
    assert run.returncode == 0, run.stderr
    assert contents(tmp_path / "dst") == converted
    assert f"downloading {ID} at commit" in run.stderr and "9 of 9 files, 24.6 MB" in run.stderr
    assert "original/part.safetensors" not in hub.sent() and "consolidated.safetensors" not in hub.sent()

    hub.heal()
    again = machine.run("convert_checkpoint", ID, tmp_path / "dst")
    assert again.returncode == 0 and again.stdout == run.stdout
    assert hub.sent() == {}, "whatever is cached is not fetched again, and a finished conversion not repeated"

    closed = f"http://127.0.0.1:{free_port()}"
    alone = machine.run("convert_checkpoint", ID, tmp_path / "dst", HF_ENDPOINT=closed)
    assert alone.returncode == 0 and alone.stdout == run.stdout
    commit = hub.repositories[ID].revisions["main"]
    assert "cannot be reached" in alone.stderr
    assert f"reading the copy that was downloaded last, {machine.cache}/snapshots/{commit}" in alone.stderr

    remedy = run.stderr.rpartition("to free its disk: ")[2].split()
    assert remedy[0] == "hf" and machine.cache.is_dir()
    subprocess.run(
        [Path(sys.executable).parent / "hf", *remedy[1:], "--yes"],
        env={**os.environ, "HF_HOME": str(machine.home)}, check=True, capture_output=True,
    )  # fmt: skip
    assert not machine.cache.exists()


def test_download_that_breaks_off_goes_on(hub, machine, converted, tmp_path):
    hub.cut(SHARDS[1], after=2 * BLOCK_BYTES, times=float("inf"))
    said = machine.refused("convert_checkpoint", ID, tmp_path / "dst")
    assert f"the download of {ID} broke off (RemoteProtocolError" in said
    assert said.endswith("run the same command again: whole files are kept")
    assert not (tmp_path / "dst").exists()

    hub.heal()
    run = machine.run("convert_checkpoint", ID, tmp_path / "dst", "--jobs", 1)
    assert run.returncode == 0, run.stderr
    assert contents(tmp_path / "dst") == converted
    assert hub.sent().keys() == {SHARDS[1]}


def test_connection_that_breaks_once_is_resumed_within_the_file(hub, machine, tmp_path):
    """huggingface-hub writes 10 MiB at a time; what was written stays."""
    one = tmp_path / "one"
    small.write(one, small.native_dtypes(small.demo_values()), small.config(None))
    hub.add(ID, one)
    hub.cut("model.safetensors", after=12 * BLOCK_BYTES)
    run = machine.run("compare_checkpoints", ID, one, "--jobs", 1)
    assert run.returncode == 0, run.stderr
    assert "Trying to resume download" in run.stderr
    ranges = [request.range for request in hub.requests if request.file == "model.safetensors"]
    assert f"bytes={10 * BLOCK_BYTES}-" in ranges
    assert "equal" in run.stdout


def _wait_for(condition) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_stopped_download_goes_on(how, hub, machine, tmp_path):
    """Ctrl-C ends it in the middle of a file, with nothing left behind; what a kill leaves behind is told."""
    hub.hold(SHARDS[1], after=2 * BLOCK_BYTES)
    patient = {
        "HF_HUB_DOWNLOAD_TIMEOUT": str(2 * LIMIT)
    }  # or the client would give the held file up by itself
    process = machine.start("convert_checkpoint", ID, tmp_path / "dst", **patient)
    blobs = machine.cache / "blobs"
    _wait_for(lambda: len(list(blobs.glob("*"))) == 9 and len(list(blobs.glob("*.incomplete"))) == 1)
    process.send_signal(how)
    _, err = process.communicate(timeout=LIMIT)
    left = list(blobs.glob("*.incomplete"))
    if how == signal.SIGINT:
        assert process.returncode == 1 and err.endswith("interrupted; the same command goes on from here\n")
        assert not left
        return
    hub.heal()
    said = machine.refused("convert_checkpoint", ID, tmp_path / "dst", **fill_disk(tmp_path / "full", 10**6))
    assert len(left) == 1 and said.endswith(
        f"that killed ones left behind: rm {blobs}/*.incomplete, or choose a DST on another disk"
    )
    assert hub.sent().keys() == {SHARDS[1]}, "what is whole is not read again"


def test_disk_that_is_too_small_is_refused_before_the_download(hub, machine, tmp_path):
    full = fill_disk(tmp_path / "full", 80_000_000)
    said = machine.refused("convert_checkpoint", ID, tmp_path / "dst", **full)
    assert f"has 80.0 MB free, the download of {ID} into {machine.home}/hub needs 24.6 MB more" in said
    assert "and the conversion needs 75" in said
    assert "set HF_HOME to a folder on another disk, or choose a DST on another disk" in said
    assert not machine.cache.exists() and not (tmp_path / "dst").exists()
    assert all(nbytes <= BLOCK_BYTES + 8 for nbytes in hub.sent().values()), "headers alone were read"

    full = fill_disk(tmp_path / "fuller", 10_000_000)
    said = machine.refused("compare_checkpoints", ID, small.DEMO, **full)
    assert f"has 10.0 MB free, the download of {ID} into {machine.home}/hub needs 24.6 MB more" in said
    assert not machine.cache.exists()


def test_destination_in_use_is_refused_before_the_download(hub, machine, tmp_path):
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst/thesis.tex").write_text("ten years of work")
    assert "is not empty" in machine.refused("convert_checkpoint", ID, tmp_path / "dst")
    assert not machine.cache.exists()


# --- inspect, plan and compare ---


def test_inspection_reads_headers_alone(hub, machine, source, tmp_path):
    reports = []
    for location in (ID, source):
        run = machine.run("inspect_checkpoint", location, "--json", "-")
        assert run.returncode == 0 and run.stderr == ""
        reports.append(json.loads(run.stdout))
    assert [report.pop("source") for report in reports] == [ID, str(source)]
    assert reports[0] == reports[1]
    sent = hub.sent()
    assert sent.keys() == {"config.json", INDEX, *SHARDS}
    assert sum(sent[shard] for shard in SHARDS) < reports[0]["nbytes"] / 7
    assert not machine.cache.exists()


@pytest.mark.parametrize("revision", ["refs/pr/1", "feature/small", "the commit"])
def test_revision_is_read(revision, hub, machine, tmp_path):
    tensors = {"embed.weight": small.demo_values()["embed.weight"]}
    other = small.write(tmp_path / "other", tensors, {"num_hidden_layers": 1})
    commit = hub.repositories[ID].commit(other, revision)
    wanted = commit if revision == "the commit" else revision
    run = machine.run("inspect_checkpoint", ID, "--revision", wanted, "--json", "-")
    assert run.returncode == 0, run.stderr
    assert [row["kind"] for row in json.loads(run.stdout)["rows"]] == ["embeddings"]


def test_plan_reads_headers_alone(hub, machine, source):
    plans = [
        machine.run("plan_memory", location, "1xH200", "--max-model-len", 4096, "--json").stdout
        for location in (ID, source)
    ]
    assert plans[0] == plans[1] and json.loads(plans[0])["fits"]
    assert all(hub.sent()[shard] <= BLOCK_BYTES + 8 for shard in SHARDS)


# --- what goes wrong ---


def test_refusals(hub, machine, source, tmp_path):
    """Each in one line with the thing, the value and the remedy."""
    hub.add("owner/gated", source, gated=True)
    hub.add("owner/private", source, private=True)
    hub.add("owner/lost", source, lost={SHARDS[2]})
    partial = tmp_path / "partial"
    partial.mkdir()
    for file in ("config.json", INDEX, *SHARDS[:2]):
        (partial / file).symlink_to(source / file)
    hub.add("owner/partial", partial)
    for name, options, variables, words in (
        ("owner/none", (), {}, "check the name; for a private one set HF_TOKEN"),
        ("owner/none", (), {"HF_TOKEN": "hf_mine"}, "check the name; for a private one set HF_TOKEN"),
        ("owner/private", (), {}, "check the name; for a private one set HF_TOKEN"),
        ("owner/gated", (), {}, f"no HF_TOKEN is set: accept its terms on {hub.url}/owner/gated"),
        ("owner/gated", (), {"HF_TOKEN": "hf_mine"}, "the account of HF_TOKEN has no access: accept its terms"),
        (ID, ("--revision", "nope"), {}, f"no revision 'nope'; name a branch, tag or commit of {hub.url}/{ID}"),
        ("owner/lost", (), {}, f"lists {SHARDS[2]}, which the hub does not have; owner/lost is incomplete"),
        ("owner/partial", (), {}, f"lists {SHARDS[2]}, which is missing; owner/partial is incomplete on the hub"),
    ):  # fmt: skip
        said = machine.refused("inspect_checkpoint", name, *options, **variables)
        assert words in said and name in said, said
    for name in ("owner/gated", "owner/lost"):
        assert name in machine.refused("convert_checkpoint", name, tmp_path / "dst")
    assert not (tmp_path / "dst").exists() and not list((machine.home / "hub").glob("models--*/blobs/*"))


def test_token_goes_to_no_other_host_and_damage_in_the_cache_is_named(hub, machine, source):
    hub.add(ID, source, gated=True)
    run = machine.run("compare_checkpoints", ID, source, "--only", "shared", HF_TOKEN="hf_let_me_in")
    assert run.returncode == 0, run.stderr
    to_storage = [request for request in hub.requests if request.path.endswith(SHARDS[0]) and request.sent]
    assert len(to_storage) == 2 and not any(request.authorized for request in to_storage)
    assert all(request.authorized for request in hub.requests if "/resolve/" in request.path)

    blob = (machine.cache / "snapshots" / hub.repositories[ID].revisions["main"] / SHARDS[0]).resolve()
    os.truncate(blob, 1000)
    said = machine.refused("inspect_checkpoint", ID)
    assert f"{blob} has 1000 bytes" in said and "delete it, and run the same command again" in said


def test_file_that_is_lost_during_the_download_is_named(hub, machine, source, tmp_path):
    hub.add(ID, source, lost={"tokenizer.json"})
    said = machine.refused("convert_checkpoint", ID, tmp_path / "dst")
    assert f"{ID} lists tokenizer.json, which the hub does not have" in said
    assert not (tmp_path / "dst").exists()


def test_hub_out_of_reach(machine):
    """It is given up at once where nobody listens, after the client's time limit where nobody answers."""
    closed = f"http://127.0.0.1:{free_port()}"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for url, seconds in ((closed, 2 * LIMIT), (f"http://127.0.0.1:{silent.getsockname()[1]}", 1)):
            variables = {"HF_ENDPOINT": url, "HF_HUB_ETAG_TIMEOUT": str(seconds)}
            said = machine.refused("inspect_checkpoint", ID, **variables)
            assert f"the hub ({url}/{ID}) cannot be reached" in said and "check the network" in said
    assert "HF_HUB_OFFLINE forbids to ask the hub: unset it" in machine.refused(
        "inspect_checkpoint", ID, HF_HUB_OFFLINE="1"
    )
