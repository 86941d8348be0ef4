"""What this build does not serve on NVFP4 layers, refused by name before any weight is read."""

import torch
from torch.nn import Module
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from .. import settings
from ..checkpoint import routing
from ..checkpoint.config import holds_nvfp4
from ..family import Layout
from . import architectures, load_formats
from .cpu import operators as cpu_operators


def refuse_unsupported(vllm_config: VllmConfig, kernel: str, layout: Layout | None) -> None:
    """Raise ValueError naming the option, why it cannot work with `kernel`, and what to do instead."""
    reasons = []
    if vllm_config.lora_config is not None:
        reasons.append(
            "--enable-lora: adapters cannot be attached to layers whose weights are packed NVFP4 operands; "
            "merge the adapter before quantizing"
        )
    if vllm_config.parallel_config.enable_eplb:
        reasons.append(
            "--enable-eplb: moving prepared experts between ranks has not been tested; leave it off"
        )
    if vllm_config.model_config is not None and vllm_config.model_config.enable_sleep_mode:
        reasons.append("--enable-sleep-mode: waking up prepared operands has not been tested; leave it off")
    if vllm_config.speculative_config is not None:
        reasons.append(
            f"--speculative-config (method {vllm_config.speculative_config.method!r}): the draft layers of "
            "DeepSeek-V4 NVFP4 checkpoints are not NVFP4 and have not been tested; leave it out"
        )
    if vllm_config.weight_transfer_config is not None:
        reasons.append(
            "--weight-transfer-config: weights sent to a running server would be written over prepared operands; "
            "leave it out, and restart the server with the new checkpoint"
        )
    load_format = vllm_config.load_config.load_format
    if reason := load_formats.refusal(load_format, deepseek_v4=False):
        reasons.append(f"--load-format {load_format}: {reason}")
    parallel = vllm_config.parallel_config
    if (
        parallel.data_parallel_size > 1
        and parallel.enable_expert_parallel
        and parallel.all2all_backend != "allgather_reducescatter"
        and vllm_config.kernel_config.moe_backend in ("auto", "cutedsl")
    ):
        reasons.append(
            f"--all2all-backend {parallel.all2all_backend}: our experts take tokens as plain rows; use "
            "allgather_reducescatter, or name another --moe-backend"
        )
    model = vllm_config.model_config
    if layout not in (None, Layout.PLAIN) and model is not None and model.dtype != torch.bfloat16:
        reasons.append(
            f"--dtype {str(model.dtype).removeprefix('torch.')}: our GPU kernels take bfloat16 activations; "
            "leave --dtype out, or name another --linear-backend and --moe-backend"
        )
    if (
        settings.implementation() is settings.Implementation.REFERENCE
        and current_platform.is_cuda()
        and model is not None
        and not model.enforce_eager
    ):
        reasons.append(
            "CUDA graphs with CUTEDSL_NVFP4_IMPL=reference: plain torch copies tables from the CPU, which a graph "
            "cannot hold; add --enforce-eager"
        )
    if reasons:
        raise ValueError(f"{kernel} does not support " + "; ".join(reasons))


def refuse_unchecked(vllm_config: VllmConfig) -> None:
    """Raise ValueError where NVFP4 layers of a DeepSeek-V4 would be loaded past a check, naming option and remedy.

    Called in every process when the configuration is complete: no loader exists yet, and nothing was read. It holds
    whoever's kernels serve; other models, and a DeepSeek-V4 without NVFP4 layers, pass.
    """
    model = vllm_config.model_config
    if (
        model is None
        or not architectures.is_deepseek_v4(model.hf_config)
        or not holds_nvfp4(getattr(model.hf_config, "quantization_config", None))
    ):
        return
    reasons = []
    if reason := architectures.refusal(model.architecture):
        reasons.append(f"architecture {model.architecture}: {reason}")
    if model.convert_type != "none":
        reasons.append(
            f"--convert {model.convert_type}: it makes a model that has not been tested; serve --runner generate"
        )
    speculative = vllm_config.speculative_config
    draft = speculative.draft_model_config if speculative is not None else None
    if draft is not None and draft.architecture in architectures.REFUSED:
        reasons.append(
            f"--speculative-config (method {speculative.method!r}, architecture {draft.architecture}): "
            f"{architectures.REFUSED[draft.architecture]}"
        )
    load_format = vllm_config.load_config.load_format
    if reason := load_formats.refusal(load_format, deepseek_v4=True):
        reasons.append(f"--load-format {load_format}: {reason}")
    device = "cpu" if current_platform.is_cpu() else "cuda"
    routed_in_torch = device == "cpu" and cpu_operators.are_defined()  # among any number
    if not routed_in_torch and (reason := routing.refusal(model.hf_config.n_routed_experts, device)):
        reasons.append(f"{reason}; {routing.REMEDY}")
    if reasons:
        raise ValueError(f"a DeepSeek-V4 with NVFP4 layers is not served with {'; '.join(reasons)}")


def refuse_reload(model: Module) -> None:
    """Raise ValueError if `model` holds prepared NVFP4 operands: reloading weights into them is not supported."""
    prepared = [name for name, module in model.named_modules() if getattr(module, "nvfp4_prepared", False)]
    if prepared:
        raise ValueError(
            f"reloading weights into prepared NVFP4 operands is not supported ({len(prepared)} layers, the first "
            f"{prepared[0]}); restart the server with the new checkpoint. The weights being served are untouched"
        )
