"""The real compose reads recipes and settings as the check of `make up` supposes. It needs no engine for that."""

import re

import pytest

from devtools.image import fit, recipes
from tests.support.paths import ROOT

pytestmark = pytest.mark.image


def options(monkeypatch, *files: str) -> dict[str, str]:
    monkeypatch.chdir(ROOT)
    command = fit.service_of(list(files))["command"]
    return {"model": command[0], **fit.options_of(command[1:])}


@pytest.mark.parametrize("recipe", recipes.RECIPES, ids=lambda recipe: recipe.name)
def test_recipes_are_served_as_written(monkeypatch, recipe):
    found = options(monkeypatch, f"recipes/{recipe.name}.env")
    budget = recipe.plan()
    served = fit.served_by(fit.service_of([f"recipes/{recipe.name}.env"])["command"])
    assert (found["model"], found["--tensor-parallel-size"]) == (recipe.model, str(recipe.count))
    assert served.request(budget.gpu) == (budget.request, False)


def test_the_cpus_recipe_reserves_no_gpu(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert fit.check(recipes.CPU, [f"recipes/{recipes.CPU}.env"]) == "no GPU is asked for, so none is checked"


def test_later_files_win_and_the_shell_over_all(monkeypatch, tmp_path):
    settings = tmp_path / ".env"
    settings.write_text("TENSOR_PARALLEL_SIZE=\"2\" # quoted, with a comment\nVLLM_ARGS='--max-num-seqs 8'\n")
    files = ("recipes/pro-8xh200.env", str(settings))
    found = options(monkeypatch, *files)
    assert (found["model"], found["--tensor-parallel-size"]) == (recipes.CURRENT["pro"], "2")
    assert found["--max-num-seqs"] == "8" and "--max-num-batched-tokens" not in found
    monkeypatch.setenv("TENSOR_PARALLEL_SIZE", "4")
    assert options(monkeypatch, *files)["--tensor-parallel-size"] == "4"


def test_every_example_of_settings_survives_compose(monkeypatch, tmp_path):
    """Quotes, spaces, $ and # reach the server as .env.example writes them."""
    monkeypatch.chdir(ROOT)
    settings = tmp_path / "settings.env"
    settings.write_text("".join(re.findall(r"^#   (\w+=.*\n)", (ROOT / ".env.example").read_text(), re.M)))
    vllm = fit.service_of([str(settings)])
    flags = " ".join(vllm["command"][vllm["command"].index("--max-model-len") :])
    assert flags == (
        "--max-model-len 131072 --served-model-name deepseek-v4 gpt-4o --enable-auto-tool-choice "
        '--tool-call-parser none --reasoning-parser none --default-chat-template-kwargs {"thinking": false}'
    )
    assert vllm["command"][-1] == '{"thinking": false}'
    assert vllm["environment"]["CUTEDSL_NVFP4_THINKING"] == "off"
    assert vllm["environment"]["VLLM_API_KEY"] == "pa$$word#1"  # how compose prints one dollar sign
