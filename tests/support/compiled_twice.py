"""Call one compiled graph with several sets of inputs, and compare outputs and gradients with eager mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._pytree import tree_flatten, tree_map

import fhopt
from fhopt.backend.compile_report import SiteRecord

_INDUCTOR = "torch._inductor.compile_fx.compile_fx"


def compiled_twice(
    function: Callable[..., Any],
    *sets: Sequence[Any],
    gradients: bool | None = None,
    tolerance: float = 1e-5,
    dynamic: bool | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[SiteRecord]:
    """Compile a function or module once, and compare its results with eager mode for each set of inputs.

    aot_eager replaces inductor, so that any difference beyond rounding comes from the rewrite. gradients: of all
    floating inputs and parameters; None: run once without and once with them. tolerance: relative to the largest
    element, absolute below 1. options: further backend options. Returns how each attention was compiled in every mode,
    as listed by `fhopt.report`. Gradients are not compared if an output has NaN.
    """
    modes = (False, True) if gradients is None else (gradients,)
    return [site for mode in modes for site in _compared(function, sets, mode, tolerance, dynamic, options or {})]


def explanations(sites: Sequence[SiteRecord]) -> list[str]:
    """Return why attentions were not rewritten."""
    return [site.reason for site in sites if site.how == "not rewritten"]


def _compared(
    function: Callable[..., Any], sets: Sequence[Sequence[Any]], gradients: bool, tolerance: float,
    dynamic: bool | None, options: Mapping[str, Any],
) -> Iterator[SiteRecord]:  # fmt: skip
    torch.compiler.reset()
    compiled = torch.compile(function, backend="flashhead", dynamic=dynamic, options={"ratio": 1, **options})
    with mock.patch(_INDUCTOR, lambda module, inputs, **_: aot_eager(module, inputs)):
        for inputs in sets:
            expected = _results(function, function, inputs, gradients)
            actual = _results(compiled, function, inputs, gradients)
            _assert_close(actual, expected, tolerance)
    graphs = fhopt.report(compiled).graphs
    yield from (site for graph in graphs for site in graph.sites)


def _results(called: Callable[..., Any], function: Any, inputs: Sequence[Any], gradients: bool) -> list[Any]:
    """Return the outputs, and with `gradients` the gradients of floating inputs and parameters, None where absent."""
    torch.manual_seed(0)
    inputs = tree_map(lambda x: _leaf(x, gradients), tuple(inputs))
    with torch.set_grad_enabled(gradients):
        outputs = [x for x in tree_flatten(called(*inputs))[0] if isinstance(x, Tensor)]
    if not gradients:
        return outputs
    parameters = list(function.parameters()) if isinstance(function, nn.Module) else []
    leaves = [x for x in (*tree_flatten(inputs)[0], *parameters) if isinstance(x, Tensor) and x.requires_grad]
    losses = [_loss(x) for x in outputs if x.requires_grad]
    if not losses:
        return [*outputs, *(None for _ in leaves)]
    found = torch.autograd.grad(torch.stack(losses).sum(), leaves, allow_unused=True)
    if any(bool(x.isnan().any()) for x in outputs if x.is_floating_point()):
        return outputs  # which operands NaN reaches depends on the order of operations
    return [*outputs, *found]


def _leaf(value: Any, gradients: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    copied = value.detach().clone()
    return copied.requires_grad_(gradients and (copied.is_floating_point() or copied.is_complex()))


def _loss(output: Tensor) -> Tensor:
    """Weight every element differently, so that no gradients cancel."""
    flat = (torch.view_as_real(output) if output.is_complex() else output).double().flatten()
    return (flat * torch.linspace(0.5, 1.5, flat.numel(), dtype=torch.float64)).sum()


def _assert_close(actual: list[Any], expected: list[Any], tolerance: float) -> None:
    assert [x is None for x in actual] == [x is None for x in expected], "other gradients are missing than in eager"
    for a, b in zip(actual, expected, strict=True):
        if b is None:
            continue
        finite = b.detach()[b.isfinite()].abs()
        largest = float(finite.max()) if finite.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(largest, 1.0), equal_nan=True)
