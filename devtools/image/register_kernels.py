#!/usr/bin/env python3
"""Register this package's kernels in the installed vLLM and prove that they stand first.

    devtools/image/register_kernels.py

Prints vLLM's NVFP4 linear and mixture-of-experts lists in selection order for CUDA and the CPU, what each
of ours answers on this machine, and exits 1 unless ours is first everywhere. The image's build runs it.
"""

import argparse
import sys


def linear_lists() -> dict[str, list[type]]:
    """vLLM's NVFP4 linear kernels by platform, in selection order, after registration."""
    from vllm.model_executor.kernels.linear import _POSSIBLE_NVFP4_KERNELS
    from vllm.platforms.interface import PlatformEnum

    return {
        platform.name: _POSSIBLE_NVFP4_KERNELS[platform] for platform in (PlatformEnum.CUDA, PlatformEnum.CPU)
    }


def main() -> int:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import AUTO_NVFP4_BACKENDS, backend_to_kernel_cls

    from cutedsl_nvfp4 import support
    from cutedsl_nvfp4.vllm import plugin
    from cutedsl_nvfp4.vllm.backend import current_support
    from cutedsl_nvfp4.vllm.experts import CuTeDSLNvFp4Experts
    from cutedsl_nvfp4.vllm.linear import CuTeDSLNvFp4LinearKernel

    plugin.register()
    good = True
    for platform, kernels in linear_lists().items():
        print(f"NVFP4 linear kernels on {platform}:")
        for rank, kernel in enumerate(kernels, 1):
            print(f"  {rank:2} {kernel.__name__}")
        good &= kernels[0] is CuTeDSLNvFp4LinearKernel
    print("NVFP4 MoE backends:")
    for rank, backend in enumerate(AUTO_NVFP4_BACKENDS, 1):
        print(f"  {rank:2} {backend.value}")
    good &= backend_to_kernel_cls(AUTO_NVFP4_BACKENDS[0]) == [CuTeDSLNvFp4Experts]
    for name, operation in (("linear", support.linear), ("experts", support.experts)):
        found = current_support(operation)
        print(f"{name} on this machine: {found.implementation if found else found.reason}")
    print("ours is first" if good else "ours is NOT first", file=sys.stdout if good else sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
