"""Marks of tests that need a C++ compiler or Triton."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import pytest

from fhopt.codegen.compiler import has_compiler

needs_compiler = pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def sampled(values: Iterable[Any], every: int) -> list[Any]:
    """Parameters of a test: every `every`th runs in `make test`; the others are slow, for `make test-slow`."""
    return [value if i % every == 0 else pytest.param(value, marks=pytest.mark.slow) for i, value in enumerate(values)]
