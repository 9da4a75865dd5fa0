"""Decode steps of consecutive layers in one call of machine code, ahead of the model's calls of these layers.

    before   layer 0, ..., layer 29: Python between each two, whose code and data the weights drive out of caches
    after    layer 0 runs all thirty; the others return what is there, and their caches hold the token then

A layer follows another where it was called with what that one returned, and with the same other arguments. What was run
ahead counts only if the call comes and is the one that was expected: the same arguments, and what was read of them has
the same bytes still. Otherwise it is thrown away, which leaves cache and model as they were, and the layer runs as it
would have without it. A layer whose steps are thrown away again and again is not run ahead any more.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import is_
from typing import Any

from torch import Tensor

from fhopt.hf.bound_program import ReadyStep
from fhopt.hf.cache_steps import run_steps

MOST_WASTED = 3  # steps of a layer that were run ahead for nothing


class Follower:
    """A layer's place among others: which one comes next, and how often running it ahead was in vain."""

    def __init__(self) -> None:
        self.next: Any = None  # the state of a layer
        self.wasted = 0


@dataclass(eq=False)
class _Ahead:
    """A step that was run ahead: the call that it was run for, and the bytes of what it read."""

    ready: ReadyStep
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    bytes: list[bytes]

    def is_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether a call is the expected one, and the layer of the cache is what it was."""
        same = len(args) == len(self.args) and kwargs.keys() == self.kwargs.keys()
        if not same or not all(map(is_, args, self.args)) or not all(map(is_, kwargs.values(), self.kwargs.values())):
            return False
        return self.bytes == _bytes(self.ready.read) and self.ready.step.is_unchanged()


class Walk(threading.local):
    """The calls of a model's layers in a thread, one after the other."""

    def __init__(self) -> None:
        self._ahead: dict[Any, _Ahead] = {}  # by the states of layers
        self._last: tuple[Any, Tensor | None, list[int]] = (None, None, [])

    def result_of(self, state: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a layer returns that was run ahead, whose cache holds the token then; None where it was not."""
        ahead = self._ahead.pop(state, None) if self._ahead else None
        if ahead is None:
            return None
        if not ahead.is_for(args, kwargs):
            state.follower.wasted += 1
            self._ahead.clear()  # they were computed from what this call would have returned
            return None
        ahead.ready.step.finish()
        self._last = state, ahead.ready.output, list(map(id, kwargs.values()))
        return ahead.ready.result

    def run(
        self, state: Any, ready: ReadyStep, args: tuple[Any, ...], kwargs: dict[str, Any],
        follow: Callable[[Any, tuple[Any, ...], dict[str, Any]], ReadyStep | None],
    ) -> Any:  # fmt: skip
        """Run the step of a layer, and of those that follow it, and return its result.

        follow: returns the step of another layer in a call, None where it is not to be run ahead.
        """
        self._link(state, args, kwargs)
        for missed in self._ahead:  # the first call that never came
            missed.follower.wasted += 1
            break
        self._ahead.clear()
        others = list(self._others(state, ready, args, kwargs, follow))
        run_steps([ready.step, *[other.ready.step for _, other in others]])
        for other_state, other in others:
            other.bytes = _bytes(other.ready.read)
            self._ahead[other_state] = other
        ready.step.finish()
        self._last = state, ready.output, list(map(id, kwargs.values()))
        return ready.result

    def _others(
        self, state: Any, ready: ReadyStep, args: tuple[Any, ...], kwargs: dict[str, Any], follow: Callable[..., Any]
    ) -> Iterator[tuple[Any, _Ahead]]:
        met = {state}
        while args and (state := state.follower.next) is not None and state.follower.wasted < MOST_WASTED:
            if state in met:
                return
            met.add(state)
            args = ready.output, *args[1:]
            ready = follow(state, args, kwargs)
            if ready is None:
                return
            yield state, _Ahead(ready, args, kwargs, [])

    def _link(self, state: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take note that a layer was called with what the last one returned."""
        last, output, others = self._last
        is_next = last is not None and last is not state and bool(args) and args[0] is output
        if is_next and others == list(map(id, kwargs.values())):
            last.follower.next = state


def _bytes(tensors: list[Tensor]) -> list[bytes]:
    dense = [x if x.is_contiguous() else x.contiguous() for x in tensors]
    return [ctypes.string_at(x.data_ptr(), x.numel() * x.element_size()) for x in dense]
