"""Candidate bases of the layouts that a site may get."""

from __future__ import annotations

import pytest
import torch
from small_models import FittedModel

from fhopt.fitting.candidates import COMPETING, fit_bases, is_slow
from fhopt.fitting.statistics import empty_statistics
from fhopt.plan.site import AttentionSite


def test_candidates_are_the_competing_layouts_unless_one_is_named(llama: FittedModel) -> None:
    auto = fit_bases(llama.statistics, context=96)
    named = fit_bases(llama.statistics, "head", context=96)
    assert {tuple(t) for t in auto.values()} == {COMPETING}  # keys rotate: no `input`
    assert {tuple(t) for t in named.values()} == {("head",)}


@pytest.mark.parametrize(
    ("device", "heads", "expected"),
    [
        ("h100", (12, 4), {"band", "head", "identity"}),
        ("edge", (128, 8), {"head", "identity"}),  # 8x the arithmetic, of which it has little
        ("cpu", (12, 4), {"band", "head", "identity"}),  # its time is traded for loss
    ],
)
def test_layouts_that_are_slow_on_a_gpu_do_not_compete(device: str, heads: tuple[int, int], expected: set[str]) -> None:
    layouts = fit_bases(empty_statistics([_site(*heads)]), context=64, device=device)["a"]
    assert set(layouts) == expected


def test_without_a_device_only_loss_decides_and_slow_plans_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 4x: 1.45 times the time of per-head latents with 9/3x64 heads, 3.2 times with 32/8x64.

    On AVX2-only CPUs, 2.2 times with 9/3x64.
    """
    monkeypatch.setattr("fhopt.hardware.this_cpu.vector_units", lambda: ("AVX-512 VNNI", "AVX-512 VBMI"))
    assert set(fit_bases(empty_statistics([_site(32, 8)]), context=64)["a"]) == set(COMPETING)
    assert is_slow(_site(32, 8), 8192) and not is_slow(_site(9, 3), 8192)
    monkeypatch.setattr("fhopt.hardware.this_cpu.vector_units", lambda: ("AVX2", "AVX-512"))  # without VBMI
    assert is_slow(_site(9, 3), 8192) and not is_slow(_site(8, 2), 8192)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not is_slow(_site(32, 8), 8192)


def _site(heads: int, kv_heads: int) -> AttentionSite:
    return AttentionSite("a", {}, "self", heads, kv_heads, 64, 64, 0.125, None, False, "causal", 0.0, "none", "")
