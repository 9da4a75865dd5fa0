"""A state of dispatch in which nothing has been built."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fhopt.codegen import build

BUILD = importlib.import_module("fhopt.codegen.build")  # `fhopt.codegen.build` as an attribute is the function
DISPATCH = importlib.import_module("fhopt.codegen.dispatch")


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def nothing_built(module_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Files of a module in one temporary folder; nothing built or said before the test counts."""
    torch.manual_seed(0)
    monkeypatch.setenv("FHOPT_CACHE_DIR", str(module_cache))
    monkeypatch.setattr("fhopt.system._warned", set())
    monkeypatch.setattr(DISPATCH, "_kernels", {})
    build.cache_clear()
    yield
    build.cache_clear()
