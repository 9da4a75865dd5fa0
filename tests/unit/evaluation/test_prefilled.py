"""Contexts prefilled once for all caches: the same answers as generation and as a prompt in one call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from character_tokenizer import characters
from small_models import FittedModel, cached, found, tiny_llama, token_ids
from window_models import windowed

from fhopt.errors import FhoptError
from fhopt.evaluation import prefilled
from fhopt.evaluation.perplexity import new_cache, switched
from fhopt.evaluation.tasks import Item, TaskOptions, run_tasks, write_items
from fhopt.fitting import fit_plan
from fhopt.models.cache_layers import measured_layers

SHORT = TaskOptions(lengths=(450,), items=1, window=80)


@pytest.fixture
def item() -> Item:
    """An item of random tokens, with two questions, one of them as long as two blocks."""
    context, question, long = (tuple(token_ids(1, n)[0].tolist()) for n in (300, 9, 150))
    return Item((*context, *question), (5, 6, 7), (20, 30), 300, ((long, (8,)),))


def greedy(model: Any, ids: tuple[int, ...], cache: Any, count: int) -> tuple[int, ...]:
    """Decode greedily: the prompt in one call, then token by token."""
    given, written = torch.tensor([ids]), []
    with torch.inference_mode():
        for _ in range(count):
            logits = model(given, **cached(cache), use_cache=True).logits
            written.append(int(logits[0, -1].argmax()))
            given = torch.tensor([written[-1:]])
    return tuple(written)


def test_the_exact_cache_scores_like_a_full_prefill(llama: FittedModel, item: Item) -> None:
    scores = prefilled.answers(llama.model, item, [])
    alone = [Item(item.context[:300] + q, a, (0, 1), 300) for q, a in item.questions]
    for (hit, nats), other in zip(scores[:, 0].tolist(), alone, strict=True):
        cell = (len(other.context), None)
        expected = run_tasks(llama.model, {"copy": {cell: [other]}}, None)["copy"][cell].exact
        assert hit == expected.hits
        assert nats == pytest.approx(expected.log_prob, abs=1e-4)  # float32, in other calls


@pytest.mark.parametrize("ratio", [1, 4])
def test_a_plan_answers_like_after_a_prefill_in_one_call(llama: FittedModel, item: Item, ratio: int) -> None:
    plan = llama.plan(ratio, window_bits=16)
    with switched(llama.model, plan):
        cache = new_cache(llama.model, plan)
        with torch.inference_mode():
            llama.model(torch.tensor([item.context[:300]]), **cached(cache), use_cache=True)
        assert cache.layers[0].quantized_tokens > 0
        answer = greedy(llama.model, item.context[300:], cache, 3)
    right = Item(item.context, answer, item.needle, 300)
    wrong = Item(item.context, (*answer[:-1], answer[-1] + 1), item.needle, 300)
    assert [float(prefilled.answers(llama.model, i, [plan])[0, 1, 0]) for i in (right, wrong)] == [1, 0]


def test_the_same_holds_for_sliding_windows(item: Item) -> None:
    """Questions follow the whole context, not only the part inside a window."""
    model = windowed("gemma3", sliding_window=64)
    sites = [s for s in found(model)[1].sites.values() if any(one.has(s.name) for one in measured_layers(model))]
    scores = prefilled.answers(model, item, [fit_plan.exact_plan(sites, sinks=4, recent=16, block=8)])
    torch.testing.assert_close(scores[:, 1], scores[:, 0], rtol=0, atol=1e-4)


def test_each_plan_is_compared_with_the_exact_cache(llama: FittedModel, item: Item) -> None:
    plans = {"exact": llama.plan(1, window_bits=16), "small": llama.plan(4)}
    results = prefilled.ask(llama.model, {"copy": {(309, None): [item, item]}}, plans)
    assert list(results) == ["copy"] and list(results["copy"]) == list(plans)
    small, same = results["copy"]["small"], results["copy"]["exact"]
    assert small.exact == same.exact and small.exact.items == 4
    assert same.log_prob_change == pytest.approx(0, abs=1e-4)
    assert small.log_prob_change is not None and abs(small.log_prob_change) > 1e-4


def test_the_model_is_left_unchanged(llama: FittedModel, item: Item) -> None:
    before = llama.model.config._attn_implementation
    prefilled.ask(llama.model, {"copy": {(309, None): [item]}}, {"small": llama.plan(4)})
    assert llama.model.config._attn_implementation == before


def test_questions_longer_than_the_model_has_positions_are_refused() -> None:
    model = tiny_llama()
    long = Item((1,) * 500, (1,), (20, 30), 490, (((1,) * 30, (2,)),))
    with pytest.raises(FhoptError, match="512"):
        prefilled.ask(model, {"copy": {(500, None): [long]}}, {})


@pytest.fixture
def spelling() -> Iterator[Any]:
    yield characters()


def test_all_questions_of_a_context_count(llama: FittedModel, spelling: Any) -> None:
    tasks = write_items(spelling, ["digits"], SHORT)
    counted = sum(len(item.questions) for items in tasks["digits"].values() for item in items)
    results = prefilled.ask(llama.model, tasks, {"small": llama.plan(4)})
    assert results["digits"]["small"].exact.items == counted == 6
