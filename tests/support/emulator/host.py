"""A compiled kernel as a Python function on CPU tensors: its own host code, its own PTX.

The object file that would be shipped is linked to runtime.c instead of CuTe DSL's runtime. What its host code launches
is run by machine.py on the memory of the tensors it was called with, which it takes for tensors of a CUDA device.
"""

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tests.support.emulator import machine, memory, ptx

_LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))
_CUDA = 2  # DLPack's number


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32 * 3),
        ("dynamic_shared", ctypes.c_uint64),
    )


class _OnCuda:
    """A CPU tensor that says it is on cuda:0."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **_: object) -> object:
        capsule = torch.utils.dlpack.to_dlpack(self.tensor)
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        address = pointer(capsule, b"dltensor")
        ctypes.c_int32.from_address(address + 8).value = _CUDA  # DLTensor.device.device_type
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CUDA, 0


def _keeping_ptx(build: Callable[[], Callable], folder: Path) -> Callable:
    """What `build` compiles, whose PTX goes to `folder`."""
    import cutlass.cute as cute

    compile_kernel = cute.compile
    cute.compile = lambda *arguments, options="", **named: compile_kernel(
        *arguments, options=f"{options} --keep-ptx --dump-dir {folder}", **named
    )
    try:
        return build()
    finally:
        cute.compile = compile_kernel


class EmulatedKernel:
    """f(*tensors and numbers): what `compile_kernel(...)` compiled, on the CPU."""

    def __init__(self, build: Callable[[], Callable], name: str = "emulated") -> None:
        """`build` compiles it (cute.compile) and returns the function."""
        self.folder = tempfile.TemporaryDirectory()
        folder = Path(self.folder.name)
        function = _keeping_ptx(build, folder)
        self.kernels: dict[str, ptx.Kernel] = {}
        for file in folder.glob("*.ptx"):
            self.kernels.update(ptx.parse(file.read_text()))
        function.export_to_c(object_file_path=str(folder / "kernel.o"), function_name=name)
        library = folder / "kernel.so"
        runtime = Path(__file__).with_name("runtime.c")
        import tvm_ffi

        ffi = Path(tvm_ffi.__file__).parent / "lib"
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-w", "-Wl,-Bsymbolic", "-o", library, folder / "kernel.o", runtime,
             f"-L{ffi}", "-ltvm_ffi", f"-Wl,-rpath,{ffi}"],
            check=True,
        )  # fmt: skip
        self._callback = _LAUNCH(self._launch)
        self._library = ctypes.CDLL(str(library), mode=os.RTLD_LOCAL)
        self._library.emulator_set_launch(self._callback)
        self._module = tvm_ffi.load_module(str(library))
        self._function = self._module[name]
        self._regions: list[tuple[int, int, str]] = []
        self._error: BaseException | None = None
        self.lazy: frozenset[str] = frozenset()
        self.seed = 0
        self.instructions = 0

    def __call__(self, *arguments: object) -> None:
        """Host code, then its launches. Tensors become operands: accesses outside them are a Fault."""
        import tvm_ffi

        self._regions, given = [], []
        for index, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor):
                argument = argument.as_subclass(torch.Tensor)
                storage = argument.untyped_storage()
                first = argument.data_ptr()
                end = storage.data_ptr() + storage.nbytes()
                self._regions.append((first, end - first, f"argument {index}"))
                argument = tvm_ffi.from_dlpack(_OnCuda(argument))
            given.append(argument)
        self._call(*given)

    def call_with_pointers(self, tensors: tuple[torch.Tensor, ...], *numbers: object) -> None:
        """The same for a kernel that takes its operands' addresses."""
        sizes = ((t.data_ptr(), t.nbytes) for t in tensors)
        self._regions = [(*size, f"argument {index}") for index, size in enumerate(sizes)]
        self._call(*(ctypes.c_void_p(t.data_ptr()) for t in tensors), *numbers)

    def _call(self, *arguments: object) -> None:
        self._error = None
        self._function(*arguments)
        if self._error is not None:
            raise self._error

    def _launch(self, name: bytes, launch: int, parameters: object) -> int:
        try:
            about = _Launch.from_address(launch)
            kernel = self.kernels[name.decode()]
            size = max((p.offset + p.size for p in kernel.parameters.values()), default=0)
            block = np.zeros(-(-size // 64) * 64, dtype=np.uint8)
            for index, parameter in enumerate(kernel.parameters.values()):
                raw = ctypes.string_at(parameters[index], parameter.size)
                block[parameter.offset : parameter.offset + parameter.size] = np.frombuffer(raw, np.uint8)
            grid = machine.Grid(
                kernel, tuple(about.grid), tuple(about.block), tuple(about.cluster), about.dynamic_shared, block,
                memory.HostMemory(self._regions),
            )  # fmt: skip
            self.instructions += machine.run(grid, self.lazy, self.seed)
        except BaseException as error:  # a callback cannot raise through the host code
            self._error = error
        return 0
