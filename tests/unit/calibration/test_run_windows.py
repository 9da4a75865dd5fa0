"""Which sites are fitted where some layers keep a sliding window, and how they are named and masked."""

from __future__ import annotations

from typing import Any

import pytest
from small_models import found
from window_models import WINDOW, windowed

from fhopt.calibration import run
from fhopt.errors import FhoptError
from fhopt.models.capture import Captured

GEMMA: dict[str, Any] = dict(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])


def fitted(captured: Captured) -> list[str]:
    return [site.name for site in run._sites(captured, "model", None).sites.values()]


@pytest.mark.parametrize("tokens", [16, WINDOW + 16])
def test_a_window_is_found_in_graphs_shorter_than_it_and_its_site_is_not_fitted(tokens: int) -> None:
    captured, outcome = found(windowed("gemma3", **GEMMA), tokens)
    masks = [(site.mask, site.window) for site in outcome.sites.values()]
    assert masks == [("sliding", WINDOW), ("causal", 0)]
    assert fitted(captured) == ["model.layers.1.self_attn"]


def test_a_model_in_which_every_layer_slides_is_refused() -> None:
    captured, _ = found(windowed("mistral"))
    with pytest.raises(FhoptError, match=f"windows of at most {WINDOW}"):
        run._sites(captured, "model", None)


def test_layers_that_read_keys_and_values_of_another_have_their_own_names_and_are_not_fitted() -> None:
    captured, outcome = found(windowed("gemma3n"))
    names = [site.name for site in outcome.sites.values()]
    assert names == [f"model.layers.{i}.self_attn" for i in range(6)]
    assert fitted(captured) == ["model.layers.2.self_attn"]
