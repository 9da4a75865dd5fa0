"""Parts of decode steps: what they add up to, and where they are known."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import pytest
import torch
from needs import needs_compiler
from small_models import Fitted

from fhopt.evaluation.perplexity import decode_options, new_cache, switched
from fhopt.evaluation.step_parts import StepParts, median_parts, step_clock
from fhopt.evaluation.throughput import _timed_call


def _noted(model: Any, plan: Any, steps: int) -> Any:
    """Read a prompt that fills a window, and note the steps behind it."""
    ids = torch.randint(50, (1, 200), generator=torch.Generator().manual_seed(0))
    with switched(model, plan), torch.inference_mode():
        options = decode_options(model, new_cache(model, plan, each_query=False))
        token, _ = _timed_call(model, ids, options)
        with step_clock(model) as clock:
            for _ in range(steps):
                token, seconds = _timed_call(model, token, options)
                clock.note(seconds)
    return clock


@needs_compiler
def test_parts_of_a_plan_add_up(llama: Fitted) -> None:
    clock = _noted(llama.model, llama.plan(4), 24)
    layers = llama.model.config.num_hidden_layers
    assert max(count for count, _ in clock._noted) == layers
    for count, parts in clock._noted:
        total, *others = astuple(parts)
        assert total == pytest.approx(sum(others)) and min(others[:1] + others[3:]) > 0
        assert (parts.attention > 0) == (count > 0) and parts.layers >= 0
    parts = clock.parts()
    assert parts is not None and 0 < parts.weights < parts.total and 0 < parts.attention < parts.total


def test_layers_that_are_run_operation_by_operation_have_no_parts(llama: Fitted) -> None:
    clock = _noted(llama.model, None, 3)
    assert clock.parts() is None and len(clock._noted) == 3 and all(parts.output > 0 for _, parts in clock._noted)


def test_nothing_is_left_in_the_model(llama: Fitted) -> None:
    output = llama.model.get_output_embeddings()
    with pytest.raises(RuntimeError, match="of a step"), step_clock(llama.model):
        assert output._forward_hooks and output._forward_pre_hooks
        raise RuntimeError("of a step")
    assert not output._forward_hooks and not output._forward_pre_hooks


def test_a_median_is_of_each_part() -> None:
    steps = [StepParts(3, 1, 0.5, 0.1, 0.4, 1), StepParts(9, 2, 0.7, 0.3, 0.2, 5.8), StepParts(4, 0, 1, 1, 1, 1)]
    assert median_parts(steps) == StepParts(4, 1, 0.7, 0.3, 0.4, 1)
