"""Entry points: register the kernels in every vLLM process, and the report endpoint in the API server."""

import logging

import vllm
from vllm.platforms import current_platform
from vllm.platforms.interface import PlatformEnum

from .. import settings

VLLM_VERSION = "0.32.0"


def check_vllm() -> None:
    """Raise RuntimeError unless this is the vLLM the patches are for, with the patches applied."""
    base = vllm.__version__.split("+")[0]
    if base != VLLM_VERSION:
        raise RuntimeError(
            f"cutedsl-nvfp4 is built for vLLM {VLLM_VERSION}, found {vllm.__version__}; install that version, "
            f"or uninstall cutedsl-nvfp4 from this environment"
        )
    from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend

    if "CUTEDSL" not in NvFp4MoeBackend.__members__:
        raise RuntimeError(
            f"vLLM {vllm.__version__} at {vllm.__path__[0]} is not patched; run devtools/patches/apply.py for "
            f"this Python, or uninstall cutedsl-nvfp4 from this environment"
        )


def _log_with_vllm() -> None:
    """Send this package's log where vLLM's goes; vLLM configures only its own logger."""
    logging.getLogger("cutedsl_nvfp4").parent = logging.getLogger("vllm")


def register() -> None:
    """vllm.general_plugins: put our kernels first. Runs in every process, any number of times."""
    _log_with_vllm()
    settings.check()
    check_vllm()
    from vllm.model_executor.kernels.linear import _POSSIBLE_NVFP4_KERNELS, register_linear_kernel
    from vllm.v1.worker.worker_base import WorkerBase

    from . import calibration
    from .backend import BACKEND
    from .cpu import operators as cpu_kernels
    from .endpoint import REPORT_METHOD
    from .linear import CuTeDSLNvFp4LinearKernel
    from .report import worker_report

    for platform in (PlatformEnum.CUDA, PlatformEnum.CPU):
        if CuTeDSLNvFp4LinearKernel not in _POSSIBLE_NVFP4_KERNELS.get(platform, []):
            register_linear_kernel(CuTeDSLNvFp4LinearKernel, platform, "nvfp4", first=True, backend=BACKEND)
    for method, function in (
        (REPORT_METHOD, worker_report),
        (calibration.START_METHOD, calibration.start_calibration),
        (calibration.STOP_METHOD, calibration.stop_calibration),
    ):
        setattr(WorkerBase, method, function)
    if current_platform.is_cpu():
        current_platform.import_kernels()
        cpu_kernels.define_missing()


def endpoint():
    """vllm.endpoint_plugins: the factory of GET /kernels."""
    from .endpoint import KernelReportEndpoint

    return KernelReportEndpoint()
