"""Plans on the wide zoo: working, refused, worse than expected, and crashed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import tiny_llama
from window_models import windowed

from benchmarks.zoo import plan_check, plans
from benchmarks.zoo.plan_check import PlanRow, check_plan
from benchmarks.zoo.transformers_classes import DECODERS, Candidate, candidates


@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_a_plan_on_a_decoder_works(ratio: float) -> None:
    row = check_plan(PlanRow("llama", ratio), tiny_llama())
    assert (row.status, row.sites, row.why) == ("works", 2, [])
    assert row.measured <= (1e-9 if ratio == 1 else 5 * row.expected)
    assert row.as_result()["impl"] == f"plan {ratio:g}x"


def test_an_unsupported_model_is_refused_with_a_reason() -> None:
    row = check_plan(PlanRow("mistral", 4.0), windowed("mistral", sliding_window=16))
    assert row.status == "refused" and "enough tokens to compress" in row.why[0]


def test_wrong_results_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_check, "_divergence", lambda exact, ours: 0.5)
    assert check_plan(PlanRow("llama", 1.0), tiny_llama()).status == "wrong"
    monkeypatch.setattr(plan_check, "FACTOR", 0.0)
    row = check_plan(PlanRow("llama", 4.0), tiny_llama())
    assert row.status == "more" and "| llama | 5.0e-01 |" in plans.page([row])


@pytest.mark.slow
def test_a_mixture_whose_token_changes_its_expert_is_checked_with_all_experts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether a token changes its expert is chance, so the first check is mocked."""
    mixture = next(c for c in candidates() if c.name == "HYV3ForCausalLM")
    checked: list[int] = []

    def check(row: PlanRow, model: Any) -> PlanRow:
        checked.append(model.config.num_experts_per_tok)
        if len(checked) == 1:
            row.status, row.measured, row.expected = "more", 0.077, 0.002
            return row
        return check_plan(row, model)

    monkeypatch.setattr(plans, "check_plan", check)
    row = plans.attempt(mixture, 4.0)
    assert row.status == "works" and row.measured <= 5 * row.expected and checked[0] < checked[1]
    assert row.why == ["a token changes its expert: 7.7e-02 nats, expected 2.0e-03"]
    assert "a token was routed to another expert" in plans.page([row])
    assert plans._with_all_experts(Candidate("LlamaForCausalLM", "llama", DECODERS, ()), row) is row


def test_a_plan_that_no_cache_layer_uses_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_check, "_layers", lambda cache: [])
    row = check_plan(PlanRow("llama", 4.0), tiny_llama())
    assert row.status == "wrong" and "is not used" in row.why[0]


def test_non_finite_values_are_infinitely_far() -> None:
    exact = torch.randn(2, 5)
    assert plan_check._divergence(exact, exact) == 0
    assert plan_check._divergence(exact, exact / 0) == math.inf


def test_a_crash_is_retried_and_then_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tried: list[float] = []

    def dies(candidate: Candidate, ratio: float) -> PlanRow:
        tried.append(ratio)
        return PlanRow(candidate.name, ratio, status="crashed", why=["its process ended by SIGABRT"])

    monkeypatch.setattr(plans, "_apart", dies)
    (row,) = plans._checked([(Candidate("Odd", "odd", DECODERS, ("eager",)), 4.0)])
    assert row.status == "crashed" and tried == [4.0, 4.0]
    assert "| its process ended by SIGABRT | Odd |" in plans.page([row])
