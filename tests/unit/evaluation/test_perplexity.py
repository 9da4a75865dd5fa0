"""Perplexity and KL with and without a plan, in one pass."""

from __future__ import annotations

import pytest
import torch
from small_models import FittedModel, cached, token_ids
from transformers import DynamicCache

import fhopt
from fhopt.cache.dynamic_layer import LatentLayer
from fhopt.errors import FhoptError
from fhopt.evaluation import perplexity
from fhopt.evaluation.perplexity import new_cache, read_steps, score, switched, token_costs
from fhopt.fitting import fit_plan
from fhopt.models import model_facts
from fhopt.plan.cache_size import CacheLayer, record_of
from fhopt.plan.window import ResidualWindow


def test_the_exact_cache_stays_exact_while_a_plan_is_applied(fitted: FittedModel) -> None:
    ids, plan = token_ids(1, 70), fitted.plan(4)
    with torch.no_grad():
        expected = fitted.model(ids).logits
        with switched(fitted.model, plan):
            cache = new_cache(fitted.model, None)
            found = torch.cat([logits for _, (logits,) in read_steps(fitted.model, ids, [cache], plan)], 1)
    assert not any(isinstance(layer, LatentLayer) for layer in cache.layers) and cache.get_seq_length() == 70
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # float32 sums in another order


def test_an_ordinary_cache_would_not_stay_exact(fitted: FittedModel) -> None:
    """Documents why `new_cache` makes another cache."""
    cache = DynamicCache(config=fitted.model.config)
    with torch.no_grad(), switched(fitted.model, fitted.plan(4)):
        fitted.model(token_ids(1, 70), **cached(cache), use_cache=True)
    assert all(isinstance(layer, LatentLayer) for layer in cache.layers)


def test_one_paired_pass_equals_two_passes(fitted: FittedModel) -> None:
    ids, plan = token_ids(2, 70), fitted.plan(4)
    costs = token_costs(fitted.model, ids, plan)
    with switched(fitted.model, plan):
        coded = score(fitted.model, ids, plan)
    exact = score(fitted.model, ids, None)
    assert costs.exact.shape == costs.plan.shape == costs.kl.shape == (2, 69)
    assert float(costs.exact.mean()) == pytest.approx(exact.nats, rel=1e-6)  # float32, in calls of other lengths
    assert float(costs.plan.mean()) == pytest.approx(coded.nats, rel=1e-6)


def test_an_exact_plan_has_no_divergence(fitted: FittedModel) -> None:
    plan = fit_plan.exact_plan(fitted.outcome.sites.values(), recent=8, block=8)
    found = token_costs(fitted.model, token_ids(2, 150), plan).compare()
    assert 0 <= found.kl < 1e-9  # float32: squares of relative errors of 1e-6
    assert found.plan == pytest.approx(found.exact, rel=1e-6)
    assert abs(found.increase_percent) < 1e-4 and found.tokens == 298


def test_the_divergence_is_never_negative_and_larger_for_a_coarse_plan(fitted: FittedModel) -> None:
    ids = token_ids(2, 150)
    fine, coarse = (token_costs(fitted.model, ids, fitted.plan(ratio)) for ratio in (2, 6))
    assert bool((fine.kl >= 0).all()) and bool((coarse.kl >= 0).all())
    assert coarse.compare().kl > 2 * fine.compare().kl > 0


def test_tokens_that_attend_to_no_latent_have_no_divergence(fitted: FittedModel) -> None:
    plan = fitted.plan(6)
    costs = token_costs(fitted.model, token_ids(1, 60), plan)
    exact = plan.window.first_length
    assert float(costs.kl[:, :exact].max()) < 1e-9 < 1e-4 < float(costs.kl[:, exact:].max())


def test_the_model_is_left_unchanged(llama: FittedModel) -> None:
    ids, outer = token_ids(1, 40), llama.plan(2)
    token_costs(llama.model, ids, llama.plan(4))
    assert not hasattr(llama.model, "_fhopt_applied") and llama.model.config._attn_implementation == "sdpa"
    fhopt.apply(llama.model, outer, skinny_products=False, decode_program=False)
    try:
        token_costs(llama.model, ids, llama.plan(4))
        assert llama.model._fhopt_applied.plan is outer and llama.model._fhopt_applied.fast == (False, False)
        score(llama.model, ids, outer)
    finally:
        fhopt.unapply(llama.model)


def test_steps_end_where_the_plan_quantizes_a_block(llama: FittedModel) -> None:
    plan = llama.plan(4)
    bounds = perplexity.step_bounds(45, plan)
    assert bounds == [(0, 20), (20, 28), (28, 36), (36, 44), (44, 45)]
    assert perplexity.step_bounds(7, plan) == [(0, 7)] and perplexity.step_bounds(20, plan) == [(0, 20)]
    sliding = CacheLayer("model.layers.0", "sliding", 32, numbers=64)  # therefore blocks of 4, from 8 + 4 tokens on
    assert plan.window.within(32) == ResidualWindow(4, 8, 4, plan.window.bits)
    ends = [stop for _, stop in perplexity.step_bounds(45, plan.with_provenance(**record_of([sliding])))]
    assert ends == [16, 20, 24, 28, 32, 36, 40, 44, 45]
    with torch.no_grad(), switched(llama.model, plan):
        cache = new_cache(llama.model, plan)
        for _ in read_steps(llama.model, token_ids(1, 44), [cache], plan):
            layer = cache.layers[0]
            assert layer.window_keys.count == plan.sinks + plan.recent  # every token that may be quantized is


@pytest.mark.parametrize("first", [0, 13, 20, 40, 44])
def test_logits_are_returned_from_the_requested_position_on(fitted: FittedModel, first: int) -> None:
    ids, plan = token_ids(1, 45), fitted.plan(4)
    with torch.no_grad():
        whole = torch.cat([x for _, (x,) in read_steps(fitted.model, ids, [new_cache(fitted.model, None)], plan)], 1)
        steps = list(read_steps(fitted.model, ids, [new_cache(fitted.model, None)], plan, first))
    assert steps[0][0] == first
    torch.testing.assert_close(torch.cat([x for _, (x,) in steps], 1), whole[:, first:])


def test_more_tokens_than_positions_are_refused(llama: FittedModel) -> None:
    model_facts.check_length(llama.model, 512)
    with pytest.raises(FhoptError, match="a context of 513 tokens is too long; expected at most 512"):
        model_facts.check_length(llama.model, 513)
