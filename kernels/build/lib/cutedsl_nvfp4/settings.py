"""Environment variables of this package: each is read here, checked here, and listed in docs/operations.md."""

import os
from enum import StrEnum


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
