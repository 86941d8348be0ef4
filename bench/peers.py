"""What the linear's and the experts' peers share: who is there, and how vLLM and Humming take an NVFP4 checkpoint."""

from collections.abc import Sequence

import torch


def import_peers(peers: Sequence[type], names: list[str]) -> tuple[list, dict[str, str]]:
    """(instances of those named, {name: why} of those whose package is missing)"""
    found, missing = [], {}
    for peer in peers:
        if peer.name in names:
            try:
                found.append(peer())
            except ImportError as error:
                missing[peer.name] = str(error)
    return found, missing


def empty_result(missing: dict[str, str], limits: dict[str, float]) -> dict:
    """What a file of rows says of its run: GPU, versions, missing peers and the ceilings measured."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "missing_peers": missing,
        "ceilings": limits,
        "rows": [],
    }


class Humming:
    """What stock vLLM 0.32.0 runs on Hopper: an NVFP4 checkpoint's tensors -> Humming's."""

    name = "humming"
    compiles = True

    def __init__(self):
        from humming.config import InputQuantizationMode
        from humming.forward import humming_forward
        from humming.schema import BaseWeightSchema, HummingInputSchema
        from humming.transform import prepare_and_transform_humming_tensors
        from humming.tune import get_heuristics_config

        self._forward, self._transform = humming_forward, prepare_and_transform_humming_tensors
        self._heuristics, self._weight_schema = get_heuristics_config, BaseWeightSchema
        self._input_schema = HummingInputSchema(input_quant_mode=InputQuantizationMode.Disabled)
        units = torch.cuda.get_device_properties(0).multi_processor_count
        self._locks = torch.zeros(8 * units, dtype=torch.int32, device="cuda")

    def _transformed(self, codes: torch.Tensor, block_scales: torch.Tensor, global_scale: float):
        """(config, tensors, weight schema) of a weight [N, K/2], or of those of all experts [E, N, K/2]."""
        *experts, n, packed_k = codes.shape
        counted = {"num_experts": experts[0]} if experts else {}
        tensors = {
            "weight_packed": codes.clone(),
            "weight_scale": block_scales.clone(),
            "weight_global_scale": torch.full((*(experts or [1]),), 1 / global_scale, device=codes.device),
        }
        shapes = {
            "shape_n_stacks": [n],
            "shape_k_stacks": [2 * packed_k],
            "param_dtype": torch.bfloat16,
            **counted,
        }
        checkpoint = self._weight_schema.from_config(
            {
                "quant_method": "compressed-tensors",
                "format": "nvfp4-pack-quantized",
                "type": "float",
                "num_bits": 4,
                "strategy": "group",
                "group_size": 16,
            }
        )
        schema, weights = checkpoint.convert_humming(tensors=tensors, **shapes)
        input_schema, inputs = self._input_schema.convert_humming(tensors=tensors, **shapes)
        config, prepared = self._transform(
            tensors=weights | inputs,
            shape_n=n,
            shape_k=2 * packed_k,
            weight_schema=schema,
            input_schema=input_schema,
            pad_n_to_multiple=256,
            pad_k_to_multiple=128,
            has_bias=False,
            torch_dtype=torch.bfloat16,
            device=codes.device,
            **counted,
        )
        return config, prepared, schema


class Marlin:
    """vLLM's Marlin: the configuration it looks for, and the locks that an engine keeps."""

    name = "marlin"
    compiles = False

    def __init__(self):
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.model_executor.layers.quantization.utils.marlin_utils import get_marlin_workspace

        config = VllmConfig()
        self._context = lambda: set_current_vllm_config(config)
        self._locks = get_marlin_workspace(torch.device("cuda", 0))
