"""What the linear layers, the experts and the plugin share: our backend's name, what it can do here, its inputs."""

from torch.nn import Module
from vllm.config import get_current_vllm_config_or_none
from vllm.platforms import current_platform

from .. import support

BACKEND = "cutedsl"  # --linear-backend and --moe-backend
INPUT, W13_INPUT, W2_INPUT = "x", "w13 input", "w2 input"  # whose activation scales a layer holds


def _device_support(operation) -> support.Support:
    if current_platform.is_cpu():
        return operation("cpu", None)
    if not current_platform.is_cuda():
        return operation(current_platform.device_type, None)
    capability = current_platform.get_device_capability()
    return operation("cuda", capability.to_int() if capability is not None else None)


def current_support(operation) -> support.Support:
    """Support for `operation` (support.linear or support.experts) on vLLM's current platform, as it is configured.

    Kernels that this project never ran on such a device serve only where their backend was asked for by name.
    """
    found = _device_support(operation)
    return opted_in(found, "linear" if operation is support.linear else "moe")


def opted_in(found: support.Support, kind: str) -> support.Support:
    """`found` if it is proven or --`kind`-backend names ours, else no support and why."""
    if found.proven:
        return found
    vllm_config = get_current_vllm_config_or_none()
    if vllm_config is not None:
        config = vllm_config.kernel_config
        asked = {getattr(config, f"{kind}_backend")}
        if kind == "linear":
            asked |= set((config.linear_backend_per_quant or {}).values())
        if BACKEND in asked:
            return found
    return support.Support(
        None,
        "none",
        f"{found.implementation} kernels are compiled and were never run by their authors; --{kind}-backend {BACKEND} "
        f"serves with them if they pass their self-check on this device",
    )


def refuse_second_preparation(layer: Module, name: str) -> None:
    """Raise if `layer` already holds prepared operands: vLLM is reloading its weights."""
    if getattr(layer, "nvfp4_prepared", False):
        raise ValueError(
            f"{name}: reloading weights into prepared NVFP4 operands is not supported; restart the server "
            f"with the new checkpoint"
        )
    layer.nvfp4_prepared = True
