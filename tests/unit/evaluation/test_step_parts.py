"""Time breakdown of decode steps: the sum of the parts, and when they are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from latent_caches import coded, plans
from layered_models import LAYERS, four_layers
from needs import needs_compiler
from small_models import token_ids

from fhopt.decode.cache_steps import _timed, timed_steps
from fhopt.evaluation.perplexity import decode_options, new_cache, switched
from fhopt.evaluation.step_parts import StepParts, step_clock
from fhopt.evaluation.throughput import _timed_call
from fhopt.hf.apply import prepare


def _noted(plan: Any, steps: int) -> Any:
    """Prefill a prompt that fills a window, and record the steps after it."""
    model, ids = four_layers(), token_ids(1, 100)
    with switched(model, plan), torch.inference_mode():
        prepare(model)
        options = decode_options(model, new_cache(model, plan, each_query=False))
        token, _ = _timed_call(model, ids, options)
        with step_clock() as clock:
            for _ in range(steps):
                token, seconds = _timed_call(model, token, options)
                clock.note(seconds)
    return clock


@needs_compiler
def test_parts_of_a_plan_add_up() -> None:
    clock = _noted(coded(plans(four_layers, 8)), 24)
    parts = clock.parts()
    assert parts is not None and 0 < clock.layers() <= LAYERS
    known = (parts.weights, parts.attention, parts.rest, parts.around)
    assert min(known) > 0 and sum(known) == pytest.approx(parts.total)


@needs_compiler
def test_layers_without_a_single_native_call_count_as_overhead() -> None:
    clock = _noted(coded(plans(four_layers, 16)), 3)
    assert clock.parts() is None and clock.layers() == 0
    with step_clock() as clock:
        clock._spent.layers, clock._spent.total = 1, 0.25
        clock.note(1.0)
        clock.note(2.0)
    assert clock.parts() == StepParts(1500.0, 0.0, 0.0, 125.0, 1375.0)


def test_an_exact_cache_has_no_parts() -> None:
    assert _noted(None, 3).parts() is None


@needs_compiler
def test_a_nested_block_counts_its_own_steps() -> None:
    with timed_steps() as outer:
        inner = _noted(coded(plans(four_layers, 8)), 12)
    assert inner.parts() is not None and outer.layers < inner._spent.layers
    assert _timed.spent is None
