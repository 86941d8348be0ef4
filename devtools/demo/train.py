#!/usr/bin/env python3
"""Make demo/: train a small DeepSeek-V4, round it to NVFP4, write the checkpoint and what it should say.

    devtools/demo/train.py                                            all of it, on the CPU
    devtools/demo/train.py --device cuda --train-only --state FILE    train on a GPU, in two minutes; then
    devtools/demo/train.py --state FILE                               round, write and judge on the CPU

transformers trains and judges.
"""

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "demo"), str(ROOT / "kernels")]

# Large activations come and go; without these glibc gives each back to the kernel and faults it in again.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "8589934592", "MALLOC_TRIM_THRESHOLD_": "17179869184"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "demo", help="checkpoint folder (default: demo/)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the training letters")
    parser.add_argument(
        "--threads", type=int, default=2, help="torch threads; another number rounds otherwise"
    )
    parser.add_argument("--state", type=Path, help="save finished phases in this file, and go on after them")
    parser.add_argument("--device", default="cpu", help="where to train: cpu (default) or cuda")
    parser.add_argument("--train-only", action="store_true", help="stop when --state holds every phase")
    parser.add_argument(
        "--ablate", action="store_true", help="train nothing; print what planted errors do to the checkpoint"
    )
    parser.add_argument(
        "--check", action="store_true", help="train nothing; print errors and margins of the texts"
    )
    arguments = parser.parse_args()
    if arguments.train_only and arguments.state is None:
        parser.error("--train-only needs --state FILE, or the training is lost")
    if arguments.device != "cpu" and not arguments.train_only:
        parser.error(
            f"--device {arguments.device}: the checkpoint is judged on the CPU; add --train-only --state FILE"
        )
    return arguments


def train_and_export(out: Path, seed: int, state: Path | None) -> None:
    from recipe import chat, export, rounding, texts, train
    from recipe.expected import read, write_expected

    started = time.time()
    model = train.train(seed, state, partial(print, flush=True))
    amax: dict[str, float] = {}
    with rounding.rounded_weights(model), rounding.record_amax(model, amax):
        for document in texts.tales() + texts.long_letters() + chat.documents():
            read(model, document)
    tensors = export.checkpoint_tensors(model, export.input_scales(amax))
    export.write_checkpoint(out, tensors)
    check(out)
    write_expected(export.model_of(tensors), out)
    print(f"{out} written in {time.time() - started:.0f} s")


def check(folder: Path) -> None:
    from recipe import chat, export, rounding, texts
    from recipe.expected import read

    tensors = export.load_checkpoint(folder)
    model = export.model_of(tensors)

    def report(label: str) -> None:
        for document in texts.tales() + texts.long_letters() + chat.documents():
            reading = read(model, document)
            print(
                f"{label:18} {document.key:36} {len(reading.ids):5} tokens, {reading.wrong} wrong, "
                f"smallest margin {reading.margin:.2f} nats, logprob {reading.answer_logprobs.mean():.4f}",
                flush=True,
            )

    report("W4A16")
    for label, policy in (
        ("W4A4 input_scale", export.stored_input_scales(tensors, model)),
        ("W4A4 per token", "per token"),
    ):
        with rounding.round_activations(model, policy):
            report(label)


def main() -> None:
    arguments = parse_arguments()
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)

    import torch

    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    if arguments.ablate:
        from recipe import ablate, export

        ablate.table(export.load_checkpoint(arguments.out))
    elif arguments.check:
        check(arguments.out)
    elif arguments.train_only:
        from recipe import train

        torch.set_default_device(arguments.device)
        train.train(arguments.seed, arguments.state, partial(print, flush=True))
    else:
        train_and_export(arguments.out, arguments.seed, arguments.state)


if __name__ == "__main__":
    main()
