"""Which devices this build has kernels for, and the reason wherever it has none."""

import importlib
import importlib.util
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from types import ModuleType

import torch

from . import settings


class Layout(StrEnum):
    """Operand layout of prepared weights; one per family of kernels."""

    PLAIN = "plain"  # the checkpoint's own layout, read by reference.py
    SM90 = "sm90"  # panels of 64 rows in the order of the tensor core's fragments (sm90/layout.py)
    BLOCK_SCALED = "block_scaled"  # the checkpoint's codes, block scales in 128x4 tiles: all of Blackwell


@dataclass(frozen=True)
class Support:
    """Whether an operation runs here, with what, and if not, why not."""

    layout: Layout | None
    implementation: str
    reason: str | None = None
    proven: bool = True  # whether this project has run the kernels on such a device

    def __bool__(self) -> bool:
        return self.layout is not None


# Kernels of this build by compute capability (major * 10 + minor).
NEVER_RUN = (100, 103, 120, 121)  # compiled, and proven by each device's own self-check alone
_LINEAR_KERNELS: dict[int, Layout] = {90: Layout.SM90, **dict.fromkeys(NEVER_RUN, Layout.BLOCK_SCALED)}
_EXPERTS_KERNELS: dict[int, Layout] = dict(_LINEAR_KERNELS)


def _support(operation: str, kernels: dict[int, Layout], device_type: str, capability: int | None) -> Support:
    if settings.implementation() is settings.Implementation.REFERENCE:
        return Support(Layout.PLAIN, f"torch reference on {device_type} (CUTEDSL_NVFP4_IMPL=reference)")
    if device_type == "cpu":
        return Support(Layout.PLAIN, "torch reference on the CPU")
    if device_type == "cuda" and capability in kernels:
        if not settings.kernels_folder() and importlib.util.find_spec("cutlass") is None:
            return Support(
                None,
                "none",
                f"nvidia-cutlass-dsl, which compiles the NVFP4 {operation} kernel for sm_{capability}, is not "
                f"installed, and {settings.KERNELS} names no kernels compiled ahead of time",
            )
        implementation = f"CuTe DSL sm_{capability}a"
        return Support(kernels[capability], implementation, proven=capability not in NEVER_RUN)
    found = f"sm_{capability}" if capability else device_type
    built = ", ".join(f"sm_{number}a" for number in sorted(kernels)) or "none"
    return Support(
        None,
        "none",
        f"this build has no NVFP4 {operation} kernel for {found} (GPU kernels built: {built}); "
        f"CUTEDSL_NVFP4_IMPL=reference runs the slow torch reference instead",
    )


def linear(device_type: str, capability: int | None) -> Support:
    """Support for the linear op on `device_type` ("cpu", "cuda") with `capability` (90 for sm_90)."""
    return _support("linear", _LINEAR_KERNELS, device_type, capability)


def experts(device_type: str, capability: int | None) -> Support:
    """Support for the mixture-of-experts op; see `linear`."""
    return _support("experts", _EXPERTS_KERNELS, device_type, capability)


@cache
def capability_of(device: torch.device) -> int:
    """Compute capability of a CUDA device, 90 for sm_90; raises ValueError for a device of another kind."""
    if device.type != "cuda":
        raise ValueError(f"operands prepared for Blackwell are multiplied on a CUDA device, got {device}")
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def sm_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def kernels_for(operation: str, capability: int) -> ModuleType:
    """The module whose `run` multiplies Layout.BLOCK_SCALED on such devices; `operation` is "linear" or "experts"."""
    family = "sm100" if capability // 10 == 10 else "sm120"
    return importlib.import_module(f".{family}.{operation}", __package__)


def block_scaled_kernels(operation: str, device: torch.device) -> ModuleType:
    """`kernels_for` the device."""
    return kernels_for(operation, capability_of(device))


def quantizes_activations(layout: Layout) -> bool:
    """Whether prepared weights of `layout` are multiplied with NVFP4 activations (W4A4) or as they come.

    Raises ValueError where CUTEDSL_NVFP4_ACTIVATIONS asks for what the layout's kernels do not do.
    """
    if layout is Layout.BLOCK_SCALED:
        if settings.activations() is settings.Activations.BF16:
            raise ValueError(
                "CUTEDSL_NVFP4_ACTIVATIONS=bf16: the Blackwell kernels run W4A4; unset it, name one of vLLM's "
                "W4A16 kernels with --linear-backend and --moe-backend (such as marlin), or use "
                "CUTEDSL_NVFP4_IMPL=reference (slow)"
            )
        return True
    if settings.activations() is not settings.Activations.NVFP4:
        return False
    if layout is Layout.SM90:
        raise ValueError(
            "CUTEDSL_NVFP4_ACTIVATIONS=nvfp4: Hopper has no FP4 tensor cores and its kernels run W4A16; unset "
            "it, or emulate W4A4 with CUTEDSL_NVFP4_IMPL=reference (slow)"
        )
    return True
