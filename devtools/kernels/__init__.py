"""Compile kernels ahead of time, read their machine code, check the layers of the package."""
