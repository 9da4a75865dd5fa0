"""Graphs before and after functionalization."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from functionalized import (
    CacheNetwork,
    assembled,
    functionalized,
    input_read_again,
    input_returned,
    inputs,
    multiplied,
    node_by_node,
    program_of,
)
from torch import Tensor, fx

from fhopt.passes.graph.nodes import fake, op_name
from fhopt.passes.graph.printing import print_graph
from fhopt.passes.graph.program import Program, copy_program
from fhopt.passes.prepare.functionalize import Functionalize, Functionalized


def names(program: Program) -> list[str]:
    return [op_name(node) for node in program.graph.nodes if op_name(node)]


def test_a_write_seen_by_no_other_node_becomes_the_out_of_place_operation() -> None:
    program = program_of(lambda y, cache, count: torch.relu_(y.mul_(2.0)) + 1)
    functionalized(program)
    assert names(program) == ["linear", "mul", "relu", "add"]


def test_a_written_view_needs_no_copy_if_only_the_view_is_used() -> None:
    program = program_of(lambda y, cache, count: y.view(2, 2, 8).transpose(1, 2).mul_(0.5).exp())
    functionalized(program)
    assert names(program) == ["linear", "view", "transpose", "mul", "exp"]


def test_a_partial_write_goes_to_a_copy_and_its_views_are_made_again() -> None:
    program = program_of(assembled)
    functionalized(program)
    lines = [line for line in print_graph(program.graph).splitlines() if "written" in line or "exp(" in line]
    first = "[['operator.getitem', [[Ellipsis, slice(None, 8, None)]], {}]]"
    assert f"written(%keys, {first}, 'copy_', [%y], {{}})" in lines[0].replace("%linear", "%y")
    assert lines[-1].endswith(".exp(%written_1)")


def test_a_written_input_is_used_in_its_new_version_and_written_back_once_at_the_end() -> None:
    program = program_of(input_read_again)
    functionalized(program)
    text = print_graph(program.graph)
    assert "%t: float32[8, 4] = .t(%index_copy)" in text
    assert [n for n in names(program) if n.endswith("_")] == ["copy_", "copy_"]
    assert names(program)[-2:] == ["copy_", "copy_"]


def test_views_of_an_input_in_the_output_are_views_of_the_input() -> None:
    program = program_of(input_returned)
    functionalized(program)
    *_, copy, view, transposed, output = program.graph.nodes
    assert [n.args[0] for n in (copy, view, transposed)] == [copy.args[0]] * 3
    assert copy.args[0].op == "placeholder"
    assert output.args[0][1:] == (view, transposed)  # Dynamo returns the input itself


def test_an_input_in_the_output_is_the_input() -> None:
    def build(graph: fx.Graph) -> Any:
        (cache,) = graph.nodes
        return (cache, graph.call_method("add_", (cache, 1.0)), graph.call_method("exp", (cache,)))

    program = node_by_node(build, torch.zeros(2))
    functionalized(program)
    cache, total, exponential, _, output = program.graph.nodes
    assert output.args[0] == (cache, cache, exponential)
    assert exponential.args == (total,)


def test_new_nodes_have_the_line_of_user_code_they_come_from() -> None:
    program = program_of(multiplied)
    functionalized(program)
    (product,) = [n for n in program.graph.nodes if op_name(n) == "mul"]
    assert "y.mul_(2.0)" in product.meta["stack_trace"]
    assert tuple(product.meta["example_value"].shape) == tuple(product.meta["val"].shape) == (4, 8)


def test_copies_into_inputs_at_the_end_are_not_candidates() -> None:
    program = program_of(lambda y, cache, count: (cache.copy_(y.detach() * 2), y)[1])
    assert Functionalize().candidates(program) == []
    assert functionalized(program) == Functionalized(0, ())


def test_graphs_without_writes_do_not_change() -> None:
    program = program_of(lambda y, cache, count: (y > 0) & (cache > 0) | (y < -1))
    before = print_graph(program.graph)
    assert functionalized(program) == Functionalized(0, ())
    assert print_graph(program.graph) == before


def test_nodes_that_only_fix_an_order_are_not_moved() -> None:
    def core(y: Tensor, cache: Tensor, count: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = F.linear(y, cache)
            y.mul_(2)
        with torch.no_grad():
            limit = y.amax()
        y.sub_(limit)
        torch._check(y.shape[0] == 4)
        return y.float()

    program = program_of(core)
    assert functionalized(program, gradients=True).left == ()
    modes = ["_enter_autocast", "linear", "written", "_exit_autocast", "_set_grad_enabled", "amax", "_set_grad_enabled"]
    assert names(program)[1:8] == modes


def test_sizes_may_be_symbols() -> None:
    def core(y: Tensor, cache: Tensor, count: Tensor) -> Tensor:
        half = y.view(2, y.shape[0] // 2, 8)
        half[:, : cache.shape[0] - 2].add_(1)
        return half + y.mul_(2).view(2, -1, 8)

    programs: list[Program] = []

    def keep(module: fx.GraphModule, example: list[Any]) -> Any:
        programs.append(copy_program(module, example))
        return module

    torch.compile(CacheNetwork(core), backend=keep, dynamic=True)(*inputs())
    (program,) = programs
    program.values = {k: v.node.hint if isinstance(v, torch.SymInt) else v for k, v in program.values.items()}
    assert "s" in str(fake(next(n for n in program.graph.nodes if op_name(n) == "linear")).shape[0])
    assert functionalized(program, gradients=True).left == ()
