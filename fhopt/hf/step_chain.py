"""Batched guard checks for the decode steps of consecutive decoder layers.

A layer program may run only if the layer is unchanged since tracing: same weight addresses, submodules, hooks and
attention, and a cache as the last step left it. Checking layer by layer takes about half as long as the native code of
the layers, because streaming the weights evicts each layer's Python objects from the CPU caches. This module stores the
guards of all layers after the first in a few flat lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.modules import module as module_hooks

from fhopt.codegen.layers.trace import UnsupportedError
from fhopt.hf.bound_program import BoundProgram, Conditions, ReadyStep
from fhopt.hf.cache_steps import CacheStep, run_steps
from fhopt.hf.layer_trace import leaf

GLOBAL_HOOKS = (module_hooks._global_forward_hooks, module_hooks._global_forward_pre_hooks)
FIRST = (0,)  # the path of the first argument
Behind = list[tuple[Any, Tensor, ReadyStep]]  # layer states, their inputs, and their steps


class CalledLayers(Protocol):
    """A loop that calls one layer after the other (fhopt/hf/layer_loop.py). elements: the layers."""

    elements: tuple[torch.nn.Module, ...]


class StepChain:
    """Layers called one after the other with the same arguments except the first.

    first, states: layers (`LayerState`); `states` are the layers after the first, and `bounds` their programs. A chain
    serves every cache and holds none.
    """

    def __init__(
        self, first: Any, program: BoundProgram, states: Sequence[Any], bounds: Sequence[BoundProgram]
    ) -> None:
        self._program, self._states, self._bounds = program, tuple(states), tuple(bounds)
        self._numbers = [bound.attention.layer for bound in bounds]
        all_of_them = [bound.conditions for bound in bounds]
        held = [entry for conditions in all_of_them for entry in conditions.objects.entries]
        held += [entry for state in states for entry in state.held()]
        layers = [vars(layer) for layer in (first.layer, *[state.layer for state in states])]
        between = [(layer, "_forward_hooks", layer["_forward_hooks"]) for layer in layers[:-1]]
        between += [(layer, "_forward_pre_hooks", layer["_forward_pre_hooks"]) for layer in layers[1:]]
        single = {(id(holder), name): (holder, name, value) for holder, name, value in [*held, *between]}
        hooks = [hooks for conditions in all_of_them for hooks in conditions.objects.empty]
        hooks += [hooks for _, _, hooks in between]
        weights = [weight for conditions in all_of_them for weight in conditions.weights]
        self._conditions = Conditions(single.values(), hooks, weights)
        self._all = first, *states
        self._turns: tuple[Any, Conditions | None] = (None, None)  # the last turns checked, and their guards
        self._calls: list[tuple[torch.nn.Module, Any]] = []  # layers, and the `__call__` of their classes
        self._between = [torch.empty(program.output.shape, dtype=program.output.dtype) for _ in range(2)]
        places = {path: i for i, (_, path) in enumerate(program.reads)}
        self._reads = [[(number, places[path]) for number, path in bound.reads] for bound in bounds]
        self._inputs = [places[path] for path in places if path == FIRST]

    @staticmethod
    def of(first: Any, ready: ReadyStep, behind: Behind) -> StepChain | None:
        """Return the chain of a layer and the steps made ready after it; None if their calls differ."""
        program, bounds = ready.bound, [step.bound for _, _, step in behind]
        paths = {path for _, path in program.reads}
        for bound in bounds:
            alike = bound.arguments is program.arguments and {path for _, path in bound.reads} <= paths
            places = (bound.attention.mask, bound.attention.cache) == (program.attention.mask, program.attention.cache)
            if not (alike and places and bound.takes(ready.output) and bound.output.shape == program.output.shape):
                return None
        if not bounds:
            return None
        return StepChain(first, program, [who for who, _, _ in behind], bounds)

    def __len__(self) -> int:
        """Return the number of layers after the first."""
        return len(self._bounds)

    def steps_behind(self, ready: ReadyStep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[CacheStep] | None:
        """Return the prepared steps after that of the first layer in a call; None if they may not run."""
        if ready.bound is not self._program:
            return None
        cache = leaf(args, kwargs, self._program.attention.cache)
        steps = self._current_steps(cache.layers, torch.get_num_threads())
        return steps if steps is not None and self._conditions.hold() else None

    def ready(self, ready: ReadyStep, steps: Sequence[CacheStep]) -> Behind:
        """Make the steps from `steps_behind` ready. ready: the first layer's step."""
        behind: Behind = []
        addresses, x = [tensor.data_ptr() for tensor in ready.read], ready.output
        read = list(ready.read)
        for state, bound, reads, step in zip(self._states, self._bounds, self._reads, steps, strict=True):
            for i in self._inputs:
                addresses[i], read[i] = x.data_ptr(), x
            for number, i in reads:
                bound.externals[number] = addresses[i]
            made = bound.made_ready(step, [read[i] for _, i in reads])
            behind.append((state, x, made))
            x = made.output
        return behind

    def run_through(self, ready: ReadyStep, steps: list[CacheStep]) -> tuple[Any, ReadyStep]:
        """Run and finish the steps of all layers; only the last result is returned.

        Returns the last layer's state and step. Intermediate results are in tensors of the chain: allocating new ones
        takes as long as the native code of a layer. ready, steps: as of `ready`.
        """
        addresses, x = [tensor.data_ptr() for tensor in ready.read], ready.output
        for number, (bound, reads) in enumerate(zip(self._bounds, self._reads, strict=True)):
            for i in self._inputs:
                addresses[i] = x.data_ptr()
            for external, i in reads:
                bound.externals[external] = addresses[i]
            x = self._between[number % 2]
            bound.externals[bound.output.external] = x.data_ptr()
        last = self._bounds[-1].made_ready(steps[-1], [])
        run_steps(ready.step, steps)
        ready.step.finish()
        for step in steps:
            step.finish()
        return self._states[-1], last

    def is_called_in(self, turns: CalledLayers) -> bool:
        """Return whether a loop calls exactly these layers in order, and each call runs only its program.

        No hook runs then, and no layer is replaced or wrapped.
        """
        if self._turns[0] is not turns:
            self._turns = turns, self._calls_of(turns)
        conditions = self._turns[1]
        if conditions is None or any(GLOBAL_HOOKS) or not conditions.hold():
            return False
        return all(type(layer).__call__ is call for layer, call in self._calls)

    def _calls_of(self, turns: CalledLayers) -> Conditions | None:
        """Return the guards for turns that call the layers; None if the turns do not, or do more."""
        layers = tuple(state.layer for state in self._all)
        start = next((i for i, layer in enumerate(turns.elements) if layer is layers[0]), 0)
        if turns.elements[start : start + len(layers)] != layers:
            return None
        try:
            entries = [entry for state in self._all for entry in state.calls()]
        except UnsupportedError:
            return None
        self._calls = [(layer, type(layer).__call__) for layer in layers]
        ends = ((layers[0], "_forward_pre_hooks"), (layers[-1], "_forward_hooks"))
        entries += [(vars(layer), name, vars(layer)[name]) for layer, name in ends]
        return Conditions(entries, [vars(layer)[name] for layer, name in ends], ())

    def _current_steps(self, layers: Sequence[Any], threads: int) -> list[CacheStep] | None:
        """Return the prepared steps of a cache's layers; None if one of them may not run."""
        steps: list[CacheStep] = []
        for number, bound in zip(self._numbers, self._bounds, strict=True):
            step = bound.prepared(layers[number], threads)
            if step is None or not bound.are_fixed:
                return None
            steps.append(step)
        return steps
