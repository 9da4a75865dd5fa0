"""A single library with an op and its kernels, for processes without fhopt.

    torch.ops.load_library("fhopt_kernels.so")      fhopt::latent_kernel(kernel, query, key, ...) and its kernels

In a process with fhopt the op is defined in Python, and kernels are registered with it when a graph needs them
(codegen/cpu/graph_kernels.py). Here both happen when the library is loaded. Its name avoids shadowing a module: a file
`kernels.so` in the working directory would be imported instead of the package `kernels`.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from string import Template

import torch

from fhopt.codegen.compiler import FLAGS, CompileError, find_compiler, native_flag
from fhopt.codegen.cpu import attention, graph_kernels
from fhopt.codegen.tiers import is_scaled
from fhopt.errors import FhoptError
from fhopt.plan.kernel_spec import KernelSpec


def render_library(specs: Sequence[KernelSpec]) -> dict[str, str]:
    """Render the C++ files of the library by name: one for the op, one for attention with the tables of all specs.

    Deterministic for the same specs.
    """
    unique = list({spec.name: spec for spec in specs}.values())
    texts = {
        "op.cpp": _op(unique),
        "attention.cpp": attention.LIBRARY.text() + "".join(map(attention.render_table, unique)),
    }
    return {name: f"{_COMMAND}\n{text}" for name, text in texts.items()}


def _op(specs: Sequence[KernelSpec]) -> str:
    """Render the one op of graph_kernels.py that exported programs call, its schema, and its kernel table."""
    head = graph_kernels.LIBRARY.text().partition("STABLE_TORCH_LIBRARY_IMPL")[0]
    return head + _TAIL.substitute(
        schema=str(torch.ops.fhopt.latent_kernel.default._schema).removeprefix("fhopt::"),
        declared="\n".join(f'extern "C" const void* {attention.table_name(spec)}();' for spec in specs),
        served="\n".join(map(_serve, specs)),
    )


def _serve(spec: KernelSpec) -> str:
    flags = is_scaled(spec.key_tiers) + 2 * is_scaled(spec.value_tiers)
    numbers = f"{spec.key_width}, {spec.value_width}, {flags}"
    return f'        fhopt_serve("{spec.name}", &latent_attention, {attention.table_name(spec)}(), {numbers});'


def compile_library(specs: Sequence[KernelSpec], path: Path) -> None:
    """Compile the library of `specs` to `path`, and write its sources to a folder next to it. Raises FhoptError.

    The error says whether there is no compiler, or what it rejected.
    """
    folder = path.with_suffix("")
    folder.mkdir()
    files = render_library(specs)
    for name, text in files.items():
        (folder / name).write_text(text)
    try:
        compiler = find_compiler()
    except CompileError as error:
        raise FhoptError(f"{error} Install g++ (or clang++), or pass --no-aot.") from error
    library = graph_kernels.LIBRARY
    flags = (*FLAGS, "-fopenmp", native_flag(), *library.flags, *library.local_flags())
    command = [compiler, *flags, *(str(folder / name) for name in files), "-o", str(path), *library.links]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
        raise FhoptError(
            f"{compiler} failed to compile the kernels: {first}. Pass --no-aot to export without compiled programs."
        )


_COMMAND = (
    f"// c++ {' '.join(FLAGS)} -std=c++20 -march=native -fopenmp -I TORCH/include -L TORCH/lib op.cpp attention.cpp\n"
    "//     -o fhopt_kernels.so -ltorch_cpu"
)
_TAIL = Template("""STABLE_TORCH_LIBRARY_FRAGMENT(fhopt, m) {
    m.def("$schema");
}

STABLE_TORCH_LIBRARY_IMPL(fhopt, CPU, m) { m.impl("latent_kernel", TORCH_BOX(&latent_kernel)); }

extern "C" void latent_attention(const Attention*);
$declared

namespace {

// Makes the kernels known when the library is loaded.
struct Serving {
    Serving() {
$served
    }
} serving;

}  // namespace
""")
