"""Correctness and speed of the generated kernels on a GPU."""
