"""The kernel library exported with a program."""

from __future__ import annotations

from small_models import FittedModel

from fhopt.codegen.cpu.attention import table_name
from fhopt.export.kernel_library import render_library
from fhopt.plan.kernel_spec import KernelSpec


def test_the_library_source_is_reproducible_and_contains_every_kernel(llama: FittedModel) -> None:
    specs = [KernelSpec.of(site, "float32") for site in llama.plan(4).sites]
    files = render_library(specs)
    assert files == render_library(specs) and set(files) == {"op.cpp", "attention.cpp"}
    assert all(f'fhopt_serve("{s.name}"' in files["op.cpp"] for s in specs)
    assert all(files["attention.cpp"].count(f"* {table_name(s)}()") == 1 for s in specs)
