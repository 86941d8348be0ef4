"""Tests, in the rooms of the code they test. `support` holds what they share; no test module imports another."""
