"""Kernel builds: from a `KernelSpec` to a callable.

On a CPU one compiled library serves every spec (cpu/attention.py); Triton and plain torch kernels are rendered per
spec. Files go to the file cache (fhopt/system.py). A file is named by its kernel and a hash of its text, for C++ also
of compiler and CPU (compiler.py), so an existing file is valid and is never rewritten.

Letters: B batch, H query heads, J latent heads, S queries, T tokens, R latent width.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from types import CodeType, ModuleType

from fhopt.codegen import eager
from fhopt.codegen.compiler import has_compiler, vector_unit
from fhopt.codegen.cpu import attention as cpu_attention
from fhopt.codegen.cpu.attention import LIBRARY
from fhopt.codegen.cpu.launch import LibraryKernel
from fhopt.codegen.gpu import attention as gpu_attention
from fhopt.codegen.gpu.launch import TritonKernel
from fhopt.codegen.prebuilt import load_prebuilt
from fhopt.codegen.tiers import spec_has_trellis
from fhopt.errors import FhoptError
from fhopt.ops.latent_attention import LatentKernel, latent_attention_reference
from fhopt.plan.kernel_spec import KernelSpec
from fhopt.system import cached_file, text_digest, write_text


def render_kernel(spec: KernelSpec, target: str) -> str:
    """Render the kernel of `spec` for `target`: "cpp", "torch" or "triton". Raises FhoptError for another target."""
    renderers: dict[str, Callable[[KernelSpec], str]] = {
        "cpp": cpu_attention.render_attention,
        "torch": eager.render_torch,
        "triton": gpu_attention.render_triton,
    }
    if target not in renderers:
        raise FhoptError(f"target {target!r} has no renderer; expected one of {', '.join(renderers)}.")
    return renderers[target](spec)


@functools.cache
def build_kernel(spec: KernelSpec) -> LatentKernel:
    """Build the CPU kernel of `spec`, once per process.

    It has the signature of `fhopt.ops.latent_attention_reference`. Compiled C++ if a compiler is found, else (with one
    warning) plain torch operations, for trellis codes the reference. The kernel ignores the arguments for bit groups,
    which `spec` fixes. Raises FhoptError for a spec without a kernel.
    """
    library = LIBRARY.load()
    return LibraryKernel(library, spec) if library is not None else without_compiler(spec)


def without_compiler(spec: KernelSpec) -> LatentKernel:
    """Return the torch implementation of `spec`: a generated file, or for trellis codes the reference."""
    return latent_attention_reference if spec_has_trellis(spec) else build_torch(spec)


def describe_kernels() -> str:
    """Describe the vector instructions of the CPU kernels, and whether they are prebuilt or compiled."""
    target = LIBRARY.prebuilt_for()
    if target is None or load_prebuilt(LIBRARY.name, LIBRARY.text(), LIBRARY.flags) is None:
        return vector_unit()
    return f"{target.unit}, prebuilt for {target.name}"


def has_kernels() -> bool:
    """Return whether C++ kernels can run: they are prebuilt, or there is a compiler."""
    return LIBRARY.prebuilt_for() is not None or has_compiler()


def build_torch(spec: KernelSpec) -> LatentKernel:
    """Build the kernel of `spec` in plain torch operations."""
    kernel: LatentKernel = load_module(spec.name, eager.render_torch(spec)).latent_attention
    return kernel


@functools.cache
def build_triton(spec: KernelSpec) -> TritonKernel:
    """Build the Triton kernels of `spec`. Raises ImportError without Triton."""
    return TritonKernel(load_module(f"{spec.name}_triton", gpu_attention.render_triton(spec)), spec)


class _Rendered(SourceFileLoader):
    """A loader of the rendered text: ignores the current content of its file, and bytecode next to it."""

    def __init__(self, name: str, path: str, text: str) -> None:
        super().__init__(name, path)
        self.text = text

    def get_code(self, fullname: str) -> CodeType:
        """Compile the text; tracebacks name the file."""
        return self.source_to_code(self.text.encode(), self.path)


def load_module(name: str, text: str) -> ModuleType:
    """Import the Python file `text` from the file cache (Triton reads the file again)."""
    stem = f"{name}-{text_digest(text)}"
    path = cached_file(f"{stem}.py", lambda path: write_text(path, text))
    name = f"fhopt_kernel_{text_digest(stem)}"
    module_spec = importlib.util.spec_from_file_location(name, path, loader=_Rendered(name, str(path), text))
    assert module_spec is not None and module_spec.loader is not None, path
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module
