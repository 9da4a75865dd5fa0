"""Which tensors share memory."""

from __future__ import annotations

import operator
from typing import Any

import torch
from functionalized import functionalized, node_by_node, program_of
from torch import Tensor, fx

from fhopt.passes.prepare.functionalize import Functionalize


def test_tensors_used_outside_the_graph_are_not_replaced() -> None:
    def body(y: Tensor) -> Tensor:
        return y.mul_(2) + 1

    def core(y: Tensor, cache: Tensor, count: Tensor) -> Any:
        z = y.detach() * 2
        z.add_(1)
        return torch.utils.checkpoint.checkpoint(body, z, use_reentrant=False) + z

    program = program_of(core)
    result = functionalized(program)
    assert [miss.reason for miss in result.left] == ["tag_activation_checkpoint changes its inputs inside"]


def test_inputs_that_share_memory_are_written_in_place() -> None:
    memory = torch.zeros(4)

    def build(graph: fx.Graph) -> Any:
        first, second = graph.nodes
        return (graph.call_method("add_", (first, 1.0)), graph.call_function(operator.mul, (second, 2.0)))

    program = node_by_node(build, memory[:2], memory[2:])
    assert ["neither as a view" in m.reason for m in Functionalize().run(program).left] == [True]
    program = node_by_node(build, torch.zeros(2), torch.zeros(2))
    program.values = {"input_0": memory[:2], "input_1": memory[2:]}
    assert ["another input shares" in m.reason for m in Functionalize().run(program).left] == [True]


def halves() -> tuple[Tensor, Tensor]:
    memory = torch.zeros(4)
    return memory[:2], memory


def test_memory_that_two_results_of_an_op_share_is_written_in_place() -> None:
    def build(graph: fx.Graph) -> Any:
        pair = graph.call_function(halves)
        one, two = (graph.call_function(operator.getitem, (pair, i)) for i in (0, 1))
        graph.call_method("add_", (one, 1.0))
        return (graph.call_function(operator.mul, (two, 2.0)),)

    result = functionalized(node_by_node(build))
    assert ["neither as a view" in miss.reason for miss in result.left] == [True]
