"""Loops that only call layers skip layers already run ahead. Which loops: test_layer_loop_source.py."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from latent_caches import coded, logits, plans
from layered_models import LAYERS, close, four_layers, model_of
from needs import needs_compiler
from small_models import cached, token_ids
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaModel

import fhopt
from fhopt.hf import layer_loop
from fhopt.hf.apply import latent_cache
from fhopt.hf.layer_loop import LOOP, CallLoop, call_loop
from fhopt.hf.layer_programs import LayerState

PROMPT, STEPS = 40, 24


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record the layers that are called as modules."""
    layers: list[Any] = []
    call = LayerState.__call__

    def watched(self: LayerState, *args: Any, **kwargs: Any) -> Any:
        layers.append(self.layer)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(LayerState, "__call__", watched)
    return layers


def steps(model: Any, ids: Tensor, cache: Any = None) -> Tensor:
    return logits(model, latent_cache(model) if cache is None else cache, ids, list(range(PROMPT, ids.shape[1])))


@torch.no_grad()
def step(model: Any, ids: Tensor, cache: Any, **options: Any) -> Any:
    return model(ids, **cached(cache), **options)


def warm() -> tuple[Any, Any, Tensor]:
    """Return a model whose loop calls only its first layer, a cache, and the next token."""
    model, ids = model_of(), token_ids(1, PROMPT + 9)
    cache = latent_cache(model)
    steps(model, ids[:, :-1], cache)
    return model, cache, ids[:, -1:]


@needs_compiler
@pytest.mark.parametrize("batch", [1, 3])
def test_layers_after_the_first_are_not_called(called: list[Any], batch: int) -> None:
    ids = token_ids(batch, PROMPT + STEPS)
    model = model_of()
    output = steps(model, ids)
    first, *others = model.model.layers
    assert called.count(first) == STEPS + 1
    assert all(called.count(layer) < 0.5 * STEPS for layer in others)
    assert close(output, steps(model_of(programs=False), ids))


@needs_compiler
def test_every_token_is_in_every_layer_of_the_cache(called: list[Any]) -> None:
    model, cache, token = warm()
    called.clear()
    step(model, token, cache)
    assert called == [model.model.layers[0]]
    assert [layer.get_seq_length() for layer in cache.layers] == [PROMPT + 9] * LAYERS


def _hooked_globally(model: Any) -> Any:
    def hook(module: Any, args: Any, output: Any) -> None:
        if module is model.model.layers[2]:
            output.mul_(1.5)

    return torch.nn.modules.module.register_module_forward_hook(hook)


def _hooked_globally_before(model: Any) -> Any:
    def hook(module: Any, args: Any) -> None:
        if module is model.model.layers[2]:
            args[0].mul_(1.5)

    return torch.nn.modules.module.register_module_forward_pre_hook(hook)


def _hooked_at_the_end(model: Any) -> Any:
    return model.model.layers[-1].register_forward_hook(lambda module, args, output: output.roll(1, -1))


def _hooked_before_all(model: Any) -> Any:
    """Pass other arguments to the first layer only."""

    def hook(module: Any, args: Any, kwargs: Any) -> Any:
        turned = tuple(x.flip(-1) for x in kwargs["position_embeddings"])
        return args, {**kwargs, "position_embeddings": turned}

    return model.model.layers[0].register_forward_pre_hook(hook, with_kwargs=True)


def _with_another_call(model: Any) -> None:
    class Calls(type(model.model.layers[2])):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs).add_(torch.arange(64) / 16)

    model.model.layers[2].__class__ = Calls


def _with_another_layer_in_the_middle(model: Any) -> Any:
    """A hook that runs before the loop replaces a layer."""
    other = copy.deepcopy(model.model.layers[2])
    with torch.no_grad():
        other.mlp.down_proj.weight.mul_(1.5)

    def hook(*_: Any) -> None:
        model.model.layers[2] = other

    return model.model.rotary_emb.register_forward_hook(hook)


def _with_another_forward(number: int) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        layer = model.model.layers[number]
        run = layer.forward
        layer.forward = lambda *args, **kwargs: run(*args, **kwargs).add_(torch.arange(64) / 16)

    return change


def _with_another_layer(model: Any) -> None:
    model.model.layers[2] = copy.deepcopy(model.model.layers[2])
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(1.5)


def _with_one_more_layer(model: Any) -> None:
    class Steers(torch.nn.Module):
        def forward(self, x: Any, **_: Any) -> Any:
            return x.add_(torch.arange(64) / 16)

    model.model.layers.insert(1, Steers())
    model.config.num_hidden_layers += 1


def _with_layers_in_another_order(model: Any) -> None:
    first, second, *others = model.model.layers
    model.model.layers = torch.nn.ModuleList([second, first, *others])


def _with_fewer_layers(model: Any) -> None:
    model.config.num_hidden_layers = 2


@needs_compiler
@pytest.mark.parametrize(
    "change",
    [
        _hooked_globally,
        _hooked_globally_before,
        _hooked_at_the_end,
        _hooked_before_all,
        _with_another_call,
        _with_another_layer_in_the_middle,
        _with_another_forward(0),
        _with_another_forward(2),
        _with_another_forward(3),
        _with_another_layer,
        _with_one_more_layer,
        _with_layers_in_another_order,
        _with_fewer_layers,
    ],
)
def test_a_change_between_two_steps_takes_effect(called: list[Any], change: Callable[[Any], Any]) -> None:
    ids, outputs = token_ids(1, PROMPT + STEPS), []
    for programs, is_changed in ((False, True), (True, True), (False, False)):
        model = model_of(programs)
        cache = latent_cache(model)
        steps(model, ids[:, : PROMPT + 8], cache)
        called.clear()
        before = step(model, ids[:, PROMPT + 8 : PROMPT + 9], cache).logits
        assert called == ([model.model.layers[0]] if programs else [])
        handle = change(model) if is_changed else None
        try:
            rest = [step(model, ids[:, i : i + 1], cache).logits for i in range(PROMPT + 9, PROMPT + STEPS)]
        finally:
            if handle is not None:
                handle.remove()
        outputs.append(torch.cat([before, *rest], 1))
    assert close(outputs[1], outputs[0])
    assert not close(outputs[0][:, 1:2], outputs[2][:, 1:2])


@needs_compiler
def test_hidden_states_of_all_layers_are_returned_in_every_step() -> None:
    ids, states = token_ids(1, PROMPT + 12), []
    for programs in (False, True):
        model = model_of(programs)
        cache = latent_cache(model)
        steps(model, ids[:, : PROMPT + 9], cache)
        given = [ids[:, i : i + 1] for i in range(PROMPT + 9, PROMPT + 12)]
        states.append([step(model, x, cache, output_hidden_states=True).hidden_states for x in given])
    for one, other in zip(*states, strict=True):
        assert len(one) == len(other) == LAYERS + 1
        assert all(map(close, one, other))


class _OwnLoop(LlamaModel):  # type: ignore[misc]
    """A model that passes different arguments to each layer, and counts its steps."""

    steps_seen, shift = 0, 0

    def forward(self, input_ids: Any = None, cache: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        x = self.embed_tokens(input_ids)
        first = cache.get_seq_length()
        positions = torch.arange(first, first + x.shape[1])[None]
        turned = self.rotary_emb(x, positions)
        turned = [turned] * 2 + [self.rotary_emb(x, positions + self.shift) if self.shift else turned] * 2
        for i, layer in enumerate(self.layers):
            x = layer(x, position_embeddings=turned[i], cache=cache, attention_mask=None)
        self.steps_seen += 1
        return self.norm(x)


def _own(programs: bool) -> Any:
    model, plan = four_layers(), coded(plans(four_layers, 8))
    model.model.__class__ = _OwnLoop
    return fhopt.prepare(fhopt.apply(model, plan, layer_programs=programs))


@needs_compiler
def test_layers_with_different_arguments_use_their_own(called: list[Any]) -> None:
    ids, outputs = token_ids(1, PROMPT + STEPS), []
    for programs in (False, True):
        whole = _own(programs)
        model, cache = whole.model, latent_cache(whole)
        assert call_loop(_OwnLoop.forward, "layers") == CallLoop(alike=False)
        with torch.no_grad():
            for i in range(STEPS + 1):
                model.shift = 7 if i > STEPS // 2 else 0
                tokens = ids[:, :PROMPT] if i == 0 else ids[:, PROMPT + i - 1 : PROMPT + i]
                called.clear()
                outputs.append(model(tokens, cache=cache)[:, -1])
                if programs and i == STEPS // 2:
                    assert called == list(model.layers[:1])
                elif programs and i == STEPS // 2 + 1:
                    assert called == [model.layers[0], *model.layers[2:]]
        assert model.steps_seen == STEPS + 1 and _OwnLoop.steps_seen == 0
    half = len(outputs) // 2
    assert all(close(one, other) for one, other in zip(outputs[half:], outputs[:half], strict=True))


@needs_compiler
def test_a_forward_that_changes_its_module_changes_the_real_one(
    called: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache, token = warm()
    run, met = LlamaModel.forward, []

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.scale, self.newest, self.part = torch.ones(3), None, torch.nn.Identity()
        del self.old
        met.append((isinstance(self, LlamaModel), self.__class__, vars(self) is vars(model.model), len(self.layers)))
        assert [type(x) for x in self.layers] == [layer_loop._Turn] * LAYERS and self.layers[1] is model.model.layers[1]
        return run(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    monkeypatch.setattr(layer_loop, "call_loop", lambda *_: CallLoop(alike=False))
    model.model.old = 1
    called.clear()
    step(model, token, cache)
    assert called == [model.model.layers[0]] and met == [(True, LlamaModel, True, LAYERS)]
    assert torch.equal(model.model.scale, torch.ones(3)) and vars(model.model)["newest"] is None
    assert isinstance(model.model.part, torch.nn.Identity) and not hasattr(model.model, "old")
    assert type(model.model.layers) is torch.nn.ModuleList and len(model.model.layers) == LAYERS


@needs_compiler
def test_layers_can_be_called_after_a_pass_that_ends_within_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_loop, "call_loop", lambda *_: CallLoop(alike=False))
    model, cache, token = warm()
    turn, counts = layer_loop._Turn.__call__, []

    def stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts.append(1)
        if len(counts) == 3:
            raise KeyboardInterrupt
        return turn(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(layer_loop._Turn, "__call__", stop)
        step(model, token, cache)
    assert [layer.get_seq_length() for layer in cache.layers] == [PROMPT + 9] * 2 + [PROMPT + 8] * 2
    walk = vars(model.model)[LOOP]._shared.walk
    assert walk.due is None and walk.turns is None and walk.may_skip == (None, 0)
    for layer in cache.layers[:2]:
        layer.crop(-1)
    output = step(model, token, cache).logits
    assert close(output, steps(model_of(programs=False), token_ids(1, PROMPT + 9))[:, -1:])
    held = weakref.ref(cache.layers[3])
    del cache
    gc.collect()
    assert held() is None


@needs_compiler
def test_a_pass_that_ends_after_the_loop_does_not_affect_the_next_one() -> None:
    model, cache, token = warm()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.norm.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        step(model, token, cache)
    hook.remove()
    assert [layer.get_seq_length() for layer in cache.layers] == [PROMPT + 9] * LAYERS
    walk = vars(model.model)[LOOP]._shared.walk
    assert walk.due is None and walk.turns is None and walk.may_skip == (None, 0) and walk.skipped == 0
    for layer in cache.layers:
        layer.crop(-1)
    output = step(model, token, cache).logits
    assert close(output, steps(model_of(programs=False), token_ids(1, PROMPT + 9))[:, -1:])


@needs_compiler
def test_calling_layers_one_by_one_agrees_with_skipping_them(
    called: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, outputs, counts, turn = token_ids(1, PROMPT + STEPS), [], [], layer_loop._Turn.__call__

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts.append(1)
        return turn(self, *args, **kwargs)

    monkeypatch.setattr(layer_loop._Turn, "__call__", watched)
    for alike in (False, True):
        monkeypatch.setattr(layer_loop, "call_loop", lambda *_, alike=alike: CallLoop(alike))
        counts.clear()
        outputs.append(steps(model_of(), ids))
        assert len(counts) > 0.7 * LAYERS * STEPS or alike
    assert len(counts) < 0.5 * LAYERS * STEPS and torch.equal(*outputs)


@needs_compiler
def test_copies_and_pickles_have_their_own_loops(called: list[Any]) -> None:
    model, _, _ = warm()
    ids = token_ids(1, PROMPT + STEPS)
    expected = steps(model, ids)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301  # written here
        called.clear()
        assert close(steps(twin, ids), expected)
        names = [list(inspect.signature(x).parameters) for x in (twin.model.forward, LlamaModel.forward)]
        assert vars(twin.model)[LOOP]._module is twin.model and names[0] == names[1][1:]
        assert called.count(twin.model.layers[0]) == STEPS + 1 and called.count(twin.model.layers[3]) < 0.5 * STEPS
        assert not any(layer in called for layer in model.model.layers)


@needs_compiler
def test_threads_do_not_share_the_state_of_a_loop(called: list[Any]) -> None:
    prompts = [token_ids(1, PROMPT + STEPS) for _ in range(3)]
    model = model_of()
    expected = [steps(model, ids) for ids in prompts]
    called.clear()
    with ThreadPoolExecutor(3) as pool:
        for output, alone in zip(pool.map(lambda ids: steps(model, ids), prompts), expected, strict=True):
            assert close(output, alone)
    assert called.count(model.model.layers[3]) < 0.5 * called.count(model.model.layers[0])


def test_removing_a_plan_removes_the_loop() -> None:
    model = four_layers()
    known = inspect.signature(model.model.forward)
    fhopt.apply(model, coded(plans(four_layers, 8)))
    assert LOOP in vars(model.model)
    assert list(inspect.signature(model.model.forward).parameters) == list(known.parameters)
    fhopt.unapply(model)
    assert LOOP not in vars(model.model) and "forward" not in vars(model.model)


def test_a_replaced_forward_is_not_changed() -> None:
    model = four_layers()
    mine = model.model.forward
    model.model.forward = mine
    fhopt.apply(model, coded(plans(four_layers, 8)))
    assert vars(model.model)["forward"] is mine and LOOP not in vars(model.model)
    fhopt.unapply(model)
    assert vars(model.model)["forward"] is mine


def test_a_forward_that_wraps_ours_is_not_changed() -> None:
    model, ids = four_layers(), token_ids(1, PROMPT)
    with torch.no_grad():
        expected = model(ids).logits
        fhopt.apply(model, coded(plans(four_layers, 8)))
        ours = model.model.forward
        theirs = model.model.forward = lambda *args, **kwargs: ours(*args, **kwargs)
        fhopt.unapply(model)
        assert vars(model.model)["forward"] is theirs and torch.equal(model(ids).logits, expected)
