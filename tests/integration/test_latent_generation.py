"""Generation with a latent cache gives the tokens of the exact model, in every mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generation import MODES, batch_of, cache_of, generate
from latent_caches import gpt2_with_biases, plans, shared
from needs import covering
from small_models import FittedModel, cached, tiny_gpt2, tiny_llama, token_ids

import fhopt
from fhopt.cache.dynamic_layer import LatentLayer
from fhopt.cache.latent_cache import LatentCache
from fhopt.fitting import fit_plan


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "kind"), [("llama", "full width"), ("gpt2", "exact")])
def test_latents_of_full_width_generate_the_same_tokens(
    name: str, kind: str, mode: str, request: pytest.FixtureRequest
) -> None:
    """Every mode runs with both models and both plans; cache operations of a mode do not depend on bases."""
    fitted: FittedModel = request.getfixturevalue(name)
    model, batch = fitted.model, batch_of(mode)
    ids = token_ids(batch, 40)
    expected = generate(model, MODES[mode], ids)
    sites = fitted.outcome.sites.values()
    plan = fitted.plan(1) if kind == "full width" else fit_plan.exact_plan(sites, recent=8, block=8)
    fhopt.apply(model, plan)
    try:
        found = generate(model, MODES[mode], ids)
    finally:
        fhopt.unapply(model)
    assert torch.equal(found.sequences, expected.sequences)
    for a, b in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_generate_makes_latent_caches_and_unapply_undoes_it(fitted: FittedModel) -> None:
    fhopt.apply(fitted.model, fitted.plan(4))
    with_latents = generate(fitted.model, MODES["greedy"], token_ids(1, 60))
    fhopt.unapply(fitted.model)
    without = generate(fitted.model, MODES["greedy"], token_ids(1, 60))
    assert all(isinstance(layer, LatentLayer) for layer in cache_of(with_latents).layers)
    assert not any(isinstance(layer, LatentLayer) for layer in cache_of(without).layers)
    assert fitted.model.config._attn_implementation == "sdpa"


def test_left_padding_is_masked_in_latents_too(fitted: FittedModel) -> None:
    ids, mask = token_ids(2, 50), torch.ones(2, 50, dtype=torch.long)
    mask[0, :9] = 0
    expected = generate(fitted.model, MODES["greedy"], ids, attention_mask=mask)
    fhopt.apply(fitted.model, fitted.plan(1))
    found = generate(fitted.model, MODES["greedy"], ids, attention_mask=mask)
    fhopt.unapply(fitted.model)
    assert torch.equal(found.sequences, expected.sequences)


def test_a_continued_chat_reuses_its_cache(llama: FittedModel) -> None:
    ids = token_ids(1, 40)
    fhopt.apply(llama.model, llama.plan(1))
    try:
        cache = LatentCache(llama.plan(1), llama.model.config)
        first = generate(llama.model, MODES["greedy"], ids, **cached(cache))
        second = generate(llama.model, MODES["greedy"], first.sequences, **cached(cache))
    finally:
        fhopt.unapply(llama.model)
    expected = generate(llama.model, {"do_sample": False, "max_new_tokens": 48, "min_new_tokens": 48}, ids)
    assert torch.equal(second.sequences, expected.sequences)


# ---- 8-bit window


@covering(1, mode=list(MODES), make={"llama": tiny_llama, "gpt2": tiny_gpt2})
def test_a_quantized_window_generates_in_every_mode(make: Any, mode: str) -> None:
    model, batch = make(), batch_of(mode)
    fhopt.apply(model, plans(make, 8))
    output = generate(model, MODES[mode], token_ids(batch, 40))
    assert all(bool(step.isfinite().all()) for step in output.logits)
    assert output.sequences.shape[1] == 64


# ---- one latent for keys and values


@pytest.mark.parametrize("mode", MODES)
def test_keys_and_values_from_one_latent_generate_the_same_tokens(mode: str) -> None:
    model, batch = gpt2_with_biases(), batch_of(mode)
    ids = token_ids(batch, 40)
    expected = generate(model, MODES[mode], ids)
    fhopt.apply(model, shared())
    output = generate(model, MODES[mode], ids)
    assert {layer.site.layout for layer in cache_of(output).layers} == {"input"}
    assert torch.equal(output.sequences, expected.sequences)
    for a, b in zip(output.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
