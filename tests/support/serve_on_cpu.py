"""Serve the demo with a GPU's operands on a CPU: prepared, selected and called as on the GPU, multiplied by torch.

    python -m tests.support.serve_on_cpu CAPABILITY OUT.json [POLICY]

Its own process, because vLLM takes over threads and signal handlers. Only two things differ from a GPU of CAPABILITY
(90 for sm_90): what support.py and family.py say of the device, and the functions that launch kernels. POLICY is a
value of CUTEDSL_NVFP4_ACTIVATION_SCALE. The draft head drafts a token a step. Writes the demo's texts as they come out,
the kernel report, how often each op ran on prepared operands, and which share of the drafts was accepted.
"""

import json
import os
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import torch

from cutedsl_nvfp4 import family as families
from cutedsl_nvfp4 import support
from cutedsl_nvfp4.family import Family
from cutedsl_nvfp4.prepare import PreparedExperts, PreparedLinear
from cutedsl_nvfp4.selfcheck import report
from cutedsl_nvfp4.selfcheck.products import ExpertsLayer, LinearLayer
from cutedsl_nvfp4.vllm import selfcheck as vllm_selfcheck
from tests.support.faults.kernel import emulated
from tests.support.paths import DEMO

calls: Counter = Counter()


def run_linear(
    family: Family, x, codes, block_scales, row_scale, act_scale=None, bias=None, *, n, k, groups=1,
    out_dtype=torch.bfloat16, batch_invariant=False, tile=None, out=None,
):  # fmt: skip
    """family.Linear.run, computed by the reference."""
    assert (x.dtype == torch.bfloat16 and family.w4a4) or act_scale is None
    calls["linear"] += 1
    layer = LinearLayer(
        "",
        PreparedLinear(codes, block_scales, row_scale, n, k, family.layout, groups),
        out_dtype,
        bias,
        act_scale,
    )
    out = torch.empty(x.shape[0], n, dtype=out_dtype) if out is None else out
    emulated((x,), layer, tile, out)
    return out


def run_experts(
    family: Family, x, w13_codes, w13_block_scales, w13_row_scale, w2_codes, w2_block_scales, w2_row_scale,
    topk_weights, topk_ids, act_scale_13=None, act_scale_2=None, expert_map=None, *, hidden, intermediate,
    swiglu_limit=None, out_dtype=torch.bfloat16, batch_invariant=False, tiles=None, out=None,
):  # fmt: skip
    """family.Experts.run, computed by the reference."""
    assert x.dtype == torch.bfloat16 and w13_row_scale.shape[1] == 2 * intermediate
    calls["experts"] += 1
    operands = PreparedExperts(
        w13_codes, w13_block_scales, w13_row_scale, w2_codes, w2_block_scales, w2_row_scale, family.layout
    )
    num_global_experts = len(w13_codes) if expert_map is None else len(expert_map)
    layer = ExpertsLayer(
        "", operands, topk_ids.shape[1], num_global_experts, expert_map, swiglu_limit, act_scale_13=act_scale_13,
        act_scale_2=act_scale_2,
    )  # fmt: skip
    out = torch.empty(x.shape, dtype=out_dtype) if out is None else out
    emulated((x, topk_weights, topk_ids), layer, tiles, out)
    return out


def pass_for(capability: int) -> None:
    """From here on this machine's CPU is a GPU of `capability` whose kernels the reference computes."""
    families.capability_of = lambda device: capability
    family = families.family_of(capability)
    family.linear.run, family.experts.run = partial(run_linear, family), partial(run_experts, family)
    for operation in ("linear", "experts"):
        real = getattr(support, operation)
        setattr(support, operation, lambda device_type, found, real=real: real("cuda", capability))
    without_child = partial(report.check, check_in_child=lambda variants, *_: [0.0] * len(variants))
    vllm_selfcheck.check_kernels = partial(vllm_selfcheck.check_kernels, check=without_child)


def main() -> None:
    capability, target = int(sys.argv[1]), Path(sys.argv[2])
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if len(sys.argv) > 3:
        os.environ["CUTEDSL_NVFP4_ACTIVATION_SCALE"] = sys.argv[3]
    pass_for(capability)
    from vllm import LLM, SamplingParams

    from cutedsl_nvfp4.vllm.endpoint import REPORT_METHOD

    asked_for = (
        {}
        if families.family_of(capability).proven
        else {"linear_backend": "cutedsl", "moe_backend": "cutedsl"}
    )
    engine = LLM(
        str(DEMO), max_model_len=4096, enforce_eager=True, async_scheduling=False, disable_log_stats=False,
        speculative_config={"method": "mtp", "num_speculative_tokens": 1}, **asked_for,
    )  # fmt: skip
    before = Counter(calls)
    documents = json.loads((DEMO / "expected.json").read_text())["documents"]
    sampling = SamplingParams(temperature=0, max_tokens=64)
    # together: the emulated kernels decode the whole weights in every step, whatever the number of tokens
    answers = engine.generate([document["prompt"] for document in documents], sampling)
    texts = [answer.outputs[0].text for answer in answers]
    (found,) = engine.collective_rpc(REPORT_METHOD)
    counted = {metric.name: metric.value for metric in engine.get_metrics() if hasattr(metric, "value")}
    drafted, accepted = (counted[f"vllm:spec_decode_num_{what}_tokens"] for what in ("draft", "accepted"))
    target.write_text(
        json.dumps(
            {
                "texts": texts,
                "report": found,
                "calls": calls,
                "before": before,
                "accepted": accepted / drafted,
            }
        )
    )


if __name__ == "__main__":
    main()
