"""Blackwell's kernels: timed, and their machine code compared with NVIDIA's own."""
