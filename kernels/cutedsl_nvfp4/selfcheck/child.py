"""GPU kernels prove themselves on the device they find, before they serve.

    stage one   every kernel the server will use, on small synthetic operands, in a child process with a time
                limit: an illegal address or a deadlock costs the child, not the server's CUDA context
    stage two   the layers' own operands, in the serving process, at every tile the server will use

What is compared, and with what: checked_products.py. A failure names layer, shape, kernel and error. Nothing stays
allocated.

    python3 -m cutedsl_nvfp4.selfcheck.child < REQUEST.json        stage one's child; see `serve_child`
"""

import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch

from ..blackwell import quantize as sm100_quantize
from ..blackwell.quantize import plain_codes, plain_scales
from ..format import AMAX_PER_GLOBAL_SCALE, GROUP_SIZE, SCALE_DTYPE
from ..prepare import prepare_experts, prepare_linear
from ..reference import dynamic_act_scale, quantize
from ..sm90 import experts as sm90_experts
from ..sm90 import linear as sm90_linear
from ..sm90.layout import PANEL_ROWS
from ..sm90.tiles import ExpertTiles, LinearTile
from ..support import Layout, kernels_for
from .products import (
    EXPERTS,
    STATIC_SIZE,
    ExpertsLayer,
    Layer,
    Multiply,
    SelfCheckFailed,
    check_experts,
    check_product,
    multiply,
)

START_SECONDS = 120.0  # for the child to import torch and reach the device
# for one kernel: compiling it, or for the first, tvm_ffi building its bridge to torch
COMPILE_SECONDS = 300.0
RUN_SECONDS = 20.0  # for one kernel's products; they take milliseconds
END_SECONDS = 10.0  # for the child to end after its last answer
ANSWER = "self-check: "  # how a child's lines begin
LINEAR, QUANTIZE = "nvfp4_linear_sm1", "nvfp4_quantize_sm1"  # how names of the other kernels for W4A4 begin

# (x, act_scale or None, groups) -> (codes, block scales, act scale)
Quantizer = Callable[
    [torch.Tensor, torch.Tensor | None, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]
]


@dataclass
class Report:
    """What was checked, for the log and for GET /kernels."""

    kernels: int = 0
    layers: int = 0
    products: int = 0
    worst_error: float = 0.0  # over the limit
    seconds: float = 0.0

    def add(self, error: float) -> None:
        self.products += 1
        self.worst_error = max(self.worst_error, error)

    def as_dict(self) -> dict:
        return {
            "verdict": "passed",
            "kernels": self.kernels,
            "layers": self.layers,
            "products": self.products,
            "worst_error_over_limit": round(self.worst_error, 4),
            "seconds": round(self.seconds, 2),
        }


# --- stage one: in a child process ---


def synthetic(
    n: int,
    k: int,
    out_dtype: torch.dtype,
    has_bias: bool,
    device: torch.device,
    generator: torch.Generator,
    layout: Layout = Layout.SM90,
    groups: int = 1,
    act_scale: float | None = None,
) -> Layer:
    """A layer of random operands: every code, scales from 2^-6 to 448 and zero, a global scale for each row."""
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randint(8, 127, (n, k // GROUP_SIZE), dtype=torch.uint8, generator=generator)
    scales[torch.rand(scales.shape, generator=generator) < 0.02] = 0
    global_scales = torch.rand(n, generator=generator) + 0.5
    operands = prepare_linear(
        codes.to(device), scales.view(SCALE_DTYPE).to(device), global_scales.to(device), [1] * n,
        layout=layout, groups=groups, name="synthetic",
    )  # fmt: skip
    bias = torch.randn(n, generator=generator).to(device) * 1000 if has_bias else None
    scale = None if act_scale is None else torch.tensor([act_scale], device=device)
    return Layer("synthetic", operands, out_dtype, bias, scale)


def synthetic_experts(
    topk: int,
    device: torch.device,
    generator: torch.Generator,
    layout: Layout = Layout.SM90,
    static: bool = False,
) -> ExpertsLayer:
    """A layer of five local random experts, with ragged sizes; `static` gives its activations scales."""
    local, hidden, intermediate = (5, 272, 144) if layout is Layout.SM90 else (5, 288, 160)

    def random(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.randint(0, 256, (local, n, k // 2), dtype=torch.uint8, generator=generator)
        scales = torch.randint(
            0x20, 0x50, (local, n, k // GROUP_SIZE), dtype=torch.uint8, generator=generator
        )
        scales[torch.rand(scales.shape, generator=generator) < 0.02] = 0
        return codes.to(device), scales.to(device).view(SCALE_DTYPE)

    size = 0.1 / hidden**0.5  # brings gate and up near one, where SwiGLU bends
    operands = prepare_experts(
        *random(2 * intermediate, hidden), (torch.rand(local, 2, generator=generator).to(device) + 0.5) * size,
        *random(hidden, intermediate), torch.rand(local, generator=generator).to(device) + 0.5,
        layout=layout, name="synthetic",
    )  # fmt: skip
    expert_map = torch.full((max(8, topk),), -1, dtype=torch.int32, device=device)
    expert_map[:7] = torch.tensor([2, -1, 0, 4, -1, 1, 3], dtype=torch.int32, device=device)
    layer = ExpertsLayer("synthetic", operands, topk, len(expert_map), expert_map, 2.0)
    if not static:
        return layer
    # of x and of an intermediate of at most 2 * 2
    scales = torch.full((1,), 1 / STATIC_SIZE), torch.linspace(4, 8, local) / AMAX_PER_GLOBAL_SCALE
    return replace(layer, act_scale_13=scales[0].to(device), act_scale_2=scales[1].to(device))


def load_kernel(name: str, topk: int, device: torch.device) -> None:
    """Compile or load what `name` stands for."""
    if name.startswith(EXPERTS):
        module, tiles, static = _blackwell_experts(name)
        scales = (torch.empty(1), torch.empty(2)) if static else (None, None)
        module.load_tiles(tiles, topk, torch.bfloat16, device, scales)
    elif name.startswith((LINEAR, QUANTIZE)):
        _blackwell(name).load(name)
    elif name in sm90_linear.shipped_kernels():
        sm90_linear.load(name)
    else:
        sm90_experts.load_tiles(sm90_experts.tiles_by_name()[name], topk, torch.bfloat16)


def _blackwell_experts(name: str) -> tuple[ModuleType, ExpertTiles, bool]:
    """(module, tiles, whether scales are static) behind one of `ExpertsLayer.kernels`."""
    arch, policy, tiles = name.removeprefix(EXPERTS).split(" ", 2)
    module = kernels_for("experts", int(arch.strip("sm_a")))
    return module, module.tiles_by_name()[tiles], policy == "static"


def _blackwell(name: str) -> ModuleType:
    """The module of a linear or quantizing kernel for Blackwell, by its name."""
    if name.startswith(QUANTIZE):
        return sm100_quantize
    return kernels_for("linear", int(re.match(r"nvfp4_linear_sm(\d+)", name)[1]))


def check_quantizer(name: str, device: torch.device, quantizer: Quantizer = sm100_quantize.run) -> float:
    """A quantizing kernel against reference.quantize, bit for bit -> 0; raises SelfCheckFailed for one wrong bit."""
    generator = torch.Generator().manual_seed(0)
    dynamic = name.endswith("_dynamic")
    for m, k, groups in ((1, 80, 1), (131, 1104, 1), (37, 4096, 2)):
        x = (torch.randn(m, groups * k, generator=generator) * 3).to(torch.bfloat16)
        x[:, :16], x[0, 16:32] = 0, -0.0
        if m > 2:
            x[1] = 0
            x[2] *= 1000
        scale = None if dynamic else torch.tensor([0.001])
        got = quantizer(x.to(device), None if dynamic else scale.to(device), groups)
        scale = dynamic_act_scale(x) if dynamic else scale
        codes, scales = quantize(x, scale.reshape(-1, 1))
        for what, ours, right in (
            ("act scale", got[2].cpu(), scale),
            ("code", plain_codes(got[0].cpu(), k, groups), codes),
            ("block scale", plain_scales(got[1].cpu(), m, k, groups), scales.view(torch.uint8)),
        ):
            wrong = (ours != right).nonzero()
            if len(wrong):
                at = wrong[0].tolist()
                raise SelfCheckFailed(
                    f"{len(wrong)} of {right.numel()} values differ from the reference's, the first is the {what} at "
                    f"{at} of x [{m}, {groups} * {k}]: {ours[tuple(at)].item()} instead of {right[tuple(at)].item()}"
                )
    return 0.0


def check_block_scaled(name: str, device: torch.device, multiply: Multiply) -> float:
    """A linear kernel for Blackwell on small ragged problems -> worst error."""
    tile, out_dtype, has_bias, aligned = _blackwell(name).variant(name)
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for n, k, groups, act_scale in ((3 * 128 + 72, 17 * 64 + 16, 1, None), (2 * 200, 80, 2, 0.01)):
        n += 0 if aligned else 3 * groups
        bias = groups == 1 if has_bias is None else has_bias
        layer = synthetic(n, k, out_dtype, bias, device, generator, Layout.BLOCK_SCALED, groups, act_scale)
        for m in (1, 2 * tile.tokens + 3 if tile.takes(2 * tile.tokens + 3) else tile.tokens - 3):
            worst = max(worst, check_product(layer, m, tile, generator, multiply))
    return worst


def check_kernel(name: str, topk: int, device: torch.device, multiply: Multiply = multiply) -> float:
    """A linear kernel, or the kernels of one choice of experts' tiles, on small ragged problems -> worst error."""
    if name.startswith(EXPERTS):
        _, tiles, static = _blackwell_experts(name)
        generator = torch.Generator().manual_seed(0)
        layer = synthetic_experts(topk, device, generator, Layout.BLOCK_SCALED, static)
        return max(check_experts(layer, m, tiles, generator, multiply) for m in (1, 2 * tiles.tokens + 3))
    if name.startswith(QUANTIZE):
        return check_quantizer(name, device)
    if name.startswith(LINEAR):
        return check_block_scaled(name, device, multiply)
    if name not in sm90_linear.shipped_kernels():
        tiles = sm90_experts.tiles_by_name()[name]
        generator = torch.Generator().manual_seed(0)
        layer = synthetic_experts(topk, device, generator)
        return max(check_experts(layer, m, tiles, generator, multiply) for m in (1, 2 * tiles.tokens + 3))
    tile, out_dtype, has_bias, aligned = sm90_linear.shipped_kernels()[name]
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for panels, k in ((3, 17 * 64 + 16), (5, 80)):
        n = panels * PANEL_ROWS + (8 if aligned else 3)
        layer = synthetic(n, k, out_dtype, has_bias, device, generator)
        for m in (1, 2 * tile.tokens + 3):
            worst = max(worst, check_product(layer, m, tile, generator, multiply))
    return worst


def serve_child(multiply: Multiply = multiply) -> None:
    """Read {"device": str, "topk": int, "kernels": [name]} from stdin; answer {"phase", "kernel", "error"} a step."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer

    def say(**line: object) -> None:
        print(ANSWER + json.dumps(line), file=answers, flush=True)

    request = json.load(sys.stdin)
    device = torch.device(request["device"])
    torch.zeros(1, device=device)
    say(phase="started")
    for name in request["kernels"]:
        if device.type == "cuda":
            load_kernel(name, request["topk"], device)
        say(phase="loaded", kernel=name)
        say(phase="checked", kernel=name, error=check_kernel(name, request["topk"], device, multiply))
    say(phase="done")


CHILD = (
    sys.executable,
    "-P",
    "-m",
    "cutedsl_nvfp4.selfcheck.child",
)  # -P: not what lies in the current folder
TOPK = 6  # of DeepSeek-V4; what is checked where no layer says


def _lines(stream) -> queue.Queue:
    """What `stream` says, line by line as it comes; None at its end."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _rest(lines: queue.Queue) -> list[str]:
    """What came until the end, or until nothing more does; without empty lines."""
    said: list[str] = []
    try:
        while (line := lines.get(timeout=END_SECONDS)) is not None:
            said.append(line.strip())
    except queue.Empty:
        pass  # a process of the child's holds the other end open
    return [line for line in said if line]


def check_in_child(
    kernels: list[str], device: str, topk: int = TOPK, command: tuple[str, ...] = CHILD
) -> list[float]:
    """Stage one for `kernels` -> the errors over their limits; SelfCheckFailed if one is wrong, crashes or hangs."""
    here = str(Path(__file__).resolve().parent.parent)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH")))),
    }
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    answers, complaints = _lines(child.stdout), _lines(child.stderr)
    errors: list[float] = []
    doing, seconds = "starting", START_SECONDS
    try:
        try:
            child.stdin.write(json.dumps({"device": device, "topk": topk, "kernels": kernels}))
            child.stdin.close()
        except BrokenPipeError:
            pass  # it died before it read all: its status tells
        while (line := answers.get(timeout=seconds)) is not None:
            if not line.startswith(ANSWER):
                continue  # printed by a library
            answer = json.loads(line.removeprefix(ANSWER))
            if answer["phase"] == "loaded":
                doing, seconds = f"running {answer['kernel']}", RUN_SECONDS
                continue
            if answer["phase"] == "checked":
                errors.append(answer["error"])
            if len(errors) < len(kernels):
                doing, seconds = f"loading {kernels[len(errors)]}", COMPILE_SECONDS
            else:
                doing, seconds = "ending", RUN_SECONDS
        status = child.wait(timeout=END_SECONDS)
    except queue.Empty:
        raise SelfCheckFailed(f"{doing}: no answer for {seconds:.0f} s: it hangs") from None
    except subprocess.TimeoutExpired:
        status = "none: it had to be killed"
    finally:
        child.kill()  # of no effect on one that has ended
        child.wait()
    if len(errors) != len(kernels) or status != 0:
        said = _rest(complaints)
        telling = (line for line in reversed(said) if "Error: " in line or "Failed: " in line)
        reason = next(telling, (said or ["without a word"])[-1])
        if doing == "starting":
            reason += (
                "; a GPU in exclusive mode has no room for it (CUTEDSL_NVFP4_SELF_CHECK=off starts without)"
            )
        raise SelfCheckFailed(f"{doing}: the child process ended with status {status}: {reason}")
    return errors


# --- stage two: in the serving process ---


def products(
    layers: list[Layer | ExpertsLayer], max_tokens: int, batch_invariant: bool
) -> Iterator[tuple[Layer | ExpertsLayer, LinearTile | ExpertTiles, int]]:
    """(layer, tile, tokens): every tile on the first layer of a shape, two on each of the others, in turn."""
    seen: dict[tuple, int] = {}
    for layer in layers:
        tiles = list(layer.tiles(max_tokens, batch_invariant).items())
        turn = seen.get(layer.shape, 0)
        seen[layer.shape] = turn + 1
        if turn:
            tiles = [tiles[(2 * turn + i) % len(tiles)] for i in range(min(2, len(tiles)))]
        for tile, m in tiles:
            yield layer, tile, m


def check_layers(
    layers: list[Layer | ExpertsLayer],
    max_tokens: int,
    batch_invariant: bool,
    report: Report,
    multiply: Multiply = multiply,
) -> None:
    """Stage two, noted in `report`. Raises SelfCheckFailed naming layer, shape, tile and error."""
    generator = torch.Generator().manual_seed(time.time_ns() % (1 << 31))
    for layer, tile, m in products(layers, max_tokens, batch_invariant):
        check_one = check_product if isinstance(layer, Layer) else check_experts
        try:
            report.add(check_one(layer, m, tile, generator, multiply))
        except SelfCheckFailed as failure:
            raise SelfCheckFailed(f"{layer.name} ({layer}, M = {m}, {tile}): {failure}") from None
        except Exception as failure:
            raise SelfCheckFailed(
                f"{layer.name} ({layer}, M = {m}, {tile}): {type(failure).__name__}: {failure}"
            ) from failure
    report.layers += len(layers)


def check(
    layers: list[Layer | ExpertsLayer],
    device: torch.device,
    max_tokens: int,
    batch_invariant: bool,
    command: tuple[str, ...] = CHILD,
) -> Report:
    """Both stages for the layers of one rank -> what was checked. Raises SelfCheckFailed."""
    report, started = Report(), time.monotonic()
    if layers:
        names = (name for layer in layers for name in layer.kernels(max_tokens, batch_invariant))
        kernels = list(dict.fromkeys(names))
        topk = next((layer.topk for layer in layers if isinstance(layer, ExpertsLayer)), TOPK)
        for error in check_in_child(kernels, str(device), topk, command):
            report.add(error)
        report.kernels = len(kernels)
        check_layers(layers, max_tokens, batch_invariant, report)
    report.seconds = time.monotonic() - started
    return report


if __name__ == "__main__":
    serve_child()
