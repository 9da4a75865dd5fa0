"""Interleaved timing of decode steps, at several context lengths of one prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import FittedModel, found, token_ids
from window_models import windowed

import fhopt
from fhopt.cli.demo_run import demo_summary, measured_break_even
from fhopt.evaluation import decode_speed
from fhopt.evaluation.perplexity import new_cache
from fhopt.evaluation.prefilled import PIECE
from fhopt.fitting import fit_plan
from fhopt.models.cache_layers import measured_layers


def test_a_prompt_is_prefilled_once_for_all_caches_and_lengths(
    llama: FittedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, read = llama.plan(4), []
    forward = llama.model.forward

    def watched(ids: Any = None, *args: Any, **options: Any) -> Any:
        read.append(ids.shape[1])
        return forward(ids, *args, **options)

    monkeypatch.setattr(llama.model, "forward", watched)
    speeds = decode_speed.decode_speed(llama.model, plan, token_ids(1, 90)[0], [40, 60], steps=3, rounds=2)
    assert [n for n in read if n > 1] == [90] and PIECE >= 90
    assert read.count(1) == 2 * 3 * (2 + 2 * 3)  # caches, lengths, warm-up steps and those of the rounds
    assert list(speeds["contexts"]) == [40, 60, 90] and speeds["contexts"][90]["plan"] == speeds["plan"] > 0
    assert speeds["bytes"]["plan"] < speeds["bytes"]["exact"] == 90 * plan.exact_token_bytes(itemsize=4)
    assert not hasattr(llama.model, "_fhopt_applied")


@torch.no_grad()
def test_timed_steps_leave_a_cache_unchanged(llama: FittedModel) -> None:
    fhopt.apply(llama.model, llama.plan(4))
    try:
        cache = new_cache(llama.model, llama.plan(4))
        llama.model(token_ids(1, 80), cache=cache)
        decode_speed._timed_steps(llama.model, cache, 5)
        assert cache.get_seq_length() == 80
    finally:
        fhopt.unapply(llama.model)


def test_steps_of_sliding_windows_are_undone() -> None:
    model = windowed("gemma3", sliding_window=64)
    sites = [s for s in found(model)[1].sites.values() if any(one.has(s.name) for one in measured_layers(model))]
    plan = fit_plan.exact_plan(sites, sinks=4, recent=16, block=8)
    speed = decode_speed.decode_speed(model, plan, token_ids(1, 200)[0], (90,), steps=3, rounds=2)
    assert sorted(speed["contexts"]) == [90, 200] and min(speed["contexts"][90].values()) > 0
    numbers = sites[0].exact_numbers_per_token
    assert speed["bytes"]["exact"] == 4 * numbers * (5 * 63 + 200)


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [([0.9, 1.1, 1.5], 2048), ([1.0, 1.1, 1.5], 512), ([0.9, 0.9, 0.9], None), ([1.2, 0.9, 1.1], 8000)],
)
def test_the_break_even_is_the_context_from_which_a_plan_is_never_slower(
    ratios: list[float], expected: int | None
) -> None:
    speeds = {n: {"exact": 2.0, "plan": 2.0 * r} for n, r in zip((512, 2048, 8000), ratios, strict=True)}
    assert measured_break_even(speeds) == expected


def test_the_last_line_of_the_demo_says_smaller_faster_same() -> None:
    result: dict[str, Any] = {
        "ratio": 4.0,
        "speed_by_context": {512: {"exact": 10.0, "plan": 9.0}, 8000: {"exact": 2.0, "plan": 5.0}},
        "break_even_tokens": 8000,
        "answer": {"exact": "Paris.", "plan": "Paris."},
        "perplexity": {"topics": {"exact": 8.0, "plan": 8.008}, "source": {"exact": 8.0, "plan": 7.9}},
    }
    assert demo_summary(result) == (
        "4.00x smaller; 2.50x the speed at 8,000 tokens (faster from 8,000 tokens); the same answer, perplexity at "
        "most +0.10%; longer greedy text usually differs from some token on."
    )
    other = result | {"break_even_tokens": None, "answer": {"exact": "Paris.", "plan": "Rome."}}
    assert "at no measured length" in demo_summary(other) and "another answer" in demo_summary(other)
