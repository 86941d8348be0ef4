"""Programs in place of docker and nvidia-smi, for tests of what make does with them.

docker answers `compose … config` for the service `vllm` with settings of the forms ${NAME}, ${NAME:-default} and
${NAME:+words}, from `--env-file`s of plain NAME=value lines; tests/image/test_compose.py asks the real compose.
Of any other command it prints the environment that make hands on, and the arguments.
"""

import os
import sys
from pathlib import Path

from tests.support.paths import ROOT

DOCKER = f"""#!{sys.executable} -I
import json, os, re, shlex, sys
import yaml

words = sys.argv[1:]
if "config" not in words:
    names = {{"PORT": "PORT", "IMAGE": "IMAGE", "VLLM_IMAGE": "VLLM_IMAGE", "REVISION": "GIT_REVISION"}}
    print(*[f"{{name}}={{os.environ.get(variable, '')}}" for name, variable in names.items()], *words)
    sys.exit()
given = [file for flag, file in zip(words, words[1:]) if flag == "--env-file"]
settings = {{}}
for file in given or [file for file in [".env"] if os.path.exists(file)]:
    settings |= dict(re.findall(r"^(\\w+)=(.*)$", open(file).read(), re.M))
settings |= os.environ

def value(found):
    name, operator, words = found.groups()
    if operator == "+":
        return words if settings.get(name) else ""
    return settings.get(name) or words or ""

yaml.SafeLoader.add_constructor("!reset", lambda loader, node: None)
service = {{}}
for file in settings.get("COMPOSE_FILE", "compose.yaml").split(":"):
    service |= yaml.safe_load(open(file))["services"]["vllm"]
command, found = service["command"], 1
while found:  # the innermost first
    command, found = re.subn(r"\\$\\{{(\\w+)(?::([-+])([^${{}}]*))?\\}}", value, command)
service["command"] = shlex.split(command)
print(json.dumps({{"services": {{"vllm": {{name: part for name, part in service.items() if part is not None}}}}}}))
"""
SETTINGS = (
    "MODEL",
    "TENSOR_PARALLEL_SIZE",
    "GPU_MEMORY_UTILIZATION",
    "MAX_MODEL_LEN",
    "VLLM_ARGS",
    "RECIPE",
    "CHECK",
    "COMPOSE_FILE",
)
IMAGE_SETTINGS = ("PORT", "IMAGE", "VLLM_IMAGE")


def nvidia_smi(gpus: list[str]) -> str:
    """A program that answers for these GPUs, "name, MiB" each."""
    lines = "".join(f"GPU-{index}, {gpu}\n" for index, gpu in enumerate(gpus))
    return f"#!/bin/sh\ncat <<'END'\n{lines}END\n"


def install(folder: Path, gpus: list[str] | None = None) -> dict[str, str]:
    """Both programs in `folder` -> an environment whose PATH begins there and that says nothing of compose's settings.

    `gpus` are nvidia_smi's; without them there is no nvidia-smi at all.
    """
    programs = {"docker": DOCKER}
    if gpus is not None:
        programs["nvidia-smi"] = nvidia_smi(gpus)
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {
        name: value for name, value in os.environ.items() if name not in (*SETTINGS, *IMAGE_SETTINGS)
    }
    return {**environment, "PATH": f"{folder}:{environment['PATH']}"}


def checkout(folder: Path, settings: str | None = None) -> Path:
    """This checkout seen from the new `folder`, with this .env of its own, or none."""
    folder.mkdir()
    for entry in ROOT.iterdir():
        if entry.name != ".env":
            (folder / entry.name).symlink_to(entry)
    if settings is not None:
        (folder / ".env").write_text(settings)
    return folder
