"""NVIDIA's own NVFP4 kernels in CuTe DSL, compiled from the sources of packages on PyPI: to compare ours with.

Nothing is installed: the wheels' Python files go to .cache (devtools/patches/vllm_source.py). The kernel files are
imported from there without the packages around them, which need a GPU. Needs nvidia-cutlass-dsl; no GPU.
"""

import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float4E2M1FN, Float8E4M3FN, Float32, Int32, Int64
from cutlass.cute.nvgpu.common import OperandMajorMode
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_ptr

from devtools.patches.vllm_source import source_tree

OPERATORS = ("nvidia-cutlass-operators", "0.3.0")
FLASHINFER = ("flashinfer-python", "0.7.0.post1")  # what vLLM 0.32.0 asks for
TOPK = 6


def _package(name: str, folder: Path) -> None:
    """Make `name` importable without running its __init__."""
    if name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package


def _flashinfer(module: str) -> ModuleType:
    """`module` of FlashInfer's sources."""
    root = source_tree(FLASHINFER[1], FLASHINFER[0])
    for name in (
        "flashinfer",
        "flashinfer.cute_dsl",
        "flashinfer.fused_moe",
        "flashinfer.fused_moe.cute_dsl",
        "flashinfer.fused_moe.cute_dsl.blackwell",
        "flashinfer.gemm",
        "flashinfer.gemm.kernels",
        "flashinfer.quantization",
    ):
        _package(name, root / name.replace(".", "/"))
    if "flashinfer.jit.moe_utils" not in sys.modules:  # builds C++ when it is used, which nothing here does
        _package("flashinfer.jit", root / "flashinfer/jit")
        unused = ModuleType("flashinfer.jit.moe_utils")
        unused.gen_moe_utils_module = None
        sys.modules["flashinfer.jit.moe_utils"] = unused
    return import_module(f"flashinfer.{module}")


def _operators(path: str) -> ModuleType:
    """A file of nvidia-cutlass-operators as a module."""
    file = source_tree(OPERATORS[1], OPERATORS[0]) / "cutlass/operators/providers/cutedsl" / path
    spec = spec_from_file_location(file.stem, file)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _pointer(element: type, alignment: int = 32) -> object:
    return make_ptr(element, 1024, cute.AddressSpace.gmem, assumed_align=alignment)


def _compile(kernel: Callable, *arguments: object, arch: str, options: str, **named: object) -> Callable:
    # their sources use names that the DSL is going to drop; both are pinned
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        return cute.compile(kernel, *arguments, options=f"--gpu-arch {arch} {options}".strip(), **named)


def dense_sm100(m: int, n: int, arch: str, options: str = "") -> Callable:
    """[M, K] @ [N, K]^T with tiles of m x n: one CTA for m = 128, two for 256."""
    implementation = _operators("gemm/implementations/sm100_dense_blockscaled_static_persistent_impl.py")
    cluster = (m // 128, 1)
    kernel = implementation.PersistentDenseBlockScaledGemmKernel(16, (m, n), cluster)
    pointers = [_pointer(t) for t in (Float4E2M1FN, Float4E2M1FN, Float8E4M3FN, Float8E4M3FN, BFloat16)]
    layouts = OperandMajorMode.K, OperandMajorMode.K, cutlass.tensor_utils.LayoutEnum.ROW_MAJOR
    problem = tuple(Int32(1024) for _ in range(4))
    return _compile(
        kernel, *pointers, layouts, problem, 148 // cluster[0], make_fake_stream(), arch=arch, options=options
    )


def _dense_flashinfer(kernel: object, arch: str, options: str) -> Callable:
    def matrix(element: type) -> object:
        shape = cute.sym_int(), cute.sym_int()
        return make_fake_compact_tensor(element, shape, stride_order=(1, 0), assumed_align=16)

    a, b, c = matrix(cutlass.Uint8), matrix(cutlass.Uint8), matrix(BFloat16)
    alpha = make_fake_compact_tensor(Float32, (1,), assumed_align=4)
    scales = _pointer(Float8E4M3FN, 16), _pointer(Float8E4M3FN, 16)
    tiles = (Int64(8),) * 3
    return _compile(
        kernel.wrapper,
        a,
        b,
        c,
        *tiles,
        1,
        *scales,
        alpha,
        148,
        make_fake_stream(),
        arch=arch,
        options=options,
    )


def dense_sm120(m: int, n: int, arch: str, options: str = "") -> Callable:
    """The same with the warp-level instruction; m counts rows of x."""
    kernels = _flashinfer("gemm.kernels.dense_blockscaled_gemm_sm120_b12x")
    return _dense_flashinfer(kernels.DenseGemmKernel(16, (m, n), (1, 1), enable_pdl=False), arch, options)


def gather_swiglu_sm100(m: int, n: int, arch: str, options: str = "") -> Callable:
    """Experts' first product: gathered tokens, SwiGLU, quantized again."""
    kernels = _flashinfer(
        "fused_moe.cute_dsl.blackwell.blockscaled_contiguous_gather_grouped_gemm_act_fusion"
    )
    cluster = (m // 128, 1)
    kernel = kernels.BlockScaledContiguousGatherGroupedGemmKernel(
        16, (m, n), cluster, vectorized_f32=True, topk=TOPK, enable_pdl=False
    )
    elements = Float4E2M1FN, Float4E2M1FN, Float8E4M3FN, Float8E4M3FN, Float4E2M1FN, Float8E4M3FN
    pointers = [_pointer(t) for t in (*elements, Float32, Int32, Int32, Int32, Int32, Float32)]
    return _grouped(kernel, pointers, 5, m, cluster, arch, options)


def finalize_sm100(m: int, n: int, arch: str, options: str = "") -> Callable:
    """Experts' second product with the weighted sum over a token's experts."""
    kernels = _flashinfer("fused_moe.cute_dsl.blackwell.blockscaled_contiguous_grouped_gemm_finalize_fusion")
    cluster = (m // 128, 1)
    kernel = kernels.Sm100BlockScaledContiguousGroupedGemmFinalizeFusionKernel(
        16, (m, n), cluster, enable_pdl=False
    )
    elements = Float4E2M1FN, Float4E2M1FN, Float8E4M3FN, Float8E4M3FN, BFloat16
    pointers = [_pointer(t) for t in (*elements, Float32, Int32, Int32, Int32, Int32, Float32)]
    return _grouped(kernel, pointers, 6, m, cluster, arch, options)


def _grouped(
    kernel: object, pointers: list, sizes: int, m: int, cluster: tuple[int, int], arch: str, options: str
) -> Callable:
    per_token_scale = None
    return _compile(
        kernel.wrapper, *pointers, per_token_scale, *(Int64(1024),) * sizes, tile_size=m, scaling_vector_size=16,
        max_active_clusters=148 // cluster[0], stream=make_fake_stream(), arch=arch, options=options,
    )  # fmt: skip


# by kind of kernel and family: (where it is from, what compiles it for a tile of m x n)
EXAMPLES: dict[tuple[str, str], tuple[str, Callable]] = {
    ("linear", "sm100"): (" ".join(OPERATORS), dense_sm100),
    ("w13", "sm100"): (" ".join(FLASHINFER), gather_swiglu_sm100),
    ("w2", "sm100"): (" ".join(FLASHINFER), finalize_sm100),
    # its experts for workstations are one kernel for both products: the dense one's loop is the same kind
    **dict.fromkeys(
        ((kind, "sm120") for kind in ("linear", "w13", "w2")), (" ".join(FLASHINFER), dense_sm120)
    ),
}
