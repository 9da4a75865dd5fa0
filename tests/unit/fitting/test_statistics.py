"""Statistics of a site."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_models import FAR, FittedModel, numbered
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from fhopt.calibration import collect
from fhopt.fitting import statistics as fitting_statistics
from fhopt.fitting.statistics import differences, placed, segment_of, spread, turned

SITE = "model.layers.1.self_attn"


@pytest.mark.parametrize("limit", [32, 16, 1])
def test_latent_heads_are_as_few_as_the_mixing_limit_allows(
    llama: FittedModel, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Two heads of 16: mixed, separate, and separate if even one exceeds the limit."""
    monkeypatch.setattr(fitting_statistics, "MIX_LIMIT", limit)
    groups = 1 if limit == 32 else 2
    statistics = collect.collect(llama.captured, llama.outcome, numbered(1), **FAR)[SITE]
    assert statistics.key.moment.shape == (groups, 32 // groups, 32 // groups)
    assert fitting_statistics.latent_groups(statistics.site) == groups


def at(llama: FittedModel, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotate keys as the model does at positions [B, T]."""
    cos, sin = llama.model.model.rotary_emb(keys, positions)
    rotated: torch.Tensor = apply_rotary_pos_emb(keys, keys, cos, sin)[1]
    return rotated


def test_rotated_keys_are_those_of_later_positions(llama: FittedModel) -> None:
    site, keys, here = llama.statistics[SITE].site, torch.randn(2, 2, 20, 16), torch.arange(20).expand(2, 20)
    for later in (torch.tensor([[37.0], [300.0]]), torch.arange(20.0).unsqueeze(0) * 7):
        expected = at(llama, keys, here + later.long())
        torch.testing.assert_close(turned(site, at(llama, keys, here), later.double()), expected, rtol=0, atol=1e-4)


def test_a_constant_in_keys_rotates_away_from_its_mean(llama: FittedModel) -> None:
    """As in a cache, means are of the first tokens, wherever the others are."""
    site, here = llama.statistics[SITE].site, torch.arange(20).unsqueeze(0)
    keys = at(llama, torch.randn(1, 2, 1, 16).expand(1, 2, 20, 16), here)
    later = torch.full((1, 1), 1000.0, dtype=torch.float64)
    values = torch.randn(1, 2, 20, 16)
    k, v = differences(site, keys, values, 0, 5, later)
    expected = at(llama, turned(site, keys, -here.double()), here + 1000) - keys[:, :, :5].mean(2, keepdim=True)
    torch.testing.assert_close(k, expected, rtol=0, atol=1e-4)
    assert torch.equal(v, differences(site, keys, values, 0, 5)[1])
    assert k.square().mean() > 2 * differences(site, keys, values, 0, 5)[0].square().mean()


def test_sliding_or_unrotated_sites_have_no_segments(llama: FittedModel) -> None:
    site = next(iter(llama.outcome.sites.values()))
    assert segment_of(site, 512, {}) == 512
    assert segment_of(site, 512, {site.name: 256}) == 0
    assert segment_of(replace(site, mask="sliding", window=64), 512, {}) == 0
    assert segment_of(replace(site, rope=None), 512, {}) == 0
    assert segment_of(replace(site, rope=replace(site.rope, positions="grid")), 512, {}) == 0  # type: ignore[type-var]
    assert segment_of(replace(site, kind="cross"), 512, {}) == 0


def test_keys_of_a_short_calibration_get_positions_all_over_their_segment() -> None:
    inside = placed(512, 7000, 200)
    assert inside is not None and inside.shape == (1, 200) and 0 <= float(inside.min()) < float(inside.max()) < 312
    whole = placed(512, 7000, 200, 4, 3)
    assert whole is not None and whole.shape == (3, 1) and float(whole.max()) < 312
    behind = placed(64, 7000, 200)
    assert behind is not None and behind.flatten().tolist()[63:65] == [0, -64] and float(behind.min()) == -192
    assert placed(0, 0, 200) is None
    far = placed(0, 7000, 200, 0, 2)
    assert far is not None and torch.equal(far.flatten(), spread(2, 0, 7000))


def test_positions_are_well_spread_for_any_count() -> None:
    assert torch.equal(torch.cat([spread(5, 0, 100), spread(3, 5, 100)]), spread(8, 0, 100))
    for count in (8, 20, 500):
        places, _ = (spread(count, 0, 100) / 100).pow(1 / 3).sort()
        assert places[0] >= 0 and places[-1] < 1 and places.diff().max() < 3 / count


def test_statistics_of_a_long_context_preserve_position_invariants(fitted: FittedModel) -> None:
    """Rotation preserves the energy of keys, of gradients and of both together, and does not affect values."""
    batches = numbered(2)
    near = collect.collect(fitted.captured, fitted.outcome, batches, **FAR)
    far = collect.collect(fitted.captured, fitted.outcome, batches, **FAR, span=5000)
    for one, other in zip(near.values(), far.values(), strict=True):
        assert torch.equal(one.value.moment, other.value.moment) and torch.equal(one.value.metric, other.value.metric)
        for before, after in ((one.key.moment, other.key.moment), (one.key.metric, other.key.metric)):
            energies = [x.diagonal(dim1=1, dim2=2).sum() for x in (before, after)]
            torch.testing.assert_close(energies[1], energies[0], rtol=1e-4, atol=0)
            assert torch.equal(before, after) == (one.site.rope is None)
