"""What the time of decode steps goes to: products with weights, attention, the output layer, and what is around them.

    with step_clock(model) as clock:
        for ...: run a step; clock.note(its seconds)
    clock.parts()                                       -> StepParts, means of the steps; None: not known

The parts of decoder layers are known where a layer and its cache are one call of machine code
(fhopt/hf/cache_steps.py), as most are of a plan on a CPU. The clock is read some ten times in a layer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fhopt.hf.cache_steps import Spent, timed_steps


@dataclass(frozen=True)
class StepParts:
    """Milliseconds of a decode step, of all sequences of a batch together: `total`, and the others, which add up to it.

    Of layers that are one call of machine code with their caches: weights, products with weights; attention, on their
    KV caches; rest, all else that they do, as norms and rotations. Of a layer with experts the attention alone is such
    a call. What was run ahead in vain is part of these. output: of the layer that gives logits; None where it is not
    called as a module. around: embeddings, masks, Python, the choice of a token, the quantization of a full block, all
    other layers, and in the first step of a plan how its layers become programs.
    """

    total: float
    weights: float
    attention: float
    rest: float
    output: float | None
    around: float


class StepClock:
    """Adds up the parts of decode steps that run within `step_clock`. seconds: of the steps that were noted."""

    def __init__(self, spent: Spent) -> None:
        self._spent, self._steps, self.seconds = spent, 0, 0.0
        self._output, self._outputs, self._start = 0.0, 0, 0.0

    def note(self, seconds: float) -> None:
        """Note a step, which took so long in all."""
        self._steps += 1
        self.seconds += seconds

    def layers(self) -> float:
        """Return how many layers a step ran as one call of machine code, in the mean."""
        return self._spent.layers / max(1, self._steps)

    def parts(self) -> StepParts | None:
        """Return the means of all steps that were noted; None where no layer was one call of machine code."""
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
    """Look into the decode steps of a model of transformers, on a CPU, until the end of the block; one at a time."""
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
