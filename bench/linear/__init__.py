"""The linear kernels and their peers."""
