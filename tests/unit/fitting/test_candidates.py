"""Bases of the layouts that a site may get."""

from __future__ import annotations

import pytest
import torch
from small_models import Fitted

from fhopt.fitting.candidates import COMPETING, fit_bases, fit_layouts, select_bases
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
    layouts = fit_bases(empty_statistics([_site(12, 4)]), context=64, device=device)["a"]
    assert set(layouts) == expected


@pytest.mark.parametrize(
    ("heads", "kv_heads", "expected"), [(9, 3, {"band", "identity"}), (32, 8, {"head", "identity"})]
)
def test_without_a_device_latents_are_shared_only_where_that_is_not_twice_as_slow(
    heads: int, kv_heads: int, expected: set[str]
) -> None:
    """Measured at 4x: 1.45 times the time of latents for each kv head with 9/3x64, 3.2 times with 32/8x64."""
    statistics = empty_statistics([_site(heads, kv_heads)])
    assert set(fit_bases(statistics, context=64)["a"]) == expected
    calibrated = fit_layouts(statistics, ("band", "identity", "head"), context=64, tokens=8192)
    assert set(select_bases(calibrated, {"a": _site(heads, kv_heads)})["a"]) == expected


def test_statistics_without_faster_latents_give_those_that_they_have() -> None:
    calibrated = fit_layouts(empty_statistics([_site(32, 8)]), COMPETING, context=64, tokens=8192)
    assert set(select_bases(calibrated, {"a": _site(32, 8)})["a"]) == set(COMPETING)


def test_arithmetic_does_not_count_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert set(fit_bases(empty_statistics([_site(32, 8)]), context=64)["a"]) == set(COMPETING)


def _site(heads: int, kv_heads: int) -> AttentionSite:
    return AttentionSite("a", {}, "self", heads, kv_heads, 64, 64, 0.125, None, False, "causal", 0.0, "none", "")
