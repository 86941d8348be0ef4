"""Which devices this build has kernels for, and the reason wherever it has none."""

import importlib.util
from dataclasses import dataclass
from enum import StrEnum

from . import compiled, settings


class Layout(StrEnum):
    """Operand layout of prepared weights; one per family of kernels."""

    PLAIN = "plain"  # the checkpoint's own layout, read by reference.py
    SM90 = "sm90"  # panels of 64 rows in the order of the tensor core's fragments (sm90/layout.py)


@dataclass(frozen=True)
class Support:
    """Whether an operation runs here, with what, and if not, why not."""

    layout: Layout | None
    implementation: str
    reason: str | None = None

    def __bool__(self) -> bool:
        return self.layout is not None


# Kernels of this build by compute capability (major * 10 + minor).
_LINEAR_KERNELS: dict[int, Layout] = {90: Layout.SM90}
_EXPERTS_KERNELS: dict[int, Layout] = {90: Layout.SM90}


def _support(operation: str, kernels: dict[int, Layout], device_type: str, capability: int | None) -> Support:
    if settings.implementation() is settings.Implementation.REFERENCE:
        return Support(Layout.PLAIN, f"torch reference on {device_type} (CUTEDSL_NVFP4_IMPL=reference)")
    if device_type == "cpu":
        return Support(Layout.PLAIN, "torch reference on the CPU")
    if device_type == "cuda" and capability in kernels:
        if not compiled.folder() and importlib.util.find_spec("cutlass") is None:
            return Support(
                None,
                "none",
                f"nvidia-cutlass-dsl, which compiles the NVFP4 {operation} kernel for sm_{capability}, is not "
                f"installed, and {compiled.KERNELS} names no kernels compiled ahead of time",
            )
        return Support(kernels[capability], f"CuTe DSL sm_{capability}a")
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


def quantizes_activations(layout: Layout) -> bool:
    """Whether prepared weights of `layout` are multiplied with NVFP4 activations (W4A4) or as they come.

    Raises ValueError where CUTEDSL_NVFP4_ACTIVATIONS asks for W4A4 and the kernel has none.
    """
    if settings.activations() is not settings.Activations.NVFP4:
        return False
    if layout is Layout.SM90:
        raise ValueError(
            "CUTEDSL_NVFP4_ACTIVATIONS=nvfp4: Hopper has no FP4 tensor cores and its kernels run W4A16; unset "
            "it, or emulate W4A4 with CUTEDSL_NVFP4_IMPL=reference (slow)"
        )
    return True
