"""Steps prepared together: most are, and any change between two of them is noticed."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from latent_caches import logits
from layered_models import LAYERS, close, model_of
from needs import needs_compiler
from small_models import token_ids
from torch import Tensor

from fhopt.hf.apply import latent_cache
from fhopt.hf.bound_program import BoundProgram
from fhopt.hf.layer_programs import STATE
from fhopt.hf.step_chain import StepChain

pytestmark = needs_compiler
PROMPT, STEPS = 40, 24


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Record for each call of a first layer whether the subsequent steps were prepared together."""
    seen: list[bool] = []
    steps_behind = StepChain.steps_behind

    def watched(*given: Any) -> Any:
        found = steps_behind(*given)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(StepChain, "steps_behind", watched)
    return seen


def steps(model: Any, cache: Any, ids: Tensor, first: int, last: int) -> Tensor:
    return logits(model, cache, ids[:, :last], list(range(first, last)))


def test_most_steps_are_prepared_together(together: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    ids, made = token_ids(1, PROMPT + STEPS), []
    model, ready = model_of(), BoundProgram.ready

    def watched(*given: Any) -> Any:
        made.append(1)
        return ready(*given)

    monkeypatch.setattr(BoundProgram, "ready", watched)
    output = steps(model, latent_cache(model), ids, PROMPT, PROMPT + STEPS)
    assert together.count(True) > 0.6 * STEPS and len(made) < 0.6 * STEPS * LAYERS
    plain = model_of(programs=False)
    assert close(output, steps(plain, latent_cache(plain), ids, PROMPT, PROMPT + STEPS))


def test_layers_of_a_loop_reuse_memory_only_for_hidden_intermediate_states(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    run_through = StepChain.run_through

    def watched(*given: Any) -> Any:
        seen.append(run_through(*given))
        return seen[-1]

    monkeypatch.setattr(StepChain, "run_through", watched)
    ids, model = token_ids(1, PROMPT + STEPS), model_of()
    steps(model, latent_cache(model), ids, PROMPT, PROMPT + STEPS)
    assert len(seen) > 0.6 * STEPS
    assert len({last.output.data_ptr() for _, last in seen}) == len(seen)  # returned outputs are never overwritten


def another_weight(model: Any) -> None:
    layer = model.model.layers[2].mlp.up_proj
    layer.weight = torch.nn.Parameter(1.5 * layer.weight.detach())


def moved_weight(model: Any) -> None:
    weight = model.model.layers[1].self_attn.o_proj.weight
    weight.data = 1.5 * weight.data


def another_part(model: Any) -> None:
    layer = model.model.layers[3].mlp
    other = torch.nn.Linear(layer.up_proj.in_features, layer.up_proj.out_features, bias=False)
    with torch.no_grad():
        other.weight.copy_(1.5 * layer.up_proj.weight)
    layer.up_proj = other


def another_forward(model: Any) -> None:
    part = model.model.layers[2].mlp.down_proj
    run = part.forward
    part.forward = lambda x: 1.5 * run(x)


def hook_inside(model: Any) -> None:
    model.model.layers[2].mlp.register_forward_hook(lambda module, args, output: 1.5 * output)


def hook_between(model: Any) -> None:
    model.model.layers[1].register_forward_hook(lambda module, args, output: 1.5 * output)


def hooks_between(model: Any) -> None:
    layer = model.model.layers[1]
    layer._forward_hooks = type(layer._forward_hooks)()
    hook_between(model)


def hook_before(model: Any) -> None:
    model.model.layers[2].register_forward_pre_hook(lambda module, args: (1.5 * args[0], *args[1:]))


def another_attention(model: Any) -> None:
    attention = model.model.layers[2].self_attn
    attention.config = copy.copy(attention.config)
    attention.config._attn_implementation = "sdpa"


def training(model: Any) -> None:
    model.model.layers[2].train()


@pytest.mark.parametrize("change", [another_attention, training])
def test_settings_of_layers_after_the_first_are_checked(together: list[bool], change: Callable[[Any], None]) -> None:
    ids, model = token_ids(1, PROMPT + 12), model_of()
    cache = latent_cache(model)
    steps(model, cache, ids, PROMPT, PROMPT + 10)
    assert together[-1]
    change(model)
    rest(model, cache, ids[:, : PROMPT + 11], PROMPT + 10)
    assert not together[-1]


@pytest.mark.parametrize(
    "change",
    [
        another_weight,
        moved_weight,
        another_part,
        another_forward,
        hook_inside,
        hook_between,
        hooks_between,
        hook_before,
    ],
)
def test_a_model_changed_between_two_steps_is_used_correctly(
    together: list[bool], change: Callable[[Any], None]
) -> None:
    ids, outputs = token_ids(1, PROMPT + STEPS), []
    middle = PROMPT + STEPS // 2
    for programs in (False, True):
        model = model_of(programs)
        cache = latent_cache(model)
        outputs.append(steps(model, cache, ids, PROMPT, middle))
        assert not programs or together[-1]
        change(model)
        outputs.append(rest(model, cache, ids, middle))
    assert close(outputs[2], outputs[0]) and close(outputs[3], outputs[1])
    unchanged = model_of(programs=False)
    cache = latent_cache(unchanged)
    steps(unchanged, cache, ids, PROMPT, middle)
    assert not close(outputs[1], rest(unchanged, cache, ids, middle))


@torch.no_grad()
def rest(model: Any, cache: Any, ids: Tensor, first: int) -> Tensor:
    """Decode the tokens from `first` on one by one, and return their logits."""
    return torch.cat([model(ids[:, i : i + 1], cache=cache).logits for i in range(first, ids.shape[1])], 1)


def test_a_cache_cropped_between_two_steps_is_used_correctly(together: list[bool]) -> None:
    ids, outputs = token_ids(1, PROMPT + STEPS), []
    for programs in (False, True):
        model = model_of(programs)
        cache = latent_cache(model)
        steps(model, cache, ids, PROMPT, PROMPT + 10)
        cache.layers[2].crop(-3)
        outputs.append(rest(model, cache, ids, PROMPT + 10))
    assert any(together)
    assert close(*outputs)


def test_another_number_of_threads_is_noticed(together: list[bool]) -> None:
    ids, model = token_ids(1, PROMPT + STEPS), model_of()
    cache = latent_cache(model)
    before = torch.get_num_threads()
    steps(model, cache, ids, PROMPT, PROMPT + 10)
    assert together[-1]
    try:
        torch.set_num_threads(before + 1)
        rest(model, cache, ids[:, : PROMPT + 11], PROMPT + 10)
        assert not together[-1]
    finally:
        torch.set_num_threads(before)


def test_two_alternating_caches_have_one_chain(together: list[bool]) -> None:
    ids, model = token_ids(1, PROMPT + STEPS), model_of()
    caches = [latent_cache(model) for _ in range(2)]
    for cache in caches:
        steps(model, cache, ids, PROMPT, PROMPT + 4)
    together.clear()
    for i in range(PROMPT + 4, PROMPT + STEPS):
        for cache in caches:
            rest(model, cache, ids[:, : i + 1], i)
    assert together.count(True) > 0.6 * len(together) and len(together) > STEPS


def test_layers_before_and_after_a_hook_have_separate_chains(together: list[bool]) -> None:
    ids, model = token_ids(1, PROMPT + STEPS), model_of()
    model.model.layers[1].register_forward_hook(lambda *_: None)
    cache = latent_cache(model)
    steps(model, cache, ids, PROMPT, PROMPT + 4)
    together.clear()
    rest(model, cache, ids, PROMPT + 4)
    assert together.count(True) > STEPS and together.count(True) > 0.6 * len(together)


def test_a_chain_holds_no_cache() -> None:
    ids, model = token_ids(1, PROMPT + STEPS), model_of()
    cache = latent_cache(model)
    steps(model, cache, ids, PROMPT, PROMPT + STEPS)
    held = [weakref.ref(part) for layer in cache.layers for part in layer.packed_keys.parts]
    assert any(vars(model.model.layers[0])[STATE].shared.walk._chains.values())
    assert held and all(part() is not None for part in held)
    del cache
    gc.collect()
    assert all(part() is None for part in held)
