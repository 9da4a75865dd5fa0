"""Latents instead of a module's buffers: what they store, take over and restore."""

from __future__ import annotations

import copy

import pytest
import torch
from buffered_decoder import (
    CLOSE,
    SLOTS,
    D,
    G,
    LatentReference,
    caches,
    call,
    coded_plan,
    compiled_with,
    decoder,
    exact_plan,
    words,
)

from fhopt.cache import module_buffers
from fhopt.errors import FhoptError

pytestmark = pytest.mark.usefixtures("traced_only")


# --------------------------------------------------------------------------------------------------- exact


def test_new_weights_take_effect_at_once() -> None:
    model = decoder()
    plain, compiled = copy.deepcopy(model), compiled_with(model, exact_plan(model))
    ids = words(40)
    for start, stop in [(0, 20), (20, 21), (21, 22)]:
        torch.testing.assert_close(
            call(compiled, ids[:, start:stop], start), call(plain, ids[:, start:stop], start), **CLOSE
        )
        with torch.no_grad():
            for parameters in zip(model.parameters(), plain.parameters(), strict=True):
                for parameter in parameters:
                    parameter.mul_(1.05)


# --------------------------------------------------------------------------------------------------- memory


def test_the_buffers_release_their_memory_and_the_state_is_as_small_as_planned() -> None:
    model = decoder()
    plan = coded_plan(model)
    held = sum(cache.nbytes for cache in caches(model))
    call(compiled_with(model, plan), words(20), 0)
    assert all(cache.isnan().all() for cache in caches(model))  # reads outside the graph give NaN
    state = module_buffers.state_of(model.layers[0].k_cache)
    rows, exact = (SLOTS - 3 + 1) * plan.sites[0].token_bytes(4), (3 + 1 + 16 + 1) * G * 2 * D * 4
    assert state is not None and state.nbytes == 2 * (rows + exact) + 16 * 8  # two sequences; slots of the ring
    assert sum(cache.untyped_storage().nbytes() for cache in caches(model)) < held / 40


def test_a_state_is_freed_with_its_buffers() -> None:
    model = decoder()
    call(compiled_with(model, exact_plan(model)), words(20), 0)
    before = len(module_buffers._states)
    for layer in model.layers:
        layer.k_cache, layer.v_cache = (torch.zeros(2, G, SLOTS, D) for _ in range(2))
    assert len(module_buffers._states) == before - 1


def test_a_write_to_a_buffer_outside_the_graph_is_noticed() -> None:
    model = decoder()
    compiled = compiled_with(model, exact_plan(model))
    call(compiled, words(20), 0)
    assert bool(call(model, words(1), 20).isnan().all())  # uncompiled
    with pytest.raises(FhoptError, match="written outside of a compiled graph"):
        call(compiled, words(1), 21)


def test_a_copy_of_a_module_has_no_tokens_and_says_so() -> None:
    model = decoder()
    plan = exact_plan(model)
    call(compiled_with(model, plan), words(20), 0)
    for other in (copy.deepcopy(model), copy.deepcopy(model).double().float()):
        with pytest.raises(FhoptError, match=r"the tokens in its cache are lost.*copy.*zero_"):
            call(compiled_with(other, plan), words(1), 20)


def test_a_buffer_of_zeros_restarts() -> None:
    model = decoder()
    plain, compiled = copy.deepcopy(model), compiled_with(model, exact_plan(model))
    call(compiled, words(20), 0)
    ids = words(30)
    for cache in caches(model):
        cache.zero_()
    for start, stop in [(0, 20), (20, 21)]:
        new = ids[:, start:stop]
        torch.testing.assert_close(call(compiled, new, start), call(plain, new, start), **CLOSE)
    assert all(cache.untyped_storage().nbytes() < cache.nbytes / 40 for cache in caches(model))
    caches(model)[0].zero_()
    with pytest.raises(FhoptError, match="only one of its two buffers was refilled"):
        call(compiled, ids[:, 21:22], 21)


@pytest.mark.slow
def test_restored_buffers_hold_the_tokens_of_the_latents() -> None:
    for spelling in ("index", "index_put_, [T,B,G,D]"):
        model, ids = decoder(spelling), words(60)
        plain, plan = copy.deepcopy(model), exact_plan(model)
        compiled = compiled_with(model, plan)
        for start, stop in [(0, 40), (40, 41)]:
            call(compiled, ids[:, start:stop], start)
            call(plain, ids[:, start:stop], start)
        module_buffers.restore(model.buffers())
        for found, wanted in zip(caches(model), caches(plain), strict=True):
            torch.testing.assert_close(found, wanted, **CLOSE)
            assert found.is_contiguous()
        torch.testing.assert_close(call(model, ids[:, 41:42], 41), call(plain, ids[:, 41:42], 41), **CLOSE)
        torch.testing.assert_close(call(compiled, ids[:, 42:43], 42), call(plain, ids[:, 42:43], 42), **CLOSE)


def test_loaded_buffers_are_taken_over() -> None:
    model = decoder()
    plain, compiled, ids = copy.deepcopy(model), compiled_with(model, exact_plan(model)), words(60)
    call(compiled, words(30), 0)
    call(plain, ids[:, :40], 0)
    model.load_state_dict(copy.deepcopy(plain.state_dict()), assign=True)
    for start in (40, 41):
        new = ids[:, start : start + 1]
        torch.testing.assert_close(call(compiled, new, start), call(plain, new, start), **CLOSE)


def test_two_modules_and_two_plans_do_not_mix() -> None:
    first, second, ids = decoder(), decoder(), words(60)
    plain, plan = copy.deepcopy(first), coded_plan(first)
    reference = LatentReference(copy.deepcopy(second), plan)
    one, other = compiled_with(first, exact_plan(first)), compiled_with(second, plan)
    for start, stop in [(0, 40), (40, 41), (41, 42)]:
        new = ids[:, start:stop]
        torch.testing.assert_close(call(one, new, start), call(plain, new, start), **CLOSE)
        torch.testing.assert_close(call(other, new, start), call(reference, new, start), rtol=1e-3, atol=1e-3)
    with pytest.raises(FhoptError, match="latents of another plan"):
        call(compiled_with(first, plan), ids[:, 42:43], 42)
