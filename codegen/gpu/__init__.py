"""Triton kernels for GPUs: rendered from the folder `sources` or written by hand, configured and launched."""
