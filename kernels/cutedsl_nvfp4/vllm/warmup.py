"""Settle W4A4 activation scales on a shipped text, through the real attention, before the server is ready.

The profile run cannot serve for this: it has no attention metadata, so everything behind the attention
sees zeros. This runs one ordinary prefill step, with metadata and KV cache, after the cache exists and
before any CUDA graph is captured.
"""

import torch
from torch.nn import Module, Parameter
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import CircularBufferSpec, KVCacheSpec, UniformTypeKVCacheSpecs

from ..activation_scale import ActivationScales
from ..settings import ActivationScale
from .backend import INPUT, W2_INPUT, W13_INPUT

logger = init_logger(__name__)

REQUEST_ID = "_cutedsl_nvfp4_warmup_"
MAX_TOKENS = 512

TEXT = """\
The harbour master keeps three books. In the first he writes what the ships bring: 40 crates of oranges, \
12 barrels of oil, a grand piano for the school. In the second he writes what they take away. The third \
book is for the weather, and he reads it aloud every morning, because the fishermen trust a voice more \
than a page.

def tide(hour: float, period: float = 12.42) -> float:
    return 1.8 * math.cos(2 * math.pi * hour / period)

Q: If a boat leaves at 06:15 and the trip takes 2 h 50 min, when does it arrive?
A: At 09:05. Add two hours to get 08:15, then fifty minutes more.

Le port est calme ce soir. Der Leuchtturm blinkt alle zehn Sekunden. 潮水在午夜上涨。 Волны тихие.
{"ship": "Aurora", "length_m": 31.5, "crew": ["Ada", "Bo", "Chi"], "insured": true}
"""


def static_layers(model: Module) -> list[tuple[str, Module, ActivationScales]]:
    """(path, layer, scales) of the layers whose activation scales are static: they can be observed."""
    found = [(path, module, getattr(module, "act_scales", None)) for path, module in model.named_modules()]
    return [
        (path, module, scales)
        for path, module, scales in found
        if isinstance(scales, ActivationScales) and scales.policy is not ActivationScale.DYNAMIC
    ]


def fold_in_twins(layers: list[tuple[str, Module, ActivationScales]]) -> None:
    """Let a layer that did not run see what one that reads the same tensor has observed."""
    for _, module, scales in layers:
        for twin in getattr(module, "nvfp4_input_twin", ()):
            scales.observe_what(twin.act_scales)


def _parameter_name(key: str) -> str:
    return {INPUT: "act_scale", W13_INPUT: "act_scale_13", W2_INPUT: "act_scale_2"}[key]


def _blocks(spec: KVCacheSpec, num_tokens: int) -> int:
    """KV cache blocks that `num_tokens` of one request need in a cache group of `spec`."""
    if isinstance(spec, UniformTypeKVCacheSpecs):
        spec = spec.first_spec
    return 1 if isinstance(spec, CircularBufferSpec) else cdiv(num_tokens, spec.block_size)


def _prefill(worker) -> None:
    """Run one request's prefill of TEXT through `worker`, then forget the request."""
    config = worker.vllm_config
    token_ids = cached_tokenizer_from_config(config.model_config).encode(TEXT)
    limit = min(
        MAX_TOKENS, config.scheduler_config.max_num_batched_tokens, config.model_config.max_model_len - 1
    )
    token_ids = token_ids[:limit]
    block_ids, next_block = [], 1  # block 0 is vLLM's null block
    for group in worker.model_runner.kv_cache_config.kv_cache_groups:
        count = _blocks(group.kv_cache_spec, len(token_ids) + 1)
        block_ids.append(list(range(next_block, next_block + count)))
        next_block += count
    available = worker.model_runner.kv_cache_config.num_blocks
    if next_block > available:
        raise ValueError(
            f"the activation warm-up needs {next_block} KV cache blocks for {len(token_ids)} tokens, "
            f"{available} exist; give the KV cache more memory or set CUTEDSL_NVFP4_ACTIVATION_SCALE=dynamic"
        )
    step = SchedulerOutput.make_empty()
    step.scheduled_new_reqs = [
        NewRequestData(
            req_id=REQUEST_ID,
            prompt_token_ids=token_ids,
            mm_features=[],
            sampling_params=SamplingParams(max_tokens=1, temperature=0.0),
            pooling_params=None,
            block_ids=tuple(block_ids),
            num_computed_tokens=0,
            lora_request=None,
            prefill_token_ids=token_ids,
        )
    ]
    step.num_scheduled_tokens = {REQUEST_ID: len(token_ids)}
    step.total_num_scheduled_tokens = len(token_ids)
    worker.execute_model(step)
    worker.sample_tokens(None)
    finish = SchedulerOutput.make_empty()
    finish.finished_req_ids = {REQUEST_ID}
    worker.execute_model(finish)


@torch.inference_mode()
def settle_activation_scales(worker) -> None:
    """Measure every static activation scale of `worker`'s model and fix it; a no-op under W4A16.

    Raises ValueError naming the layer where a scale cannot be settled (activation_scale.py).
    """
    model = worker.get_model()
    layers = static_layers(model)
    if not layers:
        return
    device = next(model.parameters()).device
    for _, _, scales in layers:
        scales.start_observing(device)
    _prefill(worker)
    fold_in_twins(layers)
    for _, module, scales in layers:
        current = {key: getattr(module, _parameter_name(key)) for key in scales.inputs}
        for key, value in scales.stop_observing(current).items():
            setattr(module, _parameter_name(key), Parameter(value, requires_grad=False))
    logger.info("NVFP4 activation scales of %d layers settled on the warm-up text", len(layers))
