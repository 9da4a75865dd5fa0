"""What a plan costs: the exact cache beside the plan's, token by token, and intervals that hold."""

from __future__ import annotations

import pytest
import torch
from small_models import Fitted, cached, token_ids
from torch import Tensor
from transformers import DynamicCache

import fhopt
from fhopt import evaluate, fitting
from fhopt.errors import FhoptError
from fhopt.evaluate import TokenCosts, bootstrap_interval, new_cache, read_steps, score, switched, token_costs
from fhopt.layers import LatentLayer


def correlated(tokens: int, generator: torch.Generator) -> Tensor:
    """[1, tokens] of mean 0; neighbours correlate by 0.8."""
    noise, out, last = torch.randn(tokens, generator=generator, dtype=torch.float64), [], 0.0
    for x in noise.tolist():
        last = 0.8 * last + x
        out.append(last)
    return torch.tensor([out], dtype=torch.float64)


def test_the_exact_cache_stays_exact_while_a_plan_is_applied(fitted: Fitted) -> None:
    ids, plan = token_ids(1, 70), fitted.plan(4)
    with torch.no_grad():
        expected = fitted.model(ids).logits
        with switched(fitted.model, plan):
            cache = new_cache(fitted.model, None)
            found = torch.cat([logits for _, (logits,) in read_steps(fitted.model, ids, [cache], plan)], 1)
    assert not any(isinstance(layer, LatentLayer) for layer in cache.layers) and cache.get_seq_length() == 70
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # float32, sums in another order


def test_an_ordinary_cache_would_not_stay_exact(fitted: Fitted) -> None:
    """Why `new_cache` makes another one."""
    cache = DynamicCache(config=fitted.model.config)
    with torch.no_grad(), switched(fitted.model, fitted.plan(4)):
        fitted.model(token_ids(1, 70), **cached(cache), use_cache=True)
    assert all(isinstance(layer, LatentLayer) for layer in cache.layers)


def test_one_paired_pass_gives_what_two_passes_give(fitted: Fitted) -> None:
    ids, plan = token_ids(2, 70), fitted.plan(4)
    costs = token_costs(fitted.model, ids, plan)
    with switched(fitted.model, plan):
        coded = score(fitted.model, ids, plan)
    exact = score(fitted.model, ids, None)
    assert costs.exact.shape == costs.plan.shape == costs.kl.shape == (2, 69)
    assert float(costs.exact.mean()) == pytest.approx(exact.nats, rel=1e-6)  # float32, in steps of another size
    assert float(costs.plan.mean()) == pytest.approx(coded.nats, rel=1e-12)


def test_an_exact_plan_costs_nothing(fitted: Fitted) -> None:
    plan = fitting.exact_plan(fitted.outcome.sites.values(), recent=8, block=8)
    found = token_costs(fitted.model, token_ids(2, 150), plan).compare()
    assert 0 <= found.kl < 1e-9  # float32: squares of relative errors of 1e-6
    assert found.plan == pytest.approx(found.exact, rel=1e-6)
    assert abs(found.increase_percent) < 1e-4 and found.tokens == 298


def test_the_divergence_is_never_negative_and_a_coarse_plan_costs_more(fitted: Fitted) -> None:
    ids = token_ids(2, 150)
    fine, coarse = (token_costs(fitted.model, ids, fitted.plan(ratio)) for ratio in (2, 6))
    assert bool((fine.kl >= 0).all()) and bool((coarse.kl >= 0).all())
    assert coarse.compare().kl > 2 * fine.compare().kl > 0


def test_tokens_that_see_no_latent_cost_nothing(fitted: Fitted) -> None:
    plan = fitted.plan(6)
    costs = token_costs(fitted.model, token_ids(1, 60), plan)
    unsealed = plan.sinks + plan.window
    assert float(costs.kl[:, :unsealed].max()) < 1e-9 < 1e-4 < float(costs.kl[:, unsealed:].max())


def test_the_model_is_left_as_it_was(llama: Fitted) -> None:
    ids, outer = token_ids(1, 40), llama.plan(2)
    token_costs(llama.model, ids, llama.plan(4))
    assert not hasattr(llama.model, "_fhopt_applied") and llama.model.config._attn_implementation == "sdpa"
    fhopt.apply(llama.model, outer)
    try:
        token_costs(llama.model, ids, llama.plan(4))
        assert llama.model._fhopt_applied.plan is outer
        score(llama.model, ids, outer)
    finally:
        fhopt.unapply(llama.model)


def test_steps_end_where_the_plan_seals_a_block(llama: Fitted) -> None:
    plan = llama.plan(4)
    bounds = evaluate.step_bounds(45, plan)
    assert bounds == [(0, 20), (20, 28), (28, 36), (36, 44), (44, 45)]
    assert evaluate.step_bounds(7, plan) == [(0, 7)] and evaluate.step_bounds(20, plan) == [(0, 20)]
    with torch.no_grad(), switched(llama.model, plan):
        cache = new_cache(llama.model, plan)
        for _ in read_steps(llama.model, token_ids(1, 44), [cache], plan):
            layer = cache.layers[0]
            assert layer.open_keys.count == plan.sinks + plan.recent  # whatever may be sealed is sealed


@pytest.mark.parametrize("first", [0, 13, 20, 40, 44])
def test_logits_are_given_from_the_asked_position_on(fitted: Fitted, first: int) -> None:
    ids, plan = token_ids(1, 45), fitted.plan(4)
    with torch.no_grad():
        whole = torch.cat([x for _, (x,) in read_steps(fitted.model, ids, [new_cache(fitted.model, None)], plan)], 1)
        steps = list(read_steps(fitted.model, ids, [new_cache(fitted.model, None)], plan, first))
    assert steps[0][0] == first
    torch.testing.assert_close(torch.cat([x for _, (x,) in steps], 1), whole[:, first:])


def test_the_figures_are_those_of_the_definition() -> None:
    exact = torch.full((2, 100), 1.0, dtype=torch.float64)
    found = TokenCosts(exact, exact + 0.01, exact * 0.5).compare()
    assert found.exact == pytest.approx(2.718281828) and found.increase_percent == pytest.approx(1.005016708)
    assert found.increase_percent_ci == pytest.approx((1.005016708, 1.005016708))  # each block says the same
    assert found.kl == 0.5 and found.kl_ci == (0.5, 0.5) and found.tokens == 200


def test_intervals_cover_the_truth_although_neighbours_correlate() -> None:
    """95 % promised; 64-token blocks and percentiles of 32 blocks keep a little less. Single tokens keep 50 %."""
    generator, covered, trials = torch.Generator().manual_seed(7), 0, 100
    for _ in range(trials):
        change = 0.01 + 0.02 * correlated(2048, generator)
        interval = TokenCosts(torch.zeros_like(change), change, change).compare().kl_ci
        assert interval is not None
        covered += interval[0] <= 0.01 <= interval[1]
    assert covered >= 0.86 * trials


def test_intervals_are_the_same_every_time_and_absent_for_one_block() -> None:
    sums, counts = [1.0, 5.0, 2.0, 4.0], [2, 2, 2, 1]
    first = bootstrap_interval(sums, counts)
    assert first == bootstrap_interval(sums, counts) and first is not None and first[0] < 12 / 7 < first[1]
    assert bootstrap_interval([1.0], [2]) is None
    x = torch.ones(1, 64, dtype=torch.float64)
    assert TokenCosts(x, x, x).compare().increase_percent_ci is None


def test_more_tokens_than_positions_are_refused(llama: Fitted) -> None:
    evaluate.check_length(llama.model, 512)
    with pytest.raises(FhoptError, match="513 tokens are to be read at once; the model has 512 positions"):
        evaluate.check_length(llama.model, 513)
