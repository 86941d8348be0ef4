"""Benchmarks of the kernels and of servers: run as `PYTHONPATH=kernels python3 -m bench.linear.measure`."""
