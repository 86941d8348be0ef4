"""Check the kernels that serve a loaded model, on every rank, before memory is profiled."""

import gc

import torch
from torch.nn import Module
from vllm import envs
from vllm.distributed.parallel_state import get_world_group, model_parallel_is_initialized
from vllm.logger import init_logger
from vllm.platforms import current_platform

from .. import settings
from ..family import Layout
from ..prepare import PreparedExperts, PreparedLinear
from ..selfcheck import report
from ..selfcheck.products import ExpertsLayer, Layer, LinearLayer, SelfCheckFailed
from .experts import CuTeDSLNvFp4Experts
from .linear import CuTeDSLNvFp4LinearKernel

logger = init_logger(__name__)


def _linear(name: str, module: Module, kernel: CuTeDSLNvFp4LinearKernel) -> LinearLayer:
    operands = PreparedLinear(
        module.weight.data, module.weight_scale.data, module.row_scale.data,
        module.nvfp4_n, module.nvfp4_k, kernel.support.layout, module.nvfp4_groups,
    )  # fmt: skip
    out_dtype = getattr(module, "nvfp4_out_dtype", torch.bfloat16)
    act_scale = getattr(module, "act_scale", None)
    return LinearLayer(name, operands, out_dtype, getattr(module, "bias", None), act_scale)


def _experts(name: str, module: Module, kernel: CuTeDSLNvFp4Experts) -> ExpertsLayer:
    operands = PreparedExperts(
        module.w13_weight.data, module.w13_weight_scale.data, module.w13_row_scale.data,
        module.w2_weight.data, module.w2_weight_scale.data, module.w2_row_scale.data, kernel.support.layout,
    )  # fmt: skip
    config = kernel.moe_config
    return ExpertsLayer(
        name, operands, config.experts_per_token, config.num_experts, module.expert_map,
        kernel.quant_config.gemm1_clamp_limit,
        ranks=config.moe_parallel_config.dp_size * config.moe_parallel_config.pcp_size,
        act_scale_13=getattr(module, "act_scale_13", None), act_scale_2=getattr(module, "act_scale_2", None),
    )  # fmt: skip


def _layers(model: Module) -> list[Layer]:
    """The model's layers that a GPU kernel of ours serves."""
    layers: list[Layer] = []
    for name, module in model.named_modules():
        quant_method = getattr(module, "quant_method", None)
        kernel = getattr(quant_method, "kernel", None)
        experts = getattr(getattr(quant_method, "moe_kernel", None), "fused_experts", None)
        if isinstance(kernel, CuTeDSLNvFp4LinearKernel) and kernel.support.layout is not Layout.PLAIN:
            layers.append(_linear(name, module, kernel))
        elif isinstance(experts, CuTeDSLNvFp4Experts) and experts.support.layout is not Layout.PLAIN:
            layers.append(_experts(name, experts.layer, experts))
    return layers


def _agree(failure: str | None) -> list[str]:
    """Every rank's failure, as this rank and all others see them."""
    if not model_parallel_is_initialized() or get_world_group().world_size == 1:
        return [failure] if failure else []
    group = get_world_group()
    failures: list[str | None] = [None] * group.world_size
    torch.distributed.all_gather_object(failures, failure, group=group.cpu_group)
    return [f"rank {rank}: {failure}" for rank, failure in enumerate(failures) if failure]


@torch.inference_mode()
def check_kernels(worker, check=report.check) -> None:
    """Check what serves `worker`'s model and note the verdict on the model, for GET /kernels.

    Raises SelfCheckFailed, on every rank if it failed on one. `check` does both stages.
    """
    model = worker.get_model()
    layers = _layers(model)
    noted, failure = {"verdict": "nothing to check: no GPU kernel of ours serves here"}, None
    if layers and settings.self_check() is settings.SelfCheck.OFF:
        logger.warning(
            "CUTEDSL_NVFP4_SELF_CHECK=off: %d NVFP4 layers serve from kernels that were not checked on this device",
            len(layers),
        )
        noted = {"verdict": "off"}
    elif layers:
        tokens = worker.vllm_config.scheduler_config.max_num_batched_tokens
        try:
            noted = check(layers, worker.device, tokens, bool(envs.VLLM_BATCH_INVARIANT)).as_dict()
        except Exception as error:  # told to all ranks, which wait for it
            failure = error
        gc.collect()
        torch.accelerator.empty_cache()
    if failures := _agree(str(failure) if failure else None):
        raise SelfCheckFailed(
            f"an NVFP4 kernel failed its self-check on {current_platform.get_device_name()}: {'; '.join(failures)}. "
            "Nothing is served from it. Report this; --linear-backend NAME, or for experts --moe-backend NAME (such as "
            "humming), serves with a kernel of vLLM's meanwhile"
        ) from failure
    model.nvfp4_self_check = noted
    logger.info("NVFP4 self-check: %s", noted)
