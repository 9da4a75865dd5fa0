"""Generated kernels: a `KernelSpec` describes one, a renderer writes its source file, `build` makes it callable.

- `render(spec, "cpp")`: the C++ file for CPUs, and the table of a spec (cpu/attention.py); `render(spec, "triton")`:
  two kernels for GPUs (gpu/attention.py); `render(spec, "torch")`: plain torch operations (eager.py).
- `build(spec)`: the callable CPU kernel, compiled once for all specs and cached on disk (build.py, cpu/launch.py; for
  GPUs gpu/launch.py).
- `fhopt::pack` and `fhopt::unpack` need no spec: one C++ file (cpu/packing.py), two Triton kernels (gpu/packing.py).
- `start()`: compile the CPU libraries in the background (background.py), once per machine; `prepare()` waits for them,
  `waiting()` for every library that a call needs.
- `linear(x, w, b)`: a linear layer in eager mode, if faster than torch's (dispatch.py); `prepare_linear()` waits for
  its kernels; `start_blocks()` and `prepare_blocks()` build those for weights in GGUF blocks.
- `layer_programs_are_built()`: whether layers may run as layer programs (layers/program.py).
- `install()`: register the kernels of all ops; nothing else does.
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
