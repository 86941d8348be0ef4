"""The training loop: tales by heart, letters by recall, a conversation; in phases of a fixed number of steps.

The filler of letters is drawn anew in every step, so their answers follow from the key alone. The ratio-128
entries are first masked there and later exchanged between letters, so that the key is looked up in the
ratio-4 layer, through its indexer.
"""

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from recipe import attention, chat, export, rounding, texts
from recipe.model import EOS, initialised_model, tokenizer

WARMUP_STEPS = 20
ACTIVATION_SCALES = (("per token", 1.0), ("per tensor", 1.0), ("per tensor", 2.0))


@dataclass(frozen=True)
class Phase:
    """A stretch of training with an optimizer of its own; the learning rate falls linearly."""

    name: str
    steps: int
    letter_length: int  # characters of the prompt
    first_lr: float
    last_lr: float
    letters_per_island: int = 1
    letters_every: int = 1  # steps
    use_indexer: bool = False  # keep only its choice, as serving does
    exchange_heavily_compressed: bool = False  # instead of hiding them
    spread_global_scales: bool = False  # before the first step
    round_weights: bool = False
    round_activations_every: int = 0  # steps; 0: never


PHASES = (
    Phase("learn", 110, 260, 3e-3, 1e-3, letters_per_island=2),
    Phase(
        "rounding", 40, 260, 1.5e-3, 3e-4, letters_per_island=2,
        spread_global_scales=True, round_weights=True, round_activations_every=2,
    ),
    Phase("long", 12, texts.LONG_PROMPT, 1e-3, 5e-4, exchange_heavily_compressed=True, round_weights=True),
    Phase(
        "settle", 24, texts.LONG_PROMPT, 5e-4, 5e-5, letters_every=3, use_indexer=True,
        exchange_heavily_compressed=True, round_weights=True, round_activations_every=2,
    ),
    Phase(
        "finish", 100, texts.LONG_PROMPT, 4e-4, 2e-5, letters_every=3, use_indexer=True,
        exchange_heavily_compressed=True, round_weights=True, round_activations_every=1,
    ),
)  # fmt: skip


def encode(documents: list[texts.Document]) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (ids [B, L], prompt lengths [B]); each document ends in EOS and is padded with EOS."""
    coder = tokenizer()
    rows = [coder.encode(d.prompt + d.continuation).ids + [EOS] for d in documents]
    width = max(map(len, rows))
    ids = torch.tensor([row + [EOS] * (width - len(row)) for row in rows])
    return ids, torch.tensor([len(coder.encode(d.prompt).ids) for d in documents])


def encode_pieces(rows: list[chat.Pieces]) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (ids [B, L], padded with EOS; which of ids[:, 1:] are to be learnt: bool [B, L-1])."""
    coder = tokenizer()
    encoded = [[(coder.encode(text).ids, learnt) for text, learnt in row] for row in rows]
    width = max(sum(len(ids) for ids, _ in row) for row in encoded)
    ids = torch.full((len(rows), width), EOS)
    learnt = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(encoded):
        at = 0
        for piece, is_learnt in row:
            ids[index, at : at + len(piece)] = torch.tensor(piece)
            learnt[index, at : at + len(piece)] = is_learnt
            at += len(piece)
    return ids, learnt[:, 1:]


def token_losses(model, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [B, L] -> (cross entropy [B, L-1], right or wrong [B, L-1]) of predicting ids[:, 1:]."""
    logits = model(ids[:, :-1], use_cache=False).logits
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(ids.shape[0], -1), logits.argmax(-1) == ids[:, 1:]


def continuation_mask(ids: torch.Tensor, prompt_lengths: torch.Tensor) -> torch.Tensor:
    """Which of ids[:, 1:] belong to a continuation, including its one EOS: bool [B, L-1]."""
    positions = torch.arange(1, ids.shape[1])
    first_eos = (ids == EOS).int().argmax(-1, keepdim=True)
    return (positions >= prompt_lengths.unsqueeze(1)) & (positions <= first_eos)


def _letter_step(model, phase: Phase, seed: int) -> tuple[float, int, float]:
    """Backward of one letter per island -> (loss of the answers' first token, wrong tokens, indexer loss)."""
    ids, prompt_lengths = encode(texts.letters(seed, phase.letter_length, phase.letters_per_island))
    answer_start = int(prompt_lengths[0]) - 1
    curriculum = attention.curriculum
    curriculum.scored_queries = torch.arange(answer_start, ids.shape[1] - 1)
    curriculum.key_entries = texts.KEY_ENTRIES
    curriculum.hide_heavily_compressed = not phase.exchange_heavily_compressed
    curriculum.exchange_heavily_compressed = phase.exchange_heavily_compressed
    curriculum.select_everything = not phase.use_indexer
    losses, right = token_losses(model, ids)
    answers = continuation_mask(ids, prompt_lengths)
    first = losses[:, answer_start]  # the one token that the key alone decides; the rest follows from it
    indexer_loss = sum(curriculum.indexer_losses)
    (losses[answers].mean() + first.mean() + 0.1 * indexer_loss).backward()
    curriculum.clear()
    return first.mean().item(), int((~right & answers).sum()), indexer_loss.item()


def _chat_step(model, seed: int) -> tuple[float, int]:
    """Backward of what the demo says in conversations -> (loss, wrong tokens)."""
    total, wrong = 0.0, 0
    for rows in chat.draw(seed):
        ids, learnt = encode_pieces(rows)
        losses, right = token_losses(model, ids)
        loss = losses[learnt].mean()
        loss.backward()
        total, wrong = total + loss.item(), wrong + int((~right & learnt).sum())
    return total, wrong


def run_phase(model, phase: Phase, first_step: int, seed: int, log=print) -> None:
    """Train `model` in place; the data depend on `seed` and on the step's number alone."""
    tale_ids, tale_prompts = encode(texts.tales())
    by_heart = continuation_mask(tale_ids, tale_prompts)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=phase.first_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    if phase.spread_global_scales:
        export.spread_global_scales(model)
    started = time.time()
    for done in range(phase.steps):
        step = first_step + done
        falling = phase.first_lr + (phase.last_lr - phase.first_lr) * done / phase.steps
        for group in optimizer.param_groups:
            group["lr"] = falling * min(1, (done + 1) / min(WARMUP_STEPS, phase.steps // 4))
        with ExitStack() as stack:
            if phase.round_weights:
                stack.enter_context(rounding.rounded_weights(model))
            if phase.round_activations_every and step % phase.round_activations_every == 0:
                policy, headroom = ACTIVATION_SCALES[
                    step // phase.round_activations_every % len(ACTIVATION_SCALES)
                ]
                stack.enter_context(rounding.round_activations(model, policy, headroom))
            losses, right = token_losses(model, tale_ids)
            losses[by_heart].mean().backward()
            if done % phase.letters_every == 0:
                answer_loss, wrong_answers, indexer_loss = _letter_step(model, phase, seed * 1_000_000 + step)
            chat_loss, wrong_chat = _chat_step(model, seed * 1_000_000 + step)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if done % 10 == 0 or phase.letter_length == texts.LONG_PROMPT:
            log(
                f"{phase.name} {done}/{phase.steps}: tales {losses[by_heart].mean().item():.4f}, "
                f"{int((~right & by_heart).sum())} wrong; letters {answer_loss:.4f}, {wrong_answers} wrong, "
                f"indexer {indexer_loss:.3f}; chat {chat_loss:.4f}, {wrong_chat} wrong; {time.time() - started:.0f} s"
            )


def train(seed: int = 0, state: Path | None = None, log=print):
    """Train the demo -> transformers model in f32 whose weights still have to be rounded (see export.py).

    With `state`, every finished phase is saved there, and a later call goes on after the last one.
    """
    model = initialised_model(seed)
    finished = 0
    if state is not None and state.exists():
        saved = torch.load(state, map_location=torch.get_default_device())
        if saved["seed"] != seed:
            raise ValueError(
                f"{state} is of seed {saved['seed']}, not {seed}; delete it or name another file"
            )
        finished = saved["finished"]
        model.load_state_dict(saved["model"])
    attention.install(model)
    model.train()
    for index, phase in enumerate(PHASES):
        if index < finished:
            continue
        run_phase(model, phase, sum(earlier.steps for earlier in PHASES[:index]), seed, log)
        if state is not None:
            torch.save({"seed": seed, "finished": index + 1, "model": model.state_dict()}, state)
    attention.uninstall(model)
    return model.eval()
