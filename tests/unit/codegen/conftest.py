"""Reset kernel dispatch to a state in which no kernel is built."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch

from fhopt.codegen import build_kernel
from fhopt.codegen.background import Builder
from fhopt.codegen.cpu import library as cpu_library

DISPATCH = importlib.import_module("fhopt.codegen.dispatch")


@pytest.fixture
def nothing_built(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget builds and warnings of this process; the session's kernel files stay."""
    torch.manual_seed(0)
    monkeypatch.setattr("fhopt.system._warned", set())
    monkeypatch.setattr(DISPATCH, "_kernels", {})
    monkeypatch.setattr(DISPATCH, "builder", Builder())
    build_kernel.cache_clear()
    cpu_library._load.cache_clear()
    yield
    build_kernel.cache_clear()
    cpu_library._load.cache_clear()
