"""Tasks: items that ask for what is in latents, scores that are those of greedy decoding, and wrong use."""

from __future__ import annotations

import json
import string
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from small_models import Fitted, tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from fhopt import tasks
from fhopt.cli import main
from fhopt.errors import FhoptError
from fhopt.evaluate import new_cache, read_steps, switched
from fhopt.tasks import TASKS, Item, TaskOptions, choose, read_lengths, run_tasks, wilson_interval, write_items

SMALL = TaskOptions(lengths=(450,), items=2, window=16)


def characters(start: str | None = None) -> Any:
    """A tokenizer of single characters; `start` is put before every text."""
    vocabulary = {w: i for i, w in enumerate(["[UNK]", *string.printable[:95], "\n"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if start:
        tokenizer.post_processor = TemplateProcessing(f"{start} $A", special_tokens=[(start, vocabulary[start])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


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
def test_contexts_have_the_asked_length_and_the_needle_tells_the_answer(task: str, tokenizer: Any) -> None:
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
            assert answer not in between + question  # only the needle knows it


@pytest.mark.parametrize(("task", "count"), [("passkey", 1), ("copy", 3), ("digits", 6), ("arithmetic", 1)])
def test_every_question_that_may_be_asked_of_a_context_is_answered_by_its_needle(
    task: str, count: int, tokenizer: Any
) -> None:
    for item in items_of(task, tokenizer):
        needle = text_of(item.context[slice(*item.needle)], tokenizer)
        assert item.questions[0] == (item.context[item.question :], item.answer)
        assert len({answer for _, answer in item.questions}) == len(item.questions) == count
        for question, answer in item.others:
            asked = text_of(question, tokenizer)
            known = text_of(answer, tokenizer)
            assert asked.rsplit("\n", 1)[1] + known in needle and known not in asked


@pytest.mark.parametrize("task", TASKS)
def test_the_whole_needle_is_in_latents_when_the_question_begins(task: str, tokenizer: Any, llama: Fitted) -> None:
    plan = llama.plan(4)
    for item in items_of(task, tokenizer):
        ids, sealed = torch.tensor([item.context[: item.question + 1]]), [0]
        with torch.no_grad(), switched(llama.model, plan):
            cache = new_cache(llama.model, plan)
            for _ in read_steps(llama.model, ids, [cache], plan):
                sealed.append(cache.layers[0].sealed)
        assert plan.sinks <= item.needle[0] and item.needle[1] <= plan.sinks + sealed[-2]  # before the last step


def test_the_passkey_stands_at_its_depth(tokenizer: Any) -> None:
    items = items_of("passkey", tokenizer)[::2]
    last = items[0].question - SMALL.window - (items[0].needle[1] - items[0].needle[0])
    assert [item.needle[0] for item in items] == [4 + (last - 4) * depth // 100 for depth in (10, 30, 50, 70, 90)]


def test_what_a_tokenizer_puts_before_every_text_comes_first() -> None:
    tokenizer = characters(start="~")
    first = tokenizer("").input_ids[0]
    for item in items_of("copy", tokenizer):
        assert item.context[0] == first and first not in item.context[1:] and len(item.context) == 450


def continued(model: Any, context: tuple[int, ...], tokens: int) -> tuple[int, ...]:
    """Greedy decoding, token by token behind the context."""
    ids = torch.tensor([context])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return tuple(output[0, len(context) :].tolist())


def test_an_item_is_right_when_greedy_decoding_writes_its_answer(llama: Fitted, tokenizer: Any) -> None:
    contexts = [item.context for item in items_of("copy", tokenizer)]
    answers = [continued(llama.model, contexts[0], 4), continued(llama.model, contexts[1], 6)]
    right = [Item(c, a, (0, 1), 449) for c, a in zip(contexts, answers, strict=True)]
    wrong = [Item(i.context, (*i.answer[:-1], (i.answer[-1] + 1) % 90), (0, 1), 449) for i in right]
    found = run_tasks(llama.model, {"copy": {(450, 10): right + wrong}}, None)["copy"][(450, 10)]
    assert (found.exact.hits, found.exact.items, found.exact.rate) == (2, 4, 0.5)
    assert found.plan is None and found.log_prob_change is None and found.log_prob_change_ci is None


def test_the_log_probability_is_that_of_the_whole_text_per_token(llama: Fitted, tokenizer: Any) -> None:
    item = items_of("digits", tokenizer)[0]
    ids = torch.tensor([[*item.context, *item.answer]])
    with torch.no_grad():
        log_p = llama.model(ids).logits.double().log_softmax(-1)
    expected = log_p[0, 449:-1].gather(-1, ids[0, 450:, None]).mean()
    found = run_tasks(llama.model, {"digits": {(450, 10): [item]}}, None)["digits"][None]
    assert found.exact.log_prob == pytest.approx(float(expected), rel=1e-5)  # float32, in steps


def test_items_read_together_score_as_alone(llama: Fitted, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of different length are padded."""
    items = items_of("copy", tokenizer, TaskOptions(lengths=(250,), items=3, window=16))
    items[0] = replace(items[0], answer=items[0].answer[:2])
    written = {"copy": {(250, 10): items}}
    together = run_tasks(llama.model, written, llama.plan(4))["copy"][None]
    monkeypatch.setattr(tasks, "BATCH", 1)
    alone = run_tasks(llama.model, written, llama.plan(4))["copy"][None]
    assert together.plan and alone.plan and together.plan.hits == alone.plan.hits
    assert together.exact.log_prob == pytest.approx(alone.exact.log_prob, rel=1e-5)  # float32, other matrix sizes
    assert together.plan.log_prob == pytest.approx(alone.plan.log_prob, rel=1e-3)  # that may round to the next code


def test_full_width_changes_no_answer_and_a_coarse_plan_does(fitted: Fitted, tokenizer: Any) -> None:
    written = write_items(tokenizer, list(TASKS), SMALL)
    for ratio, least, most in ((1, 0.0, 1e-4), (6, 1e-3, 9.0)):
        for cells in run_tasks(fitted.model, written, fitted.plan(ratio)).values():
            whole = cells[None]
            assert whole.plan and whole.log_prob_change is not None and whole.log_prob_change_ci is not None
            assert least <= abs(whole.log_prob_change) < most
            assert whole.log_prob_change_ci[0] <= whole.log_prob_change <= whole.log_prob_change_ci[1]
            assert whole.exact.items == sum(r.exact.items for cell, r in cells.items() if cell)
    assert not hasattr(fitted.model, "_fhopt_applied")


@pytest.mark.parametrize(
    ("hits", "items", "low", "high"),
    [(8, 10, 0.4901625, 0.9433178), (0, 10, 0.0, 0.2775328), (10, 10, 0.7224672, 1.0), (50, 100, 0.4038315, 0.5961685)],
)
def test_wilson_intervals_are_those_of_the_tables(hits: int, items: int, low: float, high: float) -> None:
    assert wilson_interval(hits, items) == pytest.approx((low, high), abs=1e-6)


def test_tasks_and_lengths_are_lists_with_commas() -> None:
    assert choose("copy, passkey,copy") == ["passkey", "copy"] and choose("all") == ["perplexity", *TASKS]
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


def test_a_context_longer_than_the_model_is_refused(llama: Fitted, tokenizer: Any) -> None:
    written = write_items(tokenizer, ["copy"], TaskOptions(lengths=(512,), window=16))
    with pytest.raises(FhoptError, match="the model has 512 positions"):
        run_tasks(llama.model, written, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    path = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(path)
    tiny_llama().save_pretrained(path)
    return path


def call(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["eval", *map(str, arguments)])


WRONG: dict[str, tuple[list[str], str]] = {
    "an unknown task": (["--tasks", "copy,poetry"], "'poetry' is no task; expected some of perplexity, passkey"),
    "lengths that are words": (["--lengths", "long"], "lengths 'long' are not numbers of tokens"),
    "a length of 0": (["--lengths", "0"], "not numbers of tokens"),
    "a context without room": (["--tasks", "digits", "--lengths", "200"], "Give longer --lengths"),
    "a task beyond the model": (["--tasks", "copy", "--lengths", "700"], "the model has 512 positions"),
    "perplexity beyond the model": (["--context", "900"], "the model has 512 positions"),
    "a plan that is not there": (["--plan", "nowhere"], "is not a plan"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gets_one_line_with_the_cure(case: str, folder: Path) -> None:
    arguments, message = WRONG[case]
    result = call(folder, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr and result.stdout == "" and len(result.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_the_command_measures_perplexity_and_tasks(folder: Path, llama: Fitted, tmp_path: Path) -> None:
    llama.plan(4).save(tmp_path / "plan")
    options = ["--plan", tmp_path / "plan", "--data", "license", "--context", 200, "--sequences", 2]
    options += ["--tasks", "all", "--items", 1, "--lengths", "400,450"]
    result = call(folder, *options, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert set(found) == {"model", "ratio", "perplexity", "tasks"} and found["ratio"] > 1
    row = found["perplexity"]["license"]
    assert set(row) == {"exact", "plan", "increase_percent", "increase_percent_ci", "kl", "kl_ci", "tokens"}
    assert row["tokens"] == 398 and row["kl"] > 0 and row["kl_ci"][0] <= row["kl"] <= row["kl_ci"][1]
    assert row["increase_percent"] == pytest.approx(100 * (row["plan"] / row["exact"] - 1))
    assert set(found["tasks"]) == set(TASKS) and len(found["tasks"]["passkey"]["cells"]) == 10
    assert [c["length"] for c in found["tasks"]["copy"]["cells"]] == [400, 450]
    assert {"hits", "items", "rate", "rate_ci", "log_prob"} == set(found["tasks"]["copy"]["plan"])
    table = call(folder, *options)
    assert table.exit_code == 0 and "Perplexity" in table.stdout and "arithmetic" in table.stdout


def test_without_a_plan_the_exact_model_is_measured_alone(folder: Path) -> None:
    options = ["--data", "license", "--context", 150, "--tasks", "perplexity,copy", "--items", 1, "--lengths", 400]
    result = call(folder, *options, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["ratio"] is None and set(found["perplexity"]["license"]) == {"exact", "tokens"}
    assert found["tasks"]["copy"]["plan"] is None and found["tasks"]["copy"]["exact"]["items"] == 1
    table = call(folder, *options)
    assert table.exit_code == 0 and "exact" in table.stdout
