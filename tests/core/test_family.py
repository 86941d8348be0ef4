"""Every family's modules keep the protocols of family.py, and a layout finds the family of its device."""

import inspect

import pytest
import torch

from cutedsl_nvfp4 import family
from cutedsl_nvfp4.family import Layout

FAMILIES = [pytest.param(found, id=found.name) for found in family.families()]


def parameters(function) -> list[tuple]:
    return [
        (parameter.name, parameter.kind, parameter.default)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name != "self"
    ]


def members(protocol) -> dict[str, object]:
    return {name: value for name, value in vars(protocol).items() if not name.startswith("_")}


@pytest.mark.parametrize("found", FAMILIES)
@pytest.mark.parametrize("protocol", ["Linear", "Experts"])
def test_modules_keep_the_protocols(found, protocol):
    module = getattr(found, protocol.lower())
    promised = members(getattr(family, protocol))
    assert {"run", "chosen", "kernels", "shipped"} <= set(promised)
    for name, function in promised.items():
        assert parameters(getattr(module, name)) == parameters(function), name


def test_every_capability_has_one_family():
    capabilities = [capability for found in family.families() for capability in found.capabilities]
    assert len(capabilities) == len(set(capabilities))
    for found in family.families():
        assert {family.family_of(capability) for capability in found.capabilities} == {found}
        assert {family.family_of_arch(arch) for arch in found.architectures} == {found}
    assert family.family_of(80) is None
    assert family.family_of(None) is None


@pytest.mark.parametrize(
    ("capability", "layout", "name"),
    [(90, Layout.SM90, "sm90"), (100, Layout.BLOCK_SCALED, "sm100"), (121, Layout.BLOCK_SCALED, "sm120")],
)
def test_a_layout_finds_the_family_of_its_device(monkeypatch, capability, layout, name):
    monkeypatch.setattr(family, "capability_of", lambda device: capability)
    assert family.family_for(layout, torch.device("cuda")).name == name


def test_operands_of_another_device_are_refused(monkeypatch):
    monkeypatch.setattr(family, "capability_of", lambda device: 90)
    with pytest.raises(
        ValueError, match=r"layout block_scaled cannot be multiplied on cuda: prepare them there"
    ):
        family.family_for(Layout.BLOCK_SCALED, torch.device("cuda"))


@pytest.mark.parametrize("found", FAMILIES)
def test_what_the_kernels_do_not_do_is_refused(found):
    found.require(found.w4a4, found.batch_invariant)
    with pytest.raises(
        ValueError, match=f"{found.chip} are multiplied in {'W4A4' if found.w4a4 else 'W4A16'} only"
    ):
        found.require(not found.w4a4, batch_invariant=False)
    if not found.batch_invariant:
        with pytest.raises(ValueError, match=f"{found.chip} kernels do not promise batch-invariant"):
            found.require(found.w4a4, batch_invariant=True)
