"""Checks of what the server reports about itself: counters, and which kernel serves each layer."""

from __future__ import annotations

import time
from collections import Counter

from smoke.run import Run
from smoke.verdicts import Red, Skipped, TimedOut

LAYERS_METRIC = "cutedsl_nvfp4_layers"


def metrics(run: Run) -> tuple[str, str]:
    """/metrics has vLLM's series, and a request makes its counters rise."""

    def counters() -> dict[str, float]:
        series = run.metrics()
        names = ("vllm:request_success_total", "vllm:generation_tokens_total", "vllm:prompt_tokens_total")
        missing = [name for name in names if name not in series]
        if missing:
            raise Red(f"/metrics lacks {', '.join(missing)}")
        return {name: sum(value for _, value in series[name]) for name in names}

    before = counters()
    done = run.complete(run.prompt, 8)
    wanted = (1, done.completion_tokens, done.prompt_tokens)
    patience = min(10.0, run.client.remaining() / 2)
    started = time.monotonic()
    while True:  # counters are published a little after the answer
        risen = {name: value - before[name] for name, value in counters().items()}
        if all(rise >= want for rise, want in zip(risen.values(), wanted)):
            return f"{before['vllm:request_success_total']:.0f} requests before", ""
        if time.monotonic() - started > patience:
            raise Red(f"after one request the counters rose by {risen}, expected at least {wanted}")
        time.sleep(0.1)


def kernels(run: Run) -> tuple[str, str]:
    """Every quantized layer is served by our kernel or has a named reason, and the metric agrees."""
    if run.options.no_kernels:
        raise Skipped("--no-kernels")
    report = run.kernels()
    required = ("package_version", "vllm_version", "device", "activations", "self_check", "layers", "summary")
    missing = [key for key in required if key not in report]
    if missing:
        raise Red(f"/kernels lacks {', '.join(missing)}")
    layers = report["layers"]
    if not layers:
        raise Red(
            "/kernels names no quantized layer",
            "is this an NVFP4 checkpoint? look at its quantization_config",
        )
    for layer in layers:
        named = all(layer.get(key) for key in ("name", "kind", "format", "kernel"))
        if not named or not isinstance(layer.get("ours"), bool):
            raise Red(f"/kernels: a layer without name, kind, format, kernel or a boolean `ours`: {layer}")
    foreign = [layer for layer in layers if not layer["ours"]]
    unexplained = [layer for layer in foreign if not str(layer.get("reason") or "").strip()]
    if unexplained:
        layer = unexplained[0]
        raise Red(
            f"{len(unexplained)} of {len(layers)} layers fell back without a reason, "
            f"first {layer['name']}: {layer['kernel']}",
            "a silent fallback: look for the kernel selection in the server's log",
        )
    if foreign and run.options.require_ours:
        layer = foreign[0]
        raise Red(
            f"{len(foreign)} layers not ours, first {layer['name']}: {layer['kernel']}: {layer['reason']}"
        )
    verdict = str(report["self_check"].get("verdict"))
    if run.options.require_ours and verdict in ("off", "not run"):
        raise Red(
            f"the GPU kernels were not checked on this device: self-check {verdict}",
            "start the server without CUTEDSL_NVFP4_SELF_CHECK=off",
        )
    counted = Counter(layer["kernel"] for layer in layers)
    if dict(counted) != report["summary"]:
        raise Red(f"/kernels contradicts itself: layers {dict(counted)}, summary {report['summary']}")
    reported = Counter((layer["kernel"], layer["ours"]) for layer in layers)
    measured: Counter = Counter()
    for labels, value in run.metrics().get(LAYERS_METRIC, ()):
        measured[labels.get("kernel"), labels.get("ours", "").lower() in ("true", "1")] += int(value)
    if {key: count for key, count in measured.items() if count} != dict(reported):
        raise Red(f"metric {LAYERS_METRIC} says {dict(measured)}, /kernels says {dict(reported)}")
    used = Counter(f"{layer['kernel']} ({layer.get('implementation') or '?'})" for layer in layers)
    detail = ", ".join(f"{count} x {name}" for name, count in used.most_common())
    detail += f"; activations {report['activations']} on {report['device']}; self-check: {verdict}"
    reasons = sorted({str(layer["reason"]) for layer in foreign})
    if reasons:
        detail += f"; not ours because: {'; '.join(reasons)}"
    return f"{len(layers) - len(foreign)} of {len(layers)} ours", detail


def quantizes_activations(run: Run) -> bool:
    """Whether any layer runs W4A4: /kernels says "bf16", "nvfp4:warmup", "bf16+nvfp4:dynamic" or the like.

    A server that does not say is held to W4A16, the stricter rule.
    """
    if run.options.no_kernels:
        return False
    try:
        kinds = str(run.kernels().get("activations")).split("+")
        return any(kind.startswith("nvfp4") for kind in kinds)
    except TimedOut:
        raise
    except Red:
        return False  # already red in `kernels`
