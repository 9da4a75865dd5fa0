"""Fixtures of pages for short texts."""

from __future__ import annotations

import pytest

from fhopt.refine import page_options, page_probes, page_sketches


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few hundred tokens are a context."""
    for module, names in ((page_options, "PIECE LAST"), (page_probes, "PIECE LAST"), (page_sketches, "PIECE")):
        for name in names.split():
            monkeypatch.setattr(module, name, {"PIECE": 64, "LAST": 16}[name])
