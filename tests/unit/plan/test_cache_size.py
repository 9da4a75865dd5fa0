"""Bytes of a whole model's cache: layers that a plan compresses, and those that stay exact."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hand_plans import SITE
from latent_caches import coded
from small_models import cached

from fhopt.fitting import fit_plan
from fhopt.hf.apply import latent_cache
from fhopt.plan.cache_size import (
    CacheLayer,
    cache_size,
    compressed_sites,
    hypothetical_size,
    record_of,
    tokens_within,
)
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site import AttentionSite

NUMBERS = 2 * (16 + 8)  # elements of a token at SITE
FULL = CacheLayer("layers.0", numbers=NUMBERS)
SLIDING = CacheLayer("layers.1", "sliding", 100, numbers=NUMBERS)
SHORT = CacheLayer("layers.1", "sliding", 31, numbers=NUMBERS)
STATE = CacheLayer("layers.2", is_full=False, state_bytes=640)
SHARED = CacheLayer("layers.3", is_full=False)
LAYERS = (FULL, SLIDING, STATE, SHARED)


def sites(*indices: int) -> list[AttentionSite]:
    return [replace(SITE, name=f"layers.{i}") for i in indices]


def plan(*indices: int, **provenance: Any) -> LatentPlan:
    return coded(fit_plan.exact_plan(sites(*indices), recent=8, block=8)).with_provenance(**provenance)


@pytest.mark.parametrize("tokens", [50, 99, 100, 112, 8192])
def test_a_sliding_window_is_compressed_as_far_as_it_stores_tokens(tokens: int) -> None:
    whole = plan(0, 1, **record_of(LAYERS))
    size, full = cache_size(whole, tokens), cache_size(whole, tokens, [FULL, replace(SLIDING, mask="", window=0)])
    assert size.compressed_exact_bytes == 2 * NUMBERS * (tokens + min(tokens, 100)) and size.exact_layers == 2
    assert whole.cache_bytes(tokens) == size.compressed_bytes
    assert whole.ratio(tokens) == size.compressed_ratio
    assert (size.compressed_bytes == full.compressed_bytes) is (tokens < 100)
    held, window = full.compressed_bytes // 2, whole.window.within(100)
    first, newest, quantized = window.split(tokens, 100)
    site = whole.sites[1]
    own = first * site.window_bytes(16, 2) + newest * site.window_bytes(16, 2) + quantized * site.token_bytes(2)
    assert size.compressed_bytes == held + own


@pytest.mark.parametrize("tokens", [50, 100, 8192])
def test_layers_that_stay_exact_count_as_in_an_ordinary_cache(tokens: int) -> None:
    size = cache_size(plan(0), tokens, LAYERS)
    exact = 2 * NUMBERS * min(tokens, 100) + 640
    assert size.compressed_bytes == plan(0).cache_bytes(tokens)
    assert size.compressed_exact_bytes == 2 * NUMBERS * tokens
    assert (size.exact_bytes, size.plan_bytes) == (2 * NUMBERS * tokens + exact, size.compressed_bytes + exact)
    assert size.ratio == size.exact_bytes / size.plan_bytes < size.compressed_ratio
    assert size.compressed_ratio == pytest.approx(plan(0).ratio(tokens)) and size.exact_layers == 3


def test_a_current_plan_whose_layers_have_windows_gives_the_same_sizes() -> None:
    layers = (FULL, SHORT, STATE, SHARED)
    assert cache_size(plan(0, 1, 3), 8192, layers) == cache_size(plan(0), 8192, layers)
    assert [p.site.name for p in compressed_sites(plan(0, 1, 3), layers)] == ["layers.0"]
    assert [p.site.name for p in compressed_sites(plan(0, 1, 3), LAYERS)] == ["layers.0", "layers.1"]
    nothing = cache_size(plan(1), 8192, layers)
    assert (nothing.compressed_ratio, nothing.ratio, nothing.exact_layers) == (1, 1, 4)


def test_a_plan_records_the_layers_of_its_model_without_a_change_of_its_digest() -> None:
    recorded = plan(0, **record_of(LAYERS))
    assert cache_size(recorded, 8192) == cache_size(plan(0), 8192, LAYERS)
    assert recorded.digest() == plan(0).digest() and record_of(()) == {}


def test_without_layers_the_sites_are_what_is_counted() -> None:
    size = cache_size(plan(0, 1), 8192)
    assert size.ratio == size.compressed_ratio == plan(0, 1).ratio() and size.exact_layers == 0
    one, other = sites(0, 1)
    windowed = [one, replace(other, mask="sliding", window=100)]
    assert cache_size(None, 8192, sites=windowed).exact_bytes == 2 * NUMBERS * (8192 + 100)


def test_text_and_json_have_both_ratios() -> None:
    size = cache_size(plan(0), 8192, LAYERS)
    assert f"{size.ratio:.2f}x" in size.words and "8,192 tokens" in size.words
    assert {"exact_bytes", "plan_bytes", "ratio", "compressed_ratio", "exact_layers"} <= size.as_json().keys()


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss", "qwen3_next", "gemma3n", "llama4", "mistral", "llama"])
def test_bytes_of_a_plan_equal_those_its_cache_allocates(name: str) -> None:
    from window_models import windowed

    import fhopt
    from fhopt.models.cache_layers import measured_layers

    model = windowed(name)
    layers = measured_layers(model)
    own = [layer for layer in layers if layer.numbers]
    site = replace(SITE, value_dim=16)
    made = coded(fit_plan.exact_plan([replace(site, name=layer.name) for layer in own], recent=8, block=8))
    fhopt.apply(model, made)
    cache = latent_cache(model)
    with torch.no_grad():
        model(torch.ones(1, 1, dtype=torch.long), **cached(cache), use_cache=True)  # makes states of linear layers
    before = 1
    for tokens in (512, 8192, 32768):
        for index, layer in enumerate(layers):
            for count in (tokens - before - 1, 1) if layer.numbers else ():
                cache.layers[index].update(torch.randn(1, 2, count, 16), torch.randn(1, 2, count, 16))
        before = tokens
        assert cache_size(made, tokens, layers, itemsize=4).plan_bytes == pytest.approx(cache.nbytes, rel=0.02)
    fhopt.unapply(model)


def test_a_hypothetical_plan_reduces_the_layers_that_it_may_compress() -> None:
    layers = [CacheLayer("layers.0", "sliding", 30, numbers=8), CacheLayer("layers.1", numbers=8)]
    found = hypothetical_size(4, sites(0, 1), 1000, layers)
    assert (found.exact_bytes, found.plan_bytes) == (2 * 8 * 1030, 2 * 8 * (30 + 250))
    assert (found.compressed_ratio, found.exact_layers) == (4, 1)
    found = hypothetical_size(4, sites(0, 1), 1000, [replace(layers[0], window=100), layers[1]])
    assert (found.plan_bytes, found.exact_layers) == (2 * 8 * (25 + 250), 0)
    unknown = hypothetical_size(4, sites(0), 1000, [CacheLayer("elsewhere", numbers=8)])
    assert unknown.ratio == 1 and unknown.exact_layers == 1


@pytest.mark.parametrize(("room", "tokens"), [(0, 0), (9, 0), (10, 1), (999, 99), (10**9, 500)])
def test_the_longest_context_within_a_byte_limit_is_found(room: int, tokens: int) -> None:
    assert tokens_within(room, lambda count: 10 * count, most=500) == tokens
