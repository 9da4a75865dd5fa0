"""The library of kernels beside a program."""

from __future__ import annotations

from small_models import Fitted

from fhopt.codegen.cpu.attention import table_name
from fhopt.export.kernel_library import render
from fhopt.plan.kernel_spec import KernelSpec


def test_the_text_of_the_library_is_always_the_same_and_serves_every_kernel(llama: Fitted) -> None:
    specs = [KernelSpec.of(site, "float32") for site in llama.plan(4).sites]
    files = render(specs)
    assert files == render(specs) and set(files) == {"op.cpp", "attention.cpp"}
    assert all(f'fhopt_serve("{s.name}"' in files["op.cpp"] for s in specs)
    assert all(files["attention.cpp"].count(f"* {table_name(s)}()") == 1 for s in specs)
