"""Read kernels' machine code (SASS)."""
