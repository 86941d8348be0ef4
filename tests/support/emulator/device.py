"""The product's own entry points on an emulated device: `run` of sm90/, sm100/ and sm120/ on CPU memory."""

from collections.abc import Callable
from importlib import import_module

import pytest
import torch

from cutedsl_nvfp4 import family
from cutedsl_nvfp4.family import Kernel
from tests.support.emulator.host import EmulatedKernel

_MODULES = (
    "operands", "sm90.linear", "sm90.experts", "blackwell.quantize", "blackwell.experts", "sm100.linear",
    "sm120.linear",
)  # fmt: skip
_KERNELS: dict[str, EmulatedKernel] = {}  # compiled once a process


class OnDevice(torch.Tensor):
    """A CPU tensor that says it is on the emulated device."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0)


def on_device(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(OnDevice)


class _Torch:
    """torch, for modules that allocate on the device; what they allocate is poisoned."""

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    @staticmethod
    def empty(*shape: object, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        new = torch.empty(shape, dtype=dtype)
        new.view(torch.uint8).fill_(0xFF) if new.numel() else None
        return on_device(new)


class Device:
    """One emulated GPU; `lazy` names the asynchronous work that is put off ("tma", "mma", "store")."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: int, sms: int) -> None:
        self.lazy: frozenset[str] = frozenset()
        self.seed = 0
        self.launched: list[str] = []
        monkeypatch.setattr(family, "capability_of", lambda device: capability)
        monkeypatch.setattr(Kernel, "load", self._load)
        for name in _MODULES:
            module = import_module(f"cutedsl_nvfp4.{name}")
            monkeypatch.setattr(module, "torch", _Torch())
            if hasattr(module, "sm_count"):
                monkeypatch.setattr(module, "sm_count", lambda device: sms)

    @staticmethod
    def kernel(name: str) -> EmulatedKernel:
        """A kernel that was launched before."""
        return _KERNELS[name]

    @property
    def _load(self) -> Callable[[Kernel], Callable]:
        def load(compiled: Kernel) -> Callable:
            if compiled.name not in _KERNELS:
                _KERNELS[compiled.name] = EmulatedKernel(compiled.build)
            kernel = _KERNELS[compiled.name]

            def launch(*arguments: object) -> None:
                kernel.lazy, kernel.seed = self.lazy, self.seed
                self.launched.append(compiled.name)
                kernel(*arguments)

            return launch

        return load
