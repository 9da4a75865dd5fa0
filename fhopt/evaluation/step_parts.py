"""Time breakdown of decode steps: matmuls with weights, attention, LM head, overhead.

    with step_clock(model) as clock:
        for ...: run a step; clock.note(its seconds)
    clock.parts()                                       -> StepParts, means of the steps; None: unknown

The breakdown covers decoder layers that run, with their cache, as one native call (fhopt/hf/cache_steps.py), as most
layers with a plan do on a CPU. Each layer reads the clock about ten times.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fhopt.codegen.programs.native_step import Spent
from fhopt.decode.cache_steps import timed_steps


@dataclass(frozen=True)
class StepParts:
    """Milliseconds of a decode step, for all sequences of a batch: `total`, and the parts that add up to it.

    For layers that run as one native call with their caches: weights, matmuls with weights; attention, on their KV
    caches; rest, everything else, such as norms and RoPE. In a layer with experts only the attention is such a call.
    Discarded work that ran ahead is included. output: the LM head; None if it is not called as a module. around:
    embeddings, masks, Python, sampling, quantization of a full block, all other layers, and in a plan's first step the
    tracing of layers.
    """

    total: float
    weights: float
    attention: float
    rest: float
    output: float | None
    around: float


class StepClock:
    """Accumulates the parts of decode steps inside `step_clock`. seconds: of the steps that were noted."""

    def __init__(self, spent: Spent) -> None:
        self._spent, self._steps, self.seconds = spent, 0, 0.0
        self._output, self._outputs, self._start = 0.0, 0, 0.0

    def note(self, seconds: float) -> None:
        """Add a step with its total time."""
        self._steps += 1
        self.seconds += seconds

    def layers(self) -> float:
        """Return the mean number of layers per step that ran as one native call."""
        return self._spent.layers / max(1, self._steps)

    def parts(self) -> StepParts | None:
        """Return the means of all noted steps; None if no layer ran as one native call."""
        spent = self._spent
        if not spent.layers or not self._steps:
            return None
        linear, attention = spent.linear, spent.attention
        around = self.seconds - spent.total - self._output
        seconds = (self.seconds, linear, attention, spent.total - linear - attention, self._output, around)
        total, weights, attention, rest, output, around = (1e3 * part / self._steps for part in seconds)
        given = output if self._outputs else None
        return StepParts(total, weights, attention, rest, given, around)

    def _begin_output(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def _end_output(self, *_: Any) -> None:
        self._output += time.perf_counter() - self._start
        self._outputs += 1


@contextmanager
def step_clock(model: Any) -> Iterator[StepClock]:
    """Time the decode steps of a transformers model on a CPU inside the context; one clock at a time."""
    output = model.get_output_embeddings()
    with timed_steps() as spent:
        clock = StepClock(spent)
        hooks = [] if output is None else [
            output.register_forward_pre_hook(clock._begin_output), output.register_forward_hook(clock._end_output)
        ]  # fmt: skip
        try:
            yield clock
        finally:
            for hook in hooks:
                hook.remove()
