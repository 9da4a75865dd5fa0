"""Fixtures of pages for short texts."""

from __future__ import annotations

import pytest

from fhopt.refine import page_options


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few hundred tokens are a context."""
    monkeypatch.setattr(page_options, "PIECE", 64)
    monkeypatch.setattr(page_options, "LAST", 16)
