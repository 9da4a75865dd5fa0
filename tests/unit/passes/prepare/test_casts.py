"""Casts to the dtype of another tensor, and casts to a dtype of smaller range."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compiled_twice import compiled_twice
from decomposed import traced
from torch import Tensor
from torch.nn import functional as F

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


def lowest(s: Tensor) -> float:
    return torch.finfo(s.dtype).min


def fills_then_casts_in_the_softmax(s: Tensor, hidden: Tensor) -> Tensor:
    return F.softmax(s.masked_fill(hidden, lowest(s)), dim=-1, dtype=torch.float32)


def selects_then_casts(s: Tensor, hidden: Tensor) -> Tensor:
    return torch.where(hidden, lowest(s), s).bfloat16().softmax(-1, dtype=torch.float32)


def adds_then_casts(s: Tensor, hidden: Tensor) -> Tensor:
    return (s + torch.zeros_like(hidden, dtype=s.dtype).masked_fill(hidden, lowest(s))).bfloat16().softmax(-1)


def adds_an_input_then_casts(s: Tensor, hidden: Tensor) -> Tensor:
    return torch.softmax(s + hidden, -1, dtype=torch.float32)


def casts_then_fills(s: Tensor, hidden: Tensor) -> Tensor:
    s = s.float()
    return s.masked_fill(hidden, lowest(s)).softmax(-1)


def casts_then_adds(s: Tensor, hidden: Tensor) -> Tensor:
    return (s.float() + hidden).softmax(-1)


@pytest.mark.parametrize(
    ("weights", "dtype"),
    [
        (fills_then_casts_in_the_softmax, torch.float64), (selects_then_casts, torch.float32),
        (adds_then_casts, torch.float32), (adds_an_input_then_casts, torch.float64),
        (casts_then_fills, torch.bfloat16), (casts_then_adds, torch.bfloat16),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)  # fmt: skip
def test_mask_values_beyond_the_range_of_a_cast_become_infinite(
    weights: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype
) -> None:
    """A row without keys is NaN if a cast makes its mask values -inf, and the mean of the values if not."""

    def attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        return weights(q @ k.mT, hidden).to(v.dtype) @ v

    def inputs(seed: int, rows: Callable[[Tensor], None]) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.zeros(4, 1, 6, dtype=torch.bool)
        rows(hidden)
        if weights in (adds_an_input_then_casts, casts_then_adds):
            mask_dtype = torch.float64 if dtype == torch.float64 else torch.float32
            hidden = torch.zeros(4, 1, 6, dtype=mask_dtype).masked_fill(hidden, torch.finfo(mask_dtype).min)
        return (*(torch.randn(2, 4, n, 8, generator=generator).to(dtype) for n in (5, 6, 6)), hidden)

    sets = [
        inputs(0, lambda hidden: None),
        inputs(1, lambda hidden: hidden[1].fill_(True)),  # type: ignore[arg-type]
        inputs(2, lambda hidden: hidden[1, :, :3].fill_(True)),  # type: ignore[arg-type]
    ]
    sites = compiled_twice(attention, *sets, tolerance=1e-6 if dtype == torch.float64 else 2e-2)
    assert any(site.how == "torch" for site in sites)
    is_nan = weights not in (casts_then_fills, casts_then_adds)
    assert attention(*sets[1]).isnan().any() == is_nan
