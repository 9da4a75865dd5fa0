"""The role of a node in its model: a weight, an activation, a projection, a cache.

A *weight-like* value depends only on parameters and buffers, however it is computed from them (slices, concatenation,
weight norm, dequantization). A *projection* contracts an activation with a weight-like value. The *cut* of a node is
where a backward walk from it ends: the nearest projections, and the cache inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, fx

from fhopt.passes.graph.evaluate import example_shape
from fhopt.passes.graph.nodes import VIEWS, argument, fake, is_in_place, op_name, storage_root
from fhopt.passes.graph.program import Program
from fhopt.passes.prepare.memory import with_modes
from fhopt.passes.recognize.contraction import Contraction, read_contraction

CONVOLUTION = frozenset({"conv1d", "conv2d", "conv3d", "convolution"})
WEIGHTED = CONVOLUTION | {"linear", "addmm", "addbmm", "bilinear"}
ATTENTION = frozenset({"attention", "latent_attention", "scaled_dot_product_attention"})
LOOKUP = frozenset({"embedding", "embedding_bag"})


class Kind(IntEnum):
    """The dependency class of a value: constants only, weights, or activations; the maximum over its inputs."""

    CONSTANT = 0
    WEIGHT = 1
    ACTIVATION = 2


@dataclass(frozen=True)
class Projection:
    """An activation contracted with weights: the node, the names of the weights, the axes of its features."""

    node: fx.Node
    names: tuple[str, ...]
    activation: fx.Node
    features: tuple[int, ...]  # axes of the result that come from the weight


@dataclass(frozen=True)
class Cut:
    """The nodes at which a backward walk from a node ended.

    caches: state inputs. appends: nodes that concatenate a cache with new tokens, or write into it. lookups: embeddings
    of activations reached without passing a projection (then this path has no projection).
    """

    projections: tuple[Projection, ...]
    caches: tuple[fx.Node, ...] = ()
    appends: tuple[fx.Node, ...] = ()
    lookups: tuple[fx.Node, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Qualified names of the weights of all projections."""
        return tuple(dict.fromkeys(name for projection in self.projections for name in projection.names))


class Roles:
    """The roles of the nodes of one program, each computed once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.written = written_inputs(program)
        self.changed = {storage_root(n.all_input_nodes[0]): n for n in _writers(program)}
        self.known: dict[Any, Any] = {}  # results per structure, shared by equal layers
        self._kinds: dict[fx.Node, Kind] = {}
        self._numbers: dict[fx.Node, int] = {}
        self._value_numbers: dict[str, int] = {}
        self._projections: dict[fx.Node, Projection | None] = {}
        self._modes: dict[fx.Node, bool] = {}

    def has_gradient(self, node: fx.Node) -> bool:
        """Return whether gradients are enabled where the node runs, according to the graph."""
        if node not in self._modes:
            self._modes = {n: bool(mode) for n, mode, _ in with_modes(self.program.graph)}
        return self._modes[node]

    def kind(self, node: fx.Node) -> Kind:
        """Return the kind of value that `node` depends on."""
        stack = [node]
        while stack:
            current = stack[-1]
            if current in self._kinds:
                stack.pop()
                continue
            waiting = [n for n in current.all_input_nodes if n not in self._kinds]
            if waiting:
                stack.extend(waiting)
                continue
            self._kinds[current] = self._own_kind(current)
            stack.pop()
        return self._kinds[node]

    def _own_kind(self, node: fx.Node) -> Kind:
        if node.op == "get_attr":
            return Kind.WEIGHT
        if node.op != "placeholder":
            return max((self._kinds[n] for n in node.all_input_nodes), default=Kind.CONSTANT)
        if not isinstance(fake(node), Tensor):
            return Kind.CONSTANT  # a size
        kept = self.program.is_parameter(node) or (node.name in self.program.buffers and node not in self.written)
        return Kind.WEIGHT if kept else Kind.ACTIVATION

    def number(self, node: fx.Node) -> int:
        """Return a value number, equal for nodes that compute the same value in the same way.

        Value numbering: Alpern, Wegman, Zadeck 1988.
        """
        stack = [node]
        while stack:
            current = stack[-1]
            waiting = [n for n in current.all_input_nodes if n not in self._numbers]
            if waiting:
                stack.extend(waiting)
                continue
            if current not in self._numbers:
                self._numbers[current] = self._value_numbers.setdefault(self._expression(current), len(self._numbers))
            stack.pop()
        return self._numbers[node]

    def _expression(self, node: fx.Node) -> str:
        if node.op in {"placeholder", "get_attr"}:
            return f"{node.op} {node.target}"
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: f"%{self._numbers[n]}")
        return f"{node.op} {node.target} {arguments}"

    def describe(self, side: fx.Node) -> Any:
        """Describe a tensor input of a region by its shape, a constant or a size by its value."""
        if not isinstance(fake(side), Tensor) or self.kind(side) == Kind.CONSTANT:
            return self.number(side)
        return self.kind(side), example_shape(side), str(fake(side).dtype)

    def projection(self, node: fx.Node) -> Projection | None:
        """Return `node` as a projection, None if it is not one."""
        if node not in self._projections:
            self._projections[node] = self._read_projection(node)
        return self._projections[node]

    def _read_projection(self, node: fx.Node) -> Projection | None:
        name = op_name(node)
        if name in WEIGHTED:
            return self._weighted(node, name)
        result = read_contraction(node)
        if result is None:
            return None
        for side in (result, result.swapped()):  # the weight on the right first
            if self._is_projection(side):
                features = tuple(i for i, x in enumerate(side.axes) if x and x in side.right_axes)
                return self._named(node, side.left, side.right, features)
        return None

    def _is_projection(self, contraction: Contraction) -> bool:
        """Return whether the right side is a weight, rather than a product that shares batch axes with the left."""
        if self.kind(contraction.right) != Kind.WEIGHT or len(example_shape(contraction.right)) < 2:
            return False
        if self.kind(contraction.left) == Kind.ACTIVATION:
            return not contraction.shared or not self._holds_product(contraction.right)
        return not contraction.shared and self._is_stored(contraction.right)

    def _holds_product(self, node: fx.Node) -> bool:
        """Return whether a weight-like value is itself projected, as learned queries may be."""
        return any(op_name(n) in WEIGHTED or read_contraction(n) is not None for n in _with_ancestors(node))

    def _is_stored(self, node: fx.Node) -> bool:
        return view_root(node).op in {"placeholder", "get_attr"}

    def _weighted(self, node: fx.Node, name: str) -> Projection | None:
        position = {"addmm": 2, "addbmm": 2}.get(name, 1)
        weight = argument(node, position, "weight", "mat2", "batch2")
        activation = argument(node, position - 1, "input", "mat1", "batch1", "self")
        if not isinstance(weight, fx.Node) or not isinstance(activation, fx.Node):
            return None
        if self.kind(weight) == Kind.ACTIVATION and self.kind(activation) == Kind.WEIGHT and name == "addmm":
            weight, activation = activation, weight
        if self.kind(weight) != Kind.WEIGHT:
            return None
        rank = len(example_shape(node))
        return self._named(node, activation, weight, (1,) if name in CONVOLUTION and rank > 2 else (rank - 1,))

    def _named(
        self, node: fx.Node, activation: fx.Node, weight: fx.Node, features: tuple[int, ...]
    ) -> Projection | None:
        names = self.weight_names(weight)
        return Projection(node, names, activation, features) if names else None

    def weight_names(self, node: fx.Node) -> tuple[str, ...]:
        """Return the qualified names of the parameters in a weight-like value; without any, of its buffers."""
        is_parameter_by_name: dict[str, bool] = {}
        for source in _with_ancestors(node):
            if source.op in {"placeholder", "get_attr"}:
                name = self.program.parameters.get(source.name) or self.program.buffers.get(source.name)
                if name:
                    is_parameter_by_name[name] = source.name in self.program.parameters
        parameters = tuple(sorted(n for n, is_parameter in is_parameter_by_name.items() if is_parameter))
        return parameters or tuple(sorted(is_parameter_by_name))

    def is_score_product(self, node: fx.Node) -> Contraction | None:
        """Return the contraction at `node` if it multiplies two activations (or projected values), else None."""
        if self.projection(node) is not None or self.kind(node) == Kind.CONSTANT:
            return None
        return read_contraction(node)

    def cut(self, node: fx.Node) -> Cut:
        """Walk back from `node` to the nearest projections and cache inputs."""
        projections: dict[fx.Node, Projection] = {}
        caches: dict[fx.Node, None] = {}
        appends: dict[fx.Node, None] = {}
        lookups: dict[fx.Node, None] = {}
        seen, stack = set[fx.Node](), [node]
        while stack:
            current = stack.pop()
            if current in seen:
                continue
            seen.add(current)
            projection = self.projection(current)
            if projection is not None:
                projections[current] = projection
            elif current.op == "placeholder":
                if self.is_cache(current):
                    caches[current] = None
            elif op_name(current) in LOOKUP and self.kind(current) == Kind.ACTIVATION:
                lookups[current] = None
            elif op_name(current) not in ATTENTION and self.kind(current) != Kind.CONSTANT:
                if any(self.is_cache(source) for source in current.all_input_nodes):
                    appends[current] = None
                stack.extend(current.all_input_nodes)
        ordered = tuple(projections[n] for n in sorted(projections))
        return Cut(ordered, tuple(caches), tuple(appends), tuple(lookups))

    def is_cache(self, node: fx.Node) -> bool:
        """Return whether a node is a state input that holds tokens.

        It is written to, or concatenated with new tokens, or has several heads.
        """
        value = fake(node)
        if node.op != "placeholder" or self.kind(node) != Kind.ACTIVATION or not isinstance(value, Tensor):
            return False
        if value.dim() < 3 or not value.dtype.is_floating_point:
            return False
        grows = node in self.written or any(op_name(user) in {"cat", "concat"} for user in node.users)
        return grows or (value.dim() == 4 and value.shape[1] > 1)  # a RoPE table has one head


VARYING = frozenset({"bernoulli", "normal", "multinomial", "poisson", "dropout", "empty", "new_empty", "empty_like"})


def is_fixed(node: fx.Node) -> bool:
    """Return whether a value depends on literals only: no input, parameter, buffer, symbolic size or random number."""
    return all(n.op not in {"placeholder", "get_attr"} and not _varies(n) for n in _with_ancestors(node))


def _varies(node: fx.Node) -> bool:
    """Return whether a node may give another result in each run: random draws, or uninitialized memory."""
    name = op_name(node)
    return name.startswith("rand") or name in VARYING or is_in_place(node)


CASTS = frozenset({"to", "type", "type_as", "float", "double", "half", "bfloat16", "_to_copy", "bool"})
NEGATIONS = frozenset({"logical_not", "bitwise_not", "invert", "__invert__"})


def condition_key(node: fx.Node, roles: Roles) -> tuple[int, bool]:
    """Return a number, equal for masks with the same computation up to negation, and whether the mask is negated."""
    parity = False
    while True:
        name, source = op_name(node), node.all_input_nodes[0] if node.all_input_nodes else None
        if source is None or not isinstance(fake(source), Tensor) or fake(source).dtype != torch.bool:
            return roles.number(node), parity
        if name in NEGATIONS:
            parity = not parity
        elif name not in CASTS | {"contiguous", "clone"}:
            return roles.number(node), parity
        node = source


def view_root(node: fx.Node) -> fx.Node:
    """Return the node that `node` is a view of, through all views."""
    while op_name(node) in VIEWS and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _with_ancestors(node: fx.Node) -> Iterator[fx.Node]:
    """Yield `node` and all nodes it depends on, each once."""
    seen, stack = set[fx.Node](), [node]
    while stack:
        current = stack.pop()
        if current not in seen:
            seen.add(current)
            yield current
            stack.extend(current.all_input_nodes)


def written_inputs(program: Program) -> frozenset[fx.Node]:
    """Return the placeholders that the program writes back to."""
    return frozenset(
        node.all_input_nodes[0]
        for node in program.graph.nodes
        if is_in_place(node) and node.all_input_nodes and node.all_input_nodes[0].op == "placeholder"
    )


def _writers(program: Program) -> list[fx.Node]:
    """Return the nodes that change a tensor in place within the graph and that `functionalize` could not replace."""
    inputs = [n for n in program.graph.nodes if is_in_place(n) and n.all_input_nodes]
    return [n for n in inputs if n.all_input_nodes[0].op != "placeholder" or n.users]


def common_path(names: Iterable[str]) -> str:
    """Return the longest common module path of weights, without the parameters' own names."""
    paths = [tuple(n.split(".")[:-1]) for n in names]
    if not paths:
        return ""
    if len(set(paths)) == 1:
        return ".".join(paths[0][:-1] or paths[0])  # one fused projection and nothing else: name its parent
    shared = []
    for step in zip(*paths, strict=False):
        if len(set(step)) > 1:
            break
        shared.append(step[0])
    return ".".join(shared)
