"""Write nvfp4.json beside this file: NVFP4 bytes as compressed-tensors packs them, and the values it reads back.

    .venv/bin/python tests/golden/make_nvfp4.py

Nothing of this project takes part. The block scales and the divisor follow from the data as its
documentation says: divisor = 6 * 448 / amax, block scale = divisor * amax of the group / 6.
"""

import json
from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.quant_scheme import NVFP4A16

ROWS, K, GROUP = 6, 64, 16
SCHEME = QuantizationScheme(targets=["Linear"], **NVFP4A16)


def compress(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """bf16 [N, K] -> weight_packed, weight_scale, weight_global_scale."""
    divisor = (6 * 448 / weight.abs().amax().float()).reshape(1)
    amax = weight.float().unflatten(-1, (-1, GROUP)).abs().amax(-1)
    scale = (divisor * amax / 6).clamp(max=448).to(torch.float8_e4m3fn).to(weight.dtype)
    state = {"weight": weight, "weight_scale": scale, "weight_global_scale": divisor}
    return NVFP4PackedCompressor.compress(state, SCHEME)


def golden() -> dict:
    weight = torch.randn(ROWS, K, generator=torch.Generator().manual_seed(4)).bfloat16()
    weight[1] *= 1000  # a row that dwarfs the others
    weight[2, :GROUP] = 0  # a group whose scale is zero
    packed = compress(weight)
    values = NVFP4PackedCompressor.decompress(packed, SCHEME)["weight"]
    return {
        "made_by": f"compressed-tensors {version('compressed-tensors')}",
        "weight": weight.float().tolist(),
        "weight_packed": packed["weight_packed"].tolist(),
        "weight_scale": packed["weight_scale"].view(torch.uint8).tolist(),
        "weight_global_scale": packed["weight_global_scale"].tolist(),
        "values": values.float().tolist(),
    }


if __name__ == "__main__":
    Path(__file__).with_name("nvfp4.json").write_text(json.dumps(golden()) + "\n")
