"""Costs of channels before measurement."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
from fitting_by_hand import basis

from fhopt.fitting.bases import CandidateBases
from fhopt.fitting.costs import empty_costs


def test_every_basis_of_every_layout_gets_costs_of_its_shape() -> None:
    one, two, joint = basis(1, 1.0, 1.0), basis(2, 1.0), basis(1, 1.0)
    bases: CandidateBases = {"a": {"input": (joint,), "band": (one, two)}, "b": {"head": (two, two)}}
    costs = empty_costs(bases, (0, 4))
    assert set(costs) == {("a", "input", 0), ("a", "band", 0), ("a", "band", 1), ("b", "head", 0), ("b", "head", 1)}
    for (site, layout, side), measured in costs.items():
        assert set(measured.sums) == {0, 4} and int(measured.tokens) == 0
        assert all(total.shape == bases[site][layout][side].variance.shape for total in measured.sums.values())
        assert not any(total.any() for total in measured.sums.values())


def test_one_basis_on_two_sides_is_measured_for_each() -> None:
    both = basis(1, 1.0)
    costs = empty_costs({"a": {"head": (both, both)}}, (0,))
    costs["a", "head", 0].sums[0].add_(1)
    assert not costs["a", "head", 1].sums[0].any()


def test_measurements_do_not_change_a_basis() -> None:
    with pytest.raises(FrozenInstanceError):
        basis(1, 1.0).variance = None  # type: ignore[misc, assignment]
