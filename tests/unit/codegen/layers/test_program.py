"""Programs run on other weights than those traced, and require a compiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from needs import needs_compiler
from traced_functions import Products, Traced

from fhopt.codegen.compiler import CompileError
from fhopt.codegen.cpu import library as cpu_library
from fhopt.codegen.layers import program
from fhopt.codegen.layers.lowering import lower_trace


@needs_compiler
def test_a_program_runs_on_other_tensors_of_the_same_trace() -> None:
    first, second = Products(torch.float32, True), Products(torch.float32, True)
    x, y = torch.randn(1, 1, 48), torch.randn(1, 1, 48)
    one, other = Traced(first, [x], first), Traced(second, [y], second)
    assert one.trace == other.trace and hash(one.trace) == hash(other.trace)
    torch.testing.assert_close(other.run(lower_trace(one.trace)), other.result)


def test_without_a_compiler_there_are_no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise CompileError("No C++ compiler was found.")

    monkeypatch.setattr(cpu_library, "compile_and_load", refuse)
    cpu_library._load.cache_clear()
    program.functions.cache_clear()
    assert not program.is_built()
    program.functions.cache_clear()
    cpu_library._load.cache_clear()
