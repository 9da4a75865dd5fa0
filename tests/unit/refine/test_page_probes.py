"""Probes of the attention weight that page selection leaves out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import FittedModel, token_ids
from torch import Tensor

from fhopt.attention.attend import attend
from fhopt.attention.cache_view import CacheView
from fhopt.attention.sketches import PageIndex
from fhopt.cache.dynamic_layer import LatentLayer
from fhopt.evaluation.perplexity import new_cache, switched
from fhopt.ops import attention, page_selection
from fhopt.ops.page_selection import FEWEST
from fhopt.refine import page_options, page_probes, page_sketches
from fhopt.refine.page_budget import with_pages
from fhopt.refine.page_options import PagingOptions
from fhopt.refine.page_probes import ALL, FILLS, LIFTS, MASSES, Curves

pytestmark = pytest.mark.usefixtures("small_pieces")

SMALL: dict[str, Any] = dict(tokens=4, sketch=4, context=480, sequences=1, least=0)


# --------------------------------------------------------------------------------------------------- curves


def naive_left_out(expected: Tensor, weights: Tensor, count: int) -> float:
    """Sum one query's weight of all but the `count` pages with the largest expected weight."""
    best = sorted(range(len(expected)), key=lambda p: -float(expected[p]))[:count]
    return float(weights.sum()) - sum(float(weights[p]) for p in best)


def test_curves_are_sums_over_queries_of_the_weight_omitted_by_a_plain_loop() -> None:
    """Pages have 70% of all weight; a list has room for half of them."""
    expected, weights = (torch.randn(2, 2, 3, 4, 40).softmax(-1) * 0.7).unbind(0)
    curves = Curves()
    curves.add(expected, weights, 0.5)
    queries = list(zip(expected.flatten(0, 2), weights.flatten(0, 2), strict=True))

    def left(needed: list[int]) -> list[float]:
        return [naive_left_out(e, w, n) for (e, w), n in zip(queries, needed, strict=True)]

    for at, lift in enumerate(LIFTS):
        needed = [min(20, max(FEWEST, sum(1 for x in e.tolist() if x * 40 >= lift))) for e, _ in queries]
        assert float(curves.left[at]) == pytest.approx(sum(left(needed)), abs=1e-4)  # float32
        assert float(curves.squares[at]) == pytest.approx(sum(x * x for x in left(needed)), abs=1e-4)
        assert float(curves.read[at]) == pytest.approx(sum(needed) / 40)
        assert curves.share(at) == pytest.approx(sum(needed) / 40 / len(queries))
    for at, mass in enumerate(MASSES):
        needed = []
        for e, _ in queries:
            falling = e.double().sort(descending=True).values
            needed.append(next((n for n in range(40) if mass < 1 and float(falling[n:].sum()) <= 1 - mass), 40))
        assert float(curves.by_mass[at]) == pytest.approx(sum(left(needed)), abs=1e-4)
        assert float(curves.used[at]) == pytest.approx(sum(needed) / 40)
    assert (curves.share(ALL), curves.left_out(ALL), curves.loss(ALL)) == (1.0, 0.0, 0.0)


def test_curves_count_the_pages_that_selection_reads() -> None:
    """Compare with the pages selected by `top_pages`, for each lift and list size of a plan."""
    expected = torch.randn(2, 2, 4, 40).softmax(-1) * 0.8
    curves = Curves()
    curves.add(expected, expected, 0.3)
    for at, lift in enumerate(LIFTS):
        rule = page_selection.SelectionRule(2, 12, share=0.3, least=FEWEST, mass=1.0, lift=lift)
        kept = page_selection.top_pages(expected, rule, 40)
        assert curves.share(at) == pytest.approx(float(kept.double().mean()))
        assert curves.left_out(at) == pytest.approx(float((expected * ~kept).sum(-1).mean()), abs=1e-6)


def test_page_weights_equal_those_of_full_attention(llama: FittedModel) -> None:
    """Compare with one softmax over dequantized keys."""
    plan, seen = llama.plan(4, window_bits=16), []
    model = llama.model
    with torch.no_grad(), switched(model, plan):
        cache = new_cache(model, plan)
        model(token_ids(1, 100), past_key_values=cache)
        layer = cache.layers[0]
        assert isinstance(layer, LatentLayer)
        layer.observer = lambda *arguments: seen.append(arguments)
        model(token_ids(1, 3), past_key_values=cache)
    (query, key, value, latents, scale, softcap) = seen[0]
    shares = page_probes._FullAttention.of(query, key, value, latents, scale=scale, softcap=softcap).page_weights(4)
    keys = torch.cat([latents.key.reconstruct(), latents.key.open(key, latents.sinks)], 2)
    logits = attention.grouped_scores(query, keys) * scale
    mask = torch.ones(3, keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - 3)
    weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)[..., : latents.visible]
    torch.testing.assert_close(shares, weights.unflatten(-1, (-1, 4)).sum(-1), rtol=1e-3, atol=1e-5)


# --------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("length", [10, 11])
def test_a_repeated_token_probe_repeats_tokens_of_a_text(length: int) -> None:
    ids = torch.arange(100, 100 + length)
    probe = page_probes.repeated_tokens(ids)
    half = length // 2
    again = probe[half : 2 * half]
    assert probe.shape == ids.shape and probe[0] == ids[0] and torch.equal(probe[1:half], again[1:])
    assert len(set(again.tolist())) == half and set(again.tolist()) <= set(ids[1:].tolist())
    assert not torch.equal(again, ids[1 : half + 1])


# --------------------------------------------------------------------------------------------------- the whole


def test_calibrated_pages_record_the_omitted_weight(llama: FittedModel) -> None:
    plan, ids = llama.plan(4), token_ids(1, 480)
    options = PagingOptions(share=0.5, **SMALL)
    sketched = page_sketches.with_sketches(llama.model, plan, ids[:, :200], options.sketch)
    for site in sketched.sites:
        assert site.sketch is not None and site.sketch.row_bytes == options.sketch
    curves = page_probes.measure_pages(llama.model, sketched, ids, options)
    assert all(c.count > 50 and c.cost > 0 for c in curves.values())
    for c in curves.values():
        assert c.repeated and 0 < c.repeated.count < c.count and c.repeated.cost not in (1.0, c.cost)
    assert all(0 < c.left_out(ALL - 1) < c.left_out(0) < 1 for c in curves.values())
    made = with_pages(sketched, curves, options)
    assert made.pages is not None and made.pages.tokens == 4 and max(made.pages.shares) <= 1
    record = made.provenance["pages"]
    assert set(record["left_out"]) == set(record["echo_costs"]) == {s.site.name for s in plan.sites}
    assert 0.25 < sum(record["read"].values()) / len(plan.sites) <= 0.5 and len(made.pages.lifts) == len(plan.sites)
    kept = with_pages(sketched, curves, replace(options, mass=0.95))
    assert kept.pages is not None and any(m < 1 for m in kept.pages.masses)


def test_value_mean_fill_uses_the_factor_with_the_least_error_per_head(llama: FittedModel) -> None:
    """Compare errors of probes with those of attention; some heads need a nonzero factor."""
    plan, ids = llama.plan(4, window_bits=16), token_ids(1, 480)
    options, seen = PagingOptions(share=0.25, **SMALL), []
    sketched = page_sketches.with_sketches(llama.model, plan, ids[:, :200], options.sketch)
    fill_errors, probe = page_probes.fill_errors, page_probes._Probe.__call__
    asked: Any = None

    def remember(self: Any, *arguments: Any) -> None:
        nonlocal asked
        query, key, value, _, scale, softcap = arguments
        asked = (query[:, :, -page_options.QUERIES :], key, value), dict(scale=scale, softcap=softcap)
        probe(self, *arguments)

    def watch(full: Any, absorbed: Tensor, latents: CacheView, estimates: Tensor, index: PageIndex) -> Tensor:
        (query, key, value), numbers = asked
        errors = fill_errors(full, absorbed, latents, estimates, index)
        for fill, row in zip(FILLS, errors, strict=True):
            selecting = replace(index, each_query=True, fill=torch.full((4,), fill).log())
            a, b = (
                attend(query, key, value, replace(latents, index=i, observer=None), None, **numbers)
                for i in (selecting, None)
            )
            torch.testing.assert_close((a - b).double().square().sum((0, 2, 3)), row, rtol=1e-3, atol=1e-6)
        seen.append(errors)
        return errors

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_probes, "fill_errors", watch)
        patch.setattr(page_probes._Probe, "__call__", remember)
        curves = page_probes.measure_pages(llama.model, sketched, ids, options)
    assert len(seen) == 2 * 6  # probes of 64 tokens each, from the first one with enough pages
    made = with_pages(sketched, curves, options).pages
    assert made is not None and max(max(heads) for heads in made.fill) > 0
    for site, heads in zip(sketched.sites, made.fill, strict=True):
        errors = curves[site.site.name].errors
        assert isinstance(errors, Tensor)
        for h, part in enumerate(heads):
            assert float(errors[FILLS.index(part), h]) == float(errors[:, h].min())
    bounded = with_pages(sketched, curves, replace(options, limit=0.5)).pages
    assert bounded is not None and bounded.fill == ()


def test_probes_predict_the_weight_that_selection_omits(llama: FittedModel) -> None:
    """More pages omit less weight, and less than randomly selected pages."""
    ids, options = token_ids(1, 480), PagingOptions(share=0.5, **SMALL)
    sketched = page_sketches.with_sketches(llama.model, llama.plan(2), ids[:, :200], 8)
    for curves in page_probes.measure_pages(llama.model, sketched, ids, options).values():
        left = [curves.left_out(at) for at in range(ALL + 1)]
        assert left == sorted(left, reverse=True)
        shares = [curves.share(at) for at in range(ALL + 1)]
        assert shares == sorted(shares)
        half = curves.lift_for(0.5)
        assert curves.left_out(half) < curves.left_out(0) * (1 - shares[half]) / (1 - shares[0])
