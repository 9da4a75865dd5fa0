"""Layer steps run ahead of their calls: used only if the call is the expected one."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from latent_caches import logits
from layered_models import LAYERS, close, model_of
from needs import needs_compiler
from small_models import cached, token_ids
from torch import Tensor

from fhopt.hf import cache_steps, step_chain, steps_ahead
from fhopt.hf.apply import latent_cache
from fhopt.hf.bound_program import BoundProgram
from fhopt.hf.layer_programs import STATE

pytestmark = needs_compiler
PROMPT, STEPS = 40, 40


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record how many layers each native call ran."""
    counts: list[int] = []
    run = cache_steps.run_steps

    def watched(first: Any, behind: list[Any]) -> None:
        counts.append(1 + len(behind))
        run(first, behind)

    for module in (steps_ahead, step_chain):
        monkeypatch.setattr(module, "run_steps", watched)
    return counts


def steps(model: Any, ids: Tensor, cache: Any = None) -> Tensor:
    return logits(model, latent_cache(model) if cache is None else cache, ids, list(range(PROMPT, ids.shape[1])))


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


def test_layers_return_the_states_they_computed() -> None:
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
def test_the_next_layer_uses_an_output_changed_by_a_hook(calls: list[int], hook: Callable[..., Any]) -> None:
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


def _wrapped(layer: Any, change: Callable[[Tensor], Tensor]) -> None:
    """Change the output of a layer by a wrapped forward, without a hook."""
    run = vars(layer)["forward"]
    vars(layer)["forward"] = lambda *args, **kwargs: change(run(*args, **kwargs))


@pytest.mark.parametrize("change", [lambda x: x * 1.5, lambda x: x.mul_(1.5)])
def test_the_next_layer_uses_an_output_changed_without_a_hook(
    calls: list[int], change: Callable[[Tensor], Tensor]
) -> None:
    ids = token_ids(1, PROMPT + STEPS)
    expected = model_of(programs=False)
    expected.model.layers[1].register_forward_hook(_returns_another)
    model = model_of()
    before = steps(model, ids)
    _wrapped(model.model.layers[1], change)
    calls.clear()
    output = steps(model, ids)
    assert close(output, steps(expected, ids)) and not close(output, before)
    # Steps of layers 2 and 3 were run ahead in vain, and are not run ahead again.
    assert [f.wasted for f in followers(model)] == [0, 0, steps_ahead.MAX_WASTED, 0]
    assert calls.count(LAYERS) == steps_ahead.MAX_WASTED and 2 * calls[-20:].count(2) >= len(calls[-20:])


def test_weights_written_by_a_hook_take_effect() -> None:
    """All layers share memory that a hook fills before each one."""
    ids, outputs = token_ids(1, PROMPT + STEPS), []
    for programs in (False, True):
        model = model_of(programs)
        kept = [layer.mlp.up_proj.weight.detach().clone() for layer in model.model.layers]
        memory = torch.nn.Parameter(kept[0].clone())

        def fill(module: Any, args: Any, memory: Any = memory, kept: Any = kept) -> None:
            with torch.no_grad():
                memory.copy_(kept[module.self_attn.layer_idx])

        for layer in model.model.layers:
            layer.mlp.up_proj.weight = memory
            layer.register_forward_pre_hook(fill)
        outputs.append(steps(model, ids))
    assert close(outputs[1], outputs[0]) and close(outputs[0], steps(model_of(programs=False), ids))


def test_a_pass_that_ends_early_holds_no_cache() -> None:
    model, ids = model_of(), token_ids(1, PROMPT + 8)
    cache = latent_cache(model)
    steps(model, ids, cache)

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    _wrapped(model.model.layers[1], stop)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        model(ids[:, :1], **cached(cache))
    held = [weakref.ref(layer) for layer in cache.layers]
    del cache
    gc.collect()
    assert all(layer() is None for layer in held)


def test_a_replaced_cache_layer_is_freed() -> None:
    model, ids = model_of(), token_ids(1, PROMPT + 8)
    cache = latent_cache(model)
    steps(model, ids, cache)
    window = weakref.ref(cache.layers[1].window_keys)
    expected = logits(model, copy.deepcopy(cache), ids[:, :1], [])
    cache.layers[1] = copy.deepcopy(cache.layers[1])
    assert close(logits(model, cache, ids[:, :1], []), expected)
    gc.collect()
    assert window() is None


def test_a_model_from_a_pickle_and_a_copy_run_ahead_too(calls: list[int]) -> None:
    model, ids = model_of(), token_ids(1, PROMPT + STEPS)
    expected = steps(model, ids)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):  # noqa: S301  # written here
        calls.clear()
        assert close(steps(twin, ids), expected) and calls.count(LAYERS) > 0.7 * STEPS


def test_a_pass_that_ends_early_leaves_the_other_caches_unchanged() -> None:
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


def test_a_cache_changed_between_layers_is_used_correctly() -> None:
    """A hook removes a layer's newest tokens, once."""
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


def test_two_alternating_caches_get_their_own_tokens(calls: list[int]) -> None:
    ids, outputs = [token_ids(1, PROMPT + STEPS) for _ in range(2)], []
    for programs in (False, True):
        model = model_of(programs)
        caches = [latent_cache(model) for _ in ids]
        seen = [logits(model, cache, x[:, :PROMPT], []) for cache, x in zip(caches, ids, strict=True)]
        for i in range(PROMPT, PROMPT + STEPS):
            seen += [logits(model, cache, x[:, i : i + 1], []) for cache, x in zip(caches, ids, strict=True)]
        outputs.append(torch.cat(seen, 1))
    assert close(outputs[1], outputs[0]) and calls.count(LAYERS) > STEPS


def test_a_discarded_step_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_of(), token_ids(1, PROMPT + 8)
    cache, calls = latent_cache(model), []
    make = BoundProgram.ready

    def watched(self: Any, args: Any, kwargs: Any) -> Any:
        calls.append((self, args, kwargs))
        return make(self, args, kwargs)

    monkeypatch.setattr(BoundProgram, "ready", watched)
    steps(model, ids, cache)
    (first,) = next(iter(vars(model.model.layers[0])[STATE].known.bound.values()))
    args, kwargs = next((args, kwargs) for bound, args, kwargs in calls if bound is first)
    layer, threads = cache.layers[0], torch.get_num_threads()
    with torch.no_grad():
        ready = first.ready(args, kwargs)
        assert ready.step.is_current(layer, threads)
        cache_steps.run_steps(ready.step, [])
        assert not ready.step.is_current(layer, threads) and ready.step.is_unchanged()
        assert first.ready(args, kwargs).step is not ready.step
        ready.step.finish()
    assert ready.step.is_current(layer, threads) and layer.get_seq_length() == PROMPT + 9
