"""Retrieval tasks that are hard for compressed attention: exact strings and numbers from afar.

    [sinks | filler | needle | filler .......... | question] answer
                      ^ in latents when the question is asked

| task | the needle | the answer |
|---|---|---|
| `passkey` | a five-digit number at 10, 30, 50, 70 and 90% | the number |
| `copy` | lines of random letters and digits | one of them, exactly |
| `digits` | a table of names and four-digit numbers | the number of one name |
| `arithmetic` | additions of small numbers with their sums | the sum of two that are not among them |

Depth is the position of the needle between the attention sinks and the last position that is quantized before the
question, in percent: a needle at any depth is in latents. The passkey is that of Mohtashami and Jaggi 2023, "Landmark
Attention", section 4.2. Only `arithmetic` can be answered without its needle, by a model that can add; it shows general
damage.

`fhopt.evaluation.ruler` has longer tasks with many needles.

An item is correct if each token of its answer is the most likely one, so that greedy decoding would generate it.
"""

from __future__ import annotations

import functools
import math
import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fhopt.errors import FhoptError
from fhopt.evaluation.perplexity import new_cache, read_steps, switched
from fhopt.evaluation.ruler import FIRST_NAMES, RULER, Room, RulerTask, Wording
from fhopt.evaluation.statistics import Interval, bootstrap_interval, mcnemar, paired_rate_interval
from fhopt.hardware.float_products import with_fast_products
from fhopt.models.model_facts import check_length
from fhopt.parallel.collectives import by_process, processes
from fhopt.plan.latent_plan import LatentPlan
from fhopt.progress import Progress, silent
from fhopt.texts import tokens

FILLER = "topics"
BATCH = 4  # items per forward pass: on a CPU about twice as fast as one by one
Cell = tuple[int, int | None]  # context length; depth in percent, None for needles all over the context


@dataclass(frozen=True)
class Item:
    """Token ids of a context that ends with a question, and of its answer.

    needle: its positions [start, stop), from the first to the last needle. question: position at which it begins.
    others: alternative questions with their answers, to reuse a prefilled context.
    """

    context: tuple[int, ...]
    answer: tuple[int, ...]
    needle: tuple[int, int]
    question: int
    others: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()

    @property
    def questions(self) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        """All questions, each with its answer; first the one that `context` ends with."""
        return ((self.context[self.question :], self.answer), *self.others)


@dataclass(frozen=True)
class TaskOptions:
    """Options of the tasks.

    lengths: context lengths in tokens. items: per length and depth. sinks, window: tokens that a plan stores in full
    precision.
    """

    lengths: tuple[int, ...] = (512, 1024, 2048)
    items: int = 5
    seed: int = 0
    sinks: int = 4
    window: int = 192


def _passkey(rng: random.Random, _: Room) -> Wording:
    key = f" {rng.randrange(10_000, 100_000)}"
    return Wording(
        ("\n\nThe pass key is", key, ". Remember it.", key, " is the pass key.\n\n"),
        ("\n\nWhat is the pass key? The pass key is",),
        (key,),
    )


def _copy(rng: random.Random, _: Room) -> Wording:
    codes = [" " + "".join(rng.choices(string.ascii_lowercase + string.digits, k=8)) for _ in "ABC"]
    *lines, last = [(f"\nCode {name}:", code) for name, code in zip("ABC", codes, strict=True)]
    others = tuple((_joined("\n", [line for line in [*lines, last] if line != x], x[0]), x[1:]) for x in lines)
    return Wording(_joined("\n", [*lines, last], "\n\n"), _joined("\n", lines, last[0]), last[1:], others)


def _digits(rng: random.Random, _: Room) -> Wording:
    numbers = rng.sample(range(1000, 10_000), len(FIRST_NAMES))
    lines = [(f"\nThe number of {x} is", f" {number}", ".") for x, number in zip(FIRST_NAMES, numbers, strict=True)]
    rng.shuffle(lines)
    *examples, asked = rng.sample(lines, 3)
    rest = [line for line in lines if line not in (*examples, asked)]
    others = tuple((_joined("\n", examples, line[0]), line[1:2]) for line in rest)
    return Wording(_joined("\n", lines, "\n\n"), _joined("\n", examples, asked[0]), asked[1:2], others)


def _arithmetic(rng: random.Random, _: Room) -> Wording:
    pairs = rng.sample([(a, b) for a in range(1, 6) for b in range(1, 6)], 13)  # sums that a small model can do
    *lines, last = [(f"\n{a} + {b} =", f" {a + b}") for a, b in pairs]
    return Wording(_joined("\n", lines, "\n\n"), _joined("\n", rng.sample(lines, 2), last[0]), last[1:])


def _joined(before: str, lines: Sequence[tuple[str, ...]], after: str) -> tuple[str, ...]:
    return (before, *(part for line in lines for part in line), after)


TASKS = {
    "passkey": RulerTask(_passkey, (10, 30, 50, 70, 90)),
    "copy": RulerTask(_copy),
    "digits": RulerTask(_digits),
    "arithmetic": RulerTask(_arithmetic),
}


class ItemWriter:
    """Generator of items for one tokenizer; equal options give equal items."""

    def __init__(self, tokenizer: Any, options: TaskOptions) -> None:
        self.tokenizer, self.options = tokenizer, options
        self._piece = functools.cache(self._ids)
        self.text = tokens.halves(tokens.read_text(FILLER))[1]  # the half not used for calibration
        self.filler = self._ids(self.text)
        plain, whole = self._ids("a"), list(tokenizer("a").input_ids)
        self.start = whole[: -len(plain)] if whole[-len(plain) :] == plain else []  # start tokens of the tokenizer

    def items(self, task: str, length: int, depth: int | None) -> list[Item]:
        """Generate the items of one cell. Raises FhoptError if `length` is too short for the task."""
        seeds = (f"{self.options.seed} {task} {length} {depth} {number}" for number in range(self.options.items))
        return [self._item(task, length, depth, random.Random(seed)) for seed in seeds]

    def _item(self, task: str, length: int, depth: int | None, rng: random.Random) -> Item:
        wording = (TASKS | RULER)[task].word(rng, self._room(length))
        needles = [self._encode(needle) for needle in (wording.needle, *wording.more)]
        question = self._encode(wording.question)
        places = self._place(task, length, depth, [len(needle) for needle in needles], len(question))
        count = length - len(self.start) - sum(map(len, needles)) - len(question)
        around = self._around(wording, rng, places[0] - len(self.start), count)
        context = [*self.start]
        for at, needle in zip(places, needles, strict=True):
            free = at - len(context)
            context, around = [*context, *around[:free], *needle], around[free:]
        others = tuple((tuple(self._encode(q)), tuple(self._encode(a))) for q, a in wording.others)
        span = places[0], places[-1] + len(needles[-1])
        return Item(
            (*context, *around, *question), tuple(self._encode(wording.answer)), span, length - len(question), others
        )

    def _room(self, length: int) -> Room:
        reach = 2 * length * len(self.text) // len(self.filler) + 1  # twice the average characters per token
        tokens_free = length - max(len(self.start), self.options.sinks) - self.options.window
        return Room(tokens_free, lambda pieces: len(self._encode(pieces)), self.text, reach)

    def _around(self, wording: Wording, rng: random.Random, before: int, count: int) -> list[int]:
        """Return the `count` filler tokens around the needles, of which `before` precede the first."""
        if wording.around is None:
            offset = rng.randrange(len(self.filler))
            return [self.filler[(offset + i) % len(self.filler)] for i in range(count)]
        first, second = (self._ids(text) for text in wording.around)
        return [*first[len(first) - before :], *second[: count - before]]

    def _place(self, task: str, length: int, depth: int | None, needles: list[int], question: int) -> list[int]:
        """Return the positions of needles with the given lengths. Raises FhoptError.

        At `depth` percent, or evenly between the first and the last quantized position.
        """
        sinks, window = self.options.sinks, self.options.window
        first, last = max(len(self.start), sinks), length - question - window - sum(needles)
        if last < first:
            raise FhoptError(
                f"a context of {length} tokens has no room for the task {task} between {sinks} sinks and a "
                f"residual window of {window}; expected at least {length + first - last} tokens. Use longer "
                "--lengths."
            )
        count = len(needles)
        shares = [(2 * i + 1, 2 * count) for i in range(count)] if depth is None else [(depth, 100)] * count
        return [first + sum(needles[:i]) + (last - first) * a // b for i, (a, b) in enumerate(shares)]

    def _encode(self, parts: tuple[str, ...]) -> list[int]:
        return [i for part in parts for i in self._piece(part)]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


@dataclass(frozen=True)
class Answered:
    """Scores of answers: hits are correct ones; log_prob is the mean log-probability per token, in nats."""

    hits: int
    items: int
    rate: float
    rate_ci: Interval
    log_prob: float


@dataclass(frozen=True)
class TaskResult:
    """Scores of a task, or of one cell, with the full-precision KV cache and with the plan's (None: no plan).

    log_prob_change: mean of plan minus exact over the items, with its 95% interval (None for a single item). mcnemar:
    p-value of McNemar's test that one of the two is correct more often. rate_change_ci: 95% interval of the plan's rate
    minus the exact one, paired by item, in percentage points (None for a single item).
    """

    exact: Answered
    plan: Answered | None
    log_prob_change: float | None
    log_prob_change_ci: Interval | None
    mcnemar: float | None
    rate_change_ci: Interval | None


@dataclass(frozen=True)
class _ItemScore:
    """Score of one item with one cache."""

    is_exact: bool
    log_prob: float


_Pair = tuple[_ItemScore, ...]  # with the full-precision cache, then with the plan's if there is one


def wilson_interval(hits: int, items: int) -> Interval:
    """Return the 95% interval of a rate.

    Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    z = 1.959963984540054
    rate, spread = hits / items, z * z / items
    middle = (rate + spread / 2) / (1 + spread)
    half = math.sqrt(rate * (1 - rate) * spread + spread * spread / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def write_items(tokenizer: Any, tasks: Sequence[str], options: TaskOptions) -> dict[str, dict[Cell, list[Item]]]:
    """Generate the items of each task by cell. Raises FhoptError if a length is too short for a task."""
    writer, table = ItemWriter(tokenizer, options), TASKS | RULER
    cells = {task: [(length, depth) for length in options.lengths for depth in table[task].depths] for task in tasks}
    return {task: {cell: writer.items(task, *cell) for cell in cells[task]} for task in tasks}


def check_items(model: Any, tasks: Mapping[str, Mapping[Cell, list[Item]]]) -> None:
    """Raise FhoptError if an item exceeds the model's positions."""
    for item in (item for cells in tasks.values() for items in cells.values() for item in items):
        check_length(model, len(item.context) + len(item.answer) - 1)


def run_tasks(
    model: Any, tasks: Mapping[str, Mapping[Cell, list[Item]]], plan: LatentPlan | None, progress: Progress = silent,
    *, shared: bool = False,
) -> dict[str, dict[Cell | None, TaskResult]]:  # fmt: skip
    """Run each task; returns its results by cell, and the total under None.

    Applies the plan, and restores the model afterwards. shared: each process handles its share of the items, and all
    get the results; all must call it, each with a whole model. Raises FhoptError if the plan or a length is not for
    this model.
    """
    check_items(model, tasks)
    with switched(model, plan):
        return {task: _run_task(model, task, cells, plan, progress, shared) for task, cells in tasks.items()}


def _run_task(
    model: Any, task: str, cells: Mapping[Cell, list[Item]], plan: LatentPlan | None, progress: Progress, shared: bool
) -> dict[Cell | None, TaskResult]:
    batches = [(cell, items[i : i + BATCH]) for cell, items in cells.items() for i in range(0, len(items), BATCH)]
    done, total = 0, sum(len(items) for items in cells.values())

    def measure(batch: tuple[Cell, list[Item]]) -> Tensor:
        nonlocal done
        done = min(total, done + len(batch[1]) * (processes()[1] if shared else 1))
        answered = _answer(model, batch[1], plan)
        progress(task, done, total)
        return torch.nn.functional.pad(answered, (0, 0, 0, 0, 0, BATCH - len(batch[1])))  # for `by_process`

    measured = by_process(batches, measure) if shared else [measure(batch) for batch in batches]
    scores: dict[Cell, list[_Pair]] = {cell: [] for cell in cells}
    for (cell, some), answered in zip(batches, measured, strict=True):
        scores[cell] += [
            tuple(_ItemScore(bool(hit), float(nats)) for hit, nats in row) for row in answered[: len(some)]
        ]
    together = [pair for pairs in scores.values() for pair in pairs]
    return {None: _summary(together)} | {cell: _summary(pairs) for cell, pairs in scores.items()}


@torch.inference_mode()
@with_fast_products
def _answer(model: Any, items: list[Item], plan: LatentPlan | None) -> Tensor:
    """Run items of one length in a batch, with the full-precision KV cache and with that of the plan.

    Returns for each item and cache whether the answer was correct, and its log-probability: float64 [B, caches, 2].
    """
    used = [None] if plan is None else [None, plan]
    longest = max(len(item.answer) for item in items)
    rows = [[*item.context, *item.answer, *[0] * (longest - len(item.answer))] for item in items]
    ids, first = torch.tensor(rows), len(items[0].context) - 1
    steps = read_steps(model, ids[:, :-1], [new_cache(model, p) for p in used], plan, first)
    read = list(zip(*(logits for _, logits in steps), strict=True))
    caches = [torch.cat(parts, 1).double().log_softmax(-1).cpu() for parts in read]  # [B, longest, V] each
    return torch.stack([torch.stack([score_answer(p[i], item.answer) for p in caches]) for i, item in enumerate(items)])


def score_answer(log_p: Tensor, answer: tuple[int, ...]) -> Tensor:
    """Return [is correct, mean log-probability], float64, of an answer of A tokens from log-probabilities [A.., V]."""
    target = torch.tensor(answer)
    log_p = log_p[: len(answer)]
    values = log_p.gather(-1, target[:, None])
    return torch.stack([(log_p.argmax(-1) == target).all().double(), values.mean()])


def summarize(scores: Tensor) -> TaskResult:
    """Summarize scores [items, caches, 2] of the full-precision cache and, if there are two, of a plan's."""
    return _summary([tuple(_ItemScore(bool(hit), float(nats)) for hit, nats in row) for row in scores])


def _summary(pairs: list[_Pair]) -> TaskResult:
    exact, *planned = [_answered(side) for side in zip(*pairs, strict=True)]
    if not planned:
        return TaskResult(exact, None, None, None, None, None)
    changes = [plan.log_prob - before.log_prob for before, plan in pairs]
    interval = bootstrap_interval(changes, [1] * len(changes))
    right = [[score.is_exact for score in side] for side in zip(*pairs, strict=True)]
    paired = mcnemar(*right), paired_rate_interval(*right)
    return TaskResult(exact, planned[0], sum(changes) / len(changes), interval, *paired)


def _answered(scores: Sequence[_ItemScore]) -> Answered:
    hits, items = sum(s.is_exact for s in scores), len(scores)
    log_prob = sum(s.log_prob for s in scores) / items
    return Answered(hits, items, hits / items, wilson_interval(hits, items), log_prob)
