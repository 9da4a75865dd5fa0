"""Composites that decomposition does not rewrite, with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from decomposed import (
    ATEN,
    B,
    D,
    E,
    H,
    S,
    TwiceCheckpointed,
    alternating,
    core,
    flexible,
    hand_made,
    operands,
    reason,
    sageattn,
    tokens_first,
    traced,
)
from torch import Tensor

from fhopt.errors import Miss
from fhopt.passes.graph.nodes import fake, op_name
from fhopt.passes.prepare.trace import trace_composite


def test_nested_tensors_are_not_rewritten() -> None:
    nested = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(2, E)], layout=torch.jagged)
    weights = (torch.randn(3 * E, E), torch.randn(3 * E), torch.randn(E, E), torch.randn(E))
    target = ATEN._native_multi_head_attention.default
    program = hand_made(target, nested, nested, nested, E, H, *weights, results=(torch.randn(B, 3, E), torch.ones(1)))
    assert "takes nested tensors" in reason(program)


def test_attention_in_a_checkpoint_is_not_rewritten_on_request() -> None:
    program = traced(TwiceCheckpointed(), torch.randn(B, S, E))
    found = reason(program, inline_checkpoints=False)
    assert found == "attention inside an activation checkpoint is not rewritten while training"


def test_attention_in_a_branch_is_not_rewritten() -> None:
    def call(x: Tensor) -> Tensor:
        out: Tensor = torch.cond(x.sum() > 0, lambda x: core(x, x * 2, x), lambda x: x + 1, (x,))
        return out

    assert reason(traced(call, torch.randn(B, S, E))) == "attention inside cond is not rewritten"


def test_a_body_with_other_arguments_is_not_rewritten() -> None:
    program = traced(TwiceCheckpointed(), torch.randn(B, S, E))
    (node,) = (n for n in program.graph.nodes if op_name(n) == "tag_activation_checkpoint")
    node.args = node.args[:-1]
    assert "arguments to its body" in reason(program)


def test_a_body_other_than_a_graph_is_not_rewritten() -> None:
    program = traced(flexible({}, alternating), *operands())
    (node,) = (n for n in program.graph.nodes if op_name(n) == "flex_attention")
    node.args = (*node.args[:3], node.args[0], *node.args[4:])
    assert "is not a graph of the program" in reason(program)


def test_results_returned_as_one_tuple_are_not_rewritten() -> None:
    q, k, v = torch.randn(3, B, H, S, D)
    program = hand_made(ATEN._scaled_dot_product_attention_math.default, q, k, v, results=(q, q))
    output = program.graph.output_node()
    output.args = (output.args[0][0].args[0],)  # type: ignore[index, union-attr]
    program.graph.eliminate_dead_code()
    assert "used as a tuple" in reason(program)


def test_a_second_result_in_use_is_not_rewritten() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v)

    found = reason(traced(call, *torch.randn(3, B, H, S, D)))
    assert (
        found
        == "result 1 of _scaled_dot_product_flash_attention_for_cpu is used, which its decomposition does not compute"
    )


def test_a_graph_without_fake_values_is_not_rewritten() -> None:
    program = traced(lambda m, q, k: torch.baddbmm(m, q, k.mT), *torch.randn(3, 2, S, S))
    for node in program.graph.nodes:
        node.meta.pop("example_value", None)
    assert "has no fake values" in reason(program)


def test_a_call_refused_by_its_own_code_is_not_rewritten() -> None:
    program = traced(lambda m, q, k: torch.baddbmm(m, q, k.mT), *torch.randn(3, 2, S, S))
    (node,) = (n for n in program.graph.nodes if op_name(n) == "baddbmm")
    node.kwargs = {"out_dtype": torch.float64}
    assert "baddbmm could not be traced (TypeError" in reason(program)


def test_a_result_of_another_dtype_is_not_rewritten() -> None:
    program = traced(lambda m, q, k: torch.baddbmm(m, q, k.mT), *torch.randn(3, 2, S, S))
    (node,) = (n for n in program.graph.nodes if op_name(n) == "baddbmm")
    node.meta["example_value"] = fake(node).double()
    assert reason(program) == "the decomposition of baddbmm returns torch.float32; expected torch.float64"


def test_a_composite_that_makes_a_constant_is_not_rewritten() -> None:
    program = traced(lambda m, q, k: torch.baddbmm(m, q, k.mT), *torch.randn(3, 2, S, S))
    (node,) = (n for n in program.graph.nodes if op_name(n) == "baddbmm")
    with pytest.raises(Miss, match="creates a constant tensor"):
        trace_composite(lambda m, q, k: m + torch.tensor([1.0] * S), node, program)


def test_the_reason_names_the_composite() -> None:
    program = traced(lambda q, k, v: sageattn(q, k, v, "NHD", is_causal=True), *tokens_first())
    assert reason(program) == "sageattn: causal attention of 5 queries on 7 keys; expected equal numbers"
