"""The real compose reads recipes and settings as the check of `make up` supposes. It needs no engine for that."""

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
