"""Long generation: text sampled from the exact model, and a plan's divergence from it at each token."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_models import FittedModel, token_ids

from benchmarks.tasks.generation import BLOCK, Drift, drift_of, own_text, repeated
from fhopt.errors import FhoptError
from fhopt.evaluation.perplexity import token_costs
from fhopt.fitting.fit_plan import exact_plan

PROMPT = [1, 5, 9, 2, 7]


def test_greedy_text_equals_that_of_generate(llama: FittedModel) -> None:
    written = own_text(llama.model, PROMPT, 12, temperature=0.0)
    whole = llama.model.generate(
        torch.tensor([PROMPT]), max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0
    )
    assert written == whole[0, len(PROMPT) :].tolist()


def test_sampled_text_depends_only_on_its_seed(llama: FittedModel) -> None:
    one, again, other = (own_text(llama.model, PROMPT, 30, seed=seed) for seed in (1, 1, 2))
    assert one == again != other and len(one) == 30


def test_drift_equals_the_divergence_after_the_prompt(llama: FittedModel) -> None:
    ids = token_ids(1, 200)[0]
    prompt, text = ids[:40].tolist(), ids[40:].tolist()
    # float64: the two split tokens into calls differently, and float32 rounding could change codes.
    plan, model = llama.plan(8), copy.deepcopy(llama.model).double()
    drift, costs = drift_of(model, prompt, text, plan), token_costs(model, ids[None], plan)
    rounding: Any = {"rtol": 1e-4, "atol": 5e-6}
    torch.testing.assert_close(drift.kl, costs.kl[0, 39:], **rounding)
    torch.testing.assert_close(drift.change, (costs.plan - costs.exact)[0, 39:], **rounding)
    assert drift.kl.shape == drift.agrees.shape == (160,) and float(drift.kl.max()) > 0
    mean, interval = drift.kl_between(64, 160)
    assert mean == pytest.approx(float(drift.kl[64:160].mean())) and interval is not None
    assert interval[0] <= mean <= interval[1]


def test_an_exact_plan_does_not_drift(llama: FittedModel) -> None:
    plan = exact_plan([s.site for s in llama.plan(8).sites], sinks=2, recent=8, block=8)
    text = own_text(llama.model, PROMPT, 60)
    drift = drift_of(llama.model, PROMPT, text, plan)
    assert bool(drift.agrees.all()) and drift.first_difference is None and float(drift.kl.max()) < 1e-8


def test_the_first_difference_is_the_number_of_tokens_that_agree() -> None:
    agrees = torch.tensor([True, True, False, True])
    assert Drift(torch.zeros(4), agrees, torch.zeros(4)).first_difference == 2


def test_more_tokens_than_positions_are_refused(llama: FittedModel) -> None:
    positions = llama.model.config.max_position_embeddings
    with pytest.raises(FhoptError, match="a context of 517 tokens is too long"):
        own_text(llama.model, PROMPT, positions)
    with pytest.raises(FhoptError, match="a context of 517 tokens is too long"):
        drift_of(llama.model, PROMPT, [1] * positions, llama.plan(8))


def test_loops_are_found_and_other_text_is_not_a_loop() -> None:
    assert repeated([1, 2, 3, 4, 5] * 40) == pytest.approx(1 - 5 / 197)
    assert repeated(list(range(200))) == 0 and repeated([1, 2]) == 0
    far = [1, 2, 3, 4, *range(10, 10 + 2 * BLOCK * 4), 1, 2, 3, 4]
    assert repeated(far) == 0  # too far back for a loop
