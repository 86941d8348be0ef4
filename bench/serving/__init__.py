"""Servers: step times, and checkpoints to time them with."""
