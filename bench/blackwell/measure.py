"""Blackwell's W4A4 kernels on layers of DeepSeek-V4 Flash: what devtools/kernels/check_blackwell.py checks and times.

Times are of one call, quantization of the activations included, in CUDA graphs over weights rotated past L2.
FlashInfer's linear, quantization included as well, is timed too, where it is installed.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from bench.shapes import Shape, model_shapes
from bench.timing import capture, copies, microseconds
from cutedsl_nvfp4.family import Layout
from cutedsl_nvfp4.prepare import prepare_experts
from cutedsl_nvfp4.selfcheck.products import ExpertsLayer, Layer, LinearLayer, multiply
from cutedsl_nvfp4.selfcheck.synthetic import synthetic_linear

LINEARS = (
    "wq_b/1",
    "wo_a/1",
    "wo_b/1",
    "shared_w13/1",
    "shared_w2/1",
    "wq_a_wkv",
    "compressor_r4",
    "indexer_weights",
)
FLOAT32 = ("compressor_r4",)  # of which the model wants float32
TOKENS = (1, 8, 64, 512, 4096)
LOCAL_EXPERTS, TOPK = 64, 6
HIDDEN, INTERMEDIATE = 4096, 2048
ACT_SCALE = 0.01


def linears(device: torch.device) -> Iterator[LinearLayer]:
    """Flash's linears with random operands; the first one twice: activations with one scale, and one each token."""
    generator = torch.Generator().manual_seed(0)
    for shape in model_shapes():
        model, _, name = shape.name.partition(".")
        if model == "flash" and name in LINEARS:
            out_dtype = torch.float32 if name in FLOAT32 else torch.bfloat16
            layer = synthetic_linear(
                shape.n,
                shape.k,
                out_dtype,
                False,
                device,
                generator,
                Layout.BLOCK_SCALED,
                shape.groups,
                ACT_SCALE,
            )
            yield replace(layer, name=shape.name)
            if name == LINEARS[0]:
                yield replace(layer, name=f"{shape.name}, a scale a token", act_scale=None)


def experts(device: torch.device) -> ExpertsLayer:
    """A quarter of Flash's routed experts, all of them local."""
    generator = torch.Generator(device).manual_seed(0)

    def random(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.randint(
            0, 256, (LOCAL_EXPERTS, n, k // 2), dtype=torch.uint8, generator=generator, device=device
        )
        scales = torch.randint(
            0x20, 0x50, (LOCAL_EXPERTS, n, k // 16), dtype=torch.uint8, generator=generator, device=device
        )
        return codes, scales.view(torch.float8_e4m3fn)

    size = 0.1 / HIDDEN**0.5  # brings gate and up near one
    operands = prepare_experts(
        *random(2 * INTERMEDIATE, HIDDEN), torch.full((LOCAL_EXPERTS, 2), size, device=device),
        *random(HIDDEN, INTERMEDIATE), torch.ones(LOCAL_EXPERTS, device=device),
        layout=Layout.BLOCK_SCALED, name="flash.experts",
    )  # fmt: skip
    return ExpertsLayer("flash.experts", operands, TOPK, LOCAL_EXPERTS, None, 10.0)


def _copies_of(layer: Layer) -> list[Layer]:
    """The layer and as many clones of its weights as L2 does not hold."""
    weight = layer.operands
    names = [n for n in vars(weight) if n.endswith(("codes", "block_scales"))]
    size = sum(getattr(weight, n).nbytes for n in names)
    clones = [
        replace(weight, **{n: getattr(weight, n).clone() for n in names}) for _ in range(copies(size) - 1)
    ]
    return [layer, *(replace(layer, operands=clone) for clone in clones)]


def flashinfer_linear(layer: LinearLayer, x: torch.Tensor) -> Callable[[LinearLayer], torch.Tensor]:
    """FlashInfer's quantization and product of the same operands; one global scale, so the results differ by rows'."""
    from flashinfer import fp4_quantize, mm_fp4

    alpha = layer.act_scale * layer.operands.row_scale[:1]
    inverse = 1 / layer.act_scale

    def call(each: Layer) -> torch.Tensor:
        weight = each.operands
        codes, scales = fp4_quantize(x, inverse)
        w_scales = weight.block_scales.view(weight.block_scales.shape[0] * 128, -1)
        return mm_fp4(codes, weight.codes.T, scales, w_scales.T, alpha, torch.bfloat16)

    return call


def measure_linear(layer: Layer, m: int) -> dict:
    """{"layer", "m", "us": {name: microseconds}, "failed": {name: why}, "gbytes_per_s", "tflops"}"""
    weight = layer.operands
    x = torch.randn(m, weight.groups * weight.k, device=weight.codes.device).to(torch.bfloat16)
    out = torch.empty(m, weight.n, dtype=layer.out_dtype, device=x.device)
    rotated = _copies_of(layer)
    row = {"layer": layer.name, "n": weight.n, "k": weight.k, "groups": weight.groups, "m": m, "failed": {}}
    calls: dict[str, Callable] = {"ours": lambda each: multiply((x,), each, None, out)}
    if layer.act_scale is not None and weight.groups == 1 and layer.out_dtype == torch.bfloat16:
        try:
            calls["flashinfer"] = flashinfer_linear(layer, x)
        except ImportError as missing:
            row["failed"]["flashinfer"] = str(missing)
    row["us"] = {}
    for name, call in calls.items():
        try:
            graph = capture([lambda each=each, call=call: call(each) for each in rotated])
            row["us"][name] = microseconds(graph, len(rotated))
        except Exception as error:  # a peer's: it is told in the report
            if name == "ours":
                raise
            row["failed"][name] = f"{type(error).__name__}: {error}"
    moved = Shape("", weight.n, weight.k).weight_bytes + 2 * x.numel() + out.nbytes
    return _rates(row, moved, 2 * m * weight.n * weight.k)


def measure_experts(layer: ExpertsLayer, m: int) -> dict:
    """The same for experts, m tokens with random experts each."""
    device = layer.operands.w13_codes.device
    count, hidden, intermediate = layer.sizes
    x = torch.randn(m, hidden, device=device).to(torch.bfloat16)
    ids = torch.rand(m, count, device=device).topk(layer.topk).indices.to(torch.int32)
    weights = torch.rand(m, layer.topk, device=device)
    out = torch.empty(m, hidden, dtype=layer.out_dtype, device=device)
    row = {"layer": layer.name, "experts": count, "m": m, "failed": {}}
    graph = capture(
        [lambda: multiply((x, weights, ids), layer, None, out)]
    )  # no tile named: the kernels choose
    row["us"] = {"ours": microseconds(graph, 1)}
    touched = ids.unique().numel()
    moved = touched * 3 * hidden * intermediate * 9 // 16 + 4 * m * hidden
    return _rates(row, moved, 6 * m * layer.topk * hidden * intermediate)


def _rates(row: dict, moved: int, products: int) -> dict:
    row["gbytes_per_s"] = moved / row["us"]["ours"] / 1e3
    row["tflops"] = products / row["us"]["ours"] / 1e6
    return row
