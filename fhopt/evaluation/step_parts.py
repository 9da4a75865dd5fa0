"""What the time of decode steps goes to: products with weights, attention, the output layer, and what is around them.

    with step_clock(model) as clock:
        for ...: run a step; clock.note(its seconds)
    clock.parts()                                       -> StepParts, medians of all steps; None: not known

The parts of decoder layers are known where these run as machine code (fhopt/hf/cache_steps.py), as those of a plan do
on a CPU. The clock is read some ten times in a layer, 25 ns each.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from typing import Any

from fhopt.hf.cache_steps import Spent, timed_steps


@dataclass(frozen=True)
class StepParts:
    """Milliseconds of a decode step, of all sequences of a batch together.

    weights: products with the weights of decoder layers. attention: on their KV caches. layers: all else that they do,
    as norms and rotations. output: the layer that gives logits. around: embeddings, masks, Python, the choice of a
    token, and decoder layers that are run operation by operation.
    """

    total: float
    weights: float
    attention: float
    layers: float
    output: float
    around: float

    def as_json(self) -> dict[str, float]:
        """Return the parts by name."""
        return asdict(self)


def median_parts(parts: Sequence[StepParts]) -> StepParts:
    """Return the median of each part."""
    return StepParts(*map(statistics.median, zip(*map(astuple, parts), strict=True)))


class StepClock:
    """Notes the parts of decode steps that run within `step_clock`."""

    def __init__(self, spent: Spent) -> None:
        self._spent, self._output, self._start = spent, 0.0, 0.0
        self._before, self._noted = self._now(), list[tuple[float, StepParts]]()

    def note(self, seconds: float) -> None:
        """Note a step, which took so long in all."""
        now = self._now()
        layers, machine, linear, attention, output = (b - a for a, b in zip(self._before, now, strict=True))
        others = machine - linear - attention
        parts = [1e3 * part for part in (seconds, linear, attention, others, output, seconds - machine - output)]
        self._noted.append((layers, StepParts(*parts)))
        self._before = now

    def parts(self) -> StepParts | None:
        """Return the medians of the steps that ran most layers as machine code; None where no layer was."""
        most = max((layers for layers, _ in self._noted), default=0)
        return median_parts([parts for layers, parts in self._noted if layers == most]) if most else None

    def _now(self) -> tuple[float, ...]:
        return self._spent.layers, self._spent.total, self._spent.linear, self._spent.attention, self._output

    def _begin_output(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def _end_output(self, *_: Any) -> None:
        self._output += time.perf_counter() - self._start


@contextmanager
def step_clock(model: Any) -> Iterator[StepClock]:
    """Look into the decode steps of a model of transformers until the end of the block."""
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
