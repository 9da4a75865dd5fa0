"""Segments run on other weights than those captured, and require a compiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lowered_functions import CapturedFunction, gated_mlp, mlp_weights
from needs import needs_compiler

from fhopt.codegen.compiler import CompileError
from fhopt.codegen.cpu import library as cpu_library
from fhopt.codegen.programs import program


@needs_compiler
def test_a_program_runs_on_other_tensors_of_an_equal_segment() -> None:
    one, other = [CapturedFunction(gated_mlp, [torch.randn(1, 1, 48)], mlp_weights()) for _ in range(2)]
    assert one.key == other.key and hash(one.key) == hash(other.key)
    torch.testing.assert_close(other.run(one.lowered()), other.results[0])


def test_without_a_compiler_there_are_no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise CompileError("No C++ compiler was found.")

    monkeypatch.setattr(cpu_library, "compile_and_load", refuse)
    cpu_library._load.cache_clear()
    program.functions.cache_clear()
    assert not program.is_built()
    program.functions.cache_clear()
    cpu_library._load.cache_clear()
