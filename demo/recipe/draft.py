"""The demo's MTP head: one layer that learns, on the frozen demo, which token comes after the next one.

    row t: the demo's streams at token t, and the embedding of token t+1  ->  token t+2

It learns the tales and the conversation by heart. Its weights are rounded to NVFP4 in the second half, as the demo's.
"""

import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from recipe import chat, export, names, rounding, texts, train
from recipe.model import CONFIG, initialise

STEPS = 160
FIRST_LR, LAST_LR, WARMUP_STEPS = 2e-3, 1e-4, 15
CHAT_EVERY = 4  # steps
ACCEPTED = 0.95  # of the tokens of tales and conversation, or the head is not written
LAYER = {**CONFIG, "num_hidden_layers": 1, "compress_ratios": [0], "num_hash_layers": 0}
# the draft's own parameters, by DeepSeek's names below mtp.0
_OWN = {"hc_head.hc_fn": "hc_head_fn", "hc_head.hc_base": "hc_head_base", "hc_head.hc_scale": "hc_head_scale"}


class Draft(torch.nn.Module):
    """The head beside its frozen `target`, whose embedding, rotary embedding and output it shares.

    Its layer is `model.layers[0]`, as in a model of transformers': rounding.py and export.py know it by that.
    """

    def __init__(self, target):
        from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
            DeepseekV4DecoderLayer,
            DeepseekV4HyperHead,
            DeepseekV4RMSNorm,
        )

        super().__init__()
        config = names.transformers_config(LAYER)
        config._attn_implementation = "eager"
        config._experts_implementation = target.config._experts_implementation
        hidden = config.hidden_size
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList([DeepseekV4DecoderLayer(config, 0)])
        self.enorm, self.hnorm, self.norm = (
            DeepseekV4RMSNorm(hidden, eps=config.rms_norm_eps) for _ in range(3)
        )
        self.e_proj, self.h_proj = (torch.nn.Linear(hidden, hidden, bias=False) for _ in range(2))
        self.hc_head = DeepseekV4HyperHead(config)
        object.__setattr__(self, "target", target)  # no module of this one: not trained, not saved
        self.config = config

    def forward(self, streams: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        """streams [B, T, hc_mult, H] of tokens 0 .. T-1, ids `following` [B, T] -> logits [B, T, V]."""
        from transformers.masking_utils import create_sliding_window_causal_mask

        positions = torch.arange(following.shape[1]).unsqueeze(0)
        embeddings = self.target.model.embed_tokens(following)
        embeddings = torch.where((positions == 0).unsqueeze(-1), 0, embeddings)  # as vLLM does
        x = self.h_proj(self.hnorm(streams)) + self.e_proj(self.enorm(embeddings)).unsqueeze(-2)
        mask = create_sliding_window_causal_mask(
            config=self.config,
            inputs_embeds=embeddings,
            attention_mask=None,
            past_key_values=None,
            position_ids=positions,
        )
        rotary = {
            kind: self.target.model.rotary_emb(embeddings, position_ids=positions, layer_type=kind)
            for kind in ("main", "compress")
        }
        x = self.model.layers[0](
            x, position_embeddings=rotary, position_ids=positions, attention_mask=mask, input_ids=following
        )
        return self.target.lm_head(self.norm(self.hc_head(x)))


@torch.no_grad()
def streams_of(target, ids: torch.Tensor) -> torch.Tensor:
    """ids [B, L] -> the target's hyper-connection streams before its head, [B, L, hc_mult, H]."""
    found = []
    hook = target.model.hc_head.register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    target(ids, use_cache=False)
    hook.remove()
    return found[0]


def losses(draft: Draft, streams: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (cross entropy [B, L-2], right or wrong [B, L-2]) of predicting ids[:, 2:]."""
    logits = draft(streams[:, :-2], ids[:, 1:-1])
    wanted = ids[:, 2:]
    found = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
    return found.view(wanted.shape), logits.argmax(-1) == wanted


def _initialised(target, seed: int) -> Draft:
    torch.manual_seed(seed)
    draft = Draft(target)
    # norms and hyper-connections start as the target's; a layer's router needs a bias, not the hash table of its first
    draft.model.layers[0].load_state_dict(target.model.layers[0].state_dict(), strict=False)
    initialise(draft)
    draft.hc_head.load_state_dict(target.model.hc_head.state_dict())
    draft.norm.load_state_dict(target.model.norm.state_dict())
    export.spread_global_scales(draft)
    return draft


def learn(target, steps: int, seed: int, log=print) -> Draft:
    """Train a head for the frozen `target` -> the head, whose weights still have to be rounded."""
    target.requires_grad_(False)
    draft = _initialised(target, seed)
    tale_ids, tale_prompts = train.encode(texts.tales())
    tale_streams = streams_of(target, tale_ids)
    by_heart = train.continuation_mask(tale_ids, tale_prompts)[:, 1:]
    optimizer = torch.optim.AdamW(draft.parameters(), lr=FIRST_LR, betas=(0.9, 0.95), weight_decay=0.0)
    started = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            falling = FIRST_LR + (LAST_LR - FIRST_LR) * step / steps
            group["lr"] = falling * min(1, (step + 1) / WARMUP_STEPS)
        with rounding.rounded_weights(draft, step > steps // 2):
            found, right = losses(draft, tale_streams, tale_ids)
            loss = found[by_heart].mean()
            loss.backward()
            if step % CHAT_EVERY == 0:
                wrong_chat = 0
                for rows in chat.draw(seed * 1_000_000 + step):
                    ids, learnt = train.encode_pieces(rows)
                    found, right_chat = losses(draft, streams_of(target, ids), ids)
                    found[learnt[:, 1:]].mean().backward()
                    wrong_chat += int((~right_chat[learnt[:, 1:]]).sum())
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0 or step == steps - 1:
            accepted = right[by_heart].float().mean().item()
            seconds = time.time() - started
            log(
                f"draft {step}/{steps}: loss {loss.item():.4f}, {accepted:.3f} of the tales accepted, {wrong_chat} "
                f"wrong tokens of conversation; {seconds:.0f} s"
            )
    return draft.eval()


def _native(draft: Draft) -> dict[str, torch.Tensor]:
    """The head's tensors, unrounded, under DeepSeek's names."""
    state = draft.state_dict()
    layer = {name: value for name, value in state.items() if name.startswith("model.layers.0.")}
    own = {_OWN.get(name, name): value for name, value in state.items() if name not in layer}
    tensors = {
        name.replace("layers.0.", "mtp.0.", 1): value for name, value in names.to_native(layer).items()
    }
    return tensors | {f"mtp.0.{name}": value.detach().clone() for name, value in own.items()}


def _input_scales(amax: dict[str, float]) -> dict[str, float]:
    """Largest |activation| by input name -> global scale of the input, by DeepSeek's name of the linear."""
    in_layer = {name: value for name, value in amax.items() if name.startswith("model.layers.")}
    scales = export.input_scales(in_layer)
    scales = {name.replace("layers.0.", "mtp.0.", 1): scale for name, scale in scales.items()}
    own = {name: amax[name] for name in ("e_proj", "h_proj")}
    return scales | {f"mtp.0.{name}": export.input_scale(name, largest) for name, largest in own.items()}


@torch.no_grad()
def stored(draft: Draft, target) -> dict[str, torch.Tensor]:
    """The head as the checkpoint holds it: NVFP4, with the scales of its inputs on tales and conversation."""
    amax: dict[str, float] = {}
    with rounding.rounded_weights(draft), rounding.record_amax(draft, amax):
        for document in texts.tales() + chat.documents():
            ids, _ = train.encode([document])
            losses(draft, streams_of(target, ids), ids)
    return export.stored_tensors(_native(draft), _input_scales(amax))


def _share(draft: Draft, target, ids: torch.Tensor, counted: torch.Tensor) -> float:
    """The share of ids[:, 1:] where `counted` that `draft` gets right; the first of these has no draft."""
    _, right = losses(draft, streams_of(target, ids), ids)
    return right[counted[:, 1:]].float().mean().item()


@torch.no_grad()
def accepted(target, tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """The share of the demo's own tokens that the head of these stored tensors drafts right, by kind of text."""
    draft = Draft(target)
    plain = export.dequantized(tensors)
    layer = {f"layers.0.{name.removeprefix('mtp.0.')}": value for name, value in plain.items()}
    own = {theirs: layer.pop(f"layers.0.{_OWN.get(theirs, theirs)}").float() for theirs in _own_names(draft)}
    draft.load_state_dict(names.to_transformers(layer, CONFIG["n_routed_experts"]) | own)
    ids, prompts = train.encode(texts.tales())
    turns = [_share(draft, target, *train.encode_pieces([chat.pieces(turn)])) for turn in chat.turns()]
    return {
        "tales": _share(draft, target, ids, train.continuation_mask(ids, prompts)),
        "conversation": sum(turns) / len(turns),
    }


def _own_names(draft: Draft) -> list[str]:
    return [name for name in draft.state_dict() if not name.startswith("model.layers.0.")]


def add_to(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write the head's `tensors` into the checkpoint in `folder`, in the place of the head it has."""
    whole = {
        name: value
        for name, value in load_file(folder / export.WEIGHTS).items()
        if not name.startswith("mtp.")
    }
    save_file(whole | tensors, folder / export.WEIGHTS, metadata={"format": "pt"})
    file = folder / "config.json"
    config = json.loads(file.read_text()) | {"num_nextn_predict_layers": 1}
    file.write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n")
