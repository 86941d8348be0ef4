"""GPU kernels prove themselves on the device they find, before they serve.

    stage one   every kernel the server will use, on small synthetic operands, in a child process with a time
                limit: an illegal address or a deadlock costs the child, not the server's CUDA context
    stage two   the layers' own operands, in the serving process, at every tile the server will use

Each product is written over NaN, so that what no CTA stored shows, and compared in float64 with the weight
decoded by layout.unpack_linear. A failure names layer, shape, kernel and error. Nothing stays allocated.

    python3 -m cutedsl_nvfp4.selfcheck < REQUEST.json        stage one's child; see `serve_child`
"""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from .format import GROUP_SIZE, SCALE_DTYPE
from .prepare import PreparedExperts, PreparedLinear, prepare_experts, prepare_linear
from .reference import dequantize, swiglu
from .sm90 import experts as sm90_experts
from .sm90 import linear as sm90_linear
from .sm90.layout import PANEL_ROWS, separate_gate_up, unpack_linear
from .support import Layout
from .tiles import Config, ExpertTiles, chosen, chosen_experts

PANELS = 8  # weight panels a product is compared on: the first, the last and random ones
TOKENS = 64  # rows of x it is compared on
EXPERT_TOKENS = 2  # the same for experts, of which each token meets several
BF16_LIMIT = 1.5  # times the error of rounding the exact product to bf16
F32_LIMIT = 2e-5  # relative, of a float32 result
START_SECONDS = 120.0  # for the child to import torch and reach the device
# for one kernel: compiling it, or for the first, tvm_ffi building its bridge to torch
COMPILE_SECONDS = 300.0
RUN_SECONDS = 20.0  # for one kernel's products; they take milliseconds
END_SECONDS = 10.0  # for the child to end after its last answer
ANSWER = "self-check: "  # how a child's lines begin


class SelfCheckFailed(RuntimeError):
    """A kernel is wrong, crashed or hung; the message says which and how."""


@dataclass(frozen=True)
class Layer:
    """One linear layer with prepared operands (Layout.SM90)."""

    name: str
    operands: PreparedLinear
    out_dtype: torch.dtype
    bias: torch.Tensor | None = None

    @property
    def shape(self) -> tuple:
        return self.operands.n, self.operands.k, self.operands.groups, self.out_dtype, self.bias is not None

    def __str__(self) -> str:
        weight = self.operands
        return f"N = {weight.n}, K = {weight.k}, groups = {weight.groups}, {self.out_dtype}"

    def tiles(self, max_tokens: int, batch_invariant: bool) -> dict[Config, int]:
        """Tiles that 1 .. max_tokens tokens take, each with a number of tokens that takes it."""
        return chosen(
            *self._problem(), max_tokens, batch_invariant, plain=self.bias is None and self._aligned()
        )

    def kernels(self, max_tokens: int, batch_invariant: bool) -> list[str]:
        """Names of the kernels behind `tiles`."""
        tiles = self.tiles(max_tokens, batch_invariant)
        has_bias, aligned = self.bias is not None, self._aligned()
        return [sm90_linear.kernel_name(tile, self.out_dtype, has_bias, aligned) for tile in tiles]

    def _problem(self) -> tuple[int, int, int]:
        """(rows, K, groups) as the kernel sees them: with the padding between groups."""
        weight = self.operands
        return (
            (weight.codes.shape[0] * PANEL_ROWS if weight.groups > 1 else weight.n),
            weight.k,
            weight.groups,
        )

    def _aligned(self) -> bool:
        return self._problem()[0] * self.out_dtype.itemsize % 16 == 0


@dataclass(frozen=True)
class ExpertsLayer:
    """One layer of prepared routed experts (Layout.SM90), E of them local."""

    name: str
    operands: PreparedExperts
    topk: int
    known: int  # experts that ids name
    expert_map: torch.Tensor | None = None  # int [known] -> local id or -1
    swiglu_limit: float | None = None
    out_dtype: torch.dtype = torch.bfloat16
    ranks: int = 1  # data-parallel ranks whose tokens meet here

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(E, H, I)"""
        experts, hidden = self.operands.w2_row_scale.shape
        return experts, hidden, self.operands.w13_row_scale.shape[1] // 2

    @property
    def shape(self) -> tuple:
        return *self.sizes, self.topk, self.known, self.out_dtype

    def __str__(self) -> str:
        experts, hidden, intermediate = self.sizes
        return f"E = {experts} of {self.known}, H = {hidden}, I = {intermediate}, top-k = {self.topk}"

    def tiles(self, max_tokens: int, batch_invariant: bool) -> dict[ExpertTiles, int]:
        """Tiles that 1 .. max_tokens tokens take, each with a number of tokens that takes it."""
        experts, hidden, intermediate = self.sizes
        most = max_tokens * self.ranks
        return chosen_experts(hidden, intermediate, self.topk, experts, self.known, most, batch_invariant)

    def kernels(self, max_tokens: int, batch_invariant: bool) -> list[str]:
        """Names of the kernels behind `tiles`, those of one choice together."""
        return [sm90_experts.tiles_name(tiles) for tiles in self.tiles(max_tokens, batch_invariant)]


# (inputs, layer, tile, out) -> None, writes out; inputs are (x,), or for experts (x, top-k weights, top-k ids)
Multiply = Callable[
    [tuple[torch.Tensor, ...], Layer | ExpertsLayer, Config | ExpertTiles, torch.Tensor], None
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


def multiply(
    inputs: tuple[torch.Tensor, ...],
    layer: Layer | ExpertsLayer,
    tile: Config | ExpertTiles,
    out: torch.Tensor,
) -> None:
    """What the op computes, with one tile."""
    weight = layer.operands
    if isinstance(layer, Layer):
        sm90_linear.run(
            *inputs, weight.codes, weight.block_scales, weight.row_scale, layer.bias,
            n=weight.n, k=weight.k, groups=weight.groups, out_dtype=out.dtype, config=tile, out=out,
        )  # fmt: skip
        return
    x, weights, ids = inputs
    _, hidden, intermediate = layer.sizes
    sm90_experts.run(
        x, weight.w13_codes, weight.w13_block_scales, weight.w13_row_scale, weight.w2_codes, weight.w2_block_scales,
        weight.w2_row_scale, weights, ids, layer.expert_map, hidden=hidden, intermediate=intermediate,
        swiglu_limit=layer.swiglu_limit, out_dtype=out.dtype, config=tile, out=out,
    )  # fmt: skip


def _pick(count: int, wanted: int, generator: torch.Generator) -> torch.Tensor:
    """`wanted` different indices below `count`, ascending; the first and the last among them."""
    if count <= wanted:
        return torch.arange(count)
    inner = torch.randperm(count - 2, generator=generator)[: wanted - 2] + 1
    return torch.cat([torch.tensor([0, count - 1]), inner]).sort().values


def _exact(
    x: torch.Tensor, layer: Layer, panels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rows n [R] of `panels`, their products with x in float64 [T, R], what size these have by chance [R])."""
    weight = layer.operands
    codes, scales = weight.codes[panels], weight.block_scales[panels]
    plain = unpack_linear(codes, scales, PANEL_ROWS * len(panels), weight.k)
    values = dequantize(*plain, dtype=torch.float64).view(-1, PANEL_ROWS, weight.k)
    panels_per_group = weight.codes.shape[0] // weight.groups
    rows_per_group = weight.n // weight.groups
    group = panels // panels_per_group
    row = (panels % panels_per_group * PANEL_ROWS).unsqueeze(1) + torch.arange(PANEL_ROWS, device=x.device)
    real = row < rows_per_group  # the rest is padding
    n = ((group * rows_per_group).unsqueeze(1) + row)[real]
    tokens = x.double().view(len(x), weight.groups, weight.k)[:, group]
    row_scale = weight.row_scale[n].double()
    exact = torch.einsum("tpk,prk->tpr", tokens, values)[:, real] * row_scale
    size = values.norm(dim=-1)[real] * row_scale
    if layer.bias is not None:
        bias = layer.bias[n].double()
        exact, size = exact + bias, size + bias.abs()
    return n, exact, torch.where(size > 0, size, torch.ones_like(size))


def _check_finite(out: torch.Tensor) -> None:
    """Raise SelfCheckFailed if a poisoned result was not written everywhere."""
    finite = torch.isfinite(out)
    if not bool(finite.all()):
        missing = (~finite).nonzero()
        raise SelfCheckFailed(
            f"{len(missing)} of {out.numel()} results were not written or are not finite, the first at "
            f"[m, n] = {missing[0].tolist()}"
        )


def check_product(
    layer: Layer, m: int, tile: Config, generator: torch.Generator, multiply: Multiply = multiply
) -> float:
    """Multiply m random tokens by `layer` with `tile` -> the error over its limit, at most 1.

    `generator` is the CPU's. Raises SelfCheckFailed for a result that is not finite or too far from the
    float64 product.
    """
    weight = layer.operands
    device = weight.codes.device
    seed = int(torch.randint(1 << 31, (), generator=generator))
    x = torch.randn(
        m, weight.groups * weight.k, device=device, generator=torch.Generator(device).manual_seed(seed)
    ).to(torch.bfloat16)
    out = torch.full((m, weight.n), float("nan"), device=device, dtype=layer.out_dtype)
    multiply((x,), layer, tile, out)
    _check_finite(out)
    tokens = _pick(m, TOKENS, generator).to(device)
    rows, exact, size = _exact(x[tokens], layer, _pick(weight.codes.shape[0], PANELS, generator).to(device))
    # over their size, or rows with a small global scale would not count
    off = (out[tokens][:, rows].double() - exact) / size
    norm = (exact / size).norm()
    if norm == 0:
        if bool(off.any()):
            raise SelfCheckFailed("a weight of zeros gave a result")
        return 0.0
    error = float(off.norm() / norm)
    limit = F32_LIMIT
    if layer.out_dtype != torch.float32:
        limit = BF16_LIMIT * float(((exact.to(layer.out_dtype).double() - exact) / size).norm() / norm)
    if not error <= limit:
        worst = int(rows[off.norm(dim=0).argmax()])
        raise SelfCheckFailed(f"relative error {error:.3g}, allowed {limit:.3g}; row {worst} is furthest off")
    return error / limit


def _expert(layer: ExpertsLayer, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Decoded float64 weights of one local expert: (w13 [2I, H], gate rows first, w2 [H, I])."""
    weight, (_, hidden, intermediate) = layer.operands, layer.sizes
    w13 = unpack_linear(weight.w13_codes[expert], weight.w13_block_scales[expert], 2 * intermediate, hidden)
    w13 = dequantize(*(separate_gate_up(t) for t in w13), dtype=torch.float64)
    w2 = unpack_linear(weight.w2_codes[expert], weight.w2_block_scales[expert], hidden, intermediate)
    w2 = dequantize(*w2, dtype=torch.float64)
    return (
        w13 * weight.w13_row_scale[expert].double().unsqueeze(1),
        w2 * weight.w2_row_scale[expert].double().unsqueeze(1),
    )


def check_experts(
    layer: ExpertsLayer, m: int, tiles: ExpertTiles, generator: torch.Generator, multiply: Multiply = multiply
) -> float:
    """m random tokens through random experts of `layer` -> the error over its limit, at most 1.

    The limit follows from rounding to bf16 what every fused path stores: the intermediate, each expert's
    result and their sum. Raises as `check_product`.
    """
    _, hidden, intermediate = layer.sizes
    device = layer.operands.w13_codes.device
    on_device = torch.Generator(device).manual_seed(int(torch.randint(1 << 31, (), generator=generator)))
    x = torch.randn(m, hidden, device=device, generator=on_device).to(torch.bfloat16)
    ids = (
        torch.rand(m, layer.known, device=device, generator=on_device)
        .topk(layer.topk)
        .indices.to(torch.int32)
    )
    weights = torch.rand(m, layer.topk, device=device, generator=on_device) + 0.5
    out = torch.full((m, hidden), float("nan"), device=device, dtype=layer.out_dtype)
    # the kernels' scratch comes from this memory: what they leave out shows
    scratch = [
        torch.full((m * layer.topk, width), float("nan"), device=device, dtype=torch.bfloat16)
        for width in (intermediate, hidden)
    ]
    del scratch
    multiply((x, weights, ids), layer, tiles, out)
    _check_finite(out)
    local = ids.long() if layer.expert_map is None else layer.expert_map.long()[ids.long()]
    tokens = _pick(m, EXPERT_TOKENS, generator).tolist()
    exact = torch.zeros(len(tokens), hidden, device=device, dtype=torch.float64)
    rounded = exact.clone()
    for i, token in enumerate(tokens):
        for choice, expert in enumerate(local[token].tolist()):
            if expert < 0:
                continue
            w13, w2 = _expert(layer, expert)
            h = swiglu(*(w13 @ x[token].double()).chunk(2), layer.swiglu_limit)
            by = float(weights[token, choice])
            exact[i] += by * (w2 @ h)
            rounded[i] += by * (w2 @ h.to(torch.bfloat16).double()).to(torch.bfloat16).double()
    off, norm = out[tokens].double() - exact, exact.norm()
    if norm == 0:
        if bool(off.any()):
            raise SelfCheckFailed("tokens without a local expert, or whose experts are zeros, got a result")
        return 0.0
    error = float(off.norm() / norm)
    limit = BF16_LIMIT * float((rounded.to(layer.out_dtype).double() - exact).norm() / norm)
    if not error <= limit:
        worst = tokens[int(off.norm(dim=1).argmax())]
        raise SelfCheckFailed(
            f"relative error {error:.3g}, allowed {limit:.3g}; token {worst} is furthest off"
        )
    return error / limit


# --- stage one: in a child process ---


def synthetic(
    n: int, k: int, out_dtype: torch.dtype, has_bias: bool, device: torch.device, generator: torch.Generator
) -> Layer:
    """A layer of random operands: every code, scales from 2^-6 to 448 and zero, a global scale for each row."""
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randint(8, 127, (n, k // GROUP_SIZE), dtype=torch.uint8, generator=generator)
    scales[torch.rand(scales.shape, generator=generator) < 0.02] = 0
    global_scales = torch.rand(n, generator=generator) + 0.5
    operands = prepare_linear(
        codes.to(device), scales.view(SCALE_DTYPE).to(device), global_scales.to(device), [1] * n,
        layout=Layout.SM90, name="synthetic",
    )  # fmt: skip
    bias = torch.randn(n, generator=generator).to(device) * 1000 if has_bias else None
    return Layer("synthetic", operands, out_dtype, bias)


def synthetic_experts(topk: int, device: torch.device, generator: torch.Generator) -> ExpertsLayer:
    """A layer of five local random experts, with ragged sizes."""
    local, hidden, intermediate = 5, 272, 144

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
        layout=Layout.SM90, name="synthetic",
    )  # fmt: skip
    expert_map = torch.full((max(8, topk),), -1, dtype=torch.int32, device=device)
    expert_map[:7] = torch.tensor([2, -1, 0, 4, -1, 1, 3], dtype=torch.int32, device=device)
    return ExpertsLayer("synthetic", operands, topk, len(expert_map), expert_map, 2.0)


def load_kernel(name: str, topk: int) -> None:
    """Compile or load what `name` stands for."""
    if name in sm90_linear.shipped_kernels():
        sm90_linear.load(name)
    else:
        sm90_experts.load_tiles(sm90_experts.tiles_by_name()[name], topk, torch.bfloat16)


def check_kernel(name: str, topk: int, device: torch.device, multiply: Multiply = multiply) -> float:
    """A linear kernel, or the kernels of one choice of experts' tiles, on small ragged problems -> worst error."""
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
            load_kernel(name, request["topk"])
        say(phase="loaded", kernel=name)
        say(phase="checked", kernel=name, error=check_kernel(name, request["topk"], device, multiply))
    say(phase="done")


CHILD = (sys.executable, "-P", "-m", "cutedsl_nvfp4.selfcheck")  # -P: not what lies in the current folder
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
        telling = (line for line in reversed(said) if "Error" in line or "Failed" in line)
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
) -> Iterator[tuple[Layer | ExpertsLayer, Config | ExpertTiles, int]]:
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
