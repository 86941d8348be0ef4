"""Checkpoints on disk: read, name, convert, inspect and compare them, and plan the memory they need."""
