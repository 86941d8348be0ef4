#!/usr/bin/env python3
"""Check this project's Blackwell kernels on this machine's GPU, time them, print one report to send back.

    devtools/kernels/check_blackwell.py [--report FILE] [--no-bench]

For owners of a B200, B300, RTX PRO 6000 or DGX Spark: nobody has run these kernels yet (docs/blackwell.md). Every
kernel first runs in a child process, on small problems, against the reference; then all tiles on layers of
DeepSeek-V4 Flash with random weights; then they are timed. Takes some 15 minutes, needs 8 GB of GPU memory, torch for
CUDA and nvidia-cutlass-dsl. Nothing is sent anywhere.

Exit status: 0 all is right, 1 a kernel is wrong (the report says which), 2 no Blackwell GPU, or software is missing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

MAX_TOKENS = 8192
GPUS = {100: "B200", 103: "B300", 120: "RTX PRO 6000, RTX 50", 121: "DGX Spark"}


class Unusable(Exception):
    """This machine cannot run the check; the message says what it lacks."""


def find_gpu() -> dict:
    """The first GPU: {"name", "capability", ...}. Raises Unusable unless it is one of Blackwell's."""
    try:
        import torch
    except ImportError as error:
        raise Unusable(
            f"torch is not installed ({error}); run this in the image or install torch for CUDA"
        ) from None
    wanted = ", ".join(f"{gpu} (sm_{number})" for number, gpu in GPUS.items())
    if not torch.cuda.is_available():
        raise Unusable(f"no CUDA GPU, or torch {torch.__version__} is not built for CUDA; wanted: {wanted}")
    major, minor = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    if 10 * major + minor not in GPUS:
        raise Unusable(
            f"{name} (sm_{major}{minor}) is not a Blackwell GPU that has kernels here; wanted: {wanted}"
        )
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": name,
        "capability": 10 * major + minor,
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9, 1),
    }


def software() -> dict:
    """What the kernels were made and run with."""
    import torch

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def printed(*command: str) -> str | None:
        try:
            return subprocess.run(
                command, capture_output=True, text=True, check=True, cwd=ROOT
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    packages = ("nvidia-cutlass-dsl", "apache-tvm-ffi", "flashinfer-python", "vllm")
    return {
        "commit": printed("git", "describe", "--always", "--dirty"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": (printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "").split(
            "\n"
        )[0],
        **{package: version(package) for package in packages},
    }


def find_kernels(capability: int, cutlass_dsl: str | None) -> None:
    """Raise Unusable unless kernels for the GPU are compiled, or can be."""
    from cutedsl_nvfp4 import settings

    arch, folder = f"sm_{capability}a", settings.kernels_folder()
    if folder and (folder / arch).is_dir():
        return
    if settings.forbids_jit():
        raise Unusable(
            f"{settings.KERNELS}={folder} holds no kernels for {arch}, and {settings.FORBID_JIT}=1 forbids compiling "
            f"them now; set {settings.FORBID_JIT}=0, or build the image with KERNEL_ARCHITECTURES={arch}"
        )
    if cutlass_dsl is None:
        raise Unusable("nvidia-cutlass-dsl, which compiles the kernels, is not installed")


def check_kernels(variants: list, device: str) -> dict[str, dict]:
    """Every kernel in a child process -> {name: {"error": over its limit} or {"failed": why}}.

    A failure ends the child; another one goes on with the kernels after it.
    """
    from cutedsl_nvfp4.selfcheck import child
    from cutedsl_nvfp4.selfcheck.products import SelfCheckFailed

    found: dict[str, dict] = {}
    left = list(variants)
    while left:
        try:
            errors = child.check_in_child(left, device)
        except SelfCheckFailed as failure:
            culprit = failure.variant if failure.variant in left else left[0]
            position = left.index(culprit)
            # the child checked those before it, one after the other; it told no figure for them
            found.update({str(variant): {"error": None} for variant in left[:position]})
            found[str(culprit)] = {"failed": str(failure)}
            left = left[position + 1 :]
        else:
            found.update({str(variant): {"error": error} for variant, error in zip(left, errors)})
            left = []
        print(f"{len(found)} of {len(variants)} kernels checked", flush=True)
    return found


def check_layers(layers: list) -> tuple[int, list[str]]:
    """Every tile of `layers` in this process -> (products that were right, failures)."""
    import torch

    from cutedsl_nvfp4.selfcheck import products, report

    generator = torch.Generator().manual_seed(0)
    right, failures = 0, []
    for layer, tile, m in report.products(layers, MAX_TOKENS, False):
        linear = isinstance(layer, products.LinearLayer)
        check = products.check_product if linear else products.check_experts
        try:
            check(layer, m, tile, generator)
            right += 1
        except Exception as failure:
            failures.append(f"{layer.name} ({layer}, M = {m}, {tile}): {type(failure).__name__}: {failure}")
    return right, failures


def measure(layers: list) -> list[dict]:
    """Times of every layer at every number of tokens; a row that cannot be timed says why."""
    from bench.blackwell import measure as blackwell
    from cutedsl_nvfp4.selfcheck.products import LinearLayer

    rows = []
    for layer in layers:
        linear = isinstance(layer, LinearLayer)
        for m in blackwell.TOKENS:
            try:
                rows.append((blackwell.measure_linear if linear else blackwell.measure_experts)(layer, m))
            except Exception as error:
                rows.append(
                    {"layer": layer.name, "m": m, "failed": {"ours": f"{type(error).__name__}: {error}"}}
                )
        print(f"timed {layer.name}", flush=True)
    return rows


def run(bench: bool) -> dict:
    """The whole check on this machine's GPU -> the report. Raises Unusable."""
    gpu = find_gpu()
    report = {"gpu": gpu, "software": software(), "started": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    find_kernels(gpu["capability"], report["software"]["nvidia-cutlass-dsl"])
    import torch

    from bench.blackwell import measure as blackwell

    device = torch.device("cuda", 0)
    layers = [*blackwell.linears(device), blackwell.experts(device)]
    variants = list(dict.fromkeys(v for layer in layers for v in layer.variants(MAX_TOKENS, False)))
    report["kernels"] = check_kernels(variants, "cuda:0")
    failed = any("failed" in verdict for verdict in report["kernels"].values())
    report["products"], report["failures"] = (
        (0, ["not run: a kernel failed"]) if failed else check_layers(layers)
    )
    report["rows"] = measure(layers) if bench and not report["failures"] else []
    report["passed"] = not report["failures"]
    return report


def text(report: dict) -> str:
    """The report as Markdown, the raw figures at its end."""
    gpu, kernels = report["gpu"], report["kernels"]
    errors = [verdict["error"] for verdict in kernels.values() if verdict.get("error") is not None]
    lines = [
        f"# Blackwell kernels on {gpu['name']} (sm_{gpu['capability']})",
        "",
        f"**{'passed' if report['passed'] else 'FAILED'}**: {sum('failed' not in v for v in kernels.values())} of "
        f"{len(kernels)} kernels right in a child process (worst error {max(errors, default=0):.2f} of what is "
        f"allowed), {report['products']} products of Flash's layers right.",
        "",
        ", ".join(f"{name} {value}" for name, value in report["software"].items() if value),
        "",
    ]
    lines += [f"- {name}: {verdict['failed']}" for name, verdict in kernels.items() if "failed" in verdict]
    lines += [f"- {failure}" for failure in report["failures"]]
    if report["rows"]:
        lines += [
            "",
            "| layer | M | ours, us | FlashInfer, us | GB/s | TFLOP/s |",
            "|---|---|---|---|---|---|",
        ]
    for row in report["rows"]:
        us = {name: f"{time:.1f}" for name, time in row.get("us", {}).items()}
        rates = [f"{row[rate]:.0f}" if rate in row else "-" for rate in ("gbytes_per_s", "tflops")]
        why = (
            f" ({'; '.join(f'{name}: {reason}' for name, reason in row['failed'].items())})"
            if row["failed"]
            else ""
        )
        cells = (row["layer"] + why, row["m"], us.get("ours", "-"), us.get("flashinfer", "-"), *rates)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, "", "```json", json.dumps(report), "```", ""])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--report", type=Path, default=Path("blackwell-report.md"), help="where it goes as well"
    )
    parser.add_argument("--no-bench", action="store_true", help="check, time nothing")
    arguments = parser.parse_args()
    try:
        report = run(not arguments.no_bench)
    except Unusable as reason:
        print(f"check_blackwell: {reason}", file=sys.stderr)
        return 2
    written = text(report)
    print(written)
    arguments.report.write_text(written)
    print(f"This report is in {arguments.report}: please send it back (docs/blackwell.md).", file=sys.stderr)
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
