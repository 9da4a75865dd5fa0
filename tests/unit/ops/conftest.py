"""Ops as they are without kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fhopt.ops import registry


@pytest.fixture
def references() -> Iterator[None]:
    """The ops run their references, whatever a test before has installed; that kernels agree is tested with them."""
    before = {op: registry.use(op, "cpu", None) for op in ("latent_attention", "pack", "unpack")}
    yield
    for op, kernel in before.items():
        registry.use(op, "cpu", kernel)
