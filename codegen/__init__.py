"""Generated kernels: a `KernelSpec` describes one, a renderer writes its source file, `build_kernel` makes it callable.

- `render_kernel(spec, "cpp")`: the C++ file for CPUs, and the table of a spec (cpu/attention.py); with "triton": two
  kernels for GPUs (gpu/attention.py); with "torch": plain torch operations (eager.py).
- `build_kernel(spec)`: the callable CPU kernel, compiled once for all specs and cached on disk (build.py,
  cpu/launch.py; for GPUs gpu/launch.py).
- `fhopt::pack` and `fhopt::unpack` need no spec: one C++ file (cpu/packing.py), two Triton kernels (gpu/packing.py).
- `start_builds()`: compile the CPU libraries in threads (background.py), once per machine; `build_all()` waits for
  them, and a call for the libraries that it needs.
- `dispatch_linear(x, w, b)`: a linear layer in eager mode, if faster than torch's (dispatch.py); `prepare_linear()`
  waits for its kernels; `start_blocks()` and `prepare_blocks()` build those for weights in GGUF blocks.
- `programs_are_built()`: whether decode steps may run as programs (programs/program.py).
- `register_kernels()`: register the kernels of all ops; nothing else does.
"""

from fhopt.codegen.build import build_kernel, render_kernel
from fhopt.codegen.dispatch import (
    build_all,
    dispatch_linear,
    prepare_blocks,
    prepare_linear,
    programs_are_built,
    register_kernels,
    start_blocks,
    start_builds,
)

__all__ = [
    "build_all",
    "build_kernel",
    "dispatch_linear",
    "prepare_blocks",
    "prepare_linear",
    "programs_are_built",
    "register_kernels",
    "render_kernel",
    "start_blocks",
    "start_builds",
]
