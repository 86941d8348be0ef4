"""The draft head of a DeepSeek-V4 checkpoint: MTP or DSpark, what it is stored as, and what that says of the release.

    mtp.{i}.*, or layers.{num_hidden_layers + i}.*      its tensors
    MTP      e_proj, h_proj, enorm, hnorm               num_nextn_predict_layers, one layer
    DSpark   main_proj, markov_head, confidence_head    dspark_* fields, three layers that draft a block together

Every published config.json has num_nextn_predict_layers, those with DSpark too, so the dspark_* fields decide. The
previews of V4 have MTP. The releases 0731 and 0813 have DSpark and no MTP. So have the previews' -DSpark checkpoints,
which are the previews with DSpark attached: config.json and tensors do not tell these from a release. What does is the
checkpoint's own chat encoder (`encoder_release`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from .names import EXPERTS, draft_index, linears_of, native_name

MTP, DSPARK = "MTP", "DSpark"
# what only one of the two has, below a draft layer
_MARKS = {
    MTP: ("e_proj.", "h_proj.", "enorm.", "hnorm."),
    DSPARK: ("main_proj.", "main_norm.", "markov_head.", "confidence_head."),
}
DSPARK_LAYERS = 3  # vLLM's too (models/deepseek_v4/nvidia/dspark.py) where n_mtp_layers is absent
_LINEARS = {*linears_of("attention"), *linears_of("shared"), "e_proj", "h_proj", "main_proj"}
_WIDE = {"BF16": "bf16", "F16": "f16", "F32": "f32"}
PREVIEW, RELEASE = "preview", "0731/0813"
ENCODER = "encoding/encoding_dsv4.py"  # DeepSeek's chat encoder, in the checkpoint


class _Stored(Protocol):
    """What a header says of a tensor; `dtype` in safetensors' words."""

    dtype: str


@dataclass(frozen=True)
class DraftHead:
    """`kind`, MTP or DSPARK, with `layers` draft layers; `block_size` is how many tokens a DSpark head drafts at once.

    `formats`: {layer's number and DeepSeek's path of a linear in it, such as "0.attn.wq_a"; of all routed experts of
    a layer "0.ffn.experts": formats they are stored in, as dialects.Linear names them}. Empty from config.json alone.
    """

    kind: str
    layers: int
    block_size: int | None = None
    formats: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def stored(self, experts: bool) -> tuple[str, ...]:
        """The formats of its routed experts, or of its other linears."""
        found = [formats for linear, formats in self.formats.items() if linear.endswith(EXPERTS) is experts]
        return tuple(sorted({fmt for formats in found for fmt in formats}))

    def unquantized(self, num_layers: int) -> list[str]:
        """What an ignore list must hold so that vLLM builds none of it in NVFP4 that is not; [] where all is.

        vLLM calls draft layer i `layers.{num_layers + i}`, and DSpark's projections by no layer at all. A pattern
        without the dot would be a substring of other layers' names (`layers.4` of `layers.43`).
        """
        other = [linear for linear, formats in self.formats.items() if formats != ("nvfp4",)]
        if len(other) == len(self.formats):
            patterns = ["mtp.*", *(f"layers.{num_layers + layer}.*" for layer in range(self.layers))]
        else:
            patterns = []
            for linear in other:
                layer, _, path = linear.partition(".")
                patterns += [f"mtp.{linear}", f"layers.{num_layers + int(layer)}.{path}"]
        shared = {"main_proj": "main_proj", "attn.wkv": "context_wkv_proj"} if self.kind == DSPARK else {}
        return patterns + [
            f"*.{theirs}" for path, theirs in shared.items() if any(o.endswith(f".{path}") for o in other)
        ]


def _number(value: Any) -> int:
    """A count from config.json; 0 for what is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _declared(config: Mapping[str, Any]) -> DraftHead | None:
    """What config.json says by itself: there may be no such tensors, exporters drop them and leave the fields."""
    if any(key.startswith("dspark_") and value is not None for key, value in config.items()):
        layers = _number(config.get("n_mtp_layers")) or DSPARK_LAYERS
        return DraftHead(DSPARK, layers, _number(config.get("dspark_block_size")) or None)
    layers = _number(config.get("num_nextn_predict_layers"))
    return DraftHead(MTP, layers) if layers else None


def _format(leaves: Mapping[str, str]) -> str:
    """{leaf in ModelOpt's words: dtype} of a linear -> its format."""
    weight = leaves.get("weight", "")
    if weight in _WIDE:
        return _WIDE[weight]
    if weight == "F8_E4M3":
        return "fp8"
    return "nvfp4" if "weight_scale_2" in leaves else "mxfp4"


def draft_head(config: Mapping[str, Any], tensors: Mapping[str, _Stored] | None = None) -> DraftHead | None:
    """The draft head of a checkpoint, by `config` (config.json) and `tensors` (its headers, by name); None without one.

    Without `tensors`, what config.json declares: kind, layers and block size. With them, the tensors decide whether
    there is one, which, and how many layers it has, and say what it is stored as. Where the tensors show neither
    kind's marks, config.json decides.
    """
    declared = _declared(config)
    if tensors is None:
        return declared
    num_layers = _number(config.get("num_hidden_layers")) or 10**6
    found: set[int] = set()
    kinds: set[str] = set()
    leaves: dict[str, dict[str, str]] = {}
    for name, tensor in tensors.items():
        index = draft_index(name, num_layers)
        if index is None:
            continue
        found.add(index)
        path = re.sub(r"^(?:model\.)?(?:mtp|layers)\.\d+\.", "", native_name(name))
        kinds |= {kind for kind, marks in _MARKS.items() if path.startswith(marks)}
        linear, _, leaf = path.rpartition(".")
        if linear in _LINEARS or re.fullmatch(r"ffn\.experts\.\d+\.w[123]", linear):
            leaves.setdefault(f"{index}.{linear}", {})[leaf] = tensor.dtype
    if not found:
        return None
    kind = kinds.pop() if len(kinds) == 1 else declared.kind if declared else MTP
    formats: dict[str, set[str]] = {}
    for linear, dtypes in leaves.items():
        name = re.sub(rf"\.{EXPERTS}\..*", f".{EXPERTS}", linear)
        formats.setdefault(name, set()).add(_format(dtypes))
    block_size = declared.block_size if declared is not None and kind == DSPARK else None
    ordered = {name: tuple(sorted(formats[name])) for name in sorted(formats)}
    return DraftHead(kind, max(found) + 1, block_size, ordered)


def encoder_release(source: str) -> str | None:
    """PREVIEW or RELEASE by the text of a checkpoint's ENCODER; None if it shows neither.

    The previews' has one text of reasoning effort, REASONING_EFFORT_MAX; the releases' has REASONING_EFFORT_PROMPTS.
    """
    if "REASONING_EFFORT_PROMPTS" in source:
        return RELEASE
    return PREVIEW if "REASONING_EFFORT_MAX" in source else None


def release(head: DraftHead | None, encoder: str | None = None) -> str | None:
    """PREVIEW, RELEASE, or None where it cannot be told, for a DeepSeek-V4 with draft head `head`.

    `encoder`: the text of its ENCODER, which decides where there is one. Without it, MTP means a
    preview; DSpark is a release's, or a preview's with DSpark attached.
    """
    told = encoder_release(encoder) if encoder else None
    return told or (PREVIEW if head is not None and head.kind == MTP else None)
