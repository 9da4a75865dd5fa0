"""Decode steps of consecutive layers in one native call, ahead of the model's own calls of the layers.

    before   layer 0, ..., layer 29: Python between layers, whose code and data the weights evict from CPU caches
    after    layer 0 runs all 30; the other calls return the stored results and commit the token to their caches

A layer follows another if its input is the other's result, all other arguments are the same, and no hook, which might
write weights, runs between them. A result computed ahead counts only if the expected call arrives: the same arguments,
with the same bytes in every tensor that was loaded. Otherwise it is discarded, cache and model are unchanged, and the
layer runs normally. A layer whose steps are discarded MAX_WASTED times in a row no longer runs ahead. If a loop only
calls one layer after the other (fhopt/hf/layer_loop.py), only arguments are compared; if its source shows that these
are constant, nothing is.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from ctypes import string_at
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor

from fhopt.hf.bound_program import ReadyStep
from fhopt.hf.cache_steps import run_steps
from fhopt.hf.step_chain import CalledLayers, StepChain

MAX_WASTED = 3  # consecutive discarded steps after which a layer no longer runs ahead


class Follower:
    """The layer that follows a layer, and how often running this layer ahead was wasted."""

    def __init__(self) -> None:
        self.next: Any = None  # the state of a layer
        self.wasted = 0


class _Others:
    """A call's arguments except the first. Weak references, so that an aborted forward does not keep caches alive."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.count, self.names = len(args), tuple(kwargs)
        self.held = [_reference(x) for x in (*args[1:], *kwargs.values())]

    def are(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether a call has the same arguments."""
        if len(args) != self.count or tuple(kwargs) != self.names:
            return False
        return all(map(is_, (*args[1:], *kwargs.values()), [get() for get in self.held]))


def _reference(x: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(x)
    except TypeError:  # numbers, strings, tuples
        return lambda: x


@dataclass(eq=False, slots=True)
class _AsRead:
    """A tensor as it was when steps loaded it: shape, address and bytes."""

    tensor: Tensor
    shape: torch.Size
    address: int
    numbers: bytes

    @staticmethod
    def of(tensor: Tensor) -> _AsRead:
        """Snapshot a tensor."""
        return _AsRead(tensor, tensor.shape, tensor.data_ptr(), _numbers(tensor))

    def is_unchanged(self) -> bool:
        """Return whether shape and bytes are unchanged."""
        tensor = self.tensor
        if tensor.shape != self.shape:
            return False
        if tensor.data_ptr() == self.address and tensor.is_contiguous():
            return string_at(self.address, len(self.numbers)) == self.numbers
        return _numbers(tensor) == self.numbers


def _numbers(tensor: Tensor) -> bytes:
    dense = tensor.contiguous()
    return string_at(dense.data_ptr(), dense.numel() * dense.element_size())


@dataclass(eq=False, slots=True)
class _Ahead:
    """A step that ran ahead, the call that it expects, and the tensors that it loaded."""

    ready: ReadyStep
    x: Tensor
    others: _Others
    inputs: list[_AsRead]

    def is_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether a call is the expected one and the cache layer is unchanged."""
        if not args or args[0] is not self.x or not self.others.are(args, kwargs):
            return False
        if torch.is_autocast_enabled("cpu"):
            return False
        return all(x.is_unchanged() for x in self.inputs) and self.ready.step.is_unchanged()


class DueSteps:
    """Steps that ran ahead for a loop that only calls layers."""

    def __init__(self, behind: list[tuple[Any, Tensor, ReadyStep]], others: _Others) -> None:
        """behind: as `StepChain.ready` returns it; others: arguments of the previous layer's call."""
        self.left, self.others = behind[::-1], others

    def pop(self, state: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ReadyStep | None:
        """Return a layer's step for a call; None if the step expects another call."""
        expected, x, ready = self.left.pop()
        is_it = expected is state and bool(args) and args[0] is x and self.others.are(args, kwargs)
        return ready if is_it else None


class LayerWalk(threading.local):
    """Per-thread sequence of a model's layer calls.

    turns: of the loop that is calling a layer; due: steps that ran ahead for its next turns. may_skip: a layer, and how
    many later turns a loop may skip; skipped: how many of them already ran.
    """

    def __init__(self) -> None:
        self.turns: CalledLayers | None = None
        self.due: DueSteps | None = None
        self.may_skip: tuple[Any, int] = (None, 0)
        self.skipped = 0
        self._ahead: dict[Any, _Ahead] = {}  # by layer state
        self._last: tuple[Any, Tensor, _Others] | None = None  # the last layer, its result and its arguments
        self._chains: dict[Any, StepChain | None] = {}  # layers that run ahead, by the state of the layer before

    def result_of(self, state: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of a layer that ran ahead, and commit its token to the cache; else None."""
        ahead = self._ahead.pop(state, None) if self._ahead else None
        if ahead is None:
            return None
        if not ahead.is_for(args, kwargs):
            self._waste(state)
            self._ahead.clear()  # they depend on the result of this call
            return None
        ahead.ready.step.finish()
        state.follower.wasted = 0
        self._last = state, ahead.ready.output, ahead.others
        return ahead.ready.result

    def has_chains(self) -> bool:
        """Return whether any layers run ahead together."""
        return bool(self._chains)

    def has_chain(self, states: Sequence[Any]) -> bool:
        """Return whether any of these layers runs ahead together with others."""
        return any(chain is not None and first in states for first, chain in self._chains.items())

    def due_result(self, state: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return a layer's result in a turn of a loop, as `result_of` does."""
        due = self.due
        if due is None or not due.left:
            return None
        expected, others = due.left[-1][0], due.others
        ready = due.pop(state, args, kwargs)
        if ready is None:
            self._waste(expected)
            self.due = None
            return None
        ready.step.finish()
        state.follower.wasted = 0
        self._last = state, ready.output, others
        return ready.result

    def run(
        self, state: Any, ready: ReadyStep, args: tuple[Any, ...], kwargs: dict[str, Any],
        follow: Callable[[Any, tuple[Any, ...], dict[str, Any]], ReadyStep | None],
    ) -> Any:  # fmt: skip
        """Run the steps of a layer and of the layers that follow it, and return the first layer's result.

        follow: returns another layer's step for a call; None if it may not run ahead.
        """
        self._link(state, args, kwargs)
        missed = next(iter(self._ahead), None)
        if missed is not None:  # the first call that did not arrive
            self._waste(missed)
        self._ahead.clear()
        self.due, others = None, _Others(args, kwargs)
        chain, turns = self._chains.get(state), self.turns
        steps = None if chain is None else chain.steps_behind(ready, args, kwargs)
        if chain is None or steps is None:
            is_due, behind = False, list(self._behind(state, ready, args, kwargs, follow))
            self._chains[state] = StepChain.of(state, ready, behind)
        else:
            is_due = turns is not None and chain.is_called_in(turns)
            if is_due and self.may_skip[0] is state and self.may_skip[1] >= len(chain):
                last_state, last = chain.run_through(ready, steps)
                self.skipped, self._last = len(chain), (last_state, last.output, others)
                return last.result
            behind = chain.ready(ready, steps)
        run_steps(ready.step, [step.step for _, _, step in behind])
        if is_due:
            self.due = DueSteps(behind, others)
        else:
            self._expect(behind, others)
        ready.step.finish()
        self._last = state, ready.output, others
        return ready.result

    def _expect(self, behind: list[tuple[Any, Tensor, ReadyStep]], others: _Others) -> None:
        """Store steps that ran ahead until their layers are called."""
        as_read: dict[int, _AsRead] = {}  # shared: most tensors are loaded by every layer
        for who, x, step in behind:
            for tensor in step.read:
                if id(tensor) not in as_read:
                    as_read[id(tensor)] = _AsRead.of(tensor)
            self._ahead[who] = _Ahead(step, x, others, [as_read[id(tensor)] for tensor in step.read])

    def _behind(
        self, state: Any, ready: ReadyStep, args: tuple[Any, ...], kwargs: dict[str, Any], follow: Callable[..., Any]
    ) -> Iterator[tuple[Any, Tensor, ReadyStep]]:
        """Yield the layers that follow, with their inputs and steps."""
        met = {id(state), id(ready.step.layer)}  # no layer of the model or the cache twice
        while args and not state.layer._forward_hooks:
            state = state.follower.next
            if state is None or state.follower.wasted >= MAX_WASTED or id(state) in met:
                return
            args = ready.output, *args[1:]
            ready = follow(state, args, kwargs)
            if ready is None or id(ready.step.layer) in met:
                return
            met |= {id(state), id(ready.step.layer)}
            yield state, args[0], ready

    def _waste(self, state: Any) -> None:
        """Count a wasted run of a layer."""
        state.follower.wasted += 1
        self._chains.clear()

    def _link(self, state: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record which layer followed the last one, if it was called with its result."""
        if self._last is None:
            return
        last, output, others = self._last
        if last is state or last.follower.next is state:
            return
        if args and args[0] is output and others.are(args, kwargs):
            last.follower.next = state
            self._chains.clear()
