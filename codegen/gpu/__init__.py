"""Kernels for GPUs in Triton: rendered from the folder `sources` or written as they are, configured and launched."""
