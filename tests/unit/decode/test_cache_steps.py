"""Decode steps of a layer and its cache in one call: when they are used, and the resulting cache."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from latent_caches import coded, logits, plans
from needs import needs_compiler
from padded_batches import call, padded
from small_models import tiny_llama, token_ids

import fhopt
from fhopt.cache import latent_cache as latent_cache_module
from fhopt.cache import quantized_rows
from fhopt.decode import cache_steps, step
from fhopt.decode.programs import decode_programs
from fhopt.decode.step import AttentionStep
from fhopt.hf.apply import latent_cache

pytestmark = needs_compiler


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the layer's number of quantized tokens in every prepared step that runs."""
    calls: list[int] = []
    finish = cache_steps.CacheStep.finish

    def watched(self: Any) -> None:
        calls.append(self.quantized)
        finish(self)

    monkeypatch.setattr(cache_steps.CacheStep, "finish", watched)
    return calls


def model_of(bits: int, programs: bool = True, **changes: Any) -> Any:
    model = tiny_llama(**changes)
    plan = coded(plans(tiny_llama, bits))
    return fhopt.prepare(fhopt.apply(model, plan, decode_program=programs))


def test_most_steps_with_an_8_bit_window_are_one_call(counted: list[int]) -> None:
    model = model_of(8)
    cache = latent_cache(model)
    logits(model, cache, token_ids(1, 100), list(range(40, 100)))
    assert len(counted) > 0.7 * 2 * 60 and len(set(counted)) > 3
    assert cache.get_seq_length() == 100


def test_a_full_window_gets_new_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """After quantized tokens exist; the rest of the prepared step is reused."""
    made, moved = [], []
    prepare, move = cache_steps.prepare_step, cache_steps.CacheStep.move

    def prepared(*args: Any) -> Any:
        made.append(1)
        return prepare(*args)

    def counted(self: Any, *args: Any) -> bool:
        moved.append(move(self, *args))
        return moved[-1]

    monkeypatch.setattr(step, "prepare_step", prepared)
    monkeypatch.setattr(cache_steps.CacheStep, "move", counted)
    plan = replace(coded(plans(tiny_llama, 8)), recent=32, block=32)
    ids, outputs = token_ids(2, 200), []
    for programs in (False, True):
        model = fhopt.prepare(fhopt.apply(tiny_llama(), plan, decode_program=programs))
        cache = latent_cache(model)
        outputs.append(logits(model, cache, ids, list(range(100, 200))))
    assert cache.layers[0].quantized > 96 and sum(moved) >= 2 * 6 and len(made) <= 2 * 8
    assert float((outputs[1] - outputs[0]).norm() / outputs[0].norm()) < 1e-3


def test_a_block_is_quantized_after_a_step_and_used_by_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that fills the block is not an ordinary call, and the next one is not prepared again."""
    plan = replace(coded(plans(tiny_llama, 8)), recent=24, block=8)
    ids, outputs, made, called = token_ids(2, 140), [], [], []
    prepare, ordinary = cache_steps.prepare_step, AttentionStep.run

    def prepared(layer: Any, *args: Any) -> Any:
        made.append(layer.quantized)
        return prepare(layer, *args)

    def watched(self: Any, *args: Any) -> None:
        called.append(1)
        ordinary(self, *args)

    monkeypatch.setattr(step, "prepare_step", prepared)
    monkeypatch.setattr(AttentionStep, "run", watched)
    for programs in (False, True):
        model = fhopt.prepare(fhopt.apply(tiny_llama(), plan, decode_program=programs))
        cache = latent_cache(model)
        outputs.append(logits(model, cache, ids, list(range(70, 140))))
    assert cache.layers[0].quantized > made[-1] + 32 and len(set(made)) == 1 and not called
    assert float((outputs[1] - outputs[0]).norm() / outputs[0].norm()) < 1e-3


def test_blocks_quantized_in_prepared_steps_also_warn_of_out_of_distribution_text(
    counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fhopt.system._warned", set())
    monkeypatch.setattr(quantized_rows, "SAMPLED", 64)
    plan = replace(coded(plans(tiny_llama, 8)), recent=24, block=8)
    model = fhopt.prepare(fhopt.apply(tiny_llama(), plan))
    cache = latent_cache(model)
    cache.warns = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(model, cache, token_ids(1, 80), list(range(70, 80)))
    assert cache.latent_energy is None
    monkeypatch.setattr(latent_cache_module, "UNLIKE", 0.0)
    with pytest.warns(RuntimeWarning, match="out of distribution for this plan"):
        logits(model, cache, token_ids(1, 60), list(range(1, 60)))
    assert counted and cache.latent_energy is not None and not cache.warns


def test_a_cache_changed_after_a_block_is_used_correctly(counted: list[int]) -> None:
    plan = replace(coded(plans(tiny_llama, 8)), recent=24, block=8)
    ids, outputs = token_ids(2, 100), []
    for programs in (False, True):
        model = fhopt.prepare(fhopt.apply(tiny_llama(), plan, decode_program=programs))
        cache = latent_cache(model)
        parts = [logits(model, cache, ids[:, :82], list(range(70, 82)))]
        for number in range(82, 100, 6):
            before, quantized = len(counted), cache.layers[0].quantized
            with torch.no_grad():
                while cache.layers[0].quantized == quantized:  # the last of these steps fills a block
                    parts.append(model(ids[:, :1], past_key_values=cache, use_cache=True).logits)
                assert not programs or len(counted) > before
                cache.crop(-3)
                cache.reorder_cache(torch.tensor([1, 0]))
                parts.append(model(ids[:, number : number + 1], past_key_values=cache, use_cache=True).logits)
        outputs.append(torch.cat(parts, 1))
    assert float((outputs[1] - outputs[0]).norm() / outputs[0].norm()) < 1e-3


def test_a_16_bit_window_is_used_by_ordinary_calls(counted: list[int]) -> None:
    model = model_of(16)
    logits(model, latent_cache(model), token_ids(1, 60), list(range(40, 60)))
    state = decode_programs(model)
    assert not counted and state is not None and state.has_program


def test_caches_are_the_same_afterwards() -> None:
    ids, states = token_ids(2, 90), []
    for programs in (False, True):
        model = model_of(8, programs)
        cache = latent_cache(model)
        logits(model, cache, ids, list(range(40, 90)))
        states.append([layer.state() for layer in cache.layers])
        sizes = cache.nbytes
    assert sizes == cache.nbytes
    for one, other in zip(*states, strict=True):
        assert one.keys() == other.keys() and one["parts"].keys() == other["parts"].keys()
        for name, parts in one["parts"].items():
            for x, y in zip(parts, other["parts"][name], strict=True):
                assert x.shape == y.shape and x.dtype == y.dtype
                assert float((x.double() - y.double()).abs().mean()) < 0.02 * float(x.double().abs().mean() + 1e-9)


def test_a_padded_batch_keeps_its_mask(counted: list[int]) -> None:
    """With a mask, attention is an ordinary call, and the padding stays masked."""
    ids = token_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    outputs = []
    for programs in (False, True):
        model = model_of(8, programs)
        with torch.no_grad():
            outputs.append(model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False))
    assert torch.equal(*outputs) and not counted


def test_one_sequence_of_a_padded_batch_is_decoded_in_one_call_without_a_mask(counted: list[int]) -> None:
    """Its padding is visible then, as in a full-precision cache; the order of tokens in the cache does not matter."""
    (ids, mask), outputs = padded((60, 31), 20), []
    for programs in (False, True):
        model = model_of(8, programs)
        cache = latent_cache(model)
        with torch.no_grad():
            call(model, (ids, mask), (0, 60), cache)
        cache.batch_select_indices(torch.tensor([1]))
        outputs.append(logits(model, cache, ids[1:, 60:], list(range(1, 20))))
        assert cache.layers[0].padding.parts
    assert counted
    assert float((outputs[1] - outputs[0]).norm() / outputs[0].norm()) < 1e-3


def test_other_thread_counts_and_batch_sizes_are_prepared_again(counted: list[int]) -> None:
    model = model_of(8)
    expected: dict[int, Any] = {}
    for batch in (1, 2, 1):
        ids = token_ids(batch, 60)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            output = logits(model, latent_cache(model), ids, list(range(40, 60)))
            if threads == 1:
                expected[batch] = output
            assert torch.equal(output, expected[batch])
    assert counted


def test_short_prompts_are_decoded_from_the_first_token_on(counted: list[int]) -> None:
    ids, outputs = token_ids(1, 40), []
    for programs in (False, True):
        model = model_of(8, programs)
        outputs.append(logits(model, latent_cache(model), ids, list(range(2, 40))))
    assert counted
    assert float((outputs[1] - outputs[0]).norm() / outputs[0].norm()) < 1e-3
