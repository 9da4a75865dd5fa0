"""Steps of layers that are run ahead of their calls: used where the call comes as expected, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from latent_caches import coded, logits, plans
from needs import needs_compiler
from small_models import cached, tiny_llama, token_ids
from torch import Tensor

import fhopt
from fhopt.hf import cache_steps, steps_ahead
from fhopt.hf.apply import latent_cache
from fhopt.hf.layer_programs import STATE

pytestmark = needs_compiler
LAYERS, PROMPT, STEPS = 4, 40, 40


def four_layers() -> Any:
    return tiny_llama(num_hidden_layers=LAYERS)


def model_of(programs: bool = True) -> Any:
    model, plan = four_layers(), coded(plans(four_layers, 8))
    return fhopt.prepare(fhopt.apply(model, plan, layer_programs=programs))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each call of machine code ran."""
    counts: list[int] = []
    run = cache_steps.run_steps

    def watched(steps: Any) -> None:
        counts.append(len(steps))
        run(steps)

    monkeypatch.setattr(steps_ahead, "run_steps", watched)
    return counts


def steps(model: Any, ids: Tensor, cache: Any = None) -> Tensor:
    return logits(model, latent_cache(model) if cache is None else cache, ids, list(range(PROMPT, ids.shape[1])))


def close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).norm() / expected.norm()) < 1e-3


def followers(model: Any) -> list[Any]:
    return [vars(layer)[STATE].follower for layer in model.model.layers]


def test_most_steps_are_one_call_for_all_layers(calls: list[int]) -> None:
    ids = token_ids(1, PROMPT + STEPS)
    output = steps(model_of(), ids)
    assert calls.count(LAYERS) > 0.7 * STEPS and max(calls) == LAYERS
    assert close(output, steps(model_of(programs=False), ids))


@pytest.mark.parametrize("batch", [2, 5])
def test_batches_too(calls: list[int], batch: int) -> None:
    ids = token_ids(batch, PROMPT + STEPS)
    assert close(steps(model_of(), ids), steps(model_of(programs=False), ids))
    assert LAYERS in calls


def test_what_layers_return_is_what_they_computed() -> None:
    ids, states = token_ids(1, PROMPT + 5), []
    for programs in (False, True):
        model = model_of(programs)
        cache = latent_cache(model)
        steps(model, ids, cache)
        with torch.no_grad():
            states.append(model(ids[:, :1], output_hidden_states=True, **cached(cache)).hidden_states)
    assert len(states[0]) == len(states[1]) == LAYERS + 1
    assert all(close(one, other) for one, other in zip(*states, strict=True))


def _returns_another(module: Any, args: Any, output: Any) -> Any:
    return output * 1.5


def _writes_in_place(module: Any, args: Any, output: Any) -> None:
    output.mul_(1.5)


@pytest.mark.parametrize("hook", [_returns_another, _writes_in_place])
def test_an_output_that_a_hook_changes_is_what_the_next_layer_reads(calls: list[int], hook: Callable[..., Any]) -> None:
    ids = token_ids(1, PROMPT + STEPS)
    outputs = []
    for programs in (False, True):
        model = model_of(programs)
        outputs.append(steps(model, ids))
        handle = model.model.layers[1].register_forward_hook(hook)
        calls.clear()
        outputs.append(steps(model, ids))
        handle.remove()
        outputs.append(steps(model, ids))
    for one, other in zip(outputs[:3], outputs[3:], strict=True):
        assert close(other, one)
    assert not close(outputs[1], outputs[0])


def test_layers_that_are_run_ahead_in_vain_are_left_alone(calls: list[int]) -> None:
    model, ids = model_of(), token_ids(1, PROMPT + STEPS)
    steps(model, ids)
    model.model.layers[1].register_forward_hook(_returns_another)
    calls.clear()
    steps(model, ids)
    assert [f.wasted for f in followers(model)] == [0, 0, steps_ahead.MOST_WASTED, 0]
    assert 2 * calls[-20:].count(2) >= len(calls[-20:])  # layers 0 and 1, layers 2 and 3


def test_a_forward_pass_that_ends_early_leaves_the_other_caches_as_they_were() -> None:
    model, ids = model_of(), token_ids(1, PROMPT + STEPS)
    cache = latent_cache(model)
    expected = steps(model_of(programs=False), ids)
    output = steps(model, ids[:, : PROMPT + 8], cache)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_hook(stop)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        model(ids[:, :1], **cached(cache))
    hook.remove()
    held = [layer.get_seq_length() for layer in cache.layers]
    assert held == [PROMPT + 9, PROMPT + 9, PROMPT + 8, PROMPT + 8]
    for layer in cache.layers[:2]:
        layer.crop(-1)
    rest = logits(model, cache, ids[:, PROMPT + 8 :], list(range(1, STEPS - 8)))
    assert close(torch.cat([output, rest], 1), expected)


def test_a_cache_that_changes_between_layers_is_read_as_it_is() -> None:
    """A hook that makes one layer forget its newest tokens, once."""
    ids, outputs = token_ids(1, PROMPT + STEPS), []
    for programs in (False, True):
        model = model_of(programs)
        cache = latent_cache(model)
        output = steps(model, ids[:, : PROMPT + 8], cache)
        hook = model.model.layers[1].register_forward_hook(lambda *_, c=cache: c.layers[2].crop(-3))
        with torch.no_grad():
            model(ids[:, :1], **cached(cache))
        hook.remove()
        assert [layer.get_seq_length() for layer in cache.layers] == [PROMPT + 9, PROMPT + 9, PROMPT + 6, PROMPT + 9]
        outputs.append(torch.cat([output, logits(model, cache, ids[:, :12], list(range(1, 12)))], 1))
    assert close(outputs[1], outputs[0])


def test_two_caches_in_turns_hold_what_they_were_given() -> None:
    ids, outputs = [token_ids(1, PROMPT + STEPS) for _ in range(2)], []
    for programs in (False, True):
        model = model_of(programs)
        caches = [latent_cache(model) for _ in ids]
        seen = [logits(model, cache, x[:, :PROMPT], []) for cache, x in zip(caches, ids, strict=True)]
        for i in range(PROMPT, PROMPT + STEPS):
            seen += [logits(model, cache, x[:, i : i + 1], []) for cache, x in zip(caches, ids, strict=True)]
        outputs.append(torch.cat(seen, 1))
    assert close(outputs[1], outputs[0])


def test_a_step_that_was_thrown_away_is_not_run_again() -> None:
    model, ids = model_of(), token_ids(1, PROMPT + 8)
    cache = latent_cache(model)
    steps(model, ids, cache)
    bound = next(iter(vars(model.model.layers[0])[STATE].known.bound.values()))[0]
    step = bound.steps[cache.layers[0]]
    assert step.is_current(cache.layers[0], torch.get_num_threads())
    cache_steps.run_steps([step])
    assert not step.is_current(cache.layers[0], torch.get_num_threads())
    assert step.is_unchanged()
    step.finish()
    assert step.is_current(cache.layers[0], torch.get_num_threads()) and cache.layers[0].get_seq_length() == PROMPT + 9
