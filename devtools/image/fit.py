#!/usr/bin/env python3
"""Whether this machine's GPUs hold what `make up` is about to serve; asked before anything is pulled or started.

    devtools/image/fit.py [--recipe flash-2xh200] [--env-file FILE]... [--check 0]

What is served is what `docker compose config` says with these files: compose reads the settings, nobody else. GPUs are
those that nvidia-smi lists. A model that the planner does not know is not checked, which one line says.
Exit status: 0 go on, 1 do not (one line says why, and what to do).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cutedsl_nvfp4.checkpoint.headers import CheckpointError
from cutedsl_nvfp4.checkpoint.planner.budget import (
    Budget,
    Request,
    budget_of,
    check_request,
    largest_that_auto_takes,
    longest_context,
)
from cutedsl_nvfp4.checkpoint.planner.gpus import Gpu, gpu_of_driver, parse_gpus
from cutedsl_nvfp4.checkpoint.planner.model import RELEASES, Parallel, check_parallel
from cutedsl_nvfp4.checkpoint.planner.plan import UTILIZATION, advice, refusal
from devtools.image.recipes import CPU, CURRENT, RECIPES, Recipe, streams_of

FP4_INDEXER = "--attention-config.indexer_kv_dtype"
SHORT = {"-tp": "--tensor-parallel-size", "-dp": "--data-parallel-size", "-ep": "--enable-expert-parallel"}
# flags that change what lies on a GPU in ways that the planner does not know
UNPLANNED = re.compile(
    r"-pp|-sc|-pcp|-dcp|--(pipeline|prefill-context|decode-context)-parallel-size|--data-parallel-(?!size$).*|--nnodes"
    r"|--config|--speculative-config|--kv-cache-memory-bytes|--num-gpu-blocks-override|--cpu-offload-gb|--quantization"
    r"|--hf-overrides|--(kv-transfer|attention|parallel|cache)-config(\..*)?"
)


class Unfit(Exception):
    """The machine does not hold it, or nobody can tell; the words are one line for the operator."""


class Unknown(Exception):
    """The planner knows the model or the flags too little; the words say what."""


# --- what is served ---


def service_of(env_files: list[str]) -> dict:
    """compose's service `vllm` as `docker compose up` with these --env-file would start it."""
    command = ["docker", "compose", *(word for file in env_files for word in ("--env-file", file))]
    command += ["config", "--format", "json"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise Unfit("docker is not installed; install Docker Engine with the compose plugin") from None
    if answer.returncode:
        raise Unfit(f"{' '.join(command)} failed: {answer.stderr.strip()}")
    return json.loads(answer.stdout)["services"]["vllm"]


def options_of(words: list[str]) -> dict[str, str]:
    """`--name value`, `--name=value` and `--name` -> name: value, the last of a name winning as it does in vLLM."""
    found, name = {}, None
    for word in words:
        if word.startswith("-") and not re.fullmatch(r"-\d+", word):
            name, given, value = word.partition("=")
            name = SHORT.get(name, name if name.startswith(FP4_INDEXER) else name.replace("_", "-"))
            found[name] = value
            name = None if given else name
        elif name is not None:
            found[name], name = word, None
    return found


def _integer(options: dict[str, str], name: str, default: int) -> int:
    """vLLM's integers: 1000, 128k (128,000) and 128K (131,072)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]?)", options.get(name, str(default)), re.IGNORECASE)
    if not found:
        raise Unknown(f"{name} = {options[name]!r} is no number")
    digits, unit = found.groups()
    base = 1024 if unit.isupper() else 1000
    return int(float(digits) * base ** " kmgt".index(unit.lower() or " "))


def _share(options: dict[str, str], name: str, default: float) -> float:
    try:
        return float(options.get(name, default))
    except ValueError:
        raise Unknown(f"{name} = {options[name]!r} is no number") from None


@dataclass(frozen=True)
class Served:
    """A release, and the flags with which it is served."""

    model: str
    parallel: Parallel
    options: dict[str, str]

    def request(self, gpu: Gpu) -> tuple[Request, bool]:
        """(what the planner is asked on this GPU, whether the length is vLLM's to choose)."""
        full = RELEASES[self.model]["max_position_embeddings"]
        automatic = self.options.get("--max-model-len") in ("auto", "-1")
        request = Request(
            full if automatic else _integer(self.options, "--max-model-len", full),
            _integer(self.options, "--max-num-batched-tokens", gpu.default_batched_tokens),
            _integer(self.options, "--max-num-seqs", gpu.default_seqs),
            _share(self.options, "--gpu-memory-utilization", UTILIZATION),
            self.options.get(FP4_INDEXER) == "mxfp4",
        )
        return request, automatic


def served_by(command: list[str]) -> Served:
    """The command of compose's service -> what it serves. Unknown where the planner cannot tell its memory."""
    model, options = "".join(command[:1]), options_of(command[1:])
    if model not in RELEASES:
        raise Unknown(
            f"MODEL={model} is none that the planner knows; `make plan MODEL={model} GPUS=…` may read it"
        )
    unplanned = [name for name in options if UNPLANNED.fullmatch(name) and name != FP4_INDEXER]
    if unplanned:
        raise Unknown(f"the planner knows nothing of {', '.join(unplanned)}")
    parallel = Parallel(
        _integer(options, "--tensor-parallel-size", 1),
        _integer(options, "--data-parallel-size", 1),
        "--enable-expert-parallel" in options,
    )
    if parallel.gpus < 1:
        raise Unfit(
            f"{model} is to run on {parallel.gpus} GPUs; TENSOR_PARALLEL_SIZE is their number, 1 or more"
        )
    return Served(model, parallel, options)


# --- the machine ---


def gpus_of_machine() -> list[tuple[str, Gpu]]:
    """(uuid, GPU) of every GPU, in nvidia-smi's order."""
    command = ["nvidia-smi", "--query-gpu=uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise Unfit(
            "no nvidia-smi on PATH to say what GPUs this machine has; install NVIDIA's driver, or go on unchecked "
            "with CHECK=0"
        ) from None
    if answer.returncode:
        said = " ".join((answer.stdout + answer.stderr).split())
        raise Unfit(f"nvidia-smi failed ({said}); repair NVIDIA's driver, or go on unchecked with CHECK=0")
    found = []
    for line in filter(None, answer.stdout.splitlines()):
        parts = [part.strip() for part in line.split(",")]
        if len(parts) != 3:
            raise Unfit(
                f"nvidia-smi answered {line!r} for uuid, name and memory; go on unchecked with CHECK=0"
            )
        uuid, name, mib = parts
        found.append((uuid, gpu_of_driver(name, int(mib) if mib.isdigit() else None)))
    return found


def visible(gpus: list[tuple[str, Gpu]], devices: list[dict]) -> list[Gpu]:
    """Those that compose's device reservations hand on: all, the first `count`, or those of `device_ids`."""
    device = devices[0] if devices else {}
    ids, count = device.get("device_ids"), device.get("count", -1)
    if ids:
        chosen = [gpu for index, (uuid, gpu) in enumerate(gpus) if str(index) in ids or uuid in ids]
    else:
        chosen = [gpu for _, gpu in (gpus if count in (-1, "all") else gpus[: int(count)])]
    # CUDA counts the fastest first, and ranks take the first ones
    return sorted(chosen, key=lambda gpu: -gpu.memory_gib)


def described(gpus: list[Gpu]) -> str:
    """`2 x H200`, or `no GPU`."""
    return ", ".join(f"{n} x {name}" for name, n in Counter(gpu.name for gpu in gpus).items()) or "no GPU"


def recipes_for(gpus: list[Gpu]) -> list[Recipe]:
    counts = Counter(gpu.name for gpu in gpus)
    return [recipe for recipe in RECIPES if counts[recipe.gpu] >= recipe.count]


def remedy(gpus: list[Gpu], model: str) -> str:
    """Which recipes with `model`'s shapes are for these GPUs, or for more of them."""
    recipes = [recipe for recipe in RECIPES if RELEASES[recipe.model] == RELEASES[model]]
    here = [recipe for recipe in recipes if recipe in recipes_for(gpus)]
    more = [recipe for recipe in recipes if recipe.gpu in {gpu.name for gpu in gpus}]
    for found, where in ((here, "this machine"), (more, "more of these GPUs")):
        if found:
            return f"for {where} there is {' or '.join(f'RECIPE={recipe.name}' for recipe in found)}"
    return "no recipe is for these GPUs"


# --- the verdict ---


def plan(served: Served, gpu: Gpu, parallel: Parallel) -> tuple[Budget, str | None]:
    """(the budget, why it does not fit or None)."""
    config = RELEASES[served.model]
    check_parallel(config, parallel)
    request, automatic = served.request(gpu)
    check_request(request, config, gpu)
    budget = budget_of(config, None, gpu, parallel, request)
    if automatic and (length := largest_that_auto_takes(budget)):
        budget = replace(budget, request=replace(request, max_model_len=length))
    if budget.fits:
        return budget, None
    longest = longest_context(config, None, gpu, parallel, request)
    return budget, refusal(budget, longest, advice(config, None, gpu, parallel, request))


def check_recipe(name: str) -> Recipe | None:
    """The recipe of this name, None for the CPU's; Unfit for no recipe, with the planner's word on what it asks for."""
    if name == CPU:
        return None
    for recipe in RECIPES:
        if recipe.name == name:
            return recipe
    message = (
        f"RECIPE={name}: no such recipe; there are {', '.join([recipe.name for recipe in RECIPES] + [CPU])}"
    )
    preset, _, machine = name.partition("-")
    try:
        count, gpu = parse_gpus(machine)
        served = Served(CURRENT[preset], Parallel(count), {})
        _, reason = plan(served, gpu, served.parallel)
    except KeyError:
        raise Unfit(message) from None
    except CheckpointError as error:
        raise Unfit(f"{message}; {error}" if re.match(r"\d+x", machine) else message) from None
    fits = f"fits: set MODEL={served.model} and TENSOR_PARALLEL_SIZE={count} in .env"
    raise Unfit(f"{message}; {served.model} on {count} x {gpu.name} {reason or fits}")


def check_machine(recipe: Recipe, gpus: list[Gpu]) -> None:
    """Unfit where a recipe is another machine's."""
    if recipe not in recipes_for(gpus):
        raise Unfit(
            f"RECIPE={recipe.name} is for {recipe.machine}, this machine has {described(gpus)}; "
            f"{remedy(gpus, recipe.model)}, and `make plan MODEL={recipe.preset} GPUS=…` says what fits"
        )


def check_served(served: Served, gpus: list[Gpu]) -> str:
    """What is served on which GPUs, one line. Unfit where they are too few or too small."""
    parallel, there = served.parallel, described(gpus)
    if len(gpus) < parallel.gpus:
        few = f"{served.model} is to run on {parallel.gpus} GPUs, this machine has {there}"
        count = next((n for n in (8, 4, 2, 1) if n <= len(gpus)), 0)
        if not count:
            raise Unfit(f"{few}; {remedy(gpus, served.model)}")
        _, reason = plan(served, gpus[count - 1], Parallel(count))
        raise Unfit(
            f"{few}; on {count} of them it {reason or f'fits: TENSOR_PARALLEL_SIZE={count}'}; "
            f"{remedy(gpus, served.model)}"
        )
    there = described(gpus[: parallel.gpus])
    budget, reason = plan(served, gpus[parallel.gpus - 1], parallel)
    if reason:
        where = "flags go into VLLM_ARGS" if "--" in reason else "their number is TENSOR_PARALLEL_SIZE"
        raise Unfit(
            f"{served.model} on {there} {reason} ({where}); {remedy(gpus, served.model)}; CHECK=0 tries it all the same"
        )
    streams = streams_of(budget) * parallel.dp
    return (
        f"{served.model} on {there}: {streams:.1f} requests of {budget.request.max_model_len:,} tokens at once, "
        f"by the planner"
    )


def check(recipe_name: str, env_files: list[str]) -> str:
    """What is served on which GPUs, one line. Unfit where it cannot be; Unknown where the planner cannot tell."""
    recipe = check_recipe(recipe_name) if recipe_name else None
    service = service_of(env_files)
    devices = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
    if not (devices or service.get("gpus") or service.get("runtime")):
        return "no GPU is asked for, so none is checked"
    gpus = None
    if recipe is not None:
        gpus = visible(gpus_of_machine(), devices)
        check_machine(recipe, gpus)
    served = served_by(service.get("command") or [])  # before nvidia-smi is asked: what is unknown needs none
    return check_served(served, visible(gpus_of_machine(), devices) if gpus is None else gpus)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="", help="a name of recipes/, without .env")
    parser.add_argument("--env-file", action="append", default=[], help="what compose is told to read")
    parser.add_argument("--check", default="1", help="0: look at the recipe's name alone")
    args = parser.parse_args()
    try:
        if args.check not in ("0", "1"):
            raise Unfit(f"CHECK={args.check}: 1 (the default) checks this machine's GPUs, 0 does not")
        if args.check == "0":
            if args.recipe:
                check_recipe(args.recipe)
            print("make up: not checked against this machine's GPUs: CHECK=0")
        else:
            print(f"make up: {check(args.recipe, args.env_file)}")
    except Unknown as unknown:
        print(f"make up: not checked against this machine's GPUs: {unknown}")
    except (Unfit, CheckpointError) as error:
        print(f"make up: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
