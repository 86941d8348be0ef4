"""Serve the demo with Blackwell's operands on a CPU: prepared, selected and called as on the GPU, multiplied by torch.

    python tests/support/blackwell_on_cpu.py CAPABILITY POLICY OUT.json

Its own process, because vLLM takes over threads and signal handlers. Only three things differ from a GPU of CAPABILITY
(100 for sm_100): what support.py says of the device, and the functions that launch kernels. POLICY is a value of
CUTEDSL_NVFP4_ACTIVATION_SCALE. Writes the demo's texts as they come out, the kernel report, and how often each op ran
on block-scaled operands.
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
from cutedsl_nvfp4.support import Layout
from tests.support.faults.kernel import emulated
from tests.support.paths import DEMO

calls: Counter = Counter()


def run_linear(
    x, codes, scales, row_scale, act_scale=None, bias=None, *, n, k, groups=1, out_dtype=torch.bfloat16, config=None,
    out=None,
):  # fmt: skip
    """The `run` of Blackwell's linear modules, computed by the reference."""
    assert x.dtype == torch.bfloat16 and codes.dtype == scales.dtype == torch.uint8
    calls["linear"] += 1
    operands = PreparedLinear(codes, scales, row_scale, n, k, Layout.BLOCK_SCALED, groups)
    out = torch.empty(x.shape[0], n, dtype=out_dtype) if out is None else out
    emulated((x,), selfcheck.Layer("", operands, out_dtype, bias, act_scale), config, out)
    return out


def run_experts(
    x, w13_codes, w13_scales, w13_row_scale, w2_codes, w2_scales, w2_row_scale, topk_weights, topk_ids,
    act_scale_13=None, act_scale_2=None, expert_map=None, *, hidden, intermediate, swiglu_limit=None,
    out_dtype=torch.bfloat16, config=None, out=None,
):  # fmt: skip
    """The `run` of Blackwell's experts modules, computed by the reference."""
    assert x.dtype == torch.bfloat16 and w13_codes.shape[1] == 2 * intermediate
    calls["experts"] += 1
    operands = PreparedExperts(
        w13_codes, w13_scales, w13_row_scale, w2_codes, w2_scales, w2_row_scale, Layout.BLOCK_SCALED
    )
    known = w13_codes.shape[0] if expert_map is None else expert_map.shape[0]
    layer = selfcheck.ExpertsLayer(
        "", operands, topk_ids.shape[1], known, expert_map, swiglu_limit, act_scale_13=act_scale_13,
        act_scale_2=act_scale_2,
    )  # fmt: skip
    out = torch.empty(x.shape, dtype=out_dtype) if out is None else out
    emulated((x, topk_weights, topk_ids), layer, config, out)
    return out


def main() -> None:
    capability = int(sys.argv[1])
    support.capability_of = lambda device: capability
    for operation, run in (("linear", run_linear), ("experts", run_experts)):
        real = getattr(support, operation)
        setattr(support, operation, lambda device_type, found, real=real: real("cuda", capability))
        support.kernels_for(operation, capability).run = run
    selfcheck.check_in_child = lambda kernels, device, topk, command: [0.0] * len(kernels)
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "CUTEDSL_NVFP4_ACTIVATION_SCALE": sys.argv[2]}
    from vllm import LLM, SamplingParams

    from cutedsl_nvfp4.vllm.report import collect

    engine = LLM(
        str(DEMO),
        max_model_len=4096,
        enforce_eager=True,
        async_scheduling=False,
        linear_backend="cutedsl",
        moe_backend="cutedsl",
    )
    before = Counter(calls)
    documents = json.loads((DEMO / "expected.json").read_text())["documents"]
    texts = []
    for document in documents:
        sampling = SamplingParams(temperature=0, max_tokens=80)
        texts.append(engine.generate(document["prompt"], sampling)[0].outputs[0].text)
    (report,) = engine.apply_model(collect)
    Path(sys.argv[3]).write_text(
        json.dumps({"texts": texts, "report": report, "calls": calls, "before": before})
    )


if __name__ == "__main__":
    main()
