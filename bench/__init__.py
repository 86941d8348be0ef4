"""Benchmarks of kernels and of servers. In the root: `PYTHONPATH=kernels python3 -m bench.linear.measure --help`."""
