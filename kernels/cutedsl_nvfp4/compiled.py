"""Compile a CuTe DSL kernel once per configuration, with or without a GPU, for a call that costs microseconds.

Kernels are compiled against symbolic shapes, so one object serves every M, N and K of its configuration,
and through TVM FFI: the compiled function takes torch tensors, runs on torch's current stream and spends
no time in Python. Compiling needs no GPU: the architecture is named, never detected.
"""

import os
import threading
from collections.abc import Callable, Hashable

FORBID_JIT = "CUTEDSL_NVFP4_FORBID_JIT"

_lock = threading.Lock()
_cache: dict[Hashable, Callable] = {}


def compiled(key: Hashable, build: Callable[[], Callable]) -> Callable:
    """The compiled kernel for `key`; `build()` compiles it the first time it is asked for.

    Raises RuntimeError where compiling is forbidden (CUTEDSL_NVFP4_FORBID_JIT=1) and `key` is missing.
    """
    found = _cache.get(key)
    if found is None:
        with _lock:
            found = _cache.get(key)
            if found is None:
                if os.environ.get(FORBID_JIT) == "1":
                    raise RuntimeError(
                        f"no compiled kernel for {key} and {FORBID_JIT}=1 forbids compiling one now; "
                        f"compile it ahead of time, or unset {FORBID_JIT}"
                    )
                found = _cache[key] = build()
    return found


def compile_kernel(kernel: Callable, *arguments, arch: str, options: str = "") -> Callable:
    """cute.compile `kernel` for `arch` (such as "sm_90a") against fake or real arguments."""
    import cutlass.cute as cute

    return cute.compile(kernel, *arguments, options=f"--gpu-arch {arch} --enable-tvm-ffi {options}".strip())
