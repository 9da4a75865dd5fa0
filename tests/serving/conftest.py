"""Tests of plans in vLLM. They run in the environment of `make test-serving`, and are skipped elsewhere."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

IS_THERE = importlib.util.find_spec("vllm") is not None
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder; skip them without vLLM."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.serving)
            if not IS_THERE:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed; `make test-serving` brings it"))
