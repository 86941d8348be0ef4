"""The command: fit a model on GPUs, print the budget, the flags, or by how much it does not fit."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace

from ..dialects import Contents, read_contents
from ..folder import CONFIG, find_source, read_checkpoint, read_json
from ..headers import CheckpointError
from .budget import Budget, Item, Request, budget_of, check_request, largest_that_auto_takes, longest_context
from .gpus import GIB, GPUS, Gpu, parse_gpus
from .model import KNOWN, RELEASES, Parallel, check_parallel, complete, linear_shapes, stored_format

UTILIZATION = 0.9  # compose.yaml's


def _formats(config: dict) -> str:
    """Which formats a model known by its config alone is planned in."""
    found = {name: stored_format(config, name) for name in linear_shapes(config)}
    if set(found.values()) == {"nvfp4"}:
        return "all NVFP4"
    experts = next(stored for name, stored in found.items() if ".ffn.experts." in name)
    return f"experts in {experts.upper()}, other layers in FP8 and BF16"


def load_model(location: str, revision: str | None = None) -> tuple[str, dict, Contents | None]:
    """(name, config, contents) of `pro`, `flash`, a release, a folder or a hub id; no contents without headers.

    A release is known without the hub; with a `revision`, it is read there.
    """
    if not os.path.exists(location):
        if (preset := location.lower()) in KNOWN:
            return f"DeepSeek-V4-{preset.capitalize()}, all NVFP4", dict(KNOWN[preset]), None
        if location in RELEASES and revision is None:
            config = dict(RELEASES[location])
            return f"{location}, {_formats(config)}", config, None
    source = find_source(location, revision)
    files = source.files()
    if not any(file.endswith(".safetensors") for file in files):
        config = complete(read_json(source, CONFIG, files))
        return f"{source.label} (config only: taken as {_formats(config)})", config, None
    checkpoint = read_checkpoint(source)
    return source.label, complete(checkpoint.config), read_contents(checkpoint.tensors, checkpoint.num_layers)


def _line(item: Item) -> str:
    return f"{item.name:34} {item.nbytes / GIB:9.2f}{'  (estimate)' if item.estimated else ''}"


def print_budget(budget: Budget, count: int, name: str) -> None:
    request = budget.request
    print(
        f"{name} on {count} x {budget.gpu.name}, GiB per GPU; "
        f"{request.utilization:.0%} of {budget.gpu.memory_gib} is vLLM's:"
    )
    for item in budget.managed:
        print(f"  {_line(item)}")
    print(f"  {_line(Item('KV cache: what is left', budget.kv_bytes))}")
    kinds: dict[str, list[int]] = {}
    for found in budget.pool.groups:
        for cache in found.caches:
            kinds.setdefault(cache.kind, [0, 0, 0])
            kinds[cache.kind][0] += 1
            kinds[cache.kind][1] = cache.page
            kinds[cache.kind][2] = cache.block
    for kind, (layers, page, block) in kinds.items():
        print(f"    {kind:15} {layers:3} layers, pages of {page:6} bytes for {block:3} tokens")
    print("  outside vLLM's share:")
    for item in budget.unmanaged:
        print(f"  {_line(item)}")
    print(f"  {_line(Item('free', budget.slack))}")


def _flags(budget: Budget, parallel: Parallel) -> str:
    request, gpu = budget.request, budget.gpu
    flags = [f"--tensor-parallel-size {parallel.tp}"]
    if parallel.dp > 1:
        flags.append(f"--data-parallel-size {parallel.dp}")
    if parallel.expert_parallel:
        flags.append("--enable-expert-parallel")
    flags.append(f"--gpu-memory-utilization {request.utilization:g}")
    flags.append(f"--max-model-len {request.max_model_len}")
    if request.batched_tokens != gpu.default_batched_tokens:
        flags.append(f"--max-num-batched-tokens {request.batched_tokens}")
    if request.seqs != gpu.default_seqs:
        flags.append(f"--max-num-seqs {request.seqs}")
    if request.indexer_fp4:
        flags.append("--attention-config.indexer_kv_dtype=mxfp4")
    return " ".join(flags)


def summary(budget: Budget, parallel: Parallel) -> dict:
    """The verdict for machines: what fits, the numbers vLLM will log, the flags."""
    request = budget.request
    blocks, concurrency, tokens = budget.pool.capacity(
        budget.kv_bytes, request.max_model_len, request.in_flight
    )
    return {
        "fits": budget.fits,
        "shortfall_bytes": budget.shortfall,
        "max_model_len": request.max_model_len,
        "kv_cache_bytes": budget.kv_bytes,
        "kv_blocks": blocks,
        "kv_tokens": tokens * parallel.dp,
        "concurrency": round(concurrency * parallel.dp, 2),
        "managed": {item.name: item.nbytes for item in budget.managed},
        "unmanaged": {item.name: item.nbytes for item in budget.unmanaged},
        "flags": _flags(budget, parallel),
    }


def _parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="plan_memory",
        description="Memory of a DeepSeek-V4 on GPUs, and the flags for it; see docs/memory.md.",
    )
    parser.add_argument(
        "model",
        help="pro, flash, a checkpoint's folder, or the id of a model on the hub (reading one needs huggingface-hub, "
        f"but for {', '.join(RELEASES)}, which are known)",
    )
    parser.add_argument("gpus", help=f"such as 8xH200; known are {', '.join(GPUS)}")
    parser.add_argument("--tp", type=int, help="tensor parallel size (default: all GPUs of a replica)")
    parser.add_argument("--dp", type=int, default=1, help="data parallel size (default: 1)")
    parser.add_argument("--ep", action="store_true", help="deal experts out whole (--enable-expert-parallel)")
    parser.add_argument("--max-model-len", type=int, help="default: the longest that fits")
    parser.add_argument("--max-num-batched-tokens", type=int, help="default: vLLM's for the GPU")
    parser.add_argument("--max-num-seqs", type=int, help="default: vLLM's for the GPU")
    parser.add_argument("--gpu-memory-utilization", type=float, default=UTILIZATION)
    parser.add_argument(
        "--gpu-memory-gib",
        type=float,
        help="what CUDA reports, where it differs from our table; of any other GPU",
    )
    parser.add_argument(
        "--indexer-fp4", action="store_true", help="the indexer's cache in MXFP4 instead of FP8, on sm_10x"
    )
    parser.add_argument("--revision", help="of the hub's repository; a known model is then read there, too")
    parser.add_argument("--json", action="store_true", help="print the verdict for machines")
    return parser.parse_args(arguments)


def _given(value: int | None, default: int) -> int:
    return default if value is None else value


def advice(config: dict, contents: Contents | None, gpu: Gpu, parallel: Parallel, request: Request) -> str:
    """What would make it fit, tried out: other flags, else more of these GPUs."""
    for label, changed in (
        (f"--gpu-memory-utilization {UTILIZATION:g}", replace(request, utilization=UTILIZATION)),
        ("--max-num-seqs 64", replace(request, seqs=min(64, request.seqs))),
        ("--max-num-batched-tokens 2048", replace(request, batched_tokens=min(2048, request.batched_tokens))),
        (
            "--max-num-seqs 64 --max-num-batched-tokens 2048",
            replace(request, seqs=min(64, request.seqs), batched_tokens=min(2048, request.batched_tokens)),
        ),
    ):
        if changed != request and budget_of(config, contents, gpu, parallel, changed).fits:
            return f"it fits with {label}"
    for count in (1, 2, 4, 8, 16, 32):
        wider = Parallel(count, parallel.dp, parallel.expert_parallel)
        try:
            check_parallel(config, wider)
        except CheckpointError:
            continue
        if count > parallel.tp and budget_of(config, contents, gpu, wider, request).fits:
            return f"it fits on {wider.gpus} of these GPUs"
    return "use more or larger GPUs"


def refusal(budget: Budget, longest: int, remedy: str) -> str:
    """By how much a budget does not fit, and what to do: one sentence."""
    needed, share, where = budget.needed, budget.requested, ""
    if budget.shortfall == -budget.slack:  # what comes after the cache, not the cache
        share = budget.gpu.memory - budget.requested
        needed, where = share - budget.slack, " outside vLLM's share"
    return (
        f"does not fit: one request of {budget.request.max_model_len:,} tokens lacks "
        f"{budget.shortfall / GIB:.2f} GiB per GPU (needs {needed / GIB:.2f}, has {share / GIB:.2f}{where}); {remedy}"
        + (f", or as it is with --max-model-len {longest}" if longest else "")
    )


def main(arguments: list[str]) -> int:
    """Exit status 0: it fits; 1: it does not, or the question makes no sense."""
    args = _parse_arguments(arguments)
    try:
        name, config, contents = load_model(args.model, args.revision)
        count, gpu = parse_gpus(args.gpus, args.gpu_memory_gib)
        if args.dp < 1 or count % args.dp or (args.tp is not None and args.tp * args.dp != count):
            given = f"--dp {args.dp} does" if args.tp is None else f"--tp {args.tp} and --dp {args.dp} do"
            raise CheckpointError(f"{given} not make {count} GPUs")
        parallel = Parallel(_given(args.tp, count // args.dp), args.dp, args.ep)
        check_parallel(config, parallel)
        request = Request(
            _given(args.max_model_len, config["max_position_embeddings"]),
            _given(args.max_num_batched_tokens, gpu.default_batched_tokens),
            _given(args.max_num_seqs, gpu.default_seqs),
            args.gpu_memory_utilization,
            args.indexer_fp4,
        )
        check_request(request, config, gpu)
        budget = budget_of(config, contents, gpu, parallel, request)
        longest = longest_context(config, contents, gpu, parallel, request)
        if longest and args.max_model_len is None and not budget.fits:
            automatic = largest_that_auto_takes(budget)
            budget = budget_of(config, contents, gpu, parallel, replace(request, max_model_len=longest))
        else:
            automatic = largest_that_auto_takes(budget)
    except (CheckpointError, OSError) as error:
        print(f"plan_memory: {error}", file=sys.stderr)
        return 1
    verdict = {**summary(budget, parallel), "longest": longest, "auto_max_model_len": automatic}
    if args.json:
        print(json.dumps(verdict, indent=1))
        return 0 if budget.fits else 1
    print_budget(budget, count, name)
    if gpu.unified:
        print("\nthe memory is shared with the CPU: programs and the page cache take part of it")
    if not budget.fits:
        print(f"\n{refusal(budget, longest, advice(config, contents, gpu, parallel, budget.request))}")
        return 1
    replicas = f" over {parallel.dp} replicas" if parallel.dp > 1 else ""
    print(
        f"\nmax_model_len {budget.request.max_model_len:,}: {verdict['concurrency']:.2f} such requests at "
        f"once{replicas}; vLLM will report about {verdict['kv_tokens'] // parallel.dp:,} tokens of KV cache "
        f"({verdict['kv_blocks']:,} blocks)"
    )
    print(f"--max-model-len auto would settle on {automatic:,}")
    if budget.request.max_model_len < request.max_model_len:
        remedy = advice(config, contents, gpu, parallel, request)
        print(f"the model's full {request.max_model_len:,} tokens do not fit so; {remedy}")
    print(f"\n{verdict['flags']}")
    return 0
