#!/usr/bin/env python3
"""Write recipes/: settings of compose.yaml, one file per model and machine, with what the planner predicts for it.

    devtools/image/recipes.py

RECIPES is the table. tests/tools/test_recipes.py compares the files with it byte for byte, so never edit them.
Exit status: 0 written, 1 a recipe does not fit its machine, and nothing is written.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cutedsl_nvfp4.checkpoint.planner.budget import Budget, Request, budget_of
from cutedsl_nvfp4.checkpoint.planner.gpus import GPUS
from cutedsl_nvfp4.checkpoint.planner.model import RELEASES, Parallel
from cutedsl_nvfp4.checkpoint.planner.plan import UTILIZATION
from devtools.setup.pins import PROJECT_ROOT

FOLDER = PROJECT_ROOT / "recipes"
# the current releases; compose.yaml's default is Flash's
CURRENT = {
    "flash": "nvidia/DeepSeek-V4-Flash-0731-NVFP4",
    "pro": "nvidia/DeepSeek-V4-Pro-0813-NVFP4",
}
FEWER_IN_FLIGHT = {"batched_tokens": 2048, "seqs": 64}
MARGIN = 1.05  # the planner's figures are within 5% of what vLLM reports on H200s


@dataclass(frozen=True)
class Recipe:
    """A model of CURRENT on `count` GPUs of one kind, tensor parallel over all of them."""

    preset: str
    count: int
    gpu: str

    @property
    def name(self) -> str:
        return f"{self.preset}-{self.count}x{self.gpu.lower()}"

    @property
    def model(self) -> str:
        return CURRENT[self.preset]

    @property
    def machine(self) -> str:
        return f"{self.count} x {self.gpu}"

    def plan(self) -> Budget:
        """vLLM's defaults where a request of the full length fits well with them, else fewer tokens in flight.

        ValueError if it does not fit then either.
        """
        config, gpu = RELEASES[self.model], GPUS[self.gpu]
        full = config["max_position_embeddings"]
        request = Request(full, gpu.default_batched_tokens, gpu.default_seqs, UTILIZATION)
        for changed in (request, replace(request, **FEWER_IN_FLIGHT)):
            budget = budget_of(config, None, gpu, Parallel(self.count), changed)
            if budget.fits and streams_of(budget) >= MARGIN:
                return budget
        raise ValueError(f"{self.name}: a request of {full:,} tokens does not fit; take it out of RECIPES")


RECIPES = (
    Recipe("flash", 2, "H200"),
    Recipe("flash", 4, "H200"),
    Recipe("flash", 2, "B200"),
    Recipe("pro", 8, "H200"),
    Recipe("pro", 8, "B200"),
)
CPU = "cpu-demo"
_WRITTEN = "# Written by devtools/image/recipes.py. Your own settings go into .env, which wins."


def streams_of(budget: Budget) -> float:
    """How many requests of max_model_len the KV cache holds at once."""
    request = budget.request
    return budget.pool.capacity(budget.kv_bytes, request.max_model_len, request.in_flight)[1]


def _text(recipe: Recipe) -> str:
    budget = recipe.plan()
    request = budget.request
    tokens = budget.pool.capacity(budget.kv_bytes, request.max_model_len, request.in_flight)[2]
    flags = []
    if request.batched_tokens != budget.gpu.default_batched_tokens:
        flags.append(f"--max-num-batched-tokens {request.batched_tokens}")
    if request.seqs != budget.gpu.default_seqs:
        flags.append(f"--max-num-seqs {request.seqs}")
    lines = [
        f"# DeepSeek-V4-{recipe.preset.capitalize()} on {recipe.machine}: make up RECIPE={recipe.name}",
        f"# By the planner (docs/memory.md), the KV cache holds {tokens / 1e6:.1f} million tokens: "
        f"{streams_of(budget):.1f} requests of {request.max_model_len:,} at once.",
        "# Weights are estimated from the model's shape. The draft head in the checkpoint is not loaded.",
    ]
    if recipe.gpu != "H200":
        lines.append(
            f"# On {recipe.gpu} vLLM's own NVFP4 kernels serve: docs/operations.md, Kernels that were never run."
        )
    lines += [
        _WRITTEN,
        f"MODEL={recipe.model}",
        f"TENSOR_PARALLEL_SIZE={recipe.count}",
    ]
    if flags:
        lines.append(f"VLLM_ARGS={' '.join(flags)}")
    return "\n".join(lines) + "\n"


def texts() -> dict[str, str]:
    """Name of every recipe -> the contents of its file."""
    found = {recipe.name: _text(recipe) for recipe in RECIPES}
    found[CPU] = (
        f"# The demo model on the CPU, for a machine without GPU: make up RECIPE={CPU}\n"
        f"{_WRITTEN}\n"
        "COMPOSE_FILE=compose.yaml:compose.cpu.yaml\n"
    )
    return found


def main() -> int:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    try:
        found = texts()
    except ValueError as error:
        print(f"recipes: {error}", file=sys.stderr)
        return 1
    FOLDER.mkdir(exist_ok=True)
    for file in FOLDER.glob("*.env"):
        if file.stem not in found:
            file.unlink()
    for name, text in found.items():
        (FOLDER / f"{name}.env").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
