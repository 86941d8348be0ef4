"""NVFP4 kernels for Hopper (compute capability 9.0): bf16 activations, weights decoded to bf16 in registers."""
