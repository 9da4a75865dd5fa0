"""Run ops without kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fhopt.ops import registry


@pytest.fixture
def references() -> Iterator[None]:
    """Run the reference of every op, even if another test installed kernels, which are tested elsewhere."""
    before = {op: registry.use(op, "cpu", None) for op in ("latent_attention", "pack", "unpack")}
    yield
    for op, kernel in before.items():
        registry.use(op, "cpu", kernel)
