"""Compiled kernels by name: from a library made ahead of time, else compiled once, now.

Kernels are compiled against symbolic shapes, so one object serves every M, N and K of its configuration,
and through TVM FFI: the compiled function takes torch tensors, runs on torch's current stream and spends no
time in Python. Compiling needs no GPU: the architecture is named, never detected.
`settings.kernels_folder` names the libraries, <name>.so made by `export`; `settings.forbids_jit` makes a kernel that
is not among them an error.
"""

import ctypes
import pathlib
import subprocess
import threading
from collections.abc import Callable
from functools import cache

from . import settings

_lock = threading.Lock()
_functions: dict[str, Callable] = {}
_libraries: list = []  # an unloaded library takes its functions with it


def compiled(name: str, build: Callable[[], Callable]) -> Callable:
    """The kernel called `name`; `build()` compiles it the first time it is asked for.

    Raises RuntimeError where compiling is forbidden and no library holds the kernel.
    """
    found = _functions.get(name)
    if found is None:
        with _lock:
            found = _functions.get(name)
            if found is None:
                found = _functions[name] = _load(name) or _build(name, build)
    return found


@cache
def _libraries_in(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """{name: library} of the kernels below `folder`."""
    return {path.stem: path for path in folder.rglob("*.so")}


def _load(name: str) -> Callable | None:
    folder = settings.kernels_folder()
    path = _libraries_in(folder).get(name) if folder else None
    if path is None:
        return None
    _load_runtime()
    import tvm_ffi

    library = tvm_ffi.load_module(str(path))
    _libraries.append(library)
    return library[name]


def _load_runtime() -> None:
    """Make CuTe DSL's runtime library, which exported kernels call, known to the linker."""
    name = "libcute_dsl_runtime.so"
    try:
        ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
    except OSError:  # not on the library path: it comes with the nvidia-cutlass-dsl package
        from cutlass.cute.runtime import find_runtime_libraries

        (path,) = [p for p in find_runtime_libraries(enable_tvm_ffi=False) if p.endswith(name)]
        ctypes.CDLL(path, ctypes.RTLD_GLOBAL)


def _build(name: str, build: Callable[[], Callable]) -> Callable:
    if settings.forbids_jit():
        raise RuntimeError(
            f"no compiled kernel {name} in {settings.KERNELS}={settings.kernels_folder()}, and "
            f"{settings.FORBID_JIT}=1 forbids compiling one now; compile it ahead of time, or unset that variable"
        )
    return build()


def compile_kernel(kernel: Callable, *arguments, arch: str, options: str = "") -> Callable:
    """cute.compile `kernel` for `arch` (such as "sm_90a") against fake or real arguments."""
    import cutlass.cute as cute

    return cute.compile(kernel, *arguments, options=f"--gpu-arch {arch} --enable-tvm-ffi {options}".strip())


def export(function: Callable, name: str, folder: pathlib.Path) -> pathlib.Path:
    """Write a kernel from `compile_kernel` as <folder>/<name>.so; the C compiler links it -> its path."""
    from cutlass.cute.runtime import find_runtime_libraries

    folder.mkdir(parents=True, exist_ok=True)
    object_file, library = folder / f"{name}.o", folder / f"{name}.so"
    function.export_to_c(object_file_path=str(object_file), function_name=name)
    runtime = find_runtime_libraries(enable_tvm_ffi=True)
    subprocess.run(["cc", "-shared", "-o", str(library), str(object_file), *runtime], check=True)
    object_file.unlink()
    return library
