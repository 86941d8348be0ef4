"""recipes/ is what the planner writes, and `make up` refuses what this machine's GPUs do not hold."""

import re
import subprocess
import sys

import pytest

from cutedsl_nvfp4.checkpoint.planner.plan import UTILIZATION
from devtools.image import fit, recipes
from tests.support import fake_docker
from tests.support.paths import ROOT

H200, H100, B200 = "NVIDIA H200, 143771", "NVIDIA H100 80GB HBM3, 81559", "NVIDIA B200, 183359"
OF_GPU = {"H200": H200, "B200": B200}
FLASH, PRO = recipes.CURRENT["flash"], recipes.CURRENT["pro"]


def settings_of(text: str) -> dict[str, str]:
    return dict(re.findall(r"^(\w+)=(.*)$", text, re.M))


# --- the files ---


def test_recipes_are_what_the_planner_writes():
    """If this fails, run devtools/image/recipes.py."""
    assert {path.stem: path.read_text() for path in (ROOT / "recipes").iterdir()} == recipes.texts()


def test_a_recipe_that_does_not_fit_is_not_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(recipes, "RECIPES", (*recipes.RECIPES, recipes.Recipe("flash", 1, "H200")))
    monkeypatch.setattr(recipes, "FOLDER", tmp_path / "recipes")
    monkeypatch.setattr(sys, "argv", ["recipes.py"])
    assert recipes.main() == 1
    assert (
        "flash-1xh200: a request of 1,048,576 tokens does not fit; take it out of" in capsys.readouterr().err
    )
    assert not (tmp_path / "recipes").exists()


def test_values_read_the_same_for_everyone():
    """make, Python and compose agree on NAME=value of plain words; they differ on quotes, $, and what follows a #."""
    for name, text in recipes.texts().items():
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        assert all(re.fullmatch(r"[A-Z_]+=[\w/.:-]+( [\w/.:=-]+)*", line) for line in lines), name
        assert len({line.partition("=")[0] for line in lines}) == len(lines) > 0, name


def test_defaults_and_examples_are_recipes():
    compose, example = (ROOT / "compose.yaml").read_text(), (ROOT / ".env.example").read_text()
    defaults = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", compose))
    flash, pro = (settings_of(recipes.texts()[name]) for name in ("flash-2xh200", "pro-8xh200"))
    assert flash == {name: defaults[name] for name in flash}
    assert float(defaults["GPU_MEMORY_UTILIZATION"]) == UTILIZATION
    assert set(pro.items()) <= set(re.findall(r"^# +(\w+)=(.*)$", example, re.M))


def test_operations_lists_every_recipe():
    rows = re.findall(r"^\| (`[^|]*) \|", (ROOT / "docs/operations.md").read_text(), re.M)
    assert set(recipes.texts()) <= {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


# --- the check ---


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """The check as make runs it, on a machine with these GPUs, under these settings -> (exit status, what it says)."""

    def run(gpus: list[str] | None, recipe: str = "", **settings: str) -> tuple[int, str]:
        for name, value in fake_docker.install(tmp_path, gpus).items():
            monkeypatch.setenv(name, value)
        for name in fake_docker.SETTINGS:
            monkeypatch.delenv(name, raising=False)
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        if gpus is None:  # a driver of the machine that runs the tests would answer
            monkeypatch.setenv("PATH", str(tmp_path))
        if not (folder := tmp_path / "checkout").exists():
            fake_docker.checkout(folder)
        monkeypatch.chdir(folder)
        files = ["--env-file", f"recipes/{recipe}.env"] if recipe else []
        monkeypatch.setattr(sys, "argv", ["fit.py", "--recipe", recipe, *files])
        status, said = fit.main(), capsys.readouterr()
        assert len((said.out + said.err).splitlines()) == 1, "one line"
        assert bool(status) == bool(said.err)
        return status, said.out + said.err

    return run


@pytest.mark.parametrize("recipe", recipes.RECIPES, ids=lambda recipe: recipe.name)
def test_every_recipe_is_served_on_its_machine(check, recipe):
    status, said = check([OF_GPU[recipe.gpu]] * recipe.count, recipe.name)
    assert status == 0
    streams = re.fullmatch(
        rf"make up: {recipe.model} on {recipe.machine}: (.*) requests of 1,048,576 tokens .*\n", said
    )
    assert f"{streams[1]} requests of 1,048,576 at once" in (ROOT / f"recipes/{recipe.name}.env").read_text()


def test_the_cpus_recipe_needs_no_gpu(check):
    assert check(None, recipes.CPU) == (0, "make up: no GPU is asked for, so none is checked\n")


ANOTHER_MACHINE = [
    ([B200] * 2, "flash-2xh200", "is for 2 x H200, this machine has 2 x B200; for this machine there is RECIPE=fla"),
    ([H200] * 2, "flash-4xh200", "is for 4 x H200, this machine has 2 x H200; for this machine there is RECIPE=fla"),
    ([H200] * 4, "pro-8xh200", "for more of these GPUs there is RECIPE=pro-8xh200, and `make plan MODEL=pro GPUS=…` "),
    (["NVIDIA A10, 23028"] * 2, "flash-2xh200", "this machine has 2 x A10; no recipe is for these GPUs, and `make"),
    ([], "flash-2xh200", "this machine has no GPU; no recipe is for these GPUs"),
    (None, "flash-2xh200", "no nvidia-smi on PATH to say what GPUs this machine has; install NVIDIA's driver, or go"),
]  # fmt: skip
NO_RECIPE = [
    ("flash-1xh200", "RECIPE=flash-1xh200: no such recipe; there are flash-2xh200, "),
    ("flash-1xh200", "lacks 43.65 GiB per GPU (needs 169.47, has 125.82); it fits on 2 of these GPUs"),
    ("flash-8xh200", f"{FLASH} on 8 x H200 fits: set MODEL={FLASH} and TENSOR_PARALLEL_SIZE=8 in .env"),
    ("flash-3xh200", "; num_attention_heads = 64 cannot be cut into 3"),
    ("flash", "pro-8xb200, cpu-demo\n"),
    ("pro-max", "pro-8xb200, cpu-demo\n"),
    ("../secrets", "RECIPE=../secrets: no such recipe"),
]  # fmt: skip
ONE_GPU, EIGHT = {"TENSOR_PARALLEL_SIZE": "1"}, {"TENSOR_PARALLEL_SIZE": "8"}
DOES_NOT_FIT = [
    ([H200], {}, f"{FLASH} is to run on 2 GPUs, this machine has 1 x H200; on 1 of them it does not fit: one request "),
    ([H200], ONE_GPU, f"{FLASH} on 1 x H200 does not fit: one request of 1,048,576 tokens lacks 43.65 GiB per GPU "),
    ([H200], ONE_GPU, "for more of these GPUs there is RECIPE=flash-2xh200 or RECIPE=flash-4xh200"),
    ([H100] * 4, {}, "on 2 x H100 does not fit: one request of 1,048,576 tokens lacks 22.04 GiB per GPU (needs 93.23"),
    ([H100] * 4, {}, "it fits on 4 of these GPUs (their number is TENSOR_PARALLEL_SIZE); no recipe is for these GPUs"),
    ([H200] * 4, EIGHT, "this machine has 4 x H200; on 4 of them it fits: TENSOR_PARALLEL_SIZE=4; "),
    ([H200, "NVIDIA T4, 15360"], {}, "on 1 x H200, 1 x T4 does not fit"),
    ([H200] * 4, {"TENSOR_PARALLEL_SIZE": "0"}, "on 0 GPUs; TENSOR_PARALLEL_SIZE is their number, 1 or more"),
    ([H200] * 4, {"TENSOR_PARALLEL_SIZE": "3"}, "num_attention_heads = 64 cannot be cut into 3"),
    ([H200] * 8, {"MODEL": PRO, **EIGHT}, "lacks 2.52 GiB per GPU (needs 128.34, has 125.82); it fits with --max-num-"),
    ([H200] * 8, {"MODEL": PRO, **EIGHT}, "(flags go into VLLM_ARGS); for this machine there is RECIPE=pro-8xh200; C"),
    ([H200] * 2, {"VLLM_ARGS": "--attention-config.indexer_kv_dtype=mxfp4"}, "indexer_kv_dtype=mxfp4: it has that cac"),
    ([H200] * 2, {"VLLM_ARGS": "--max-model-len 2M"}, "--max-model-len = 2097152; the model's range is 1 to 1048576"),
    (["NVIDIA Thor, [N/A]"], {}, "no memory for 'NVIDIA Thor', and the planner does not know it"),
    (["No devices"], {}, "nvidia-smi answered 'GPU-0, No devices' for uuid, name and memory; go on unchecked with"),
    (None, {}, "install NVIDIA's driver, or go on unchecked with CHECK=0"),
]  # fmt: skip


@pytest.mark.parametrize(
    "gpus, recipe, settings, words",
    [
        *[(gpus, recipe, {}, words) for gpus, recipe, words in ANOTHER_MACHINE],
        *[([H200], recipe, {}, words) for recipe, words in NO_RECIPE],
        *[(gpus, "", settings, words) for gpus, settings, words in DOES_NOT_FIT],
        ([H200] * 8, "pro-8xh200", {"VLLM_ARGS": "--max-num-seqs 64"}, "it fits with --max-num-batched-tokens 2048, "),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(check, gpus, recipe, settings, words):
    status, said = check(gpus, recipe, **settings)
    assert status == 1 and said.startswith("make up: ")
    assert words in said


@pytest.mark.parametrize(
    "gpus, settings, words",
    [
        (["NVIDIA GB10, [N/A]"] * 2, {"VLLM_ARGS": "--max-num-batched-tokens 2048"}, f"{FLASH} on 2 x DGXSPARK: "),
        ([H200, H200, "NVIDIA T4, 15360"], {}, f"{FLASH} on 2 x H200: 4.2 requests of 1,048,576 tokens at once, by "),
        ([H200] * 4, {"VLLM_ARGS": "-dp 2 --enable-expert-parallel"}, f"{FLASH} on 4 x H200: 1"),
        ([H200] * 8, {"MODEL": PRO, **EIGHT, "VLLM_ARGS": "--max-model-len auto"}, "on 8 x H200: 1.0 requests of 5"),
    ],
)  # fmt: skip
def test_what_fits_is_served(check, gpus, settings, words):
    status, said = check(gpus, **settings)
    assert status == 0 and words in said


@pytest.mark.parametrize(
    "gpus, settings, words",
    [
        (
            None,
            {"MODEL": "me/mine"},
            "MODEL=me/mine is none that the planner knows; `make plan MODEL=me/mine GPUS=",
        ),
        (
            [H200] * 2,
            {"VLLM_ARGS": "--pipeline_parallel_size 2"},
            "the planner knows nothing of --pipeline-parallel",
        ),
        ([H200] * 2, {"VLLM_ARGS": "--max-num-seqs few"}, "--max-num-seqs = 'few' is no number"),
        ([H200] * 2, {"GPU_MEMORY_UTILIZATION": "most"}, "--gpu-memory-utilization = 'most' is no number"),
    ],
)
def test_what_nobody_can_judge_is_served_and_said(check, gpus, settings, words):
    status, said = check(gpus, **settings)
    assert status == 0 and said.startswith(f"make up: not checked against this machine's GPUs: {words}")


def test_a_driver_that_fails_is_named(check, monkeypatch, tmp_path):
    smi = "#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\nexit 18\n"
    monkeypatch.setattr(fake_docker, "nvidia_smi", lambda gpus: smi)
    status, said = check([])
    assert (
        status == 1
        and "nvidia-smi failed (Failed to initialize NVML: Driver/library version mismatch)" in said
    )


def test_devices_of_an_override_file_are_the_machine():
    machine = [("GPU-a", "first"), ("GPU-b", "second"), ("GPU-c", "third")]
    gpus = [(uuid, fit.Gpu(name, 100 - index)) for index, (uuid, name) in enumerate(machine)]
    for device, names in (
        ({"count": -1}, ["first", "second", "third"]),
        ({"count": 2}, ["first", "second"]),
        ({"device_ids": ["2", "GPU-b"]}, ["second", "third"]),
    ):
        assert [gpu.name for gpu in fit.visible(gpus, [device])] == names


# --- make ---


@pytest.fixture
def make(tmp_path):
    """make on a machine with these GPUs, in a checkout with this .env."""

    def run(*arguments: str, gpus: list[str], env: str | None = None) -> subprocess.CompletedProcess:
        programs = tmp_path / "programs"
        programs.mkdir(exist_ok=True)
        environment = fake_docker.install(programs, gpus)
        folder = fake_docker.checkout(tmp_path / f"checkout-{len(list(tmp_path.iterdir()))}", env)
        command = ["make", "--no-print-directory", *arguments]
        return subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True)

    return run


def test_make_up_starts_a_recipe_with_env_above_it(make):
    said = make("up", "RECIPE=flash-4xh200", gpus=[H200] * 4).stdout
    assert (
        f"{FLASH} on 4 x H200: " in said and "compose --env-file recipes/flash-4xh200.env up --wait" in said
    )
    said = make("up", "RECIPE=flash-4xh200", gpus=[H200] * 4, env="TENSOR_PARALLEL_SIZE=2\n").stdout
    assert f"{FLASH} on 2 x H200: " in said
    assert "compose --env-file recipes/flash-4xh200.env --env-file .env up --wait" in said
    said = make("up", "TENSOR_PARALLEL_SIZE=4", gpus=[H200] * 4, env="TENSOR_PARALLEL_SIZE=2\n").stdout
    assert f"{FLASH} on 4 x H200: " in said and " compose up --wait" in said


def test_make_up_starts_nothing_that_does_not_fit(make):
    said = make("up", gpus=[H200], env="TENSOR_PARALLEL_SIZE=1\n")
    assert said.returncode and "does not fit" in said.stderr and "compose" not in said.stdout
    said = make("up", "CHECK=0", gpus=[H200], env="TENSOR_PARALLEL_SIZE=1\n")
    assert said.returncode == 0 and " compose up --wait" in said.stdout
    assert "not checked against this machine's GPUs: CHECK=0" in said.stdout
    said = make("up", "CHECK=no", gpus=[H200])
    assert (
        said.returncode and "CHECK=no: 1 (the default) checks" in said.stderr and "compose" not in said.stdout
    )
    said = make("up", "CHECK=0", "RECIPE=none", gpus=[H200])
    assert said.returncode and "RECIPE=none: no such recipe" in said.stderr and "compose" not in said.stdout


@pytest.mark.parametrize(
    "target, command", [("logs", "docker compose logs"), ("down", "docker compose --profile")]
)
def test_logs_and_down_need_no_recipe_and_take_one(target, command):
    """`-n`: this checkout's own demo server is left alone."""
    for arguments in ([], ["RECIPE=cpu-demo"]):
        said = subprocess.run(
            ["make", "-n", target, *arguments], cwd=ROOT, text=True, check=True, capture_output=True
        )
        assert command in said.stdout


def test_make_plan_takes_a_gpu_of_several_words(make):
    said = make("plan", "MODEL=flash", "GPUS=4xRTX PRO 6000", gpus=[])
    assert said.returncode == 0 and "on 4 x RTXPRO6000, GiB per GPU" in said.stdout
