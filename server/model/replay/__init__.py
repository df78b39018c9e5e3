"""Decode steps on a CPU, replayed without the Python of the model: noted once, then run from a list."""
