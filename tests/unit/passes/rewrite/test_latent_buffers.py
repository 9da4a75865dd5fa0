"""Buffers that are not replaced by latents, with the reason."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from buffered_decoder import SLOTS, D, Decoder, G, call, compiled_with, decoder, exact_plan, sites_of, words
from torch import Tensor

from fhopt.backend.compile import last_outcome
from fhopt.fitting import fit_plan
from fhopt.plan.latent_plan import LatentPlan

pytestmark = pytest.mark.usefixtures("traced_only")


def reasons(model: Any, *args: Any, plan: LatentPlan | None = None) -> str:
    """Return why no buffer of a module is replaced."""
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="the plan changed nothing"):
        torch._dynamo.reset()
        compiled_with(model, plan or exact_plan(decoder()))(*(args or (words(5), torch.arange(5), 0)))
    outcome = last_outcome()
    assert outcome is not None
    return "; ".join(sorted({m.reason for m in outcome.missed}))


class Changed(Decoder):
    """A decoder with one step changed."""

    def __init__(self, change: Callable[[Any, Tensor, Tensor, Tensor], Tensor], batch: int = 2) -> None:
        super().__init__(batch=batch)
        for layer in self.layers:
            setattr(layer, "kept", functools.partial(self.step, layer, change))  # noqa: B010  # mypy: a method

    @staticmethod
    def step(layer: Any, change: Any, cache: Tensor, new: Tensor, at: Tensor, start: int) -> Any:
        return change(layer, cache, new, at)


def part_of_the_batch(layer: Any, cache: Tensor, new: Tensor, at: Tensor) -> Tensor:
    cache[: new.shape[0], :, at] = new
    return cache[: new.shape[0]]


def rolled(layer: Any, cache: Tensor, new: Tensor, at: Tensor) -> Tensor:
    cache.copy_(cache.roll(-1, 2))
    cache[:, :, at] = new
    return cache


def later_slots(layer: Any, cache: Tensor, new: Tensor, at: Tensor) -> Tensor:
    cache[:, :, at] = new
    return cache[:, :, 1:]


def a_slot_for_each(layer: Any, cache: Tensor, new: Tensor, at: Tensor) -> Tensor:
    cache[torch.arange(2)[:, None], :, at + torch.arange(2)[:, None]] = new.transpose(1, 2)
    return cache


def halves(layer: Any, cache: Tensor, new: Tensor, at: Tensor) -> Tensor:
    cache[:, :, at, :8] = new[..., :8]
    return cache


def added(layer: Any, cache: Tensor, new: Tensor, at: Tensor) -> Tensor:
    cache.index_add_(2, at, new)
    return cache


def read_twice(layer: Any, cache: Tensor, new: Tensor, at: Tensor) -> Tensor:
    cache[:, :, at] = new
    return cache + 0 * cache.mean()


def reordered(layer: Any, cache: Tensor, new: Tensor, at: Tensor) -> Tensor:
    cache[:, :, at] = new
    return cache[at[:2]]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (part_of_the_batch, "not read for all of its sequences"),
        (rolled, "changed by copy_|changed by clone|changed by roll|moves the tokens"),
        (later_slots, "not read from the first slot on"),
        (a_slot_for_each, "could not be run|different slots"),
        (halves, "different slots"),
        (added, "changed by index_add"),
        (read_twice, "read through mean"),
        (reordered, "read through getitem"),
    ],
)
def test_buffers_other_than_tokens_in_slots_are_not_rewritten(change: Any, reason: str) -> None:
    model, batch = Changed(change).eval(), 1 if change is part_of_the_batch else 2
    found = reasons(model, words(5, batch), torch.arange(5), 0)
    assert any(part in found for part in reason.split("|")), found


def test_a_training_graph_keeps_its_buffers() -> None:
    model = decoder()
    with pytest.warns(RuntimeWarning, match="the graph is compiled for training"):
        compiled_with(model, exact_plan(model))(words(5), torch.arange(5), 0)


def test_caches_passed_by_the_caller_are_not_rewritten() -> None:
    given = (torch.zeros(2, G, SLOTS, D), torch.zeros(2, G, SLOTS, D))
    assert "use LatentCache" in reasons(decoder(), words(5), torch.arange(5), 0, given)
    assert given[0].is_contiguous() and not given[0].isnan().any()


def test_a_buffer_that_is_a_view_is_not_rewritten() -> None:
    model = decoder()
    for layer in model.layers:
        layer.k_cache, layer.v_cache = (torch.zeros(3, 2, G, SLOTS, D)[1] for _ in range(2))
    assert "is a view of other tensors" in reasons(model)


def test_more_sinks_than_slots_are_not_rewritten() -> None:
    plan = fit_plan.exact_plan(sites_of(decoder()), sinks=SLOTS, recent=8, block=8)
    assert "attention sinks of the plan" in reasons(decoder(), plan=plan)


def test_a_graph_that_needs_the_tokens_of_latents_is_refused() -> None:
    model = decoder()
    plan = exact_plan(model)
    call(compiled_with(model, plan), words(20), 0)
    with pytest.raises(
        Exception, match=r"k_cache holds latents, and this graph needs its tokens: the graph is compiled for training"
    ):
        compiled_with(model, plan)(words(1), torch.tensor([20]), 0)
