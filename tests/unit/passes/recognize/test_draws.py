"""Random values for checks: no value of the traced call is reused, and equal computations have equal values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from fhopt.models.capture import capture
from fhopt.passes.graph.evaluate import Evaluator, Region
from fhopt.passes.recognize.draws import DRAWS, LARGE, MILD, MIXED, random_sides
from fhopt.passes.recognize.node_roles import Roles


class Masked(nn.Module):
    def forward(self, x: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        filled = x.masked_fill(~mask, 0.0) * (~mask).to(x.dtype)
        return filled + bias + torch.arange(x.shape[-1])


def drawn(draw: str, mask: Tensor) -> dict[str, Tensor]:
    x = torch.randn(3, 4)
    program = capture(Masked(), (x, mask, torch.zeros(3, 4))).program
    start = next(n for n in program.graph.nodes if n.op == "placeholder" and program.values[n.name].shape == x.shape)
    end: fx.Node = program.graph.output_node().args[0][0]  # type: ignore[index, assignment]
    region = Region(Evaluator(program), [start], end)
    return {node.name: value for node, value in random_sides(region, Roles(program), draw).items()}


@pytest.mark.parametrize("draw", DRAWS)
def test_every_input_is_drawn_and_values_from_literals_are_not(draw: str) -> None:
    values = drawn(draw, torch.ones(3, 4, dtype=torch.bool))
    floats = [v for v in values.values() if v.is_floating_point() and v.shape == (3, 4)]
    assert any(not torch.equal(v, torch.zeros(3, 4, dtype=v.dtype)) for v in floats)
    assert not any("arange" in name for name in values)


def test_one_mask_has_the_same_value_as_bool_and_as_float() -> None:
    values = drawn(MILD, torch.ones(3, 4, dtype=torch.bool))
    masks = [v for v in values.values() if v.dtype == torch.bool]
    numbers = [v for name, v in values.items() if "to" in name]
    assert masks and numbers and all(torch.equal(m.double(), n) for m in masks for n in numbers)
    assert not masks[0].all() and masks[0].any()


def test_a_mask_hides_some_element_even_if_it_has_few() -> None:
    assert not drawn(MILD, torch.ones(1, 4, dtype=torch.bool))["invert"].all()


def test_large_draws_have_a_fully_masked_row() -> None:
    values = drawn(LARGE, torch.ones(1, 4, dtype=torch.bool))
    assert not next(v for v in values.values() if v.dtype == torch.bool).logical_not().any()


def test_mixed_draws_hide_every_other_key_of_each_row() -> None:
    mask = next(v for v in drawn(MIXED, torch.ones(3, 4, dtype=torch.bool)).values() if v.dtype == torch.bool)
    assert torch.equal(mask[..., 1:], ~mask[..., :-1])


def test_draws_of_constant_masks_show_every_key_or_none() -> None:
    for draw in ("0", "1"):
        mask = next(v for v in drawn(draw, torch.ones(3, 4, dtype=torch.bool)).values() if v.dtype == torch.bool)
        assert bool(mask.all()) or not bool(mask.any())
