"""Tasks modeled on RULER."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict
from typing import Any

import pytest
from character_tokenizer import characters
from needs import sampled
from small_models import FittedModel, tiny_llama

from fhopt.errors import FhoptError
from fhopt.evaluation.ruler import RULER
from fhopt.evaluation.task_choice import parse_tasks
from fhopt.evaluation.tasks import TASKS, Item, TaskOptions, run_tasks, write_items
from fhopt.texts import tokens

LENGTH = 1500  # characters
OPTIONS = TaskOptions(lengths=(LENGTH,), items=2, window=16)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return characters()


@pytest.fixture(scope="module")
def written(tokenizer: Any) -> dict[str, list[Item]]:
    cells = write_items(tokenizer, list(RULER), OPTIONS)
    return {task: [item for items in cells[task].values() for item in items] for task in RULER}


class Read:
    """An item as text: the part from first to last needle, question, answer, and the rest."""

    def __init__(self, item: Item, tokenizer: Any) -> None:
        def text(ids: tuple[int, ...]) -> str:
            return "".join(tokenizer.convert_ids_to_tokens(list(ids)))

        start, stop = item.needle
        self.needle, self.question = text(item.context[start:stop]), text(item.context[item.question :])
        self.answer, self.filler = text(item.answer), text((*item.context[:start], *item.context[stop : item.question]))


@pytest.fixture(scope="module")
def read(written: dict[str, list[Item]], tokenizer: Any) -> dict[str, list[Read]]:
    return {task: [Read(item, tokenizer) for item in items] for task, items in written.items()}


@pytest.mark.parametrize("task", sampled(RULER, 3))
def test_items_are_the_same_for_the_same_seed(task: str, tokenizer: Any, written: dict[str, list[Item]]) -> None:
    def again(seed: int) -> list[Item]:
        options = TaskOptions(OPTIONS.lengths, OPTIONS.items, seed, window=16)
        return [item for items in write_items(tokenizer, [task], options)[task].values() for item in items]

    items = written[task]
    assert items == again(0)
    assert len({item.context for item in items}) == len(items) == 2 * len(RULER[task].depths)
    assert not {item.context for item in items} & {item.context for item in again(1)}


@pytest.mark.parametrize("task", RULER)
def test_contexts_have_the_requested_length_and_their_needles_are_in_latents(
    task: str, written: dict[str, list[Item]]
) -> None:
    """Latents when the question begins: from the sinks to the window before it."""
    for item in written[task]:
        start, stop = item.needle
        assert len(item.context) == LENGTH
        assert OPTIONS.sinks <= start < stop <= item.question - OPTIONS.window


@pytest.mark.parametrize("start", [None, "~"])
def test_a_token_before_every_text_changes_no_length(start: str | None) -> None:
    for items in write_items(characters(start=start), list(RULER), TaskOptions((1400,), 1, window=16)).values():
        assert all(len(item.context) == 1400 for cell in items.values() for item in cell)


@pytest.mark.parametrize("task", [task for task in RULER if task not in ("variable_tracking", "common_words")])
def test_the_parts_of_an_answer_are_only_in_the_needles_and_in_order(task: str, read: dict[str, list[Read]]) -> None:
    for item in read[task]:
        parts = item.answer.split(",") if task == "niah_multivalue" else [item.answer]
        places = [item.needle.find(part) for part in parts]
        assert -1 not in places and places == sorted(places)
        assert not any(part.strip() in item.filler + item.question for part in parts)


def test_the_question_asks_one_key_of_many(read: dict[str, list[Read]]) -> None:
    needle = re.compile(r"\nThe code number of the (\w+ \w+) is (\d{5})\.\n")
    for task, least, most in (("niah_single", 1, 1), ("niah_multikey", 8, LENGTH // 150)):
        for item in read[task]:
            pairs = needle.findall(item.needle)
            assert least <= len(pairs) <= most and len({key for key, _ in pairs}) == len(pairs)
            asked = item.question.split("\n")[-1]
            assert asked.endswith(" is") and dict(pairs)[asked.split(" the ")[1][:-3]] == item.answer.strip()


def test_the_needles_of_a_spread_task_are_all_over_the_context(written: dict[str, list[Item]]) -> None:
    for task, item in ((task, item) for task, items in written.items() for item in items):
        room = item.question - OPTIONS.window - OPTIONS.sinks
        if RULER[task].depths == (None,):
            assert item.needle[1] - item.needle[0] > room / 2


@pytest.mark.parametrize("task", ["niah_single", "question"])
def test_a_single_needle_is_at_its_depth(task: str, written: dict[str, list[Item]]) -> None:
    for item, depth in zip(written[task], (10, 10, 50, 50, 90, 90), strict=True):
        last = item.question - OPTIONS.window - (item.needle[1] - item.needle[0])
        assert item.needle[0] == 4 + (last - 4) * depth // 100


def test_a_key_has_four_values(read: dict[str, list[Read]]) -> None:
    for item in read["niah_multivalue"]:
        (key,) = set(re.findall(r"\nA code number of the (\w+ \w+) is", item.needle))
        values = re.findall(rf"the {key} is (\d{{5}})\.", item.needle)
        assert len(values) == 4 and item.answer == " " + ", ".join(values)
        assert item.question.endswith(f"\nAll code numbers of the {key}, in order of appearance:")


def holding(value: str, text: str) -> list[str]:
    """Return the variables that hold a value, by running the statements."""
    held: dict[str, str] = {}
    for name, number, before in re.findall(r"\nVAR (\w+) = (?:(\d+)|VAR (\w+))", text):
        held[name] = number or held[before]
    return [name for name, known in held.items() if known == value]


def test_the_variables_of_a_value_are_found_by_following_its_chain(read: dict[str, list[Read]]) -> None:
    for item in read["variable_tracking"]:
        values = re.findall(r"\nVAR \w+ = (\d+)", item.needle)
        assert len(values) == LENGTH // 300 - 1 and len(set(values)) == len(values)
        shown, asked = re.findall(r"\nVariables that hold (\d+):", item.question)
        assert asked in values and item.answer.split() == holding(asked, item.needle)
        assert len(item.answer.split()) == 5
        assert f"hold {shown}: {' '.join(holding(shown, item.question))}\n" in item.question
        assert not re.search(rf"\b({'|'.join(item.answer.split())})\b", item.question)


def test_the_question_asks_the_most_common_words(read: dict[str, list[Read]]) -> None:
    for item in read["common_words"]:
        words = item.needle.removeprefix("\n\nList 1:").split()
        counts = Counter(words)
        asked = item.answer.split()
        assert {word for word, _ in counts.most_common(3)} == set(asked) == {w for w, n in counts.items() if n == 30}
        assert {n for word, n in counts.items() if word not in asked} == {3} and len(counts) > 9
        assert asked == sorted(asked, key=words.index)
        shown, rest = item.question.removeprefix("\n\nList 2:").split("\nThe three most common words", 1)
        common = [word for word, n in Counter(shown.split()).items() if n == 4]
        assert f"appearance: {' '.join(common)}\n" in rest and rest.endswith("of list 1, by first appearance:")


def test_a_list_fills_the_context_as_far_as_words_suffice(tokenizer: Any) -> None:
    (longest,) = write_items(tokenizer, ["common_words"], TaskOptions((90_000,), 1, window=16))["common_words"].values()
    words = Read(longest[0], tokenizer).needle.removeprefix("\n\nList 1:").split()
    assert len(words) > 3000 and longest[0].needle[0] > 5000  # filler on both sides


def test_the_question_asks_a_sentence_of_the_text_word_for_word(read: dict[str, list[Read]]) -> None:
    for item in read["question"]:
        body = item.question.removeprefix("\n\nComplete this sentence of the text above:")
        assert len(body) > 30 and item.needle == body + item.answer
        assert item.answer.strip().lower() not in (item.filler + body).lower()
        assert not item.answer.strip().islower() or "_" in item.answer


def test_a_question_is_at_its_place_in_the_text(read: dict[str, list[Read]], tokenizer: Any) -> None:
    text = "".join(tokenizer.convert_ids_to_tokens(tokenizer(tokens.read_text("topics")).input_ids))
    for item in read["question"]:
        at = text.index(item.needle)
        assert text[at + len(item.needle) :][:9] in item.filler and text[at - 9 : at] in item.filler


def test_a_context_longer_than_the_text_wraps_around_and_repeats_no_question(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tokens.read_text("topics")[-20_000:]
    monkeypatch.setattr("fhopt.evaluation.tasks.tokens.read_text", lambda _: text)
    for items in write_items(tokenizer, ["question"], TaskOptions((25_000,), 2, window=16))["question"].values():
        found = [Read(item, tokenizer) for item in items]
        assert not any(item.answer.strip() in item.filler for item in found)


def test_the_question_asks_a_field_of_a_record_as_json(read: dict[str, list[Read]]) -> None:
    for item in read["json_extraction"]:
        records = {row["id"]: row for row in map(json.loads, re.findall(r"\n(\{.*\})\n", item.needle))}
        assert len(records) == LENGTH // 150 - 1
        *shown, last = item.question.split("\n")[3:]
        for row in map(json.loads, (*shown, last + item.answer + "}")):
            (field,) = row.keys() - {"id"}
            assert records[row["id"]][field] == row[field]
        assert len(shown) == 2 and isinstance(json.loads(item.answer), (float, str))


def test_twelve_lines_are_copied(read: dict[str, list[Read]]) -> None:
    for item in read["long_copy"]:
        header = item.question.rsplit("\n", 1)[1]
        assert re.fullmatch(r"(\n[0-9a-f]{8}){12}", item.answer) and header + item.answer in item.needle


@pytest.mark.parametrize("task", RULER)
def test_a_context_without_room_is_refused(task: str, tokenizer: Any) -> None:
    with pytest.raises(FhoptError, match=rf"has no room for the task {task} .* expected at least \d+ tokens"):
        write_items(tokenizer, [task], TaskOptions((60,), 1, window=16))


def test_a_text_without_a_rare_word_is_refused(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fhopt.evaluation.tasks.tokens.read_text", lambda _: "Nothing happens here at all. " * 200)
    with pytest.raises(FhoptError, match="no word that occurs only once"):
        write_items(tokenizer, ["question"], TaskOptions((600,), 1, window=16))


def test_ruler_expands_to_its_tasks_and_all_to_the_others() -> None:
    assert parse_tasks("ruler") == list(RULER) and parse_tasks("all") == ["perplexity", *TASKS]
    assert parse_tasks("ruler,all, copy") == ["perplexity", *TASKS, *RULER] and not RULER.keys() & TASKS.keys()
    assert parse_tasks("long_copy,passkey,question") == ["passkey", "question", "long_copy"]
    with pytest.raises(FhoptError, match=r"task 'squad' is unknown; .*, long_copy, all, ruler") as found:
        parse_tasks("ruler,squad")
    assert len(str(found.value).splitlines()) == 1


@pytest.mark.slow
def test_both_caches_are_compared_item_by_item(llama: FittedModel, tokenizer: Any) -> None:
    model = tiny_llama(max_position_embeddings=4096)  # the weights of `llama`
    asked = ["niah_single", "variable_tracking", "question", "long_copy"]
    items = write_items(tokenizer, asked, TaskOptions((750,), 1, window=16))
    for task, cells in run_tasks(model, items, llama.plan(4)).items():
        whole = cells[None]
        assert set(cells) == {None, *[(750, depth) for depth in RULER[task].depths]}
        assert whole.plan and whole.mcnemar == 1.0  # random weights answer no question
        assert whole.rate_change_ci == (None if len(cells) == 2 else (0.0, 0.0))
        assert {"mcnemar", "rate_change_ci"} <= json.loads(json.dumps(asdict(whole))).keys()
