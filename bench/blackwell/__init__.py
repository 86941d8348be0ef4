"""Blackwell's kernels: timed, and read beside NVIDIA's own."""
