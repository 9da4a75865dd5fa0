"""Extra inputs of rewritten graphs, bound at call time.

Dynamo uses one compiled graph for other weights too (another instance of a class, `load_state_dict`, an update in
place) and does not ask the backend again. So nothing that was made of weights is baked into a graph: it comes in as
extra inputs, and the `Binder` looks, at every call, whether the weights that came with the call are still those.
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

KEPT = 256  # sets of weights, such as the layers that share one graph, whose extra inputs are kept
LOOKED_AT = 4  # weights of which numbers are looked at in each call
SAMPLED = 64  # numbers of a weight that are looked at


@dataclass
class _Entry:
    """What some source tensors lead to: they are held weakly, with the versions and samples of numbers that they had.

    Versions tell of all changes but those through `.data`, and inference tensors have none. Samples tell of these: of a
    few tensors at every call, in turn, since such changes seldom come alone.
    """

    sources: list[weakref.ref[Tensor]]
    versions: list[tuple[int, int]]
    samples: list[float]
    made: list[Tensor]
    stale: Stale | None = None
    turn: int = 0

    @staticmethod
    def of(sources: Sequence[Tensor], made: list[Tensor], stale: Stale | None = None) -> _Entry:
        """Of tensors as they are."""
        return _Entry(
            [weakref.ref(x) for x in sources], [version(x) for x in sources], [*map(sample, sources)], made, stale
        )

    def is_for(self, sources: Sequence[Tensor]) -> bool:
        """True for the same tensors, unchanged."""
        held = zip(self.sources, self.versions, sources, strict=True)
        return all(ref() is x and was == version(x) for ref, was, x in held) and self._looks_the_same(sources)

    def _looks_the_same(self, sources: Sequence[Tensor]) -> bool:
        count = len(sources)
        looked_at = {(self.turn + i) % count for i in range(min(LOOKED_AT, count))} if count else set[int]()
        self.turn += LOOKED_AT
        return all(repr(self.samples[i]) == repr(sample(sources[i])) for i in looked_at)  # NaN, too


class Binder:
    """Gives the extra inputs of one program. `inputs`: how many inputs its graph had before it was rewritten."""

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
        """The extra inputs for these inputs. Raises Stale when there are none for their weights."""
        sources = [inputs[i] for i in self.positions]
        key = tuple([id(x) for x in sources])
        entry = self.known.get(key)
        if entry is None or not entry.is_for(sources):
            entry = self._remember(key, sources)
        if entry.stale is not None:
            raise entry.stale
        return entry.made

    def _remember(self, key: tuple[int, ...], sources: list[Tensor]) -> _Entry:
        self.known.pop(key, None)
        try:
            entry = _Entry.of(sources, self._make(sources))  # afterwards: making may have changed a cache
        except Stale as stale:
            entry = _Entry.of(sources, [], stale)
        self.known[key] = entry
        while len(self.known) > KEPT:
            self.known.popitem(last=False)
        return entry

    def _make(self, sources: list[Tensor]) -> list[Tensor]:
        values = dict(zip(self.source_names, sources, strict=True))
        made = []
        with torch.no_grad():
            for bound, example in zip(self.bound, self.examples, strict=True):
                value = example if bound is None else bound.make(*[values[s] for s in bound.sources])
                assert value is not None
                made.append(value)
        return made


def version(x: Tensor) -> tuple[int, int]:
    """(how often a tensor was changed in place, where it is); inference tensors do not tell the first, 0."""
    return 0 if x.is_inference() else x._version, x.data_ptr()


def sample(x: Tensor) -> float:
    """A sum of some numbers of a tensor in CPU memory; elsewhere reading them would wait for the device: 0."""
    if not x.is_cpu or not x.numel() or not x.dtype.is_floating_point or not x.is_contiguous():
        return 0.0
    with torch.no_grad():
        return float(x.detach().view(-1)[:: max(1, x.numel() // SAMPLED)].double().sum())
