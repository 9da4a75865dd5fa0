"""The search for the smallest plan within a loss limit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from healed_plans import Letters
from small_models import FittedModel

from fhopt.calibration.options import FitOptions
from fhopt.calibration.run import Calibration
from fhopt.errors import FhoptError
from fhopt.evaluation.statistics import TokenCosts
from fhopt.models.loaded_model import LoadedModel
from fhopt.refine import loss_target
from fhopt.refine.loss_target import smallest_plan
from fhopt.refine.options import RATIOS, Gate, read_loss

OPTIONS = FitOptions(texts=("topics",), sinks=4, recent=8, block=8, tokens=2048, context=96)
SMALL = Gate(0.01, sequences=2, context=200)


@pytest.fixture(scope="module")
def calibration(llama: FittedModel) -> Calibration:
    options = replace(OPTIONS, mean_tokens=0)
    return Calibration(llama.statistics, llama.bases, llama.costs, {"model": "tiny"}, options, {}, llama.outcome)


@pytest.fixture(scope="module")
def loaded(llama: FittedModel) -> LoadedModel:
    return LoadedModel("tiny", llama.model, Letters())


@pytest.mark.parametrize(("text", "share"), [("1%", 0.01), (" 0.5 % ", 0.005), ("0.02", 0.02), ("1/50", 0.02)])
def test_a_loss_is_parsed_as_percent_or_number(text: str, share: float) -> None:
    assert read_loss(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "one", "1%%", "%"])
def test_a_text_that_is_not_a_loss_is_refused(text: str) -> None:
    with pytest.raises(FhoptError, match="is invalid; expected a share"):
        read_loss(text)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.0, float("nan")])
def test_a_meaningless_limit_is_refused(share: float) -> None:
    with pytest.raises(FhoptError, match=r"max_loss .* is invalid"):
        Gate(share).check()


@pytest.mark.parametrize("last", [0, 1, 7, 18])
def test_bisection_finds_the_last_that_passes_in_few_trials(last: int) -> None:
    tried: list[float] = []

    def passes(value: float) -> bool:
        tried.append(value)
        return value <= RATIOS[last]

    assert loss_target._largest(RATIOS, passes) == RATIOS[last]
    assert len(tried) <= 6
    assert loss_target._largest(RATIOS, lambda value: False) is None


@pytest.mark.slow
def test_the_plan_passes_its_gate_and_the_next_size_does_not(loaded: LoadedModel, calibration: Calibration) -> None:
    limit = replace(SMALL, max_loss=0.02)
    plan, trials = smallest_plan(loaded, calibration, OPTIONS, limit, loss_target.held_out(loaded, OPTIONS, limit))
    passed = {r for r, c in trials.items() if c.increase_percent_ci and c.increase_percent_ci[1] <= 2}
    assert plan.provenance["ratio"] == max(passed)
    assert all(r > max(passed) for r in trials if r not in passed)
    assert plan.provenance["gate"]["max_loss"] == 0.02
    assert plan.provenance["gate"]["increase_percent_ci"][1] <= 2


def test_a_gate_that_no_plan_passes_reports_the_smallest_loss(
    loaded: LoadedModel, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dear(model: Any, ids: torch.Tensor, plan: Any) -> TokenCosts:
        exact = torch.rand(2, 199, dtype=torch.float64)
        return TokenCosts(exact, exact + 0.5, torch.full_like(exact, 0.5))

    monkeypatch.setattr(loss_target, "token_costs", dear)
    with pytest.raises(FhoptError, match=r"no plan passes 1.00%: at 2x perplexity changes by \+64"):
        smallest_plan(loaded, calibration, OPTIONS, SMALL, loss_target.held_out(loaded, OPTIONS, SMALL))


def test_an_unavailable_size_does_not_pass(loaded: LoadedModel, calibration: Calibration) -> None:
    """At 400 tokens, sinks and window take a twentieth of the cache; every available size passes a loose gate."""
    options, limit = replace(OPTIONS, tokens=400, window_bits=16), replace(SMALL, max_loss=0.99)
    plan, trials = smallest_plan(loaded, calibration, options, limit, loss_target.held_out(loaded, options, limit))
    assert plan.provenance["ratio"] == max(trials) < RATIOS[-1]


def test_a_model_with_few_positions_is_evaluated_as_far_as_they_go(loaded: LoadedModel) -> None:
    assert loss_target.held_out(loaded, OPTIONS, replace(SMALL, context=2048)).shape == (2, 512)


def test_held_out_tokens_are_not_those_of_the_calibration(loaded: LoadedModel) -> None:
    from fhopt.texts import tokens

    held = loss_target.held_out(loaded, OPTIONS, SMALL)
    used = tokens.calibration_ids(loaded.tokenizer, OPTIONS.texts, count=2, length=200)
    assert held.shape == (2, 200) and not torch.equal(held, used)
