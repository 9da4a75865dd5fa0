"""Time breakdown of decode steps: matmuls with weights, attention, overhead.

    with step_clock() as clock:
        for ...: run a step; clock.note(its seconds)
    clock.parts()                                       -> StepParts, means of the steps; None: unknown

The breakdown covers the native calls of decode programs (fhopt/decode/). Each layer reads the clock about ten times.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fhopt.codegen.programs.native_step import Spent
from fhopt.decode.cache_steps import timed_steps


@dataclass(frozen=True)
class StepParts:
    """Milliseconds of a decode step, for all sequences of a batch: `total`, and the parts that add up to it.

    In native calls: weights, matmuls with weights, the LM head included; attention, on KV caches; rest, everything
    else, such as norms and RoPE. around: embeddings, masks, Python, sampling, quantization of a full block, operations
    that run as in the model, and in a plan's first step its capture.
    """

    total: float
    weights: float
    attention: float
    rest: float
    around: float


class StepClock:
    """Accumulates the parts of decode steps inside `step_clock`. seconds: of the steps that were noted."""

    def __init__(self, spent: Spent) -> None:
        self._spent, self._steps, self.seconds = spent, 0, 0.0

    def note(self, seconds: float) -> None:
        """Add a step with its total time."""
        self._steps += 1
        self.seconds += seconds

    def layers(self) -> float:
        """Return the mean number of layers per step whose attention was in a native call."""
        return self._spent.layers / max(1, self._steps)

    def parts(self) -> StepParts | None:
        """Return the means of all noted steps; None if no layer was in a native call."""
        spent = self._spent
        if not spent.layers or not self._steps:
            return None
        rest = spent.total - spent.linear - spent.attention
        seconds = (self.seconds, spent.linear, spent.attention, rest, self.seconds - spent.total)
        return StepParts(*(1e3 * part / self._steps for part in seconds))


@contextmanager
def step_clock() -> Iterator[StepClock]:
    """Time the decode steps of this thread on a CPU inside the context; one clock at a time."""
    with timed_steps() as spent:
        yield StepClock(spent)
