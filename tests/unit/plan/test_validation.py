"""Plans with pages: validation, saving, and sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hand_plans import CODED, SITE, in_segments, random_plan
from paged_plans import TOKENS, paged, sketch

from fhopt.cache.latent_cache import LatentCache
from fhopt.cache.sliding_layer import SlidingLatentLayer
from fhopt.errors import FhoptError
from fhopt.inspection import drawing
from fhopt.ops import page_selection
from fhopt.plan.description import numbers_of
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.serialization import describe_plan
from fhopt.plan.site_plan import BitGroup, PagePlan

# --------------------------------------------------------------------------------------------------- caches


@pytest.mark.parametrize("fill", [False, True], ids=["left out", "filled"])
@pytest.mark.parametrize("layout", ["head", "input"])
def test_pages_of_either_layout_are_counted_to_the_byte(
    layout: str, fill: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fhopt.cache.base_layer.SAMPLE", 3)
    plan = paged(random_plan(layout, CODED, window_bits=16), fill=fill)
    cache = LatentCache(plan)
    cache.update(torch.randn(1, 2, 100, 16), torch.randn(1, 2, 100, 8), 0)
    row = cache.report()[0]
    assert row["bytes"] - row["spare"] == plan.cache_bytes(100, itemsize=4)
    assert row["index"] == plan.sketch_bytes() * row["sealed_tokens"] > 0
    count = row["sealed_tokens"] // TOKENS
    read = row["sealed"] * (page_selection.pages_read(count, 0.25, 4) + (3 if fill else 0)) // count
    assert row["dense_step_bytes"] - row["step_bytes"] == row["sealed"] - read - row["index"]


# --------------------------------------------------------------------------------------------------- plans


def test_a_plan_with_pages_is_saved_and_loaded(tmp_path: Path) -> None:
    plan = paged(random_plan("head", CODED), share=0.125, mass=0.9, limit=0.25)
    filled = paged(random_plan("head", CODED), fill=True, lift=1.5)
    for each in (plan, filled):
        loaded = LatentPlan.load(each.save(tmp_path / "plan"))
        assert loaded.pages == each.pages and loaded.digest() == each.digest()
    loaded = LatentPlan.load(plan.save(tmp_path / "plan"))
    a, b = loaded.sites[0].sketch, plan.sites[0].sketch
    assert a is not None and b is not None and a.tiers == b.tiers
    assert torch.equal(a.channels, b.channels) and torch.equal(a.mean, b.mean)
    assert len({p.digest() for p in (plan, replace(plan, pages=None), random_plan("head", CODED))}) == 3


def test_the_average_pages_read_by_a_site_are_shown_if_calibration_recorded_them() -> None:
    plan = paged(random_plan("head", CODED), share=0.5)
    (site,) = plan.sites
    assert plan.page_read(site) == plan.page_share(site) == 0.5
    told = plan.with_provenance(pages={"read": {site.site.name: 0.125}})
    assert told.page_read(told.sites[0]) == 0.125
    assert "reads 12% of the pages, at most 50%" in drawing._window(told.sites[0], told)
    whole = replace(plan, pages=None)
    assert whole.page_read(site) == 1.0 and not any("pages" in line for line in drawing._window(site, whole))


def test_a_plan_without_pages_has_the_digest_from_before_pages(tmp_path: Path) -> None:
    plan = random_plan("head", CODED)
    text = (plan.save(tmp_path / "plan") / "plan.json").read_text()
    assert "pages" not in text and "sketch" not in text
    assert b'"version": 3' in numbers_of(describe_plan(plan))
    assert b'"version": 4' in numbers_of(describe_plan(paged(plan)))


@pytest.mark.parametrize(
    "tier",
    [BitGroup(8, 16, math.inf), BitGroup(8, 16, 0.0), BitGroup(8, 16, math.nan), BitGroup(4, math.inf, 1.0)],  # type: ignore[arg-type]
)
def test_invalid_bit_groups_are_refused(tier: BitGroup) -> None:
    with pytest.raises(FhoptError, match=r"bit groups|quantization steps"):
        random_plan("head", (tier,))


@pytest.mark.parametrize(
    ("pages_of_plan", "reason"),
    [
        (PagePlan(3, (0.5,), (1.0,)), "expected a divisor of the plan's block, 8"),
        (PagePlan(0, (0.5,), (1.0,)), "expected a divisor of the plan's block, 8"),
        (PagePlan(4, (0.5, 0.5), (1.0,)), "pages have 2 shares and 1 masses; expected 1"),
        (PagePlan(4, (0.0,), (1.0,)), "above 0 and at most 1"),
        (PagePlan(4, (0.5,), (1.5,)), "above 0 and at most 1"),
        (PagePlan(4, (0.5,), (1.0,), limit=math.nan), "above 0 and at most 1"),
        (PagePlan(4, (0.5,), (1.0,), least=-1), "least of at least 0"),
        (PagePlan(4, (0.5,), (1.0,), fill=((0.5,),)), r"entries for \[1\] heads"),
        (PagePlan(4, (0.5,), (1.0,), fill=((0.5, 0.5, -0.5, 0.0),)), "expected numbers of at least 0"),
        (PagePlan(4, (0.5,), (1.0,), fill=((0.5, 0.5, math.nan, 0.0),)), "expected numbers of at least 0"),
        (PagePlan(4, (0.5,), (1.0,), limit=0.5, fill=((0.5,) * 4,)), "are mutually exclusive"),
        (PagePlan(4, (0.5,), (1.0,), lifts=(1.0, 1.0)), "expected 1 numbers of at least 0"),
        (PagePlan(4, (0.5,), (1.0,), lifts=(-1.0,)), "expected 1 numbers of at least 0"),
        (PagePlan(4, (0.5,), (1.0,), lifts=(math.inf,)), "expected 1 numbers of at least 0"),
        (PagePlan(4, (0.5,), (1.0,)), "no sketches to select pages by"),
    ],
)
def test_invalid_pages_are_refused(pages_of_plan: PagePlan, reason: str) -> None:
    with pytest.raises(FhoptError, match=reason):
        replace(random_plan("head"), pages=pages_of_plan)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"channels": torch.zeros(1, 8, dtype=torch.int64)}, "sketches have shapes"),
        ({"channels": torch.zeros(2, 8)}, "sketches have shapes"),
        ({"channels": torch.full((2, 8), 16)}, "beyond the latent's 16"),
        ({"mean": torch.full((2, 16), math.inf)}, "invalid means or deviations"),
        ({"deviation": torch.zeros(2, 16)}, "invalid means or deviations"),
        ({"tiers": (BitGroup(3, 8, 1.0),)}, "bits of"),
        ({"tiers": (BitGroup(2, 8, 0.0),)}, "bits of"),
        ({"tiers": (BitGroup(2, 8, 1.0), BitGroup(2, 8, 1.0))}, "sketches have shapes"),
    ],
)
def test_invalid_sketches_are_refused(change: dict[str, Any], reason: str) -> None:
    site = random_plan("head").sites[0]
    with pytest.raises(FhoptError, match=reason):
        replace(random_plan("head"), sites=(replace(site, sketch=replace(sketch(site.key), **change)),))


def test_cross_attention_cannot_select_pages() -> None:
    plan = random_plan("head")
    site = replace(plan.sites[0], site=replace(SITE, kind="cross"))
    with pytest.raises(FhoptError, match="expected a share of 1"):
        replace(plan, sites=(site,), pages=PagePlan(4, (0.5,), (1.0,)))
    assert replace(plan, sites=(site,), pages=PagePlan(4, (1.0,), (1.0,))).sketch_bytes() == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda plan: replace(plan, sites=(replace(plan.sites[0], segment=100),)), "expected a multiple of 64"),
        (
            lambda plan: replace(plan, sites=(replace(plan.sites[0], site=SITE),)),
            "segments require quantized keys with RoPE",
        ),
        (
            lambda plan: replace(
                plan, sites=(replace(plan.sites[0], site=replace(plan.sites[0].site, mask="sliding", window=64)),)
            ),
            "segments require quantized keys with RoPE",
        ),
        (lambda plan: in_segments(random_plan("head")), "segments require quantized keys with RoPE"),
        (lambda plan: replace(plan, pages=PagePlan(4, (0.5,), (1.0,))), "page selection does not support segments"),
        (lambda plan: plan.check_no_means("an exported step"), "does not support segments"),
        (lambda plan: SlidingLatentLayer(plan, plan.sites[0], 64), "expected none in sliding-window attention"),
    ],
)
def test_invalid_segments_are_refused(change: Callable[[LatentPlan], Any], reason: str) -> None:
    plan = in_segments(random_plan("head", CODED))
    with pytest.raises(FhoptError, match=reason):
        change(plan)


def test_keys_and_values_of_one_latent_must_agree() -> None:
    site = random_plan("input", CODED).sites[0]
    other = replace(site, value=replace(site.value, tiers=()))
    with pytest.raises(FhoptError, match="share one latent head and its bit groups"):
        LatentPlan((other,), 4, 8, 8)
    with pytest.raises(FhoptError, match="bases have shapes"):
        LatentPlan((replace(site, layout="head"),), 4, 8, 8)
    with pytest.raises(FhoptError, match="window_bits=4"):
        LatentPlan((site,), 4, 8, 8, window_bits=4)
