"""Expected gains of a model from a plan, before one exists."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sample_reports
from hand_plans import SITE
from small_models import FittedModel

from fhopt.hardware.devices import find_device
from fhopt.inspection.prospects import KeptExact, Placement, Prospects, kept_exact, prospects, site_prospects
from fhopt.models.sites import find_sites
from fhopt.plan.cache_size import CacheLayer

SITES = [replace(SITE, name=f"layers.{i}.attention") for i in range(4)]
NUMBERS = SITE.exact_numbers_per_token
FULL = [CacheLayer(f"layers.{i}", numbers=NUMBERS) for i in range(4)]
PLACE = Placement(find_device("cpu"), 10_000_000)


def test_bytes_fall_by_the_ratio_and_contexts_grow_by_it() -> None:
    found = site_prospects("m", SITES, [PLACE], parameters=1000, layers=FULL)
    exact, four, eight = found.caches
    assert (exact.cache, four.cache, eight.cache) == ("exact", "4x", "8x")
    assert exact.bytes_per_token == 4 * NUMBERS * 2 == 4 * four.bytes_per_token == 8 * eight.bytes_per_token
    assert (exact.ratio, four.ratio, eight.ratio) == (1, 4, 8)
    assert exact.fits[0].tokens == (10_000_000 - 2000) // (4 * NUMBERS * 2)
    assert four.fits[0].tokens == pytest.approx(4 * exact.fits[0].tokens, abs=4)
    assert exact.pays == () and four.pays[0].device == "cpu"


def test_the_speedup_is_the_ratio_of_weight_and_cache_bytes() -> None:
    found = site_prospects("m", SITES, [PLACE], parameters=1000, layers=FULL, positions=4096)
    assert found.contexts == (2048,)
    weights, cache = 2000, 2048 * 4 * NUMBERS * 2
    assert found.caches[1].speedups == pytest.approx(((weights + cache) / (weights + cache / 4),))
    assert found.caches[0].speedups == (1.0,)
    assert site_prospects("m", SITES, [], positions=100).contexts == (100,)


def test_weights_that_do_not_fit_leave_room_for_no_token() -> None:
    found = site_prospects("m", SITES, [PLACE], parameters=10_000_000, layers=FULL)
    assert [one.fits[0].tokens for one in found.caches] == [0, 0, 0]


def test_layers_with_a_short_window_stay_exact_and_lower_the_ratio_of_the_whole_model() -> None:
    layers = [*FULL[:2], *(replace(one, window=16, mask="sliding") for one in FULL[2:])]
    found = site_prospects("m", SITES, [PLACE], layers=layers)
    assert found.kept_exact == (KeptExact(2, "caches only the newest 16 tokens (sliding window)"),)
    assert 3.9 < found.caches[1].ratio < 4
    alone = site_prospects("m", [replace(s, mask="sliding", window=16) for s in SITES], [PLACE])
    assert alone.caches[2].ratio == 1 and alone.caches[2].pays[0].verdict == "never"


def test_layers_with_a_longer_window_are_compressed() -> None:
    layers = [*FULL[:2], *(replace(one, window=64, mask="sliding") for one in FULL[2:])]
    found = site_prospects("m", SITES, [PLACE], layers=layers)
    assert found.kept_exact == () and found.caches[1].ratio == pytest.approx(4, rel=1e-3)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (CacheLayer("layers.0", is_full=False, state_bytes=64), "linear attention"),
        (CacheLayer("layers.0", is_full=False), "no tokens"),
        (CacheLayer("layers.0", is_full=False, numbers=3), "its own kind of KV cache"),
        (CacheLayer("other.0", numbers=3), "no attention found"),
    ],
)
def test_what_stays_exact_has_its_reason(layer: CacheLayer, reason: str) -> None:
    (found,) = kept_exact(SITES, [layer])
    assert found.layers == 1 and reason in found.reason
    assert kept_exact(SITES, FULL) == kept_exact(SITES) == ()


def test_a_loaded_model_has_the_prospects_of_its_layers_and_positions(llama: FittedModel) -> None:
    loaded = sample_reports.loaded(llama)
    found: Prospects = prospects(loaded, find_sites(loaded), [PLACE])
    assert (found.sites, found.positions, found.contexts, found.kept_exact) == (2, 512, (512,), ())
    assert found.caches[0].bytes_per_token == 2 * 2 * 2 * 16 * 2 and found.caches[2].ratio == 8
    assert found.parameters == sum(p.numel() for p in llama.model.parameters())
