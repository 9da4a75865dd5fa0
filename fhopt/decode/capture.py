"""Capture of a model's decode step as one fx graph.

The step is recorded twice, with two cache lengths. Integers that differ by the difference of the lengths are the length
plus a number; whatever else differs cannot be captured. In the graph

    placeholders   arguments (meta["path"]), weights (meta["weight"]), constants (meta["constant"]), the cache, `length`
    attend_cached  cache update and attention of one layer (meta["attention"])
    call_module    modules that run as in the model (see opaque_modules.py)
    everything else is aten, as recorded

`meta["val"]` is the value of the recorded call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fhopt.codegen.programs.errors import UnsupportedError
from fhopt.decode.length import LengthGuard
from fhopt.decode.opaque_modules import failed_module
from fhopt.decode.recording import (
    CacheRef,
    HeldWeight,
    RecordedOp,
    RecordedValue,
    StepRecording,
    ValueRef,
    record_step,
)
from fhopt.decode.recording_cache import cached_tokens

OFFSET = 5  # tokens by which the second recording's cache is longer
MAX_OPAQUE = 8  # classes of modules that run as in the model


@dataclass(eq=False)
class CapturedStep:
    """A decode step as a graph. output: the result's structure, with nodes; guards: on the cache length."""

    graph: Graph
    cache: Node
    length: Node
    output: Any
    guards: tuple[LengthGuard, ...]


def attend_cached(
    cache: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None
) -> NoReturn:
    """Represent cache update and attention of a layer in a graph: [B,H,S,D], [B,G,S,D], [B,G,S,E] -> [B,S,H,E]."""
    raise NotImplementedError("a graph of a decode step runs as a program")


def cache_length(cache: Any, layer: int) -> Tensor:
    """Return the length tensor of a layer of a static cache."""
    made: Tensor = cache.layers[layer].get_seq_length()
    return made


def is_attention(node: Node) -> bool:
    """Return whether a node is attention on the cache."""
    return node.target is attend_cached


def capture_step(
    model: torch.nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any],
    attentions: frozenset[int], cache: Any,
) -> CapturedStep:  # fmt: skip
    """Capture a call of a model's forward with one new token per sequence; the cache is unchanged.

    attentions: ids of the modules that attend to the cache. Raises UnsupportedError, with the reason.
    """
    opaque: frozenset[type] = frozenset()
    while True:
        try:
            first, second = [record_step(model, forward, args, kwargs, n, opaque) for n in (0, OFFSET)]
            return _Builder(first, second, cached_tokens(cache)).captured()
        except Exception as error:
            module = failed_module(model, error, attentions)
            if module is None or type(module) in opaque or len(opaque) >= MAX_OPAQUE:
                if isinstance(error, UnsupportedError):
                    raise
                raise UnsupportedError(f"its recording fails ({type(error).__name__}: {error})") from error
            opaque |= {type(module)}


class _Builder:
    """Makes the graph of two recordings of one step."""

    def __init__(self, first: StepRecording, second: StepRecording, length: int) -> None:
        self._first, self._second, self._tokens = first, second, length
        self._graph = Graph()
        self._nodes: dict[int, Node] = {}
        for number, pair in enumerate(zip(first.values, second.values, strict=False)):
            self._add_source(number, *pair)
        self._cache = self._placeholder("cache", None)
        self._length = self._placeholder("length", length)
        self._lengths: dict[int, Node] = {0: self._length}  # by what is added

    def captured(self) -> CapturedStep:
        """Return the graph. Raises UnsupportedError if the recordings differ in more than the length."""
        one, two = self._first, self._second
        guards = _guards(one.guards, two.guards)
        if len(one.ops) != len(two.ops) or guards is None:
            raise UnsupportedError("its operations depend on the cache length")
        for op, other in zip(one.ops, two.ops, strict=True):
            self._add(op, other)
        output = self._converted(one.output, two.output)
        nodes: list[Node] = []
        torch.fx.node.map_arg(_listed(output), lambda node: nodes.append(node))
        self._graph.output(tuple(nodes))
        for node in reversed(self._graph.find_nodes(op="call_function", target=operator.getitem)):
            if not node.users:  # such as the mean of a LayerNorm
                self._graph.erase_node(node)
        return CapturedStep(self._graph, self._cache, self._length, output, tuple(dict.fromkeys(guards)))

    def _placeholder(self, name: str, value: Any, **meta: Any) -> Node:
        node = self._graph.placeholder(name)
        node.meta.update(meta, val=value)
        return node

    def _add(self, op: RecordedOp, other: RecordedOp) -> None:
        if op.target != other.target or len(op.results) != len(other.results):
            raise UnsupportedError("its operations depend on the cache length")
        args = tuple([self._converted(x, y) for x, y in zip(op.args, other.args, strict=True)])
        kwargs = {name: self._converted(x, other.kwargs[name]) for name, x in op.kwargs.items()}
        if isinstance(op.target, str) and op.target not in ("attention", "length"):
            node = self._graph.create_node("call_module", op.target, args, kwargs)
        else:
            target = {"attention": attend_cached, "length": cache_length}.get(op.target, op.target)
            node = self._graph.call_function(target, args, kwargs)
        if op.call is not None:
            node.meta["attention"] = op.call
            node.args = (args[0], *map(self._copied_before(node), args[1:4]), *args[4:])
        values = [self._first.values[number].value for number in op.results]
        others = [self._second.values[number].value for number in other.results]
        if not op.is_tuple:
            self._note(node, op.results[0], values[0], others[0])
            return
        node.meta["val"] = tuple(values)
        for index, number in enumerate(op.results):
            if isinstance(values[index], Tensor):
                item = self._graph.call_function(operator.getitem, (node, index))
                self._note(item, number, values[index], others[index])

    def _copied_before(self, attention: Node) -> Callable[[Node], Node]:
        """Return a function that copies an operand of attention: each has a tensor of its own, in native memory."""

        def copied(x: Node) -> Node:
            with self._graph.inserting_before(attention):
                made = self._graph.call_function(torch.ops.aten.clone.default, (x,))
            made.meta.update({name: x.meta[name] for name in ("val", "is_dynamic") if name in x.meta})
            return made

        return copied

    def _note(self, node: Node, number: int, value: Any, other: Any) -> None:
        """Set the value of a node: a tensor, or a number that guards the program."""
        node.meta["val"] = value
        self._nodes[number] = node
        if isinstance(value, Tensor):
            node.meta["is_dynamic"] = value.shape != other.shape
        elif value != other:
            raise UnsupportedError("a number that is computed depends on the cache length")
        else:
            node.meta["guard"] = value

    def _converted(self, x: Any, y: Any) -> Any:
        """Return an argument of both recordings with nodes. Raises UnsupportedError."""
        if isinstance(x, ValueRef) and isinstance(y, ValueRef):
            return self._value(x.number, y.number)
        if isinstance(x, CacheRef) and isinstance(y, CacheRef):
            return self._cache
        if isinstance(x, (tuple, list)) and isinstance(y, (tuple, list)) and len(x) == len(y):
            return type(x)(self._converted(a, b) for a, b in zip(x, y, strict=True))
        if isinstance(x, dict) and isinstance(y, dict) and list(x) == list(y):
            return {name: self._converted(value, y[name]) for name, value in x.items()}
        if isinstance(x, int) and isinstance(y, int) and not isinstance(x, bool):
            number, other = int(x), int(y)  # not cache lengths, whose comparisons are guards
            if number == other:
                return number
            if number + OFFSET == other:
                return self._length_plus(number - self._tokens)
        elif type(x) is type(y) and (x == y or x != x):
            return x
        raise UnsupportedError("its operations depend on the cache length")

    def _length_plus(self, number: int) -> Node:
        if number not in self._lengths:
            node = self._graph.call_function(operator.add, (self._length, number))
            node.meta["val"] = self._tokens + number
            self._lengths[number] = node
        return self._lengths[number]

    def _add_source(self, number: int, recorded: RecordedValue, again: RecordedValue) -> None:
        """Add the placeholder of a value that no operation made, if it is the same in both recordings."""
        source, value = recorded.source, recorded.value
        if source is None or type(source) is not type(again.source):
            return
        if isinstance(source, HeldWeight):
            node = self._placeholder(source.name, value, weight=source)
        elif isinstance(source, tuple):
            dynamic = value.shape != again.value.shape
            node = self._placeholder("argument", value, path=source, is_dynamic=dynamic)
        elif torch.equal(value, again.value):
            node = self._placeholder("constant", value, constant=value)
        else:
            return
        self._nodes[number] = node

    def _value(self, number: int, other: int) -> Node:
        if number != other or number not in self._nodes:
            raise UnsupportedError("a tensor that is made of the cache length")
        return self._nodes[number]


def _guards(first: list[LengthGuard], second: list[LengthGuard]) -> list[LengthGuard] | None:
    """Return the guards of both recordings; None if the cache length decides what the model does.

    Comparisons of the cache length with the length of a mask do not depend on the length: the signature holds them.
    """
    if len(first) != len(second):
        return None
    found: list[LengthGuard] = []
    for one, two in zip(first, second, strict=True):
        if one == two:
            found.append(one)
        elif (one.comparison, one.result) != (two.comparison, two.result) or one.gap != two.gap + OFFSET:
            return None
    return found


def _listed(x: Any) -> Any:
    """Return a template as nested tuples that fx can walk."""
    if isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], type):
        parts = x[1].values() if isinstance(x[1], dict) else x[1]
        return tuple(map(_listed, parts))
    return x if isinstance(x, Node) else None
