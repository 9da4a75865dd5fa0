"""Extra inputs of rewritten graphs, bound at call time.

Dynamo reuses a compiled graph for other weights (another instance of a class, `load_state_dict`, an in-place update)
without calling the backend again. Tensors computed from weights are therefore extra inputs instead of constants of a
graph, and the `Binder` checks at every call that they were computed from the weights of that call.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fhopt.errors import Stale
from fhopt.passes.graph.program import Bound, Program

KEPT = 256  # sets of weights, such as the layers that share one graph, whose extra inputs are cached
CHECKED = 4  # weights whose samples are compared in each call
SAMPLED = 64  # elements in the sample of a weight


@dataclass
class _Entry:
    """Extra inputs for a set of source tensors, with weak references, versions and samples of these.

    Versions detect all changes except those through `.data`; inference tensors have no versions. Samples detect the
    rest: each call compares a few tensors, round-robin, since such changes rarely affect a single tensor.
    """

    sources: list[weakref.ref[Tensor]]
    versions: list[tuple[int, int]]
    samples: list[float]
    inputs: list[Tensor]
    stale: Stale | None = None
    turn: int = 0

    @staticmethod
    def of(sources: Sequence[Tensor], inputs: list[Tensor], stale: Stale | None = None) -> _Entry:
        """Create the entry for tensors in their current state."""
        return _Entry(
            [weakref.ref(x) for x in sources], [version(x) for x in sources], [*map(sample, sources)], inputs, stale
        )

    def is_for(self, sources: Sequence[Tensor]) -> bool:
        """Return whether these are the same tensors, unchanged."""
        held = zip(self.sources, self.versions, sources, strict=True)
        return all(ref() is x and was == version(x) for ref, was, x in held) and self._has_equal_samples(sources)

    def _has_equal_samples(self, sources: Sequence[Tensor]) -> bool:
        count = len(sources)
        checked = {(self.turn + i) % count for i in range(min(CHECKED, count))} if count else set[int]()
        self.turn += CHECKED
        return all(repr(self.samples[i]) == repr(sample(sources[i])) for i in checked)  # as text, NaN equals NaN


class Binder:
    """Extra inputs of one program. inputs: how many inputs its graph had before the rewrite."""

    def __init__(self, program: Program, inputs: int) -> None:
        names = list(program.values)
        self.names = names[inputs:]
        self.bound: list[Bound | None] = [program.bound.get(name) for name in self.names]
        self.examples: list[Tensor | None] = [
            program.values[name] if bound is None else None for name, bound in zip(self.names, self.bound, strict=True)
        ]
        used = {source for bound in self.bound if bound is not None for source in bound.sources}
        self.positions = [i for i, name in enumerate(names[:inputs]) if name in used]
        self.source_names = [names[i] for i in self.positions]
        self.known: OrderedDict[tuple[int, ...], _Entry] = OrderedDict()

    def __call__(self, inputs: Sequence[Any]) -> list[Tensor]:
        """Return the extra inputs for these inputs. Raises Stale if there are none for their weights."""
        sources = [inputs[i] for i in self.positions]
        key = tuple([id(x) for x in sources])
        entry = self.known.get(key)
        if entry is None or not entry.is_for(sources):
            entry = self._remember(key, sources)
        if entry.stale is not None:
            raise entry.stale
        return entry.inputs

    def _remember(self, key: tuple[int, ...], sources: list[Tensor]) -> _Entry:
        self.known.pop(key, None)
        try:
            entry = _Entry.of(sources, self._make(sources))  # after _make, which may modify a cache
        except Stale as stale:
            entry = _Entry.of(sources, [], stale)
        self.known[key] = entry
        while len(self.known) > KEPT:
            self.known.popitem(last=False)
        return entry

    def _make(self, sources: list[Tensor]) -> list[Tensor]:
        values = dict(zip(self.source_names, sources, strict=True))
        inputs = []
        with torch.no_grad():
            for bound, example in zip(self.bound, self.examples, strict=True):
                value = example if bound is None else bound.make(*[values[s] for s in bound.sources])
                assert value is not None
                inputs.append(value)
        return inputs


def version(x: Tensor) -> tuple[int, int]:
    """Return (number of in-place changes, address) of a tensor; the first is 0 for inference tensors."""
    return 0 if x.is_inference() else x._version, x.data_ptr()


def sample(x: Tensor) -> float:
    """Return the sum of some elements of a CPU tensor; 0 for other devices, where it would synchronize."""
    if not x.is_cpu or not x.numel() or not x.dtype.is_floating_point or not x.is_contiguous():
        return 0.0
    with torch.no_grad():
        return float(x.detach().view(-1)[:: max(1, x.numel() // SAMPLED)].double().sum())
