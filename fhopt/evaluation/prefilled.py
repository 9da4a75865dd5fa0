"""Tasks with a context that is prefilled once, for the full-precision KV cache and for those of all plans.

    context     prefilled by the exact model in pieces, into a full-precision cache
    caches      a plan's cache is filled from its keys and values, as a prefill in one call would
    questions   each is processed after the context, with its answer, in a copy of each cache

Within a prefill, tokens attend to each other's full-precision keys and values; a plan has errors only from the question
on. This matches serving: prefill a document, then ask questions. `fhopt.evaluation.tasks.run_tasks` is stricter: it
processes the context itself as decoding would.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fhopt.evaluation.perplexity import decode_options, new_cache, step_bounds, switched
from fhopt.evaluation.tasks import Cell, Item, TaskResult, score_answer, summarize
from fhopt.hardware.float_products import with_fast_products
from fhopt.models.model_facts import check_length
from fhopt.plan.latent_plan import LatentPlan

PIECE = 1024  # context tokens per forward pass


def ask(
    model: Any, tasks: Mapping[str, Mapping[Cell, list[Item]]], plans: Mapping[str, LatentPlan],
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, dict[str, TaskResult]]:  # fmt: skip
    """Ask every question of every item; returns results by task and plan name, paired with the full-precision cache.

    `progress(done)` is called after each item of a task. Restores the model afterwards. Raises FhoptError if a plan or
    a length is not for this model.
    """
    items = {task: [item for some in cells.values() for item in some] for task, cells in tasks.items()}
    for item in (item for some in items.values() for item in some):
        check_length(model, item.question + max(len(q) + len(a) for q, a in item.questions) - 1)
    results: dict[str, dict[str, TaskResult]] = {}
    for task, some in items.items():
        parts = []
        for done, item in enumerate(some, 1):
            parts.append(answers(model, item, list(plans.values())))
            progress(done)
        scores = torch.cat(parts)  # [questions, 1 + plans, 2]
        results[task] = {name: summarize(scores[:, [0, n]]) for n, name in enumerate(plans, 1)}
    return results


@torch.inference_mode()
@with_fast_products
def answers(model: Any, item: Item, plans: Sequence[LatentPlan]) -> Tensor:
    """Prefill an item's context once and ask all its questions.

    Returns, for each question with the full-precision cache and with that of each plan, whether the answer was correct
    and its mean log-probability: float64 [questions, 1 + plans, 2].
    """
    context = torch.tensor([item.context[: item.question]], device=model.device)
    exact = new_cache(model, None)
    exact.activate_past_recording()  # sliding layers must retain what a plan's cache is filled with
    with switched(model, plans[0] if plans else None):  # its attention speeds up exact prefill, too
        for piece in context.split(PIECE, 1):
            model(piece, **decode_options(model, exact))
    with switched(model, None):
        found = [[_asked(model, exact, None, item.question, *pair) for pair in item.questions]]
    for plan in plans:
        with switched(model, plan):
            cache = prefilled(model, plan, exact)
            found.append([_asked(model, cache, plan, item.question, *pair) for pair in item.questions])
    return torch.stack([torch.stack(column) for column in found], 1)


def prefilled(model: Any, plan: LatentPlan, exact: Any, tokens: int | None = None) -> Any:
    """Fill the KV cache of a plan, which is applied to the model, from a prefilled full-precision cache.

    exact: its layers must all store all tokens (`activate_past_recording`). tokens: use only the first ones; None: all.
    """
    cache = new_cache(model, plan)
    for index, layer in enumerate(exact.layers):
        if layer.is_initialized and layer.keys is not None:
            cache.update(layer.keys[:, :, :tokens], layer.values[:, :, :tokens], index)
    return cache


def _asked(
    model: Any, cache: Any, plan: LatentPlan | None, start: int, question: tuple[int, ...], answer: tuple[int, ...]
) -> Tensor:
    """Process a question and its answer after `start` tokens in a copy of the cache; returns the answer's score."""
    own, ids = copy.deepcopy(cache), torch.tensor([[*question, *answer[:-1]]], device=model.device)
    stop, options = start + ids.shape[1], decode_options(model, own)
    logits: list[Tensor] = []
    for first, last in step_bounds(stop, plan):
        if last > start:
            piece = ids[:, max(first, start) - start : last - start]
            if "logits_to_keep" in options:
                options["logits_to_keep"] = min(piece.shape[1], len(answer))
            logits.append(model(piece, **options).logits[0])
    return score_answer(torch.cat(logits)[-len(answer) :].double().log_softmax(-1).cpu(), answer)
