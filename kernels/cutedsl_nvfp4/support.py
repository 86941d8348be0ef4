"""Which devices this build has kernels for, and the reason wherever it has none."""

import importlib.util
from dataclasses import dataclass

from . import settings
from .family import Family, Layout, families, family_of


@dataclass(frozen=True)
class Support:
    """Whether an operation runs here, with what, and if not, why not."""

    layout: Layout | None
    implementation: str
    reason: str | None = None
    family: Family | None = None  # whose kernels; None: the reference, or nothing

    def __bool__(self) -> bool:
        return self.layout is not None

    @property
    def proven(self) -> bool:
        """Whether this project has run what it names on such a device."""
        return self.family is None or self.family.proven

    @property
    def batch_invariant(self) -> bool:
        """Whether rows can be computed independently of the batch."""
        return self.family is not None and self.family.batch_invariant


def _support(operation: str, device_type: str, capability: int | None) -> Support:
    if settings.implementation() is settings.Implementation.REFERENCE:
        return Support(Layout.PLAIN, f"torch reference on {device_type} (CUTEDSL_NVFP4_IMPL=reference)")
    if device_type == "cpu":
        return Support(Layout.PLAIN, "torch reference on the CPU")
    family = family_of(capability) if device_type == "cuda" else None
    if family is not None:
        if not settings.kernels_folder() and importlib.util.find_spec("cutlass") is None:
            return Support(
                None,
                "none",
                f"nvidia-cutlass-dsl, which compiles the NVFP4 {operation} kernel for sm_{capability}, is not "
                f"installed, and {settings.KERNELS} names no kernels compiled ahead of time",
            )
        return Support(family.layout, f"CuTe DSL sm_{capability}a", family=family)
    found = f"sm_{capability}" if capability else device_type
    built = ", ".join(arch for family in families() for arch in family.architectures) or "none"
    return Support(
        None,
        "none",
        f"this build has no NVFP4 {operation} kernel for {found} (GPU kernels built: {built}); "
        f"CUTEDSL_NVFP4_IMPL=reference runs the slow torch reference instead",
    )


def linear(device_type: str, capability: int | None) -> Support:
    """Support for the linear op on `device_type` ("cpu", "cuda") with `capability` (90 for sm_90)."""
    return _support("linear", device_type, capability)


def experts(device_type: str, capability: int | None) -> Support:
    """Support for the mixture-of-experts op; see `linear`."""
    return _support("experts", device_type, capability)


def quantizes_activations(found: Support) -> bool:
    """Whether what `found` names multiplies NVFP4 activations (W4A4), or activations as they come.

    Raises ValueError where CUTEDSL_NVFP4_ACTIVATIONS asks for what the kernels do not do.
    """
    asked = settings.activations()
    if found.family is None:
        return asked is settings.Activations.NVFP4
    if found.family.w4a4 and asked is settings.Activations.BF16:
        raise ValueError(
            f"CUTEDSL_NVFP4_ACTIVATIONS=bf16: the {found.family.chip} kernels run W4A4; unset it, name one of vLLM's "
            "W4A16 kernels with --linear-backend and --moe-backend (such as marlin), or use "
            "CUTEDSL_NVFP4_IMPL=reference (slow)"
        )
    if not found.family.w4a4 and asked is settings.Activations.NVFP4:
        raise ValueError(
            f"CUTEDSL_NVFP4_ACTIVATIONS=nvfp4: {found.family.chip} has no FP4 tensor cores and its kernels run W4A16; "
            "unset it, or emulate W4A4 with CUTEDSL_NVFP4_IMPL=reference (slow)"
        )
    return found.family.w4a4
