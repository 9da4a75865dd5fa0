"""Retrieval tasks in long contexts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from character_tokenizer import characters
from needs import sampled
from small_models import FittedModel

from fhopt.errors import FhoptError
from fhopt.evaluation import tasks
from fhopt.evaluation.perplexity import new_cache, read_steps, switched
from fhopt.evaluation.task_choice import parse_tasks, read_lengths
from fhopt.evaluation.tasks import (
    TASKS,
    Cell,
    Item,
    TaskOptions,
    run_tasks,
    wilson_interval,
    write_items,
)

SMALL = TaskOptions(lengths=(450,), items=2, window=16)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return characters()


def items_of(task: str, tokenizer: Any, options: TaskOptions = SMALL) -> list[Item]:
    return [item for items in write_items(tokenizer, [task], options)[task].values() for item in items]


@pytest.mark.parametrize("task", TASKS)
def test_items_are_the_same_for_the_same_seed(task: str, tokenizer: Any) -> None:
    items = items_of(task, tokenizer)
    assert items == items_of(task, tokenizer)
    assert len({item.context for item in items}) == len(items) == 2 * len(TASKS[task].depths)
    other = items_of(task, tokenizer, TaskOptions(SMALL.lengths, SMALL.items, 1, window=16))
    assert not {item.context for item in items} & {item.context for item in other}


def text_of(ids: tuple[int, ...], tokenizer: Any) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(list(ids)))


@pytest.mark.parametrize("task", TASKS)
def test_contexts_have_the_requested_length_and_the_needle_contains_the_answer(task: str, tokenizer: Any) -> None:
    for item in items_of(task, tokenizer):
        needle, question = (
            text_of(item.context[s], tokenizer) for s in (slice(*item.needle), slice(item.question, None))
        )
        between, answer = (
            text_of(item.context[item.needle[1] : item.question], tokenizer),
            text_of(item.answer, tokenizer),
        )
        asked = question.rsplit("\n", 1)[1] if task != "passkey" else "The pass key is"
        assert len(item.context) == 450 and question.startswith("\n") and question.endswith(asked)
        if task == "arithmetic":
            a, b = asked.removesuffix(" =").split(" + ")
            assert int(a) + int(b) == int(answer) and asked not in needle
        else:
            assert asked + answer in needle
            assert answer not in between + question  # only in the needle


@pytest.mark.parametrize(("task", "count"), [("passkey", 1), ("copy", 3), ("digits", 6), ("arithmetic", 1)])
def test_every_question_about_a_context_is_answered_by_its_needle(task: str, count: int, tokenizer: Any) -> None:
    for item in items_of(task, tokenizer):
        needle = text_of(item.context[slice(*item.needle)], tokenizer)
        assert item.questions[0] == (item.context[item.question :], item.answer)
        assert len({answer for _, answer in item.questions}) == len(item.questions) == count
        for question, answer in item.others:
            asked = text_of(question, tokenizer)
            known = text_of(answer, tokenizer)
            assert asked.rsplit("\n", 1)[1] + known in needle and known not in asked


@pytest.mark.parametrize("task", sampled(TASKS, 4))
def test_the_whole_needle_is_in_latents_when_the_question_begins(task: str, tokenizer: Any, llama: FittedModel) -> None:
    plan = llama.plan(4)
    for item in items_of(task, tokenizer):
        ids, quantized = torch.tensor([item.context[: item.question + 1]]), [0]
        with torch.no_grad(), switched(llama.model, plan):
            cache = new_cache(llama.model, plan)
            for _ in read_steps(llama.model, ids, [cache], plan):
                quantized.append(cache.layers[0].quantized)
        assert plan.sinks <= item.needle[0] and item.needle[1] <= plan.sinks + quantized[-2]  # before the last call


def test_the_passkey_is_at_its_depth(tokenizer: Any) -> None:
    items = items_of("passkey", tokenizer)[::2]
    last = items[0].question - SMALL.window - (items[0].needle[1] - items[0].needle[0])
    assert [item.needle[0] for item in items] == [4 + (last - 4) * depth // 100 for depth in (10, 30, 50, 70, 90)]


def test_tokens_added_before_every_text_come_first() -> None:
    tokenizer = characters(start="~")
    first = tokenizer("").input_ids[0]
    for item in items_of("copy", tokenizer):
        assert item.context[0] == first and first not in item.context[1:] and len(item.context) == 450


def continued(model: Any, context: tuple[int, ...], tokens: int) -> tuple[int, ...]:
    """Decode greedily, token by token after the context."""
    ids = torch.tensor([context])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return tuple(output[0, len(context) :].tolist())


def test_an_item_is_right_if_greedy_decoding_gives_its_answer(llama: FittedModel, tokenizer: Any) -> None:
    contexts = [item.context for item in items_of("copy", tokenizer)]
    answers = [continued(llama.model, contexts[0], 4), continued(llama.model, contexts[1], 6)]
    right = [Item(c, a, (0, 1), 449) for c, a in zip(contexts, answers, strict=True)]
    wrong = [Item(i.context, (*i.answer[:-1], (i.answer[-1] + 1) % 90), (0, 1), 449) for i in right]
    found = run_tasks(llama.model, {"copy": {(450, 10): right + wrong}}, None)["copy"][(450, 10)]
    assert (found.exact.hits, found.exact.items, found.exact.rate) == (2, 4, 0.5)
    assert found.plan is None and found.log_prob_change is None and found.log_prob_change_ci is None
    assert found.mcnemar is None and found.rate_change_ci is None


def test_the_log_probability_is_that_of_the_whole_text_per_token(llama: FittedModel, tokenizer: Any) -> None:
    item = items_of("digits", tokenizer)[0]
    ids = torch.tensor([[*item.context, *item.answer]])
    with torch.no_grad():
        log_p = llama.model(ids).logits.double().log_softmax(-1)
    expected = log_p[0, 449:-1].gather(-1, ids[0, 450:, None]).mean()
    found = run_tasks(llama.model, {"digits": {(450, 10): [item]}}, None)["digits"][None]
    assert found.exact.log_prob == pytest.approx(float(expected), rel=1e-5)  # float32, split into calls


def test_batched_items_score_like_single_ones(
    llama: FittedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers of different length are padded."""
    items = items_of("copy", tokenizer, TaskOptions(lengths=(250,), items=3, window=16))
    items[0] = replace(items[0], answer=items[0].answer[:2])
    written: dict[str, dict[Cell, list[Item]]] = {"copy": {(250, 10): items}}
    together = run_tasks(llama.model, written, llama.plan(4))["copy"][None]
    monkeypatch.setattr(tasks, "BATCH", 1)
    alone = run_tasks(llama.model, written, llama.plan(4))["copy"][None]
    assert together.plan and alone.plan and together.plan.hits == alone.plan.hits
    assert together.exact.log_prob == pytest.approx(alone.exact.log_prob, rel=1e-5)  # float32, other matrix sizes
    assert together.plan.log_prob == pytest.approx(alone.plan.log_prob, rel=1e-3)  # may round to the next code


@pytest.mark.slow
def test_full_width_changes_no_answer_and_a_coarse_plan_does(fitted: FittedModel, tokenizer: Any) -> None:
    written = write_items(tokenizer, list(TASKS), SMALL)
    for ratio, least, most in ((1, 0.0, 1e-4), (6, 1e-3, 9.0)):
        for cells in run_tasks(fitted.model, written, fitted.plan(ratio)).values():
            whole = cells[None]
            assert whole.plan and whole.log_prob_change is not None and whole.log_prob_change_ci is not None
            assert least <= abs(whole.log_prob_change) < most
            assert whole.log_prob_change_ci[0] <= whole.log_prob_change <= whole.log_prob_change_ci[1]
            assert whole.exact.items == sum(r.exact.items for cell, r in cells.items() if cell)
    assert not hasattr(fitted.model, "_fhopt_applied")


def test_both_caches_are_compared_item_by_item(llama: FittedModel, tokenizer: Any) -> None:
    """A coarse plan misses some answers of the exact cache."""
    items = items_of("passkey", tokenizer, TaskOptions(lengths=(450,), items=1, window=16))
    answered = [replace(item, answer=continued(llama.model, item.context, 3)) for item in items]
    found = run_tasks(llama.model, {"passkey": {(450, 10): answered + items}}, llama.plan(8))["passkey"][None]
    assert found.exact.hits == 5 and found.plan is not None and found.plan.hits < 5
    lost = 5 - found.plan.hits  # a hit with the plan is one with the exact cache; neither hits the other answers
    assert found.mcnemar == pytest.approx(min(1.0, 2 / 2**lost))
    assert found.rate_change_ci and found.rate_change_ci[0] <= -100 * lost / 10 <= found.rate_change_ci[1]
    alone = run_tasks(llama.model, {"passkey": {(450, 10): items[:1]}}, llama.plan(8))["passkey"][None]
    assert alone.mcnemar == 1.0 and alone.rate_change_ci is None


@pytest.mark.parametrize(
    ("hits", "items", "low", "high"),
    [(8, 10, 0.4901625, 0.9433178), (0, 10, 0.0, 0.2775328), (10, 10, 0.7224672, 1.0), (50, 100, 0.4038315, 0.5961685)],
)
def test_wilson_intervals_agree_with_the_tables(hits: int, items: int, low: float, high: float) -> None:
    assert wilson_interval(hits, items) == pytest.approx((low, high), abs=1e-6)


def test_tasks_and_lengths_are_comma_separated_lists() -> None:
    assert parse_tasks("copy, passkey,copy") == ["passkey", "copy"] and parse_tasks("all") == ["perplexity", *TASKS]
    assert read_lengths("512, 64,512") == (512, 64)


def test_a_context_without_room_says_how_long_it_must_be(tokenizer: Any) -> None:
    with pytest.raises(
        FhoptError, match=r"100 tokens has no room for the task copy .* expected at least (\d+)"
    ) as found:
        write_items(tokenizer, ["copy"], TaskOptions(lengths=(100,), window=16))
    least = int(str(found.value).split("at least ")[1].split()[0])
    write_items(tokenizer, ["copy"], TaskOptions(lengths=(least,), window=16))
    with pytest.raises(FhoptError, match="no room"):
        write_items(tokenizer, ["copy"], TaskOptions(lengths=(least - 1,), window=16))


def test_a_context_longer_than_the_model_is_refused(llama: FittedModel, tokenizer: Any) -> None:
    written = write_items(tokenizer, ["copy"], TaskOptions(lengths=(512,), window=16))
    with pytest.raises(FhoptError, match="expected at most 512, the model's limit"):
        run_tasks(llama.model, written, None)
