"""Kernels made from text: a `KernelSpec` says what, a renderer writes the file, `build` makes it callable.

- `render(spec, "cpp")`: one C++ file for CPUs (cpu/attention.py); `render(spec, "triton")`: two kernels for GPUs
  (gpu/attention.py); `render(spec, "torch")`: plain torch operations (eager.py).
- `build(spec)`: the kernel for CPUs, compiled, cached on disk, callable (build.py, cpu/launch.py; for GPUs
  gpu/launch.py).
- `latent_attention(...)`: the kernel that its arguments need, built at the first call (dispatch.py).
- `fhopt::pack` and `fhopt::unpack` need no spec: one C++ file (cpu/packing.py), two Triton kernels (gpu/packing.py).
- `expect(specs)`: these will be needed together, and are compiled side by side when the first of them is.
- `install()`: the ops run through all of these.
"""

from fhopt.codegen.build import build, render
from fhopt.codegen.cpu.graph_kernels import call_kernels
from fhopt.codegen.dispatch import expect, install, latent_attention

__all__ = ["build", "call_kernels", "expect", "install", "latent_attention", "render"]
