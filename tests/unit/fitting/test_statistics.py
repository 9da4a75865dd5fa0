"""Statistics of a site."""

from __future__ import annotations

import pytest
from small_models import FAR, Fitted, numbered

from fhopt.calibration import collect
from fhopt.fitting import statistics as fitting_statistics

SITE = "model.layers.1.self_attn"


@pytest.mark.parametrize("limit", [32, 16, 1])
def test_as_few_latent_heads_as_keep_the_mixed_space_within_the_limit(
    llama: Fitted, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Two heads of 16: together, apart, and apart where even one is too wide."""
    monkeypatch.setattr(fitting_statistics, "MIX_LIMIT", limit)
    groups = 1 if limit == 32 else 2
    statistics = collect.collect(llama.captured, llama.outcome, numbered(1), **FAR)[SITE]
    assert statistics.key.moment.shape == (groups, 32 // groups, 32 // groups)
    assert fitting_statistics.latent_groups(statistics.site) == groups
