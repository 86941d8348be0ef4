"""The product's own entry points on an emulated device: `run` of sm90/, sm100/ and sm120/ on CPU memory."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from cutedsl_nvfp4 import support
from tests.support.emulator.host import EmulatedKernel

_MODULES = (
    "sm90.linear", "sm90.experts", "sm100.quantize", "sm100.linear", "sm100.experts", "sm120.linear", "sm120.experts",
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
        monkeypatch.setattr(support, "capability_of", lambda device: capability)
        for name in _MODULES:
            if find_spec(f"cutedsl_nvfp4.{name}") is None:
                continue
            module = import_module(f"cutedsl_nvfp4.{name}")
            monkeypatch.setattr(module, "torch", _Torch())
            for function, stand_in in (
                ("compiled", self._compiled),
                ("capability_of", lambda device: capability),
                ("sm_count", lambda device: sms),
            ):
                if hasattr(module, function):
                    monkeypatch.setattr(module, function, stand_in)

    @staticmethod
    def kernel(name: str) -> EmulatedKernel:
        """A kernel that was launched before."""
        return _KERNELS[name]

    def _compiled(self, name: str, build: Callable[[], Callable]) -> Callable:
        if name not in _KERNELS:
            _KERNELS[name] = EmulatedKernel(build)
        kernel = _KERNELS[name]

        def launch(*arguments: object) -> None:
            kernel.lazy, kernel.seed = self.lazy, self.seed
            self.launched.append(name)
            kernel(*arguments)

        return launch
