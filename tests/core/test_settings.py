"""Every environment variable is refused by name where its value is wrong, whether or not this device reads it."""

import re

import pytest

from cutedsl_nvfp4 import compiled, settings, support
from tests.support.paths import ROOT


@pytest.mark.parametrize("variable", settings.READERS)
@pytest.mark.parametrize("value", ["true", "AUTO", "no such thing"])
def test_a_wrong_value_is_refused_by_name(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"{variable}='{value}'"):
        settings.READERS[variable]()
    with pytest.raises(ValueError, match=variable):
        settings.check()


def test_the_defaults_pass():
    settings.check()
    assert settings.kernels_folder() is None and not settings.forbids_jit()


@pytest.mark.parametrize("value, forbidden", [("0", False), ("1", True)])
def test_compiling_is_forbidden_by_one(monkeypatch, value, forbidden):
    monkeypatch.setenv(settings.FORBID_JIT, value)
    assert settings.forbids_jit() is forbidden


def test_compiling_is_refused_where_the_value_is_wrong(monkeypatch):
    """ "true" once meant that compiling was allowed."""
    monkeypatch.setenv(settings.FORBID_JIT, "true")
    with pytest.raises(ValueError, match="CUTEDSL_NVFP4_FORBID_JIT='true' is not one of: 0, 1"):
        compiled.compiled("some_kernel", lambda: pytest.fail("compiled"))


def test_a_folder_that_is_not_there_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv(settings.KERNELS, str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="missing' is no folder"):
        support.linear("cuda", 90)


def test_a_variable_that_nobody_reads_is_refused(monkeypatch):
    monkeypatch.setenv("CUTEDSL_NVFP4_SELFCHECK", "off")
    with pytest.raises(
        ValueError, match=r"CUTEDSL_NVFP4_SELFCHECK: no such setting.*CUTEDSL_NVFP4_SELF_CHECK"
    ):
        settings.check()


def test_the_plugin_refuses_a_wrong_value(monkeypatch):
    from cutedsl_nvfp4.vllm import plugin

    monkeypatch.setenv(settings.FORBID_JIT, "yes")
    with pytest.raises(ValueError, match="CUTEDSL_NVFP4_FORBID_JIT='yes' is not one of: 0, 1"):
        plugin.register()


def test_settings_alone_reads_the_environment():
    package = ROOT / "kernels/cutedsl_nvfp4"
    readers = [
        path.name for path in package.rglob("*.py") if re.search(r"environ\b.*CUTEDSL", path.read_text())
    ]
    assert readers == [], "read and check it in settings.py"
    named = set(re.findall(r"`(CUTEDSL_NVFP4_\w+)`", (ROOT / "docs/operations.md").read_text()))
    assert named == set(settings.READERS)
