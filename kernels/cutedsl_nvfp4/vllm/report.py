"""Which kernel serves each NVFP4 layer, and why where it is not ours."""

from collections import Counter

import torch
import vllm
from torch.nn import Module
from vllm.model_executor.kernels.linear.nvfp4.base import NvFp4LinearKernel
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend

from .. import __version__, support
from .backend import current_support
from .draft import named_modules, served_models
from .experts import CuTeDSLNvFp4Experts
from .linear import CuTeDSLNvFp4LinearKernel, DequantizedGroupedLinearKernel


def _row(name: str, kind: str, serving: object, ours: bool, found: support.Support) -> dict:
    kernel = type(serving)
    if ours:
        implementation, reason = serving.support.implementation, None
    elif kernel is DequantizedGroupedLinearKernel:
        implementation = "bf16, dequantized at load"
        reason = (
            found.reason
            or "another --linear-backend was requested, and none multiplies a block-diagonal weight"
        )
    else:
        implementation = kernel.__module__
        reason = found.reason or "another backend was requested, by name or by VLLM_BATCH_INVARIANT"
    return {
        "name": name,
        "kind": kind,
        "format": "nvfp4",
        "kernel": kernel.__name__,
        "ours": ours,
        "implementation": implementation,
        "reason": reason,
    }


def _activations(module: Module, kernel: object) -> str:
    if not getattr(kernel, "quantize_activations", False):
        return "bf16"
    return f"nvfp4:{module.act_scales.policy.value}"


def collect(model: Module, draft: Module | None = None) -> dict:
    """The report of one rank: versions, device, activation formats, and a row per NVFP4 layer of model and draft."""
    rows, activations = [], Counter()
    for name, module in named_modules([model] if draft is None else [model, draft]):
        quant_method = getattr(module, "quant_method", None)
        kernel = getattr(quant_method, "kernel", None)
        if isinstance(kernel, NvFp4LinearKernel):
            ours = isinstance(kernel, CuTeDSLNvFp4LinearKernel)
            rows.append(_row(name, "linear", kernel, ours, current_support(support.linear)))
            if ours:
                activations[_activations(module, kernel)] += 1
        elif isinstance(getattr(quant_method, "nvfp4_backend", None), NvFp4MoeBackend):
            experts = quant_method.moe_kernel.fused_experts
            ours = isinstance(experts, CuTeDSLNvFp4Experts)
            rows.append(_row(name, "experts", experts, ours, current_support(support.experts)))
            if ours:
                activations[_activations(module, experts)] += 1
    device = next(model.parameters()).device
    return {
        "package_version": __version__,
        "vllm_version": vllm.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "activations": "+".join(sorted(activations)) or "none of ours",
        "self_check": getattr(model, "nvfp4_self_check", {"verdict": "not run"}),
        "draft": type(draft).__name__ if draft is not None else None,
        "layers": rows,
        "summary": dict(Counter(row["kernel"] for row in rows)),
    }


def worker_report(worker) -> dict:
    """The report of `worker`'s rank; callable by name through collective_rpc."""
    return collect(*served_models(worker))
