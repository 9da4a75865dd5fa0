"""Casts to the dtype of another tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from decomposed import traced
from torch import Tensor

from fhopt.passes.graph.nodes import op_name
from fhopt.passes.prepare.casts import resolve_casts


def type_as(x: Tensor, y: Tensor) -> Tensor:
    return x.type_as(y) + 1


def to_other(x: Tensor, y: Tensor) -> Tensor:
    return x.to(y) + 1


def to_other_by_name(x: Tensor, y: Tensor) -> Tensor:
    return x.to(tensor=y) + 1  # type: ignore[call-overload]


@pytest.mark.parametrize("function", [type_as, to_other, to_other_by_name], ids=lambda f: f.__name__)
def test_a_cast_to_another_tensor_no_longer_depends_on_it(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, y = torch.randn(3), torch.randn(2, dtype=torch.float16)
    program = traced(function, x, y)
    resolve_casts(program)
    program.module.recompile()
    (cast,) = [n for n in program.graph.nodes if op_name(n) in {"to", "type_as"}]
    assert len(cast.all_input_nodes) == 1 and cast.args[1] is torch.float16
    assert torch.equal(torch.fx.Interpreter(program.module).run(*program.values.values())[0], function(x, y))


def test_a_cast_that_must_copy_is_not_changed() -> None:
    program = traced(lambda x, y: x.to(y, copy=True) + 1, torch.randn(3), torch.randn(2, dtype=torch.float16))
    resolve_casts(program)
    assert any(len(n.all_input_nodes) == 2 for n in program.graph.nodes)
