"""Blackwell kernels for workstations (sm_120a, sm_121a): W4A4 on the warp-level MMA."""
