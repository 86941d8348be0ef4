"""Serve the demo with Hopper's operands on a CPU: prepared, selected and called as on an H200, multiplied by torch.

    python tests/support/hopper_on_cpu.py OUT.json

Its own process, because vLLM takes over threads and signal handlers. Only three things differ from the GPU: what
support.py says of the device, and the two functions that launch kernels. Writes the demo's texts as they come out, the
kernel report, and how often each op ran on packed operands.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import torch

from cutedsl_nvfp4 import support
from cutedsl_nvfp4.prepare import PreparedExperts, PreparedLinear
from cutedsl_nvfp4.selfcheck import child as selfcheck
from cutedsl_nvfp4.sm90 import experts, linear
from cutedsl_nvfp4.support import Layout
from tests.support.faults.kernel import emulated
from tests.support.paths import DEMO

calls: Counter = Counter()


def run_linear(
    x, codes, scales, row_scale, bias=None, *, n, k, groups=1, out_dtype=torch.bfloat16, batch_invariant=False,
    config=None, out=None,
):  # fmt: skip
    """sm90.linear.run's signature, computed by the reference."""
    linear._check_shapes(x, codes, scales, row_scale, bias, n, k, groups, out_dtype)
    calls["linear"] += 1
    operands = PreparedLinear(codes, scales, row_scale, n, k, Layout.SM90, groups)
    out = torch.empty(x.shape[0], n, dtype=out_dtype) if out is None else out
    emulated((x,), selfcheck.Layer("", operands, out_dtype, bias), config, out)
    return out


def run_experts(
    x, w13_codes, w13_scales, w13_row_scale, w2_codes, w2_scales, w2_row_scale, topk_weights, topk_ids, expert_map=None,
    *, hidden, intermediate, swiglu_limit=None, out_dtype=torch.bfloat16, batch_invariant=False, config=None, out=None,
):  # fmt: skip
    """sm90.experts.run's signature, computed by the reference."""
    operands = (w13_codes, w13_scales, w13_row_scale), (w2_codes, w2_scales, w2_row_scale)
    experts._check_shapes(x, *operands, topk_weights, topk_ids, expert_map, hidden, intermediate, out_dtype)
    calls["experts"] += 1
    prepared = PreparedExperts(*operands[0], *operands[1], Layout.SM90)
    known = w13_codes.shape[0] if expert_map is None else expert_map.shape[0]
    layer = selfcheck.ExpertsLayer("", prepared, topk_ids.shape[1], known, expert_map, swiglu_limit)
    out = torch.empty(x.shape, dtype=out_dtype) if out is None else out
    emulated((x, topk_weights, topk_ids), layer, config, out)
    return out


def main() -> None:
    linear.run, experts.run = run_linear, run_experts
    for operation in ("linear", "experts"):
        real = getattr(support, operation)
        setattr(support, operation, lambda device_type, capability, real=real: real("cuda", 90))
    selfcheck.check_in_child = lambda kernels, device, topk, command: [0.0] * len(kernels)
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM, SamplingParams

    from cutedsl_nvfp4.vllm.report import collect

    engine = LLM(str(DEMO), max_model_len=4096, enforce_eager=True, async_scheduling=False)
    before = Counter(calls)
    documents = json.loads((DEMO / "expected.json").read_text())["documents"]
    texts = []
    for document in documents:
        sampling = SamplingParams(temperature=0, max_tokens=80)
        texts.append(engine.generate(document["prompt"], sampling)[0].outputs[0].text)
    (report,) = engine.apply_model(collect)
    Path(sys.argv[1]).write_text(
        json.dumps({"texts": texts, "report": report, "calls": calls, "before": before})
    )


if __name__ == "__main__":
    main()
