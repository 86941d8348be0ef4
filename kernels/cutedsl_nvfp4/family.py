"""Families of kernels: what a folder such as sm90/ offers, and which one multiplies which operands on which device.

A family is the kernels of one group of architectures that share an operand layout and an arithmetic. Its folder holds
FAMILY (in `__init__.py`) and two modules that keep the protocols below: `linear` and `experts`. A new chip is one
folder and its name in FOLDERS; a second kernel for a chip is a tile of another class, which `kernels` maps to it.

This module imports neither CuTe DSL nor a family's kernels: those are imported when they are asked for.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache, cached_property
from typing import Any, Protocol

import torch

from .compiled import compiled

FOLDERS = ("sm90", "sm100", "sm120")


class Layout(StrEnum):
    """Operand layout of prepared weights."""

    PLAIN = "plain"  # the checkpoint's own layout, read by reference.py
    SM90 = "sm90"  # panels of 64 rows in the order of the tensor core's fragments (sm90/layout.py)
    BLOCK_SCALED = "block_scaled"  # the checkpoint's codes, block scales in 128x4 tiles (blackwell/layout.py)


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel: its name, what compiles it, and what it was compiled for."""

    name: str  # in `compiled` and in the ahead-of-time library
    module: str  # of this package, such as "sm90.compile"
    kind: str  # compile_<kind> of that module compiles it: linear, product, route, gather, combine, quantize
    arguments: tuple  # of that function
    tile: Any = None  # of kernels with a main loop
    out_dtype: torch.dtype | None = None  # of linear kernels, as the next two
    has_bias: bool | None = None  # None: the kernel takes both
    aligned: bool | None = None  # whether rows of the result are whole 16-byte pieces; None: it takes both

    def build(self, options: str = "") -> Callable:
        """Compile it; needs CuTe DSL, and no GPU."""
        module = importlib.import_module(f".{self.module}", __package__)
        return getattr(module, f"compile_{self.kind}")(*self.arguments, options=options)

    def load(self) -> Callable:
        """The kernel, from the library made ahead of time, else compiled at the first call."""
        return compiled(self.name, self.build)


@dataclass(frozen=True)
class LinearProblem:
    """A linear layer as the choice of its kernels sees it: weight [n, k], of `groups` blocks on the diagonal."""

    n: int
    k: int
    groups: int = 1
    out_dtype: torch.dtype = torch.bfloat16
    has_bias: bool = False
    static: bool = False  # under W4A4: whether the activations' global scale is known beforehand


@dataclass(frozen=True)
class ExpertsProblem:
    """A layer of routed experts as the choice of its kernels sees it."""

    hidden: int
    intermediate: int
    topk: int
    num_local_experts: int
    num_global_experts: int
    out_dtype: torch.dtype = torch.bfloat16
    static: bool = False  # as LinearProblem's


class Linear(Protocol):
    """What a family's `linear` module offers."""

    def run(
        self,
        x: torch.Tensor,  # bf16 [M, groups * K]
        codes: torch.Tensor,  # codes, block scales and row scale from prepare_linear for the family's layout
        block_scales: torch.Tensor,
        row_scale: torch.Tensor,  # f32 [N]
        act_scale: torch.Tensor | None = None,  # f32 [1] or [M] under W4A4; None: each token's own
        bias: torch.Tensor | None = None,  # f32 or bf16 [N]
        *,
        n: int,
        k: int,
        groups: int = 1,
        out_dtype: torch.dtype = torch.bfloat16,
        batch_invariant: bool = False,
        tile: Any = None,  # overrides the choice
        out: torch.Tensor | None = None,  # receives the result instead of new memory
    ) -> torch.Tensor:
        """NVFP4 linear -> [M, N] of `out_dtype`, on torch's current stream."""

    def chosen(self, problem: LinearProblem, max_tokens: int, batch_invariant: bool) -> dict[Any, int]:
        """Every tile that `run` takes for 1 .. max_tokens tokens, each with the fewest tokens that take it."""

    def kernels(self, problem: LinearProblem, tile: Any, arch: str) -> list[Kernel]:
        """The kernels that `run` launches with `tile`, in their order."""

    def shipped(self, arch: str) -> dict[str, Kernel]:
        """{name: kernel} of everything that `run` can ask for on `arch`, but for the quantizer."""


class Experts(Protocol):
    """What a family's `experts` module offers."""

    def run(
        self,
        x: torch.Tensor,  # bf16 [M, H]
        w13_codes: torch.Tensor,  # these six from prepare_experts for the family's layout
        w13_block_scales: torch.Tensor,
        w13_row_scale: torch.Tensor,
        w2_codes: torch.Tensor,
        w2_block_scales: torch.Tensor,
        w2_row_scale: torch.Tensor,
        topk_weights: torch.Tensor,  # f32 [M, T]
        topk_ids: torch.Tensor,  # int [M, T], global expert ids; others are skipped
        act_scale_13: torch.Tensor | None = None,  # f32 [1] or [E] under W4A4; None: per token
        act_scale_2: torch.Tensor | None = None,  # f32 [1] or [E] under W4A4; None: per (token, choice) pair
        expert_map: torch.Tensor | None = None,  # int [global experts] -> local id or -1
        *,
        hidden: int,
        intermediate: int,
        swiglu_limit: float | None = None,
        out_dtype: torch.dtype = torch.bfloat16,
        batch_invariant: bool = False,
        tiles: Any = None,  # overrides the choice
        out: torch.Tensor | None = None,  # receives the result instead of new memory
    ) -> torch.Tensor:
        """Mixture of NVFP4 experts -> [M, H] of `out_dtype`, on torch's current stream; see reference.experts."""

    def chosen(self, problem: ExpertsProblem, max_tokens: int, batch_invariant: bool) -> dict[Any, int]:
        """Every pair of tiles that `run` takes for 1 .. max_tokens tokens, each with the fewest that take it."""

    def kernels(self, problem: ExpertsProblem, tiles: Any, arch: str) -> list[Kernel]:
        """The kernels that `run` launches with `tiles`, each once."""

    def shipped(self, arch: str) -> dict[str, Kernel]:
        """{name: kernel} of everything that a served model's `run` can ask for on `arch`."""

    def choices(self) -> dict[str, Any]:
        """{name: tiles} of every pair of tiles that a served model's `run` can take."""


@dataclass(frozen=True)
class Family:
    """The kernels of one folder."""

    name: str  # the folder
    chip: str  # how messages call it
    capabilities: tuple[int, ...]  # compute capabilities, major * 10 + minor
    layout: Layout
    w4a4: bool  # activations are rounded to NVFP4; else weights are decoded and activations stay bf16 (W4A16)
    batch_invariant: bool  # whether a row's result can be computed independently of the other rows
    proven: bool  # whether this project has run the kernels on such a device
    f32_limit: float  # relative error of a float32 result that the self-check allows

    @cached_property
    def linear(self) -> Linear:
        return importlib.import_module(f".{self.name}.linear", __package__)

    @cached_property
    def experts(self) -> Experts:
        return importlib.import_module(f".{self.name}.experts", __package__)

    @property
    def architectures(self) -> tuple[str, ...]:
        return tuple(f"sm_{capability}a" for capability in self.capabilities)

    def arch_of(self, device: torch.device) -> str:
        """The architecture of `device`'s kernels: "sm_100a" on a B200."""
        if len(self.capabilities) == 1:
            return self.architectures[0]
        return arch_of(device)

    def quantizers(self, arch: str) -> dict[str, Kernel]:
        """{name: kernel} that round activations, under W4A4."""
        if not self.w4a4:
            return {}
        return importlib.import_module(".blackwell.quantize", __package__).shipped(arch)

    def shipped(self, arch: str) -> dict[str, Kernel]:
        """{name: kernel} of everything compiled ahead of time for `arch`."""
        return {**self.quantizers(arch), **self.linear.shipped(arch), **self.experts.shipped(arch)}

    def require(self, quantize_activations: bool, batch_invariant: bool) -> None:
        """Raise ValueError unless the kernels do what is asked."""
        if quantize_activations is not self.w4a4:
            arithmetic = "W4A4" if self.w4a4 else "W4A16"
            raise ValueError(f"operands prepared for {self.chip} are multiplied in {arithmetic} only")
        if batch_invariant and not self.batch_invariant:
            raise ValueError(f"the {self.chip} kernels do not promise batch-invariant results")


@cache
def families() -> tuple[Family, ...]:
    return tuple(importlib.import_module(f".{folder}", __package__).FAMILY for folder in FOLDERS)


def family_of(capability: int | None) -> Family | None:
    """The family whose kernels run on devices of `capability` (90 for sm_90), if there is one."""
    return next((family for family in families() if capability in family.capabilities), None)


def family_of_arch(arch: str) -> Family:
    """The family of `arch`, such as "sm_90a"; KeyError for one that has none."""
    return {arch: family for family in families() for arch in family.architectures}[arch]


def family_for(layout: Layout, device: torch.device) -> Family:
    """The family that multiplies operands of `layout` on `device`; ValueError if none does."""
    fitting = [family for family in families() if family.layout is layout]
    if len(fitting) == 1:
        return fitting[0]
    found = family_of(capability_of(device))
    if found not in fitting:
        raise ValueError(f"operands of layout {layout} cannot be multiplied on {device}: prepare them there")
    return found


@cache
def capability_of(device: torch.device) -> int:
    """Compute capability of a CUDA device, 90 for sm_90; raises ValueError for a device of another kind."""
    if device.type != "cuda":
        raise ValueError(f"prepared operands are multiplied on a CUDA device, got {device}")
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def arch_of(device: torch.device) -> str:
    """The architecture of a CUDA device's kernels: "sm_100a" on a B200; raises as `capability_of`."""
    return f"sm_{capability_of(device)}a"


@cache
def sm_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
