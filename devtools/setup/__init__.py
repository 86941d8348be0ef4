"""Make .venv, look at the machine, serve the demo."""
