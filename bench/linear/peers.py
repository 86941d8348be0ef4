"""The linear's peers: how each prepares NVFP4 weights and is called.

A peer gives `prepare(codes, block_scales, global_scale) -> weights`, tensors in tuples, lists and dicts that
`clone` copies, and `call(x, weights) -> out [M, N]`. One that `compiles` does so at its first call, for bench/warm.py.
One whose package is missing raises ImportError in its constructor; the bench names it in its output.
"""

import json
from functools import cache
from typing import ClassVar

import torch

from bench import peers
from cutedsl_nvfp4.reference import dequantize


def clone(prepared):
    """What a peer prepared once more: its tensors copied, with their strides, and all else shared."""
    if isinstance(prepared, torch.Tensor):
        copied = prepared.detach().clone()
        if copied.stride() != prepared.stride():
            raise ValueError(f"a copy would have strides {copied.stride()} instead of {prepared.stride()}")
        return copied
    if isinstance(prepared, dict):
        return {name: clone(value) for name, value in prepared.items()}
    if type(prepared) in (tuple, list):
        return type(prepared)(clone(value) for value in prepared)
    return prepared


class CublasBf16:
    """What an unquantized checkpoint runs: torch.mm on bf16 weights."""

    name = "cublas_bf16"
    compiles = False
    bytes_per_weight = 2.0

    def prepare(self, codes: torch.Tensor, block_scales: torch.Tensor, global_scale: float):
        return dequantize(codes, block_scales, global_scale, torch.bfloat16)

    def call(self, x: torch.Tensor, weight) -> torch.Tensor:
        return torch.mm(x, weight.t())


class Quack:
    """quack-kernels' gemm_w4a16 with its own tile choice."""

    name = "quack"
    compiles = True
    bytes_per_weight = 9 / 16

    def __init__(self):
        from quack.gemm_w4 import gemm_w4a16, prepare_w4_weight

        self._gemm, self._prepare = gemm_w4a16, prepare_w4_weight

    def prepare(self, codes: torch.Tensor, block_scales: torch.Tensor, global_scale: float):
        return *self._prepare(codes, block_scales, "nvfp4")[:2], global_scale

    def call(self, x: torch.Tensor, weights) -> torch.Tensor:
        blob, scales, global_scale = weights
        return self._gemm(x, blob, scales, tensor_scale=global_scale, wformat="nvfp4")


class Humming(peers.Humming):
    """Called as vLLM's HummingNvFp4LinearKernel calls it.

    Left to itself Humming compiles its tiles for every M, 33 kernels a shape, at a shape's first call. It is given
    its own choice for the M at hand instead: the same kernel, 7 a shape for all of `shapes.TOKENS`.
    """

    bytes_per_weight = 9 / 16
    _COMPUTE: ClassVar = {"use_batch_invariant": False, "use_f16_accum": False, "gemm_type": "dense"}
    _COMPUTE_CONFIG = json.dumps(_COMPUTE)

    def prepare(self, codes: torch.Tensor, block_scales: torch.Tensor, global_scale: float):
        config, prepared, schema = self._transformed(codes, block_scales, global_scale)
        tuning = self._heuristics(layer_config=config, **self._COMPUTE)

        @cache
        def tiles(m: int) -> str:
            return json.dumps(next(chosen for low, high, chosen in tuning if low < m <= high))

        return config, prepared, schema.hadamard_block_size, tiles

    def call(self, x: torch.Tensor, weights) -> torch.Tensor:
        config, tensors, hadamard, tiles = weights
        return self._forward(
            config,
            inputs=x,
            weight=tensors["weight"],
            weight_scale=tensors.get("weight_scale"),
            zero_point=tensors.get("zero_point"),
            bias=None,
            weight_scale_2=tensors.get("weight_scale_2"),
            input_scale=None,
            input_scale_2=None,
            hadamard_block_size=hadamard,
            locks=self._locks,
            compute_config=self._COMPUTE_CONFIG,
            tuning_config=tiles(x.shape[0]),
        )


class Marlin(peers.Marlin):
    """Called as vLLM's MarlinNvFp4LinearKernel calls it."""

    bytes_per_weight = 9 / 16

    def __init__(self):
        from vllm.model_executor.layers.quantization.utils import marlin_utils_fp4

        super().__init__()
        self._marlin = marlin_utils_fp4

    def prepare(self, codes: torch.Tensor, block_scales: torch.Tensor, global_scale: float):
        layer = torch.nn.Module()
        layer.output_size_per_partition, layer.input_size_per_partition = codes.shape[0], 2 * codes.shape[1]
        layer.params_dtype = torch.bfloat16
        for name, tensor in (
            ("weight", codes.clone()),
            ("weight_scale", block_scales.clone()),
            ("weight_global_scale", torch.tensor(global_scale, device=codes.device)),
        ):
            setattr(layer, name, torch.nn.Parameter(tensor, requires_grad=False))
        with self._context():
            self._marlin.prepare_fp4_layer_for_marlin(layer)
        return layer.weight, layer.weight_scale, layer.weight_global_scale, *codes.shape

    def call(self, x: torch.Tensor, weights) -> torch.Tensor:
        weight, scale, global_scale, n, packed_k = weights
        return self._marlin.apply_fp4_marlin_linear(
            input=x,
            weight=weight,
            weight_scale=scale,
            weight_global_scale=global_scale,
            workspace=self._locks,
            size_n=n,
            size_k=2 * packed_k,
        )


PEERS = (Quack, Humming, Marlin, CublasBf16)
