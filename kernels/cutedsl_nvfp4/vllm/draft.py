"""The MTP head of a DeepSeek-V4 target: which one was asked for, what it is stored as, and its names in vLLM.

    --speculative-config       check_request         against config.json, before anything is read
    headers of all tensors     check_head            before the target's weights are read; notes the head
    the draft is built         with_stored_format    its quantization follows from what was noted
    the draft is loaded        DraftNames            the checkpoint's names -> vLLM's

vLLM builds the draft with the target's quantization. A head is stored in the target's NVFP4, as DeepSeek's own
(FP8 blocks, MXFP4 experts), or unquantized; config.json does not say which, the headers do.
Imports vLLM's layers inside functions only: the patched configuration imports this module.
"""

import copy
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.nn import Module

from ..checkpoint.config import holds_nvfp4
from ..checkpoint.dialects import FP8_BLOCK
from ..checkpoint.draft import DSPARK, MTP, DraftHead, draft_head
from ..checkpoint.layers import FUSED
from ..checkpoint.mtp import SHARED, check_mtp, draft_path
from ..checkpoint.names import EXPERTS, listed

logger = logging.getLogger(__name__)

CLASS = "DeepSeekV4MTP"  # the draft's, on every platform
_METHODS = {"mtp": MTP, "dspark": DSPARK}
WIDE, _WIDE_DTYPES = "unquantized", ("bf16", "f16", "f32")
_NVFP4, _FP8, _MXFP4, _NONE = {"nvfp4"}, {"fp8"}, {"mxfp4"}, set()
# quantized formats of (linears, routed experts) that vLLM has one quantization config for
_SERVED_TOGETHER = (
    (_NONE, _NONE), (_NVFP4, _NONE), (_NONE, _NVFP4), (_NVFP4, _NVFP4),
    (_FP8, _NONE), (_NONE, _MXFP4), (_FP8, _MXFP4), (_FP8, _NVFP4),
)  # fmt: skip
# what a draft layer has besides a layer of the model, but its last norm
OUTSIDE_BLOCK = ("e_proj.", "h_proj.", "enorm.", "hnorm.", "hc_head_")
LISTED = 3  # names shown in an error
_NOTED = "cutedsl_nvfp4_head"  # attribute of the draft's config
_NO_HEAD_NEEDED = "ngram needs no head"


def _described(head: DraftHead | None) -> str:
    if head is None:
        return "no draft head"
    blocks = f", blocks of {head.block_size}" if head.block_size else ""
    return f"{head.kind}'s draft head ({head.layers} layer{'s' if head.layers > 1 else ''}{blocks})"


def _refuse_other_kind(method: str, head: DraftHead | None, source: str) -> None:
    wanted = _METHODS.get(method)
    if wanted is None or (head is not None and head.kind == wanted):
        return
    raise ValueError(
        f"--speculative-config (method {method!r}): the checkpoint has {_described(head)}, by {source}, and not "
        f"{wanted}'s. Use a checkpoint with that head, or leave --speculative-config out; {_NO_HEAD_NEEDED}"
    )


def check_request(speculative: Any) -> None:
    """Raise ValueError where config.json of a DeepSeek-V4 target has another head than `speculative` asks for.

    `speculative` is vLLM's SpeculativeConfig while it is made: the draft's config is read, nothing else.
    """
    target, draft = speculative.target_model_config, speculative.draft_model_config
    if getattr(target.hf_config, "model_type", None) != "deepseek_v4" or speculative.method not in _METHODS:
        return
    if draft.model not in (target.model, getattr(target, "model_weights", None)):
        raise ValueError(
            f"--speculative-config: model {draft.model!r} is not the target's checkpoint; the draft head of a "
            f"DeepSeek-V4 is read from there. Leave `model` out"
        )
    if speculative.target_parallel_config.pipeline_parallel_size > 1:
        raise ValueError(
            "--speculative-config: the draft head is on the last pipeline stage, and the embedding that it needs on "
            "the first; that has not been tested. Use --tensor-parallel-size instead, or leave --speculative-config out"
        )
    head = draft_head(vars(draft.hf_config))
    _refuse_other_kind(speculative.method, head, "config.json")
    tokens = speculative.num_speculative_tokens
    if head.kind == MTP and tokens is not None and tokens > head.layers and tokens % head.layers:
        raise ValueError(
            f"--speculative-config: num_speculative_tokens {tokens} cannot be drafted; the checkpoint has "
            f"{_described(head)}, which run in turn. Use at most {head.layers}, or a multiple of it"
        )


def check_head(hf_config: Any, tensors: Mapping[str, Any], speculative: Any) -> None:
    """Raise ValueError unless the checkpoint's `tensors` (headers by name) hold the whole MTP head asked for.

    Notes the head for `with_stored_format`. Nothing to do where no head was asked for (`speculative` None, or ngram).
    """
    if speculative is None or speculative.method != "mtp":
        return
    config = vars(hf_config)
    head = draft_head(config, tensors)
    _refuse_other_kind("mtp", head, "its tensors")
    declared = draft_head(config)
    if declared is None or declared.layers != head.layers:
        raise ValueError(
            f"config.json declares {_described(declared)}, and the checkpoint has {_described(head)}; set "
            f"num_nextn_predict_layers to {head.layers}"
        )
    check_mtp(config, tensors, head)
    _formats(head, config["num_hidden_layers"])
    setattr(speculative.draft_model_config.hf_config, _NOTED, head)


def _served(path: str) -> str:
    """DeepSeek's path of a linear below a layer -> vLLM's of the layer it is in."""
    for fused, parts in FUSED.items():
        for part in parts:
            if path.endswith(part):
                return path.removesuffix(part) + fused
    return path.replace("shared_experts.w2", "shared_experts.down_proj")


def _formats(head: DraftHead, num_layers: int) -> dict[str, str]:
    """{vLLM's layer: the format of the linears in it} of `head`; ValueError for a mix that vLLM has no layers for."""
    found: dict[str, set[str]] = {}
    for linear, stored in head.formats.items():
        layer, _, path = linear.partition(".")
        formats = {WIDE if one in _WIDE_DTYPES else one for one in stored}
        found.setdefault(f"model.layers.{num_layers + int(layer)}.{_served(path)}", set()).update(formats)
    experts = {one for name, formats in found.items() if name.endswith(EXPERTS) for one in formats} - {WIDE}
    linears = {one for name, formats in found.items() if not name.endswith(EXPERTS) for one in formats} - {
        WIDE
    }
    together = [name for name, formats in found.items() if len(formats) > 1]
    if together or (linears, experts) not in _SERVED_TOGETHER:
        raise ValueError(
            "--speculative-config: the checkpoint's MTP head cannot be served as it is stored: linears in "
            f"{' and '.join(head.stored(experts=False))}, experts in {' and '.join(head.stored(experts=True))}"
            + (f", several of these in {listed(together, LISTED)}" if together else "")
            + ". Served are NVFP4, FP8 blocks with MXFP4 or NVFP4 experts, and what is unquantized. Export it so, or "
            "leave --speculative-config out"
        )
    return {name: formats.pop() for name, formats in found.items()}


def _quantization(formats: Mapping[str, str], target: Any) -> Any:
    """vLLM's quantization config, or None, for draft layers in `formats`; `target` is the target's."""
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config
    from vllm.models.deepseek_v4.quant_config import DeepseekV4FP8Config

    unquantized = [name for name, one in formats.items() if one == WIDE]
    found = set(formats.values()) - {WIDE}
    if not found:
        return None
    if found == {"nvfp4"}:
        if isinstance(target, ModelOptNvFp4Config):
            config = copy.copy(target)
        else:
            config = ModelOptNvFp4Config(is_checkpoint_nvfp4_serialized=True)
        heads = {
            re.sub(r"(layers\.\d+)\..*", r"\1.head", name) for name in formats
        }  # the target's takes its place
        config.exclude_modules = unquantized + sorted(heads)
        return config
    config = DeepseekV4FP8Config(ignored_layers=unquantized, weight_block_size=[FP8_BLOCK, FP8_BLOCK])
    # else taken from the target's config.json, which speaks of the target's experts
    config._resolved_expert_dtype = "fp4"
    config._resolved_moe_quant_algo = "NVFP4" if "nvfp4" in found else ""
    return config


def with_stored_format(vllm_config: Any) -> Any:
    """`vllm_config` for building the draft: with the quantization that its head is stored in.

    Unchanged where the target has no NVFP4 layer, and with dummy weights, which are stored in nothing.
    """
    target, draft = (
        vllm_config.model_config.hf_config,
        vllm_config.speculative_config.draft_model_config.hf_config,
    )
    if not holds_nvfp4(getattr(target, "quantization_config", None)):
        return vllm_config
    if vllm_config.load_config.load_format == "dummy":
        return vllm_config
    formats = _formats(getattr(draft, _NOTED), target.num_hidden_layers)
    stored = copy.copy(vllm_config)
    stored.quant_config = _quantization(formats, vllm_config.quant_config)
    counts = Counter(formats.values())
    logger.info(
        "MTP head, as it is stored: %s", ", ".join(f"{counts[one]} layers {one}" for one in sorted(counts))
    )
    return stored


class DraftNames:
    """The checkpoint's names of an MTP head's tensors -> vLLM's, by `apply_list` as vLLM's WeightsMapper does.

    mtp.{i}.e_proj.weight        model.layers.{num_layers + i}.e_proj.weight
    mtp.{i}.attn.wq_b.weight     model.layers.{num_layers + i}.mtp_block.attn.wq_b.weight
    """

    def __init__(self, num_layers: int):
        self.num_layers = num_layers

    def _rename(self, name: str) -> str | None:
        found = draft_path(name, self.num_layers)
        if found is None or found[1] in SHARED:
            return None
        layer, path = found
        if path == "norm.weight":
            path = "shared_head.norm.weight"
        elif not path.startswith(OUTSIDE_BLOCK):
            path = f"mtp_block.{path}"
        path = path.replace(".shared_experts.w2.", ".shared_experts.down_proj.")
        path = path.replace(".gate.bias", ".gate.e_score_correction_bias")
        if path.endswith(".scale"):
            path = path.removesuffix("scale") + (
                "weight_scale" if f".{EXPERTS}." in path else "weight_scale_inv"
            )
        return f"model.layers.{self.num_layers + layer}.{path}"

    def apply_list(self, names: Iterable[str]) -> list[str]:
        """vLLM's names; of tensors outside the head, and of those it shares with the target, none."""
        return [renamed for name in names if (renamed := self._rename(name)) is not None]


def is_draft(model: Module) -> bool:
    """Whether `model` is vLLM's MTP draft of a DeepSeek-V4."""
    return any(base.__name__ == CLASS for base in type(model).__mro__)


def is_shared(parameter: str) -> bool:
    """Whether the target's embedding or head takes the place of this parameter of a draft once it is loaded."""
    return parameter.startswith("model.embed_tokens.") or ".shared_head.head." in parameter


def draft_weights(
    model: Module, weights: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) pairs of a checkpoint -> those of the draft `model`, under DeepSeek's names."""
    for name, tensor in weights:
        if found := draft_path(name, model.config.num_hidden_layers):
            layer, path = found
            yield f"mtp.{layer}.{path}", tensor


def served_models(worker: Any) -> list[Module]:
    """The model that `worker` serves, and its draft where it has one that is a model."""
    draft = worker.get_draft_model()
    return [worker.get_model()] + ([draft] if draft is not None else [])


def named_modules(models: Iterable[Module]) -> Iterator[tuple[str, Module]]:
    """(name, module) of all of `models`; what a draft shares with its target, once."""
    seen: set[Module] = set()
    for model in models:
        yield from model.named_modules(memo=seen)


def checkpoint_name(module: str, num_layers: int) -> str | None:
    """vLLM's name of a module in a draft layer -> the checkpoint's, mtp.{i}.…; None for a module of the target's."""
    found = draft_path(module, num_layers)
    return f"mtp.{found[0]}.{found[1].removeprefix('mtp_block.')}" if found is not None else None
