"""Layer programs bound to the weights of a layer: which calls they fit."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from latent_caches import coded, logits, plans
from needs import needs_compiler
from small_models import tiny_llama, token_ids

import fhopt
from fhopt.hf.apply import latent_cache
from fhopt.hf.bound_program import BoundProgram
from fhopt.hf.layer_programs import STATE

pytestmark = needs_compiler


@pytest.fixture
def layer_and_call(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, BoundProgram, tuple[Any, ...], dict[str, Any]]:
    """Return a layer, its program, and the arguments of a call that it fits."""
    model = tiny_llama()
    fhopt.prepare(fhopt.apply(model, coded(plans(tiny_llama, 8))))
    calls: list[Any] = []
    ready = BoundProgram.ready

    def watched(self: Any, args: Any, kwargs: Any) -> Any:
        calls.append((self, args, kwargs))
        return ready(self, args, kwargs)

    monkeypatch.setattr(BoundProgram, "ready", watched)
    logits(model, latent_cache(model), token_ids(1, 50), list(range(40, 50)))
    layer = model.model.layers[0]
    (bound,) = next(iter(vars(layer)[STATE].known.bound.values()))
    return layer, *next(call for call in calls if call[0] is bound)


def test_a_program_fits_calls_like_the_recorded_one(layer_and_call: Any) -> None:
    _, bound, args, kwargs = layer_and_call
    x = args[0]
    with torch.no_grad():
        assert bound.fits(args, kwargs) and bound.fits((torch.ones_like(x),), kwargs)
        assert not bound.fits((x.double(),), kwargs) and not bound.fits((torch.cat([x, x]),), kwargs)
        assert not bound.fits(args, {**kwargs, "use_cache": not kwargs["use_cache"]})
        assert not bound.fits(args, {**kwargs, "use_cache": int(kwargs["use_cache"])})
        assert not bound.fits(args, {**kwargs, "more": 1}) and not bound.fits((*args, None), kwargs)
        assert not bound.fits(args, dict(reversed(kwargs.items())))
        with torch.autocast("cpu", torch.bfloat16):
            assert not bound.fits(args, kwargs)


def test_a_change_of_the_layer_is_noticed(layer_and_call: Any) -> None:
    layer, bound, _, _ = layer_and_call
    assert bound.is_current()
    weight = layer.mlp.up_proj.weight
    kept = weight.data
    weight.data = kept.clone()
    assert not bound.is_current()
    weight.data = kept
    assert bound.is_current()
    hook = layer.mlp.register_forward_hook(lambda *_: None)
    assert not bound.is_current()
    hook.remove()
    act, layer.mlp.act_fn = layer.mlp.act_fn, torch.nn.GELU()
    assert not bound.is_current()
    layer.mlp.act_fn = act
    layer.mlp.act_fn.forward = torch.relu
    assert not bound.is_current()
    del layer.mlp.act_fn.forward
    assert bound.is_current()


def test_a_cache_that_was_freed_takes_no_memory() -> None:
    model, caches = tiny_llama(), []
    fhopt.prepare(fhopt.apply(model, coded(plans(tiny_llama, 8))))
    for _ in range(2):
        caches.append(latent_cache(model))
        logits(model, caches[-1], token_ids(1, 60), list(range(40, 60)))
    held = [weakref.ref(part) for layer in caches[-1].layers for part in layer.packed_keys.parts]
    assert held and all(part() is not None for part in held)
    caches.clear()
    gc.collect()
    assert all(part() is None for part in held)


def test_programs_of_layers_called_with_the_same_arguments_fit_together(layer_and_call: Any) -> None:
    _, bound, args, _ = layer_and_call
    model = tiny_llama()
    fhopt.prepare(fhopt.apply(model, coded(plans(tiny_llama, 8))))
    for batch in (1, 2):
        logits(model, latent_cache(model), token_ids(batch, 50), list(range(40, 50)))
    known = [vars(layer)[STATE].known.bound for layer in model.model.layers]
    (one, of_two), (other, of_two_others) = ([found for (found,) in bounds.values()] for bounds in known)
    assert one.fits_as(other) and of_two.fits_as(of_two_others) and not one.fits_as(of_two_others)
    assert bound.takes(args[0]) and not bound.takes(torch.ones(1, 64, 1).transpose(1, 2)[..., ::2])
    one.arguments = bound.arguments
    assert one.fits_as(bound)
    model.model.layers[0].mlp.up_proj.weight.data = model.model.layers[0].mlp.up_proj.weight.data.clone()
    assert not one.fits_as(bound)
