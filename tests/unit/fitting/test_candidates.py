"""Bases of the layouts that a site may get."""

from __future__ import annotations

import pytest
from small_models import Fitted

from fhopt.fitting.candidates import COMPETING, fit_bases
from fhopt.fitting.statistics import empty_statistics
from fhopt.plan.site import AttentionSite


def test_candidates_are_the_layouts_that_compete_unless_one_is_named(llama: Fitted) -> None:
    auto = fit_bases(llama.statistics, context=96)
    named = fit_bases(llama.statistics, "head", context=96)
    assert {tuple(t) for t in auto.values()} == {COMPETING}  # keys rotate: no `input`
    assert {tuple(t) for t in named.values()} == {("head",)}


@pytest.mark.parametrize(
    ("device", "expected"), [("h100", {"band", "head", "identity"}), ("cpu", {"head", "identity"})]
)
def test_layouts_that_are_slow_on_a_device_do_not_compete(device: str, expected: set[str]) -> None:
    """12 query heads on one latent of 4 kv heads: four times the arithmetic, which only a CPU feels."""
    site = AttentionSite("a", {}, "self", 12, 4, 64, 64, 0.125, None, False, "causal", 0.0, "none", "")
    layouts = fit_bases(empty_statistics([site]), context=64, device=device)["a"]
    assert set(layouts) == expected
