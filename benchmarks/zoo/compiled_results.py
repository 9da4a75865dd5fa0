"""Tasks of the compiled zoo, the results of each compiler, and their comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from model_zoo import Entry, ZooCase
from torch import Tensor

TOLERANCE = 1e-4  # float32, other summation orders, through two layers and a softmax: the backend's guarantee


@dataclass(frozen=True)
class ZooTask:
    """One use of a model. build: creates module and arguments. run: calls it, and returns the results.

    by_layers: each layer is compiled instead of the model, so that layers may share graphs. exact: creates the same in
    float32, if the task rounds to 16 bits.
    """

    entry: Entry
    mode: str
    build: Callable[[], ZooCase]
    run: Callable[[Callable[..., Any], ZooCase], CompilerResult]
    dynamic: bool | None = None
    by_layers: bool = False
    tolerance: float = TOLERANCE
    exact: Callable[[], ZooCase] | None = None

    @property
    def label(self) -> str:
        """`entry/mode`."""
        return f"{self.entry.label}/{self.mode.replace(' ', '_')}"


@dataclass
class CompilerResult:
    """Results of a task with one compiler. values: outputs, changed caches and buffers, in order; None: no gradient."""

    values: list[Any] = field(default_factory=list)
    gradients: list[Tensor | None] = field(default_factory=list)
    graphs: int = 0
    breaks: int = 0
    given_up: list[str] = field(default_factory=list)  # warnings of graphs that passes could not process
    refusal: str = ""
    seconds: float = 0.0
    sites: int = 0  # attentions that fhopt's passes detected, over all graphs


@dataclass(frozen=True)
class CompiledResult:
    """Results of a task with all compilers."""

    task: ZooTask
    seen: Mapping[str, CompilerResult]

    @property
    def excuse(self) -> str:
        """Why the results cannot be compared; "" if they can."""
        refusals = ((name, self.seen[name].refusal) for name in ("eager", "inductor"))
        return next((f"{name}: {refusal}" for name, refusal in refusals if refusal), "")

    def figure(self, metric: str, compiler: str) -> float:
        """Return one of the METRICS; errors are relative to the largest value of the tensor, or of all gradients."""
        if metric == "max_error":
            return largest_difference(self.seen["eager"].values, self.seen[compiler].values)
        if metric == "max_gradient_error":
            return largest_difference(self.seen["eager"].gradients, self.seen[compiler].gradients, together=True)
        return float(getattr(self.seen[compiler], metric))

    def distance(self, metric: str, compiler: str) -> float:
        """Return the distance from the same task in float32, by the norms of tensors, or of all gradients together.

        By norms, since rounding may send one token to another expert, which changes its values entirely.
        """
        exact, seen = self.seen["float32"], self.seen[compiler]
        if metric == "max_error":
            return max((relative_norm([x], [y]) for x, y in zip(exact.values, seen.values, strict=True)), default=0.0)
        return relative_norm(exact.gradients, seen.gradients)

    @property
    def failures(self) -> list[str]:
        """Broken promises, in words; none if inductor, or torch itself, cannot run the task."""
        ours, theirs = self.seen["flashhead"], self.seen["inductor"]
        if self.excuse:
            return []
        if ours.refusal:
            return [ours.refusal]
        failures = list(ours.given_up)
        for metric in ("max_error", "max_gradient_error"):
            if self.task.exact is not None:
                failures += self._rounds_more(metric)
                continue
            ours_is, theirs_is = self.figure(metric, "flashhead"), self.figure(metric, "inductor")
            allowed = self.task.tolerance
            if not ours_is <= max(allowed, 2 * theirs_is):
                failures.append(f"{metric} {ours_is:.1e}, inductor's {theirs_is:.1e}, expected at most {allowed:.0e}")
        for metric in ("graphs", "breaks"):
            if self.figure(metric, "flashhead") > self.figure(metric, "inductor"):
                failures.append(f"{getattr(ours, metric)} {metric}, inductor has {getattr(theirs, metric)}")
        return failures

    def _rounds_more(self, metric: str) -> list[str]:
        """Return a failure if 16-bit results are much further from float32 than those of eager mode."""
        ours_is, eager_is = self.distance(metric, "flashhead"), self.distance(metric, "eager")
        if ours_is <= max(self.task.tolerance, 1.5 * eager_is):
            return []
        return [f"{metric}: {ours_is:.1e} from float32, eager {eager_is:.1e}"]


def largest_difference(expected: Sequence[Any], actual: Sequence[Any], together: bool = False) -> float:
    """Return the largest difference relative to the largest value of its tensor, or of all tensors `together`."""
    if len(expected) != len(actual):
        return math.inf
    pairs = [_difference(*pair) for pair in zip(expected, actual, strict=True)]
    if together:
        pairs = [(max((p[0] for p in pairs), default=0.0), max((p[1] for p in pairs), default=0.0))]
    return max((difference / max(size, 1e-30) if difference else 0.0 for difference, size in pairs), default=0.0)


def relative_norm(expected: Sequence[Any], actual: Sequence[Any]) -> float:
    """Return the norm of the difference of tensors of any floating types, relative to that of the expected ones."""
    pairs = [
        (x.double(), y.double())
        for x, y in zip(expected, actual, strict=True)
        if isinstance(x, Tensor) and isinstance(y, Tensor) and x.is_floating_point()
    ]
    size = sum(float(x.square().sum()) for x, _ in pairs)
    return math.sqrt(sum(float((x - y).square().sum()) for x, y in pairs) / max(size, 1e-30))


def _difference(expected: Any, actual: Any) -> tuple[float, float]:
    """Return (largest difference, largest expected magnitude); infinite if the two are not comparable."""
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
        return (0.0 if type(expected) is type(actual) and expected == actual else math.inf), 1.0
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return math.inf, 1.0
    if expected.is_complex():
        return _difference(torch.view_as_real(expected), torch.view_as_real(actual))
    expected, actual = expected.double(), actual.double()
    finite = expected.isfinite()
    if not torch.allclose(expected[~finite], actual[~finite], rtol=0.0, atol=0.0, equal_nan=True):
        return math.inf, 1.0
    if not finite.any():
        return 0.0, 0.0
    apart = (expected - actual)[finite].abs().nan_to_num(math.inf)
    return float(apart.max()), float(expected[finite].abs().max())
