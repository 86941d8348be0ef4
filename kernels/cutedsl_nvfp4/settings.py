"""Environment variables of this package: each is read here, checked here, and listed in docs/operations.md."""

import os
from enum import StrEnum
from pathlib import Path

PREFIX = "CUTEDSL_NVFP4_"
KERNELS = "CUTEDSL_NVFP4_KERNELS"
FORBID_JIT = "CUTEDSL_NVFP4_FORBID_JIT"
THINKING = "CUTEDSL_NVFP4_THINKING"


class Implementation(StrEnum):
    """CUTEDSL_NVFP4_IMPL: which code runs behind the ops."""

    AUTO = "auto"  # the kernel for the device found; plain torch on the CPU
    REFERENCE = "reference"  # plain torch on any device: slow, for finding out whose fault an output is


class Activations(StrEnum):
    """CUTEDSL_NVFP4_ACTIVATIONS: what the weights are multiplied with."""

    AUTO = "auto"  # bf16 where weights are decoded in registers (CPU, Hopper), nvfp4 on Blackwell
    BF16 = "bf16"  # W4A16
    NVFP4 = "nvfp4"  # W4A4; on the CPU emulated exactly


class ActivationScale(StrEnum):
    """CUTEDSL_NVFP4_ACTIVATION_SCALE: where the activations' global scale comes from under W4A4."""

    CHECKPOINT = "checkpoint"  # input_scale; a layer without one uses dynamic
    WARMUP = "warmup"  # measured on a shipped text before the server is ready
    DYNAMIC = "dynamic"  # per token, from the token itself


class SelfCheck(StrEnum):
    """CUTEDSL_NVFP4_SELF_CHECK: whether GPU kernels are compared with the reference before they serve."""

    ON = "on"
    OFF = "off"  # a quicker start, and no word if a kernel is wrong on this device


class Thinking(StrEnum):
    """CUTEDSL_NVFP4_THINKING: how a chat request that says nothing about it is answered."""

    ON = "on"  # thinking, at the model's usual effort
    OFF = "off"
    LOW = "low"
    HIGH = "high"
    MAX = "max"


def _read(variable: str, choices: type[StrEnum], default: StrEnum) -> StrEnum:
    value = os.environ.get(variable, default.value)
    try:
        return choices(value)
    except ValueError:
        allowed = ", ".join(choice.value for choice in choices)
        raise ValueError(f"{variable}={value!r} is not one of: {allowed}") from None


def implementation() -> Implementation:
    return _read("CUTEDSL_NVFP4_IMPL", Implementation, Implementation.AUTO)


def activations() -> Activations:
    return _read("CUTEDSL_NVFP4_ACTIVATIONS", Activations, Activations.AUTO)


def activation_scale() -> ActivationScale:
    return _read("CUTEDSL_NVFP4_ACTIVATION_SCALE", ActivationScale, ActivationScale.CHECKPOINT)


def self_check() -> SelfCheck:
    return _read("CUTEDSL_NVFP4_SELF_CHECK", SelfCheck, SelfCheck.ON)


def thinking() -> Thinking:
    return _read(THINKING, Thinking, Thinking.ON)


def kernels_folder() -> Path | None:
    """CUTEDSL_NVFP4_KERNELS: folder of folders (one for each architecture) of kernels compiled ahead of time."""
    named = os.environ.get(KERNELS)
    if not named:
        return None
    if not Path(named).is_dir():
        raise ValueError(
            f"{KERNELS}={named!r} is no folder; name one that devtools/kernels/compile.py wrote, or unset it"
        )
    return Path(named)


def forbids_jit() -> bool:
    """CUTEDSL_NVFP4_FORBID_JIT: 1 makes a kernel that was not compiled ahead of time an error; 0 compiles it."""
    value = os.environ.get(FORBID_JIT, "0")
    if value not in ("0", "1"):
        raise ValueError(f"{FORBID_JIT}={value!r} is not one of: 0, 1")
    return value == "1"


READERS = {
    "CUTEDSL_NVFP4_IMPL": implementation,
    "CUTEDSL_NVFP4_ACTIVATIONS": activations,
    "CUTEDSL_NVFP4_ACTIVATION_SCALE": activation_scale,
    "CUTEDSL_NVFP4_SELF_CHECK": self_check,
    KERNELS: kernels_folder,
    FORBID_JIT: forbids_jit,
    THINKING: thinking,
}


def check() -> None:
    """Raise ValueError for a variable that has a wrong value, or that this package does not know.

    Every process calls it at its start: a device that never reads a variable refuses it all the same.
    """
    if unknown := sorted(name for name in os.environ if name.startswith(PREFIX) and name not in READERS):
        raise ValueError(
            f"{', '.join(unknown)}: no such setting; the settings are {', '.join(sorted(READERS))} (docs/operations.md)"
        )
    for read in READERS.values():
        read()
