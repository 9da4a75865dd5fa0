"""The spellings of attention that torch's compiler knows: each is found, with projections and without."""

from __future__ import annotations

import inspect
import itertools
import re
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from needs import sampled
from torch import Tensor, nn
from torch._inductor.fx_passes import fuse_attention

from fhopt.backend.compile import last_outcome

PATTERNS = {
    name.removesuffix("_inference"): pattern
    for name, pattern in fuse_attention._get_sfdp_patterns(torch.device("cpu"))
    if name.endswith("_inference")
}
ENOUGH = 16  # maximum size of an axis: some examples have 1,000
SOME = "_sfdp_pattern_1", "_sfdp_pattern_21_half"  # run through all of inductor


def as_own(function: types.FunctionType, names: dict[str, Any]) -> types.FunctionType:
    """Return a copy of a compiler function in this file, because Dynamo does not trace the compiler's own."""
    return types.FunctionType(function.__code__.replace(co_filename=__file__), names, function.__name__)


NAMES = dict(vars(fuse_attention))  # of functions that call each other
NAMES |= {n: as_own(f, NAMES) for n, f in NAMES.items() if re.fullmatch(r"_sfdp_pattern_\d+", n)}

SEVERAL_LEVELS = "_sfdp_pattern_19_half"  # overwrites scores by -65504, and adds a mask that may have about this value


class Projected(nn.Module):
    """A pattern applied to projections of its operands."""

    def __init__(self, pattern: Callable[..., Any], operands: list[Tensor]) -> None:
        super().__init__()
        self.pattern = pattern
        self.q, self.k, self.v = (nn.Linear(t.shape[-1], t.shape[-1], dtype=t.dtype) for t in operands)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **numbers: float) -> Any:
        return self.pattern(self.q(query), self.k(key), self.v(value), *rest, **numbers)


def filled(index: int, example: Any) -> Any:
    """Fill an example: operands with random values, or a mask with zeros and ones that leaves one key visible."""
    if not isinstance(example, Tensor) or not example.dim():
        return example
    small = example.detach()[tuple(slice(ENOUGH) for _ in example.shape)]
    if index < 3:
        return small.copy_(torch.randn(small.shape))
    mask = torch.randint(0, 2, small.shape)
    mask[..., 0] = 1
    return small.copy_(mask)


def attention(name: str, is_projected: bool) -> tuple[Any, list[Any], dict[str, float]]:
    """Return a pattern as a function, its tensor arguments and its number arguments."""
    match = re.match(r"_sfdp_pattern_\d+", name)
    assert match is not None
    function, pattern = NAMES[match[0]], PATTERNS[name]
    torch.manual_seed(5)
    inputs = [filled(i, x) for i, x in enumerate(pattern["example_inputs"])]
    numbers = dict(pattern["scalar_workaround"] or {})
    if "dropout_p" in inspect.signature(function).parameters:
        numbers["dropout_p"] = 0.0
    return Projected(function, inputs[:3]).eval() if is_projected else function, inputs, numbers


def strides(tensor: Tensor) -> list[int]:
    """Strides of axes larger than one; others have no effect."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def check(name: str, is_projected: bool) -> None:
    function, inputs, numbers = attention(name, is_projected)

    def call(*arguments: Any) -> Any:
        return function(*arguments, **numbers)

    with torch.no_grad():
        expected = call(*inputs)
        options: Any = {"ratio": 1, "assume_finite": True}  # otherwise float16 scores are not rewritten
        found = torch.compile(call, backend="flashhead", options=options, dynamic=False)(*inputs)
    outcome = last_outcome()
    assert outcome is not None
    if name.startswith(SEVERAL_LEVELS):
        assert not outcome.lowered and "a bias may have about the value" in outcome.missed[0].reason
        return
    assert len(outcome.sites) == is_projected, outcome.missed
    assert len(outcome.lowered) == 1, outcome.missed
    results = [expected, found] if isinstance(expected, Tensor) else [expected[0], found[0]]
    assert results[0].dtype == results[1].dtype and strides(results[0]) == strides(results[1])
    is_half = torch.half in (inputs[0].dtype, results[0].dtype)
    rounding = 2e-2 if is_half else 1e-5  # separate matmuls round scores of 16 to multiples of 1 / 64
    torch.testing.assert_close(results[1], results[0], rtol=rounding, atol=rounding)


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize(("name", "is_projected"), sampled(itertools.product(PATTERNS, [False, True]), 5))
def test_a_pattern_of_the_compiler_is_found_and_gives_the_same_result(name: str, is_projected: bool) -> None:
    check(name, is_projected)


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("name", SOME)
def test_a_pattern_gives_the_same_result_through_inductor(name: str) -> None:
    check(name, False)
