"""Run one prompt through vLLM in this process and save what enters and leaves every part of every layer.

    python tests/support/parity/record_layers.py CHECKPOINT IDS.json RECORDING.safetensors

Its own process, because vLLM takes over threads and signal handlers. Recorded, by name, one row per token:
`N.streams` [T, hc, H] entering layer N (N = number of layers: leaving the last), `N.attn.in`, `N.attn.out`, `N.ffn.in`,
`N.ffn.out` [T, H], `N.choice` int32 [T, index_topk] (ratio-4 layers; -1 is none), `final` [T, H], `ids` [T].
"""

import json
import os
import sys
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import save_file

DECODED = 16  # tokens that are generated, one per step, after the prompt

Rows = dict[str, list[torch.Tensor]]


def watch(model, rows: Rows) -> None:
    """Make every part of vLLM's `model` append what it reads and returns to `rows`."""

    def keep(name: str, value: torch.Tensor) -> None:
        rows[name].append(value.detach().clone())

    def outputs(name):
        return lambda _, args, output: keep(name, output)

    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda _, args, n=index: keep(f"{n}.streams", args[0]))
        layer.attn_norm.register_forward_hook(outputs(f"{index}.attn.in"))
        layer.attn.register_forward_hook(outputs(f"{index}.attn.out"))
        layer.ffn_norm.register_forward_hook(outputs(f"{index}.ffn.in"))
        layer.ffn.register_forward_hook(outputs(f"{index}.ffn.out"))
        if layer.attn.indexer is not None:

            def choice(attention, args, output, n=index):
                keep(f"{n}.choice", attention.topk_indices_buffer[: output.shape[0]])

            layer.attn.register_forward_hook(choice)
    layers = len(model.model.layers)
    layer.register_forward_hook(lambda _, args, output: keep(f"{layers}.streams", output[0]))
    model.model.norm.register_forward_hook(outputs("final"))


def record(checkpoint: Path, prompt: list[int], into: Path) -> None:
    """Serve `prompt` once, prefill and `DECODED` steps; save the rows of every token but the last."""
    from vllm import LLM, SamplingParams

    engine = LLM(str(checkpoint), max_model_len=8192, enforce_eager=True, async_scheduling=False)
    rows: Rows = defaultdict(list)
    engine.apply_model(lambda model: watch(model, rows))
    sampling = SamplingParams(temperature=0, max_tokens=DECODED + 1, ignore_eos=True)
    answer = engine.generate({"prompt_token_ids": prompt}, sampling)[0].outputs[0]
    recording = {name: torch.cat(parts) for name, parts in rows.items()}
    recording["ids"] = torch.tensor(prompt + list(answer.token_ids[:DECODED]))
    for name, value in recording.items():
        if len(value) != len(recording["ids"]):
            raise RuntimeError(f"{name} has {len(value)} rows for {len(recording['ids'])} tokens")
    save_file(recording, into)


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the hooks live in this process
    record(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]))
