"""Lowering of fx nodes to segments, and keys of equal segments."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lowered_functions import CapturedFunction, expect_close, gated_mlp, mlp_weights
from needs import needs_compiler
from torch import Tensor
from torch.fx import Graph

from fhopt.codegen.programs.lowering import (
    LoweringError,
    base_name,
    has_instructions,
    inputs_of,
    is_in_place_node,
    is_mutation,
    is_weight,
    layout_key,
    node_key,
)

aten = torch.ops.aten


def test_inputs_are_in_order_of_first_use() -> None:
    captured = CapturedFunction(lambda x, y, z: torch.cat([z * 2, y + 1, z * y]), [torch.randn(3) for _ in range(3)])
    assert [node.name for node in inputs_of(captured.segment[0])] == ["z_1", "y_1"]


def test_nodes_are_named_by_their_operation() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    scalar, own = graph.call_function(aten.add.Scalar, (x, 1)), graph.call_function(torch.ops.fhopt.pack.default, (x,))
    assert (base_name(scalar), base_name(own)) == ("add", "fhopt::pack")
    assert has_instructions(scalar) and not has_instructions(own) and not has_instructions(x)
    assert not is_mutation(scalar) and not is_in_place_node(scalar) and not is_weight(x)


@pytest.mark.parametrize(
    ("target", "changes", "in_place", "has_some"),
    [
        (aten.mul_.Tensor, True, True, True),
        (aten.squeeze_.dim, True, False, True),
        (aten.exp_.default, True, False, False),
        (aten.copy_.default, True, False, False),
        (aten.add.out, True, False, False),
        (aten.add.Tensor, False, False, True),
    ],
)
def test_nodes_that_change_an_operand(
    target: Callable[..., Tensor], changes: bool, in_place: bool, has_some: bool
) -> None:
    graph = Graph()
    node = graph.call_function(target, (graph.placeholder("x"), 1))
    assert (is_mutation(node), is_in_place_node(node), has_instructions(node)) == (changes, in_place, has_some)


# --------------------------------------------------------------------------------------------------- keys


def test_keys_do_not_depend_on_values_and_names() -> None:
    first, second = [CapturedFunction(gated_mlp, [torch.randn(1, 1, 48)], mlp_weights()) for _ in range(2)]
    assert first.key == second.key and hash(first.key) == hash(second.key)
    assert first.key != CapturedFunction(gated_mlp, [torch.randn(2, 1, 48)], mlp_weights()).key
    assert first.key != CapturedFunction(gated_mlp, [torch.randn(1, 1, 48)], mlp_weights(bias=False)).key


def test_keys_depend_on_numbers_dtypes_operands_and_outputs() -> None:
    functions: list[Callable[[Tensor, Tensor], object]] = [
        lambda x, y: x * 2 + y,
        lambda x, y: x * 2.0 + y,
        lambda x, y: x * 3 + y,
        lambda x, y: x * 2 + x * 2,
        lambda x, y: x * 0.0 + y,
        lambda x, y: x * -0.0 + y,
        lambda x, y: (x * 2 + y).half(),
        lambda x, y: (x * 2 + y).bfloat16(),
        lambda x, y: x.clamp(0, 1) + y,
        lambda x, y: x.clamp(None, 1) + y,
        lambda x, y: [x * 2 + y, y + 1],
        lambda x, y: [x * 2 + y, y + 1][::-1],
    ]
    keys = [CapturedFunction(function, [torch.randn(4), torch.randn(4)]).key for function in functions]
    assert len(set(keys)) == len(keys)


def test_keys_tell_weights_from_other_inputs() -> None:
    """A weight is read at its own strides, any other input is dense."""
    x, w = torch.randn(4, 6), torch.randn(6, 4).t()
    assert CapturedFunction(torch.mul, [x, w]).key != CapturedFunction(torch.mul, [x], [w]).key
    assert CapturedFunction(torch.mul, [x], [w]).key != CapturedFunction(torch.mul, [x], [w.contiguous()]).key


def test_a_node_key_describes_operands_by_a_given_key() -> None:
    (first, second, third), _, _ = CapturedFunction(lambda x: (x + 1) * (x * 2), [torch.randn(3)]).segment
    assert node_key(first, layout_key) != node_key(second, layout_key) != node_key(third, layout_key)
    assert node_key(third, layout_key) != node_key(third, lambda node: node)
    (twice,) = CapturedFunction(lambda x: x * 2, [torch.randn(3)]).segment[0]
    assert node_key(second, layout_key) == node_key(twice, layout_key)


def test_a_value_that_is_no_tensor_has_no_layout() -> None:
    split, *_ = CapturedFunction(lambda x: x.split(2)[1] * 2, [torch.randn(4)]).segment[0]
    assert layout_key(split) is None


# --------------------------------------------------------------------------------------------------- segments


@needs_compiler
def test_views_of_several_results_and_unused_values() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        first, _, third = x.split(2)
        w.exp()  # unused
        return first * third

    x, w = torch.randn(6, 5), torch.randn(3)
    expect_close(CapturedFunction(function, [x], [w]).run(), function(x.double(), w.double()), torch.float32)


@needs_compiler
def test_a_view_of_other_strides_in_the_arena_is_a_copy() -> None:
    """Results have the strides of the operands in torch, and are dense in the arena."""

    def function(x: Tensor) -> Tensor:
        return (x.t() + 1).t().view(-1) * 2

    x = torch.randn(6, 5)
    expect_close(CapturedFunction(function, [x]).run(), function(x.double()), torch.float32)


@needs_compiler
def test_results_are_stored_in_the_type_and_shape_of_the_capture() -> None:
    x, w = torch.randn(3, 4).bfloat16(), torch.randn(4, 3)
    captured = CapturedFunction(lambda x, w: (x.float() + 1).half() * 1, [x], [w])
    (stored,) = captured.lowered().stored
    assert (stored.external, stored.shape, stored.dtype) == (1, (3, 4), torch.float16)
    assert captured.run().dtype == torch.float16


@pytest.mark.parametrize(
    ("function", "reason", "name"),
    [
        (lambda x: x + torch.arange(4.0), "the operation arange", "arange"),
        (lambda x: x.double().mul(2), "a result of torch.float64", "mul"),
        (lambda x: torch.add(x, 1, out=x + 2), "the operation add", "add"),
        (lambda x: [x * 2, x.to(torch.float64)], "a result of torch.float64", "_to_copy"),
    ],
)
def test_an_unsupported_node_is_named(function: Callable[[Tensor], Tensor], reason: str, name: str) -> None:
    with pytest.raises(LoweringError, match=reason) as caught:
        CapturedFunction(function, [torch.rand(4, 4)]).lowered()
    assert base_name(caught.value.node) == name


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64])
def test_inputs_of_other_types_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(LoweringError, match=f"elements of {dtype}"):
        CapturedFunction(lambda x: x * 2.5, [torch.ones(4).to(dtype)]).lowered()
