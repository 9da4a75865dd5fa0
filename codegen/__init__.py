"""Generated kernels: a `KernelSpec` says what, a renderer writes the file, `build` makes it callable.

- `render(spec, "cpp")`: the C++ file for CPUs, and the table of a spec (cpu/attention.py); `render(spec, "triton")`:
  two kernels for GPUs (gpu/attention.py); `render(spec, "torch")`: plain torch operations (eager.py).
- `build(spec)`: the kernel for CPUs, compiled once for all specs, cached on disk, callable (build.py, cpu/launch.py;
  for GPUs gpu/launch.py).
- `fhopt::pack` and `fhopt::unpack` need no spec: one C++ file (cpu/packing.py), two Triton kernels (gpu/packing.py).
- `start()`: libraries for CPUs are compiled in the background (background.py), once on a machine; `prepare()` waits
  for them, `waiting()` for all that calls need.
- `linear(x, w, b)`: a linear layer, in eager mode, where that is faster than by torch (dispatch.py); `prepare_linear()`
  waits for its kernels; `start_blocks()` and `prepare_blocks()` build those of weights in GGUF blocks.
- `layer_programs_are_built()`: whether layers may run as programs (cpu/layer_program.py).
- `install()`: fill in the kernels of all ops; nothing else does.
"""

from fhopt.codegen.build import build, render
from fhopt.codegen.dispatch import (
    install,
    layer_programs_are_built,
    linear,
    prepare,
    prepare_blocks,
    prepare_linear,
    start,
    start_blocks,
    waiting,
)

__all__ = [
    "build",
    "install",
    "layer_programs_are_built",
    "linear",
    "prepare",
    "prepare_blocks",
    "prepare_linear",
    "render",
    "start",
    "start_blocks",
    "waiting",
]
