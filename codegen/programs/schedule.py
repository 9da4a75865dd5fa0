"""Schedule of a captured decode step: native segments, attention, and nodes that run eagerly.

eager      embedding, rotary angles, masks: a few small nodes, before the first segment if their inputs allow it
segment    all nodes with instructions up to the next attention or eager node
attention  on the cache of one layer
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from fhopt.codegen.cpu.calls.kernels import TYPES
from fhopt.codegen.programs.errors import UnsupportedError
from fhopt.codegen.programs.lowering import (
    LoweringError,
    base_name,
    has_instructions,
    inputs_of,
    is_mutation,
    is_weight,
    layout_key,
    lower_segment,
    node_key,
    segment_key,
)
from fhopt.codegen.programs.program import SegmentProgram

MAX_EAGER_KINDS = 64  # kinds of nodes without instructions; give up after as many attempts to lower


@dataclass(frozen=True, eq=False)
class EagerNode:
    """A node that runs as in the model. reason: why it has no instructions."""

    node: Node
    reason: str


@dataclass(frozen=True, eq=False)
class AttentionNode:
    """Cache update and attention of one layer."""

    node: Node


@dataclass(frozen=True, eq=False)
class NativeSegment:
    """Nodes that run natively. inputs: external values; outputs: values of theirs that are used outside."""

    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    program: SegmentProgram


Item = EagerNode | AttentionNode | NativeSegment


@dataclass(frozen=True, eq=False)
class StepSchedule:
    """The items of a graph in order; each uses only values of earlier ones, and placeholders."""

    items: tuple[Item, ...]


class Scheduler:
    """Makes the schedule of a graph. Placeholders with meta["weight"] are weights.

    is_attention: tells nodes that update and read the cache. stays: nodes that must run eagerly, with reasons.
    """

    def __init__(self, graph: Graph, is_attention: Callable[[Node], bool], stays: dict[Node, str]) -> None:
        self._nodes = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
        (output,) = graph.find_nodes(op="output")
        self._returned = frozenset(output.all_input_nodes)
        self._is_attention = is_attention
        self._eager: dict[Node, str] = dict(stays)
        self._eager |= dict.fromkeys(_aliased(self._nodes), "another node changes it in place, through a view")
        self._kinds: dict[Hashable, str] = {}
        self._programs: dict[Hashable, SegmentProgram] = {}

    def schedule(self) -> StepSchedule:
        """Return the schedule. Raises UnsupportedError if no node has instructions, or if the order would matter."""
        while len(self._kinds) <= MAX_EAGER_KINDS:
            self._mark()
            try:
                items = tuple(self._items())
            except LoweringError as error:
                self._refuse(error.node, str(error))
                continue
            if not any(isinstance(item, NativeSegment) for item in items):
                raise UnsupportedError("no operation of the step has instructions")
            return StepSchedule(items)
        raise UnsupportedError(f"more than {MAX_EAGER_KINDS} kinds of operations have no instructions")

    def _refuse(self, node: Node, reason: str) -> None:
        """Note that nodes like this one run eagerly."""
        if node.target is operator.getitem:
            node = node.all_input_nodes[0]
        kind = _kind(node)
        if kind in self._kinds:
            self._eager[node] = reason
        self._kinds[kind] = reason

    def _mark(self) -> None:
        """Find the nodes that run eagerly: without instructions, or parts of their results."""
        for node in self._nodes:
            if node in self._eager or self._is_attention(node):
                continue
            if node.target is operator.getitem:
                source = node.args[0]
                if source in self._eager or self._is_attention(source):
                    self._eager[node] = "a part of another result"
            else:
                reason = _reason(node) or self._kinds.get(_kind(node))
                if reason:
                    self._eager[node] = reason

    def _items(self) -> Iterable[Item]:
        """Yield the items. Eager nodes move before the native ones that they do not depend on."""
        pending: dict[Node, None] = {}  # native ones
        for node in self._nodes:
            is_attention = self._is_attention(node)
            if not is_attention and node not in self._eager:
                pending[node] = None
                continue
            if is_attention or is_mutation(node) or not pending.keys().isdisjoint(node.all_input_nodes):
                yield from self._flush(pending)
            yield AttentionNode(node) if is_attention else EagerNode(node, self._eager[node])
        yield from self._flush(pending)

    def _flush(self, pending: dict[Node, None]) -> Iterable[NativeSegment]:
        """Yield the segment of the pending nodes if values of theirs are used; then none are pending."""
        nodes, inside = tuple(pending), set(pending)
        pending.clear()
        outputs = tuple(
            node for node in nodes
            if isinstance(node.meta["val"], Tensor)
            and (node in self._returned or any(user not in inside and user.op != "output" for user in node.users))
        )  # fmt: skip
        if not outputs:
            return
        inputs = tuple(inputs_of(nodes))
        key = segment_key(nodes, inputs, outputs)
        program = self._programs.get(key)
        if program is None:
            program = self._programs[key] = lower_segment(nodes, inputs, outputs)
        yield NativeSegment(nodes, inputs, outputs, program)


def _aliased(nodes: Sequence[Node]) -> Iterable[Node]:
    """Yield nodes that share memory with a value that is changed in place while another view of it is still used.

    Native code keeps results of segments apart, so that these nodes run eagerly.
    """
    order = {node: index for index, node in enumerate(nodes)}
    for node in nodes:
        if not is_mutation(node):
            continue
        changed = changed_operands(node)
        shared = {key for x in changed for key in value_storages(x)}
        family = [x for x in nodes if not shared.isdisjoint(value_storages(x))]
        earlier = [x for x in family if order[x] < order[node] and x not in changed]
        if any(order.get(user, len(nodes)) > order[node] for x in earlier for user in x.users):  # also the output
            yield from family


def changed_operands(node: Node) -> list[Node]:
    """Return the operands that a node changes in place."""
    schema: Any = node.target._schema  # type: ignore[union-attr]
    given = {**dict(zip([a.name for a in schema.arguments], node.args, strict=False)), **node.kwargs}
    written = [given.get(a.name) for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [x for x in written if isinstance(x, Node)]


def value_storages(node: Node) -> set[int]:
    """Return keys of the storages of a node's captured values."""
    made = node.meta["val"]
    tensors = made if isinstance(made, (tuple, list)) else [made]
    return {x.untyped_storage()._cdata for x in tensors if isinstance(x, Tensor)}


def _reason(node: Node) -> str:
    """Return why a node cannot have instructions, from its operation and types; "" if it may have."""
    if not has_instructions(node):
        return f"{base_name(node)} has no instructions"
    values = [node, *node.all_input_nodes]
    for value in values:
        made = value.meta["val"]
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if not isinstance(tensor, Tensor):
                return "a number that is computed"
            if tensor.dtype not in TYPES and not is_weight(value):
                return f"{base_name(node)} of {tensor.dtype}"
            if value.meta.get("is_dynamic"):
                return "its shape depends on the length"
    return ""


def _kind(node: Node) -> Hashable:
    """Return a key that is equal for nodes of one operation, with the same numbers and operands of the same layout."""
    return node_key(node, layout_key)
