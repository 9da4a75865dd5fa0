"""Reset kernel dispatch to a state in which no kernel is built."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch

from fhopt.codegen import build
from fhopt.codegen.background import Builder

BUILD = importlib.import_module("fhopt.codegen.build")  # `fhopt.codegen.build` as an attribute is the function
DISPATCH = importlib.import_module("fhopt.codegen.dispatch")


@pytest.fixture
def nothing_built(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget builds and warnings of this process; the session's kernel files stay."""
    torch.manual_seed(0)
    monkeypatch.setattr("fhopt.system._warned", set())
    monkeypatch.setattr(DISPATCH, "_kernels", {})
    monkeypatch.setattr(DISPATCH, "builder", Builder(waits=True))
    build.cache_clear()
    BUILD._library.cache_clear()
    yield
    build.cache_clear()
    BUILD._library.cache_clear()
