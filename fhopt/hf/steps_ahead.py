"""Decode steps of consecutive layers in one call of machine code, ahead of the model's calls of these layers.

    before   layer 0, ..., layer 29: Python between each two, whose code and data the weights drive out of caches
    after    layer 0 runs all thirty; the others return what is there, and their caches hold the token then

A layer follows another where it was called with what that one returned, and with the same other arguments, and where no
hook runs between the two, which might write their weights. What was run ahead counts only if the call comes and is the
one that was expected: the same arguments, and what was read of them has the same bytes still. Otherwise it is thrown
away, which leaves cache and model as they were, and the layer runs as it would have without it. A layer whose steps are
thrown away several times in a row is not run ahead any more. Where a loop does nothing but to call one layer after the
other (fhopt/hf/layer_loop.py), arguments are all that is compared, and where these are the same by its source, nothing.
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

MOST_WASTED = 3  # steps of a layer that were run ahead for nothing


class Follower:
    """A layer's place among others: which one comes next, and how often running it ahead was in vain."""

    def __init__(self) -> None:
        self.next: Any = None  # the state of a layer
        self.wasted = 0


class _Others:
    """The arguments of a call but for the first. Caches are held weakly: a pass that ends early must not keep them."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.count, self.names = len(args), tuple(kwargs)
        self.held = [_reference(x) for x in (*args[1:], *kwargs.values())]

    def are(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether a call has the same ones."""
        if len(args) != self.count or tuple(kwargs) != self.names:
            return False
        return all(map(is_, (*args[1:], *kwargs.values()), [get() for get in self.held]))


def _reference(x: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(x)
    except TypeError:  # numbers, names, tuples
        return lambda: x


@dataclass(eq=False, slots=True)
class _AsRead:
    """A tensor, and what it was when steps read it: its shape, where it stood, its numbers in order."""

    tensor: Tensor
    shape: torch.Size
    address: int
    numbers: bytes

    @staticmethod
    def of(tensor: Tensor) -> _AsRead:
        """Return a tensor as it is now."""
        return _AsRead(tensor, tensor.shape, tensor.data_ptr(), _numbers(tensor))

    def is_unchanged(self) -> bool:
        """Return whether it has the shape and the numbers that it had."""
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
    """A step that was run ahead: the call that it was run for, and what it read."""

    ready: ReadyStep
    x: Tensor
    others: _Others
    inputs: list[_AsRead]

    def is_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether a call is the expected one, and the layer of the cache is what it was."""
        if not args or args[0] is not self.x or not self.others.are(args, kwargs):
            return False
        if torch.is_autocast_enabled("cpu"):
            return False
        return all(x.is_unchanged() for x in self.inputs) and self.ready.step.is_unchanged()


class DueSteps:
    """Steps that were run ahead for the turns of a loop, in which nothing happens but calls of layers."""

    def __init__(self, behind: list[tuple[Any, Tensor, ReadyStep]], others: _Others) -> None:
        """behind: as `StepChain.ready` returns it; others: arguments of the call of the layer before."""
        self.left, self.others = behind[::-1], others

    def pop(self, state: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ReadyStep | None:
        """Return the step of a layer in a call; None where it was made for another one."""
        expected, x, ready = self.left.pop()
        is_it = expected is state and bool(args) and args[0] is x and self.others.are(args, kwargs)
        return ready if is_it else None


class Walk(threading.local):
    """The calls of a model's layers in a thread, one after the other.

    turns: of the loop that calls a layer now; due: what was run ahead for turns that come. may_skip: a layer, and how
    many turns are left behind its own, in a loop that may leave them out; skipped: how many of them were done.
    """

    def __init__(self) -> None:
        self.turns: CalledLayers | None = None
        self.due: DueSteps | None = None
        self.may_skip: tuple[Any, int] = (None, 0)
        self.skipped = 0
        self._ahead: dict[Any, _Ahead] = {}  # by the states of layers
        self._last: tuple[Any, Tensor, _Others] | None = None  # a layer, what it returned, what it was called with
        self._chains: dict[Any, StepChain | None] = {}  # layers that are run ahead, by the states of those before them

    def result_of(self, state: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a layer returns that was run ahead, whose cache holds the token then; None where it was not."""
        ahead = self._ahead.pop(state, None) if self._ahead else None
        if ahead is None:
            return None
        if not ahead.is_for(args, kwargs):
            self._waste(state)
            self._ahead.clear()  # they were computed from what this call would have returned
            return None
        ahead.ready.step.finish()
        state.follower.wasted = 0
        self._last = state, ahead.ready.output, ahead.others
        return ahead.ready.result

    def has_chains(self) -> bool:
        """Return whether any layers are run ahead together."""
        return bool(self._chains)

    def has_chain(self, states: Sequence[Any]) -> bool:
        """Return whether any of these layers is run ahead together with others."""
        return any(chain is not None and first in states for first, chain in self._chains.items())

    def due_result(self, state: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a layer returns in a turn of a loop, as `result_of` does."""
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
        """Run the step of a layer, and of those that follow it, and return its result.

        follow: returns the step of another layer in a call, None where it is not to be run ahead.
        """
        self._link(state, args, kwargs)
        missed = next(iter(self._ahead), None)
        if missed is not None:  # the first call that never came
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
        """Keep steps that were run ahead until their layers are called."""
        as_read: dict[int, _AsRead] = {}  # most tensors are read by every layer
        for who, x, step in behind:
            for tensor in step.read:
                if id(tensor) not in as_read:
                    as_read[id(tensor)] = _AsRead.of(tensor)
            self._ahead[who] = _Ahead(step, x, others, [as_read[id(tensor)] for tensor in step.read])

    def _behind(
        self, state: Any, ready: ReadyStep, args: tuple[Any, ...], kwargs: dict[str, Any], follow: Callable[..., Any]
    ) -> Iterator[tuple[Any, Tensor, ReadyStep]]:
        """Yield the states of layers that follow, what they are called with, and their steps."""
        met = {id(state), id(ready.step.layer)}  # no layer twice, and none of the cache
        while args and not state.layer._forward_hooks:
            state = state.follower.next
            if state is None or state.follower.wasted >= MOST_WASTED or id(state) in met:
                return
            args = ready.output, *args[1:]
            ready = follow(state, args, kwargs)
            if ready is None or id(ready.step.layer) in met:
                return
            met |= {id(state), id(ready.step.layer)}
            yield state, args[0], ready

    def _waste(self, state: Any) -> None:
        """Take note that a layer was run ahead in vain."""
        state.follower.wasted += 1
        self._chains.clear()

    def _link(self, state: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take note that a layer was called with what the last one returned."""
        if self._last is None:
            return
        last, output, others = self._last
        if last is state or last.follower.next is state:
            return
        if args and args[0] is output and others.are(args, kwargs):
            last.follower.next = state
            self._chains.clear()
