"""Extra inputs that follow the weights of a call."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fhopt.backend.bound_inputs import KEPT, Binder
from fhopt.errors import Stale
from fhopt.passes.graph.program import Bound, Program


def program_of(make: object, weight: Tensor) -> Program:
    """A program with one input, `w`, and two extra ones: one derived from it, and one constant."""
    module = fx.GraphModule(torch.nn.Module(), fx.Graph())
    values = {"w": weight, "made": torch.zeros(2), "constant": torch.ones(3)}
    return Program(module, values, bound={"made": Bound(("w",), make)})  # type: ignore[arg-type]


def test_values_derived_from_weights_are_computed_once_and_again_after_a_change() -> None:
    calls: list[float] = []

    def make(w: Tensor) -> Tensor:
        calls.append(float(w.sum()))
        return w * 2

    weight = torch.ones(2)
    binder = Binder(program_of(make, weight), 1)
    for _ in range(3):
        made, constant = binder([weight])
    assert calls == [2.0] and made.tolist() == [2, 2] and constant.tolist() == [1, 1, 1]
    weight.mul_(3)
    assert binder([weight])[0].tolist() == [6, 6] and calls == [2.0, 6.0]


def test_two_sets_of_weights_alternate_without_being_recomputed() -> None:
    calls: list[int] = []

    def make(w: Tensor) -> Tensor:
        calls.append(1)
        return w + 1

    first, second = torch.zeros(2), torch.ones(2)
    binder = Binder(program_of(make, first), 1)
    for _ in range(4):
        assert binder([first])[0].tolist() == [1, 1]
        assert binder([second])[0].tolist() == [2, 2]
    assert len(calls) == 2


def test_weights_are_not_kept_alive_and_a_reused_address_is_no_match() -> None:
    binder = Binder(program_of(lambda w: w + 1, torch.zeros(2)), 1)
    for value in range(50):
        weight = torch.full((2,), float(value))
        assert binder([weight])[0].tolist() == [value + 1] * 2
        del weight
        gc.collect()


def test_no_more_sets_are_cached_than_a_model_has_layers() -> None:
    binder = Binder(program_of(lambda w: w + 1, torch.zeros(2)), 1)
    held = [torch.zeros(2) for _ in range(KEPT + 10)]
    for weight in held:
        binder([weight])
    assert len(binder.known) == KEPT


def test_inference_tensors_have_no_versions_and_still_work() -> None:
    with torch.inference_mode():
        weight = torch.ones(2)
        binder = Binder(program_of(lambda w: w * 2, weight), 1)
        assert binder([weight])[0].tolist() == [2, 2]


def test_stale_weights_reach_the_caller() -> None:
    def make(w: Tensor) -> Tensor:
        raise Stale("others")

    weight = torch.ones(2)
    with pytest.raises(Stale, match="others"):
        Binder(program_of(make, weight), 1)([weight])


@pytest.mark.parametrize("change", [lambda x: x.data.mul_(3), lambda x: setattr(x, "data", x.data * 3)])
def test_changes_through_data_are_noticed_although_versions_stay(change: Any) -> None:
    weight = torch.nn.Parameter(torch.ones(1000))
    binder = Binder(program_of(lambda w: w.detach().clone()[:2], weight), 1)
    assert binder([weight])[0].tolist() == [1, 1]
    change(weight)
    assert binder([weight])[0].tolist() == [3, 3]


def test_inference_tensors_that_change_are_noticed() -> None:
    with torch.inference_mode():
        weight = torch.ones(4)
        binder = Binder(program_of(lambda w: w * 2, weight), 1)
        binder([weight])
        weight.mul_(2)
        assert binder([weight])[0].tolist() == [4] * 4


def test_stale_weights_stay_stale_without_being_recomputed() -> None:
    calls: list[int] = []

    def make(w: Tensor) -> Tensor:
        calls.append(1)
        raise Stale("others")

    weight = torch.ones(2)
    binder = Binder(program_of(make, weight), 1)
    for _ in range(3):
        with pytest.raises(Stale):
            binder([weight])
    assert len(calls) == 1
