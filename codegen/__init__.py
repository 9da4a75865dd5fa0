"""Kernels made from text: a `KernelSpec` says what, a renderer writes the file, `build` makes it callable.

- `render(spec, "cpp")`: one C++ file for CPUs (cpp.py); `render(spec, "triton")`: two kernels for GPUs
  (triton_attention.py); `render(spec, "torch")`: plain torch operations (torch_ops.py).
- `build(spec)`: the kernel for CPUs, compiled, cached on disk, callable (build.py, call.py; for GPUs triton_call.py).
- `latent_attention(...)`: the kernel that its arguments need, built at the first call (dispatch.py).
- `fhopt::pack` and `fhopt::unpack` need no spec: one C++ file (pack.py), two Triton kernels (triton_pack.py).
- `expect(specs)`: these will be needed together, and are compiled side by side when the first of them is.
- `install()`: the ops run through all of these.
"""

from fhopt.codegen.build import build, render
from fhopt.codegen.dispatch import expect, install, latent_attention
from fhopt.codegen.native import call_kernels

__all__ = ["build", "call_kernels", "expect", "install", "latent_attention", "render"]
