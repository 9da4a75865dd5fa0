"""Lowering of a segment, a run of fx nodes between two attentions, to instructions.

Everything is computed in float32, and rounded where a matmul uses it and where the segment stores it; casts between
floating types inside a segment are dropped. Segments with equal nodes, such as those of equal layers, are lowered once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from fhopt.codegen.cpu.calls.caches import Code, PackedInstruction
from fhopt.codegen.cpu.calls.kernels import TYPES
from fhopt.codegen.programs import operations
from fhopt.codegen.programs.emitter import Emitter
from fhopt.codegen.programs.errors import UnsupportedError
from fhopt.codegen.programs.instructions import Instruction, Value, four, packed, place
from fhopt.codegen.programs.program import SegmentProgram, Stored


class LoweringError(UnsupportedError):
    """A node of a segment that has no instructions. node: which."""

    def __init__(self, node: Node, message: str) -> None:
        super().__init__(message)
        self.node = node


def lower_segment(nodes: Sequence[Node], inputs: Sequence[Node], outputs: Sequence[Node]) -> SegmentProgram:
    """Lower nodes in order. inputs: values that they use from outside; outputs: values of theirs that others use.

    The index of an input is the number of its external; the outputs follow. Raises LoweringError.
    """
    changes = any(is_in_place_node(node) for node in nodes)
    emitter = Emitter(inputs, [node for node in inputs if is_weight(node)], changes)
    for node in nodes:
        emitter.node = node
        try:
            _lower(emitter, node)
        except UnsupportedError as error:
            raise LoweringError(node, str(error)) from error
    stored: list[Stored] = []
    for node in outputs:
        emitter.node = node
        try:
            stored.append(_store(emitter, node))
        except UnsupportedError as error:
            raise LoweringError(node, str(error)) from error
    arena = place(emitter.instructions)
    instructions = [one for i in emitter.instructions for one in packed(i)]
    array = (PackedInstruction * len(instructions))(*instructions)
    sources = tuple(one.source for i in emitter.instructions for one in (i, *i.joined))
    return SegmentProgram(array, sources, tuple(stored), arena, emitter.externals)


def segment_key(nodes: Sequence[Node], inputs: Sequence[Node], outputs: Sequence[Node]) -> Hashable:
    """Return a key that is equal for segments with the same nodes, and inputs of the same layout."""
    numbers = {node: index for index, node in enumerate((*inputs, *nodes))}
    listed = [(node_key(node, numbers.__getitem__), layout_key(node)) for node in nodes]
    return tuple(listed), tuple(map(layout_key, inputs)), tuple([numbers[node] for node in outputs])


def node_key(node: Node, key: Callable[[Node], Hashable]) -> Hashable:
    """Return a key of an operation with its arguments. key: of the operands that are nodes."""

    def part(x: Any) -> Hashable:
        if isinstance(x, Node):
            return Node, key(x)
        return tuple(map(part, x)) if isinstance(x, (list, tuple)) else repr(x)

    return node.target, part(node.args), part(tuple(node.kwargs.items()))


def layout_key(node: Node) -> Hashable:
    """Return shape, strides and type of a node's value, and whether it is a weight; None if it is no tensor."""
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return None
    return tuple(value.shape), value.stride(), value.dtype, is_weight(node)


def is_weight(node: Node) -> bool:
    """Return whether a placeholder is a parameter or buffer."""
    return "weight" in node.meta


def inputs_of(nodes: Sequence[Node]) -> list[Node]:
    """Return the values that nodes use and do not make, in order of first use."""
    inside, found = set(nodes), dict[Node, None]()
    for node in nodes:
        map_arg((node.args, node.kwargs), lambda x: found.setdefault(x) if x not in inside else None)
    return list(found)


def base_name(node: Node) -> str:
    """Return the name of a node's aten operation without its overload; for another library, with its namespace."""
    schema = getattr(node.target, "_schema", None)
    name = str(node.target) if schema is None else str(schema.name)
    return name.removeprefix("aten::")


def is_in_place_node(node: Node) -> bool:
    """Return whether a node changes its first operand, and instructions for that exist."""
    base = base_name(node)
    return base.endswith("_") and base[:-1] in operations.IN_PLACE


def has_instructions(node: Node) -> bool:
    """Return whether a node's operation may have instructions; its operands decide when it is lowered."""
    base = base_name(node)
    return base in operations.VIEWS or is_in_place_node(node) or (base in operations.HANDLERS and not is_mutation(node))


def is_mutation(node: Node) -> bool:
    """Return whether a node changes an operand in place."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _lower(emitter: Emitter, node: Node) -> None:
    if node.target is operator.getitem:
        emitter.values[node] = _item(emitter, *node.args)
        return None
    base = base_name(node)
    if base in operations.VIEWS:
        return _view(emitter, node, base)
    if is_in_place_node(node):
        return _change(emitter, node, base[:-1])
    handler = None if is_mutation(node) else operations.HANDLERS.get(base)
    if handler is None:
        raise UnsupportedError(f"the operation {base}")
    emitter.values[node] = handler(emitter, node.args, dict(node.kwargs))
    return None


def _item(emitter: Emitter, source: Any, index: Any) -> Value:
    """Return one result of an operation with several: all of them are views, or the first one is the only one."""
    parts = emitter.parts.get(source)
    if parts is not None:
        return parts[index]
    if index:
        raise UnsupportedError(f"result {index} of {base_name(source)}")
    return emitter.value(source)


def _view(emitter: Emitter, node: Node, base: str) -> None:
    """Apply an operation that changes only shape and strides."""
    value, rest = emitter.value(node.args[0]), node.args[1:]
    if any(isinstance(x, torch.dtype) for x in rest):
        raise UnsupportedError("a view of another type")
    if value.external >= 0 and emitter.inputs[value.external] not in emitter.weights:
        value = emitter.in_arena(value)
    function: Any = node.target
    if base.endswith("_"):
        function = getattr(getattr(torch.ops.aten, base[:-1]), function._overloadname)
    try:
        views = function(value.view, *rest, **node.kwargs)
    except RuntimeError:  # the elements have another order here
        value = emitter.dense(value)
        views = function(value.view, *rest, **node.kwargs)
    if isinstance(views, (tuple, list)):
        emitter.parts[node] = [Value(view, value.buffer, value.external) for view in views]
    else:
        emitter.values[node] = Value(views, value.buffer, value.external)


def _change(emitter: Emitter, node: Node, base: str) -> None:
    """Lower an operation that changes its first operand in place."""
    target = emitter.value(node.args[0])
    if target.buffer is None:
        raise UnsupportedError(f"{base}_ on an input or a weight")
    result = operations.HANDLERS[base](emitter, node.args, dict(node.kwargs))
    if tuple(result.view.shape) != tuple(target.view.shape):
        raise UnsupportedError(f"{base}_ of another shape")
    emitter.emit(Instruction(Code.COPY, four(target.view.shape), target, result))
    emitter.changed.add(target.buffer)
    emitter.values[node] = target


def _store(emitter: Emitter, node: Node) -> Stored:
    """Emit the instruction that writes a value to a dense tensor of its type."""
    value, like = emitter.in_arena(emitter.values[node]), node.meta["val"]
    if like.dtype not in TYPES or tuple(value.view.shape) != tuple(like.shape):
        raise UnsupportedError(f"a result of {like.dtype} {tuple(like.shape)}")
    external, emitter.externals = emitter.externals, emitter.externals + 1
    dense = torch.empty(tuple(like.shape), dtype=like.dtype, device="meta")
    sizes, kind = four(like.shape), TYPES[like.dtype]
    emitter.emit(Instruction(Code.STORE, sizes, value, Value(dense), external=external, type=kind))
    return Stored(external, tuple(like.shape), like.dtype)
