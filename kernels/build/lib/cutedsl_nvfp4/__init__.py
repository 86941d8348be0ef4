"""NVFP4 linear and mixture-of-experts kernels in CuTe DSL, and the vLLM plugin that serves with them.

Importing this package touches no GPU, compiles nothing and patches nothing.
"""

__version__ = "0.1.0"
