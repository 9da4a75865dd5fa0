"""Generated kernels: a `KernelSpec` says what, a renderer writes the file, `build` makes it callable.

- `render(spec, "cpp")`: one C++ file for CPUs (cpu/attention.py); `render(spec, "triton")`: two kernels for GPUs
  (gpu/attention.py); `render(spec, "torch")`: plain torch operations (eager.py).
- `build(spec)`: the kernel for CPUs, compiled, cached on disk, callable (build.py, cpu/launch.py; for GPUs
  gpu/launch.py).
- `latent_attention(...)`: the kernel that its arguments need, built from the first call on (dispatch.py).
- `fhopt::pack` and `fhopt::unpack` need no spec: one C++ file (cpu/packing.py), two Triton kernels (gpu/packing.py).
- `expect(specs)`: kernels that will be needed together are compiled side by side when the first of them is, in the
  background (background.py); `prepare(specs)` waits for them, `waiting()` for all.
- `install()`: fill in the kernels of all ops; nothing else does.
"""

from fhopt.codegen.build import build, render
from fhopt.codegen.cpu.graph_kernels import call_kernels
from fhopt.codegen.dispatch import expect, install, latent_attention, prepare, waiting

__all__ = ["build", "call_kernels", "expect", "install", "latent_attention", "prepare", "render", "waiting"]
