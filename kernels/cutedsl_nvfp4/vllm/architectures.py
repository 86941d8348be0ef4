"""vLLM's architectures of the DeepSeek-V4 family: which ones our checks hold for, and why the others are refused."""

from typing import Any

from torch.nn import Module

from ..checkpoint.config import ARCHITECTURES

MODEL_TYPES = ("deepseek_v4", "deepseek_v41")

_DRAFT = (
    "its draft layers are loaded past names, divisors and coverage and have not been tested; leave "
    "--speculative-config out"
)
# architecture -> why its NVFP4 layers are refused
REFUSED = {
    "DeepseekV41ForCausalLM": (
        "DeepSeek-V4.1 has other layers and names than DeepSeek-V4, which none of our checks knows; serve DeepSeek's "
        "own checkpoint of it, or the NVFP4 one with vLLM's image"
    ),
    **dict.fromkeys(("DeepSeekV4MTPModel", "DSparkDraftModel", "DSparkV41DraftModel"), _DRAFT),
}


def is_deepseek_v4(hf_config: Any) -> bool:
    """Whether a config of vLLM's is of the family, V4.1 included."""
    return getattr(hf_config, "model_type", None) in MODEL_TYPES


def refusal(architecture: str | None) -> str | None:
    """Why the NVFP4 layers of a model of this family are not served as `architecture`; None where they are."""
    if architecture in ARCHITECTURES:
        return None
    return REFUSED.get(
        architecture, "this project does not know it; leave out what selects it, such as --model-impl"
    )


def is_checked(model: Module) -> bool:
    """Whether `model`, as vLLM built it, is one whose tensors are checked and translated."""
    return any(base.__name__ in ARCHITECTURES for base in type(model).__mro__)
