"""The experts' kernels and their peers."""
