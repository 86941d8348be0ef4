"""What the DeepSeek-V4 patches call: quantized compressor and indexer, grouped NVFP4 wo_a.

Imports vLLM inside functions only: the patched model modules import this one.
"""

import torch
from torch.nn import Module


def nvfp4_config_or_none(quant_config):
    """`quant_config` if it can describe NVFP4 attention layers, else None (what vLLM hard-codes).

    DeepSeek's native FP8 checkpoints keep compressor and indexer weights in bf16 without listing them as
    ignored, so only ModelOpt's NVFP4 configuration, which does list them, may reach those layers.
    """
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

    return quant_config if isinstance(quant_config, ModelOptNvFp4Config) else None


def is_nvfp4(layer: Module) -> bool:
    """Whether `layer` is served from NVFP4 operands by our kernel (a dequantized wo_a is not)."""
    from .linear import CuTeDSLNvFp4LinearKernel

    return isinstance(getattr(layer.quant_method, "kernel", None), CuTeDSLNvFp4LinearKernel)


def request_float32_output(layer: Module) -> None:
    """Have `layer` return float32 where its kernel can: compressor scores are summed in float32."""
    layer.nvfp4_out_dtype = torch.float32


def linear_float32(layer: Module, x: torch.Tensor) -> torch.Tensor:
    """`layer`(x) in float32, x [M, K] -> [M, N], whatever the layer's weight is stored as."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    if isinstance(layer.quant_method, UnquantizedLinearMethod):
        return torch.mm(x, layer.weight.T, out_dtype=torch.float32)
    out = layer(x)
    return (out[0] if isinstance(out, tuple) else out).float()


def require_grouped_nvfp4(wo_a: Module) -> None:
    """Make sure an NVFP4 wo_a, a block-diagonal weight, gets a kernel that can multiply one.

    Called when the layer is built. Where another NVFP4 kernel was selected, swaps in the one that
    dequantizes at load, and says so.
    """
    from vllm.logger import init_logger
    from vllm.model_executor.kernels.linear.nvfp4.base import NvFp4LinearKernel

    from .linear import CuTeDSLNvFp4LinearKernel, DequantizedGroupedLinearKernel

    kernel = getattr(wo_a.quant_method, "kernel", None)
    if not isinstance(kernel, NvFp4LinearKernel) or isinstance(kernel, CuTeDSLNvFp4LinearKernel):
        return
    init_logger(__name__).warning_once(
        "%s cannot multiply the block-diagonal wo_a; it is dequantized to bf16 at load instead",
        type(kernel).__name__,
    )
    wo_a.quant_method.kernel = DequantizedGroupedLinearKernel(kernel.config)
