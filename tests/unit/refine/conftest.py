"""Fixtures of pages for short texts, and of a plan to heal."""

from __future__ import annotations

import pytest
from healed_plans import loaded
from small_models import FittedModel, tiny_llama

from fhopt.models.loaded_model import LoadedModel
from fhopt.plan.latent_plan import LatentPlan
from fhopt.refine import page_options, page_probes, page_sketches


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill in small chunks, so that a few hundred tokens are a context."""
    for module in (page_options, page_probes, page_sketches):
        monkeypatch.setattr(module, "PIECE", 64)
    for module in (page_options, page_probes):
        monkeypatch.setattr(module, "LAST", 16)


@pytest.fixture
def plan(llama: FittedModel) -> LatentPlan:
    return llama.plan(8.0)


@pytest.fixture
def model() -> LoadedModel:
    return loaded(tiny_llama())
