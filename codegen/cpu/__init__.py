"""Kernels for CPUs: C++ files of the folder `sources`, rendered, compiled and called."""
