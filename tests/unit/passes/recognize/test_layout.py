"""Permuting axes and back."""

from __future__ import annotations

import pytest
import torch

from fhopt.passes.recognize.layout import arrange, arrangement


@pytest.mark.parametrize(
    ("source", "target", "shape"),
    [
        ((("b", "h"), ("s",), ("d",)), (("b",), ("h",), ("s",), ("d",)), (6, 5, 4)),
        ((("b",), ("s",), ("h", "d")), (("b",), ("h",), ("s",), ("d",)), (2, 5, 12)),
        ((("b",), ("h",), ("s",), ("d",)), (("h", "b"), ("d",), ("s",)), (2, 3, 5, 4)),
        (((), ("s",), ("d",)), (("b",), (), ("s",), ("d",)), (1, 5, 4)),
    ],
)
def test_permuting_and_back_changes_nothing(source: object, target: object, shape: tuple[int, ...]) -> None:
    sizes = {"b": 2, "h": 3, "s": 5, "d": 4}
    tensor = torch.randn(shape)
    there = arrangement(source, target, sizes)  # type: ignore[arg-type]
    assert arrange(tensor, arrangement(source, source, sizes)).equal(tensor)  # type: ignore[arg-type]
    moved = arrange(tensor, there)
    if {a for axis in source for a in axis} == {a for axis in target for a in axis}:  # type: ignore[attr-defined]
        back = arrange(moved, arrangement(target, source, sizes))  # type: ignore[arg-type]
        assert back.equal(tensor)
    else:
        assert moved.shape == (2, 1, 5, 4) and moved[1, 0].equal(tensor[0])
