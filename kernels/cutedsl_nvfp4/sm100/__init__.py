"""Blackwell kernels for data centres (sm_100a, sm_103a): W4A4 on tcgen05."""
