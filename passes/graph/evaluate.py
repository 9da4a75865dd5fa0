"""Evaluation of parts of a graph: regions on random inputs, optionally at smaller sizes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from functools import cached_property
from types import MappingProxyType
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx

from fhopt.errors import Miss
from fhopt.passes.graph.nodes import FLOATS, SIZED, fake, overflow_limit, shape, size_hint
from fhopt.passes.graph.program import Program
from fhopt.passes.graph.transforms import transform_scopes

MAX_NODES = 600  # per region
_smaller: ContextVar[Mapping[int, int]] = ContextVar("smaller", default=MappingProxyType({}))


@contextlib.contextmanager
def smaller(sizes: Mapping[int, int]) -> Iterator[None]:
    """Run everything within on tensors of smaller sizes than the example's: 40 tokens reveal as much as 8,192.

    sizes: size of the example -> smaller size. If one size has two meanings, the run fails; repeat it at full size.
    """
    token = _smaller.set(sizes)
    try:
        yield
    finally:
        _smaller.reset(token)


def example_shape(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of a tensor node in the example (see `smaller`), symbols as their hints. Evaluates nothing."""
    sizes = shape(node)
    if sizes is None:
        raise Miss(f"{node.name} is not a tensor", node)
    replaced = _smaller.get()
    full = (size_hint(d) for d in sizes)
    return tuple(replaced.get(d, d) for d in full)


# --------------------------------------------------------------------------------------------------- evaluation


class Evaluator(fx.Interpreter):
    """An interpreter that runs any part of a program on its example values, each node once, on demand.

    Inputs that are not parameters are cloned first, so that in-place nodes cannot touch the caller's tensors.
    """

    def __init__(self, program: Program, values: Mapping[fx.Node, Any] | None = None, promote: bool = False) -> None:
        super().__init__(program.module, garbage_collect_values=False)
        self.program = program
        self.promote = promote
        self.env = dict(values or {})

    def run_node(self, n: fx.Node) -> Any:
        """Return the example value of a placeholder (the hint of a symbol), or run the node."""
        if n.op != "placeholder":
            value = super().run_node(n)
            return _overflow(_promote(value), overflow_limit(n)) if self.promote else value
        value = self.program.values[n.name]
        if isinstance(value, Tensor):
            return value.detach() if n.name in self.program.parameters else value.detach().clone()
        return value.node.hint if isinstance(value, (torch.SymInt, torch.SymFloat)) else value  # int() would guard

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function; with `promote`, float casts cast to float64, and a view may copy."""
        if self.promote and target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            target = torch.ops.aten.reshape.default
        name = str(getattr(target, "__name__", target)).partition(".")[0]
        return super().call_function(target, *(self.sized(name, args, kwargs) if self.promote else (args, kwargs)))

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a method; with `promote`, float casts cast to float64, and a view may copy."""
        if not self.promote:
            return super().call_method(target, args, kwargs)
        name = "double" if target in {"float", "half", "bfloat16"} else target
        name = "reshape" if name == "view" and not any(isinstance(a, torch.dtype) for a in args) else name
        return super().call_method(name, *self.sized(name, args, kwargs))

    @staticmethod
    def sized(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a call with float types promoted and sizes replaced according to `smaller`."""
        sizes = _smaller.get() if name in SIZED else {}

        def widen(value: Any) -> Any:
            if isinstance(value, torch.dtype) and value in FLOATS:
                return torch.float64
            if type(value) is int:
                return sizes.get(value, value)
            if isinstance(value, slice):
                return slice(widen(value.start), widen(value.stop), value.step)
            return type(value)(widen(v) for v in value) if type(value) in (tuple, list) else value

        return tuple(widen(a) for a in args), {k: widen(v) for k, v in kwargs.items()}

    def example(self, node: fx.Node) -> Any:
        """Return the value of `node`; for a tensor, its leading part of shape `example_shape`."""
        value = self.value(node)
        if type(value) is int:
            return _smaller.get().get(value, value)
        if not isinstance(value, Tensor) or not _smaller.get():
            return value
        for axis, size in enumerate(example_shape(node)):
            value = value.narrow(axis, 0, size)
        return value

    @torch.no_grad()
    def value(self, node: fx.Node) -> Any:
        """Return the value of `node`, computing ancestors that have no value yet."""
        for ancestor in self._needed(node):
            self.env[ancestor] = self.run_node(ancestor)
        return self.env[node]

    def _needed(self, node: fx.Node) -> list[fx.Node]:
        """Return `node` and its ancestors without a value, inputs first; from a `vmap` scope, all nodes.

        Raises Miss if functorch gradients or tangents are among them, which are disabled during evaluation.
        """
        order = self._ancestors([node])
        scopes = [scope for scope in transform_scopes(self.program.graph) if not scope.nodes.isdisjoint(order)]
        for scope in scopes:
            if not scope.only_maps:
                raise Miss(f"{node.name} is computed by {scope.name}; expected ATen operations", node)
        if not scopes:
            return order
        return sorted(self._ancestors([node, *(n for scope in scopes for n in scope.nodes)]), key=_position)

    def _ancestors(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        """Return nodes and their ancestors without a value, inputs first."""
        order: list[fx.Node] = []
        seen: set[fx.Node] = set()
        stack = [(node, False) for node in nodes]
        while stack:
            current, expanded = stack.pop()
            if expanded:
                order.append(current)
            elif current not in seen and current not in self.env:
                seen.add(current)
                stack.append((current, True))
                stack.extend((source, False) for source in current.all_input_nodes)
        return order


class Region:
    """The nodes between some inputs and a dependent node, as a function that can be run on other values.

    inputs: nodes whose values are replaced. end: the result. nodes: in graph order. sides: other nodes that they use.
    Raises RuntimeError if there are more than MAX_NODES nodes, and Miss if some are inside a function transform.
    """

    def __init__(self, base: Evaluator, inputs: Iterable[fx.Node], end: fx.Node) -> None:
        self.base, self.end = base, end
        self.inputs = tuple(dict.fromkeys(inputs))
        self.nodes = _between(self.inputs, end)
        if len(self.nodes) > MAX_NODES:
            raise RuntimeError(f"{len(self.nodes)} nodes between the inputs and {end.name}, more than {MAX_NODES}")
        scope = next((s for s in transform_scopes(base.program.graph) if not s.nodes.isdisjoint(self.nodes)), None)
        if scope is not None:
            raise Miss(f"a part of it runs inside {scope.name}; expected all of it outside", end)
        inside = {*self.nodes, *self.inputs}
        self.sides = tuple(dict.fromkeys(s for n in self.nodes for s in n.all_input_nodes if s not in inside))

    @cached_property
    def overflow_limit(self) -> float:
        """The largest number that no cast of the region to a dtype of smaller range turns into infinity."""
        return min(map(overflow_limit, self.nodes), default=math.inf)

    def run(self, values: Mapping[fx.Node, Any], differentiable: bool = False) -> Tensor:
        """Return the value of `end` for these values of inputs and sides; other sides have their example value.

        Everything is promoted to float64, whatever dtype the region casts to; but a cast to a dtype of smaller range
        gives infinity for numbers beyond it, such as the lowest float64 as a mask value in float32. Raises what a node
        raises, and RuntimeError if the result is not a tensor, or if a side's smaller part is constant although the
        side is not.
        """
        env: dict[fx.Node, Any] = dict(values)
        for side in self.sides:
            if side not in env:
                env[side] = _promote(self._shown(side))
        evaluator = Evaluator(self.base.program, env, promote=True)
        with torch.set_grad_enabled(differentiable):
            for node in self.nodes:
                evaluator.env[node] = evaluator.run_node(node)
        result = evaluator.env[self.end] if self.end in evaluator.env else evaluator.value(self.end)
        if not isinstance(result, Tensor):
            raise RuntimeError(f"{self.end.name} is not a tensor")
        return result

    def _shown(self, side: fx.Node) -> Any:
        """Return a side's example; raise RuntimeError if its smaller part is constant and the whole is not.

        An example is a padding mask whose padding begins after the evaluated tokens.
        """
        part, whole = self.base.example(side), self.base.value(side)
        if isinstance(part, Tensor) and part.shape != whole.shape and _is_one(part) and not _is_one(whole):
            raise RuntimeError(f"{side.name} begins with {list(part.shape)} equal numbers, and has others")
        return part


def _is_one(tensor: Tensor) -> bool:
    return not tensor.numel() or bool((tensor == tensor.flatten()[0]).all())


def signature(region: Region, describe: Callable[[fx.Node], Any]) -> tuple[Any, ...]:
    """Describe a region's computation, independently of the layer it is in.

    Equal for two regions that compute the same from inputs of the same shapes; `describe` characterizes a side.
    """
    places = {node: index for index, node in enumerate((*region.inputs, *region.sides, *region.nodes))}

    def place(node: fx.Node) -> str:
        return f"%{places[node]}"

    calls = [
        (n.op, str(n.target), repr(fx.node.map_arg((n.args, n.kwargs), lambda m: _Place(place(m)))))
        for n in region.nodes
    ]
    shapes = tuple((example_shape(n), str(fake(n).dtype)) for n in region.inputs)
    return (tuple(calls), shapes, tuple(describe(side) for side in region.sides))


class _Place(str):
    """A node's index in a region; its repr has no quotes, like a node's."""

    def __repr__(self) -> str:
        return str(self)


def window(first: fx.Node, last: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """Return the data-flow edges among the nodes from `first` to `last` in graph order."""
    edges: list[tuple[fx.Node, fx.Node]] = []
    lowest, node = _position(first), last
    while _position(node) > lowest:
        edges.extend((source, node) for source in node.all_input_nodes if _position(source) >= lowest)
        node = node.prev
    return edges


def _between(inputs: tuple[fx.Node, ...], end: fx.Node) -> list[fx.Node]:
    """Return the nodes on a path from an input to `end`, and `end`, in graph order."""
    fixed = set(inputs)
    if end in fixed:
        return []
    first = min(inputs, key=_position)
    flow: nx.DiGraph = nx.DiGraph((u, v) for u, v in window(first, end) if v not in fixed)
    if end not in flow:
        return []
    flow.add_edges_from(("start", node) for node in fixed)
    between = nx.descendants(flow, "start") & (nx.ancestors(flow, end) | {end})
    return sorted(between - fixed, key=_position)


def random_like(node: fx.Node, seed: int = 0) -> Tensor:
    """Draw random float64 values of the shape of `node`, on its device."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(example_shape(node), generator=generator, dtype=torch.float64)
    return value.to(fake(node).device)


def _position(node: fx.Node) -> Any:
    return node._sort_key


def _overflow(value: Any, limit: float) -> Any:
    if limit == math.inf or not isinstance(value, Tensor):
        return value
    return value.masked_fill(value > limit, math.inf).masked_fill(value < -limit, -math.inf)


def _promote(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.dtype in FLOATS else value
