"""Writes that are not functionalized, with the reason."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functionalized import functionalized, node_by_node, program_of
from torch import Tensor, fx, nn

from fhopt.models.capture import capture
from fhopt.passes.prepare.functionalize import Functionalize


@torch.library.custom_op("fhopt_test::double_", mutates_args=("x",))
def double_(x: Tensor) -> None:
    x.mul_(2)


def by_custom_op(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    cache.add_(1)
    torch.ops.fhopt_test.double_(cache)
    return y + cache


def changed_form(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    z = y * 2
    z.unsqueeze_(0)
    return z.add_(1)


def several_at_once(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    a, b = y * 1, y * 2
    torch._foreach_add_([a, b], 1.0)
    return a + b


def without_gradient(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    with torch.no_grad():
        y.mul_(2)
    return y.exp()


def strided(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    part = y.as_strided((2, 2), (8, 1))
    y.mul_(2)
    return part + 1


def past_autograd(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    y.data.mul_(2)
    return y + 1


def running_statistics(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    mean, variance = torch.zeros(8), torch.ones(8)
    mean.add_(1)
    y = F.batch_norm(y, mean, variance, training=True)
    return y + mean


def second_argument(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    _, wide = torch.broadcast_tensors(y, cache[:1])
    cache.add_(1)
    return y + wide


def looked_through(y: Tensor, cache: Tensor, count: Tensor) -> Any:
    row = y.view(-1).view_as(cache)
    row.add_(1)
    cache.add_(1)
    return y


STAYS = {
    by_custom_op: "the custom op fhopt_test.double_",
    changed_form: "unsqueeze_ changes the form of the tensor",
    several_at_once: "several tensors at once",
    without_gradient: "another gradient mode",
    strided: "the view part cannot be made again",
    past_autograd: "cannot be made again",
    running_statistics: "running statistics",
    second_argument: "an argument that is not its first",
    looked_through: "the view row cannot be made again",
}


@pytest.mark.parametrize("core", STAYS, ids=lambda f: f.__name__)
def test_an_irreplaceable_write_stays_with_a_reason(core: Callable[..., Any]) -> None:
    program = program_of(core)
    result = functionalized(program)
    assert result.left
    assert all(STAYS[core] in miss.reason for miss in result.left), [miss.reason for miss in result.left]


def test_a_parameter_is_written_in_place() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen = nn.Parameter(torch.zeros(3), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(1)
            return x.mul(self.seen).add_(1)

    program = capture(Counting(), (torch.ones(3),)).program
    result = functionalized(program)
    assert result.changed == 1
    assert ["is a parameter" in miss.reason for miss in result.left] == [True]


def test_functions_without_a_public_name_are_called_where_they_are() -> None:
    def shift_(x: Tensor) -> Tensor:
        return x.add_(1)

    def build(graph: fx.Graph) -> Any:
        (first,) = graph.nodes
        graph.call_function(shift_, (first,))
        return (graph.call_function(operator.mul, (first, 2.0)),)

    result = functionalized(node_by_node(build, torch.zeros(2)))
    assert ["cannot be called by name" in miss.reason for miss in result.left] == [True]


@pytest.mark.parametrize("forgotten", ["view", "scores"])
def test_without_a_fake_value_nothing_is_assumed(forgotten: str) -> None:
    def core(y: Tensor, cache: Tensor, count: Tensor) -> Any:
        scores = y * 2
        view = scores.view(-1)
        scores.add_(1)
        return view + 1

    program = program_of(core)
    (node,) = [n for n in program.graph.nodes if n.name == forgotten]
    node.meta.pop("example_value")
    reasons = [miss.reason for miss in Functionalize().run(program).left]
    assert reasons == [
        {"view": "what view returns is not known", "scores": "the memory of scores is not known"}[forgotten]
    ]


def test_other_tensors_are_replaced_next_to_one_that_is_not() -> None:
    def core(y: Tensor, cache: Tensor, count: Tensor) -> Any:
        by_custom_op(y, cache, count)
        y.mul_(2)
        return y.add_(cache)

    result = functionalized(program_of(core))
    assert (result.changed, len(result.left)) == (2, 2)
