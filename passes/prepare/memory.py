"""Memory of a graph: which nodes share it, and which each node changes; for `functionalize`.

Aliasing is decided only by the identity of the storages of fake values. Each storage has a tree of views; a storage
that cannot be followed has a recorded reason.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor

from fhopt.passes.graph.nodes import argument, fake, op_name
from fhopt.passes.graph.program import Program
from fhopt.passes.graph.transforms import transformed_nodes

_OPERATORS: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv, operator.ifloordiv: operator.floordiv, operator.imod: operator.mod,
    operator.ipow: operator.pow, operator.iand: operator.and_, operator.ior: operator.or_, operator.ixor: operator.xor,
    operator.ilshift: operator.lshift, operator.irshift: operator.rshift,
}  # fmt: skip
_RANDOM_NAMES = "uniform_ normal_ bernoulli_ random_ exponential_ cauchy_ log_normal_ geometric_"
_FORM_NAMES = (
    "set_ resize_ resize_as_ as_strided_ squeeze_ unsqueeze_ transpose_ swapaxes_ swapdims_ t_ detach_ requires_grad_ "
    "rename_ share_memory_"
)
RANDOM, _FORM = frozenset(_RANDOM_NAMES.split()), frozenset(_FORM_NAMES.split())
_RUNNING_STATISTICS = frozenset({"batch_norm", "instance_norm"})
_NOT_REPEATABLE = frozenset(
    {"as_strided", "data", "_get_data_attr"}
)  # they access memory outside of their input tensor
Call = tuple[str, Any, tuple[Any, ...], dict[str, Any]]  # op, target, args, kwargs of a node
Step = tuple[str, tuple[Any, ...], Mapping[str, Any]]  # name, arguments after the tensor, keyword arguments of a view


def called_name(node: fx.Node) -> str:
    """Return the name by which `written` finds the function that a node calls, "" without one."""
    target: Any = node.target
    if node.op != "call_function" or isinstance(target, HigherOrderOperator):
        return str(target) if node.op == "call_method" else ""
    try:
        name = "builtins.getattr" if target is getattr else fx.node._get_qualified_name(target)
        name = name.removeprefix("_")  # _operator.mul
        return name if named_callable(name) == target else ""
    except (ImportError, AttributeError, RuntimeError, ValueError):
        return ""


@functools.cache
def named_callable(name: str) -> Callable[..., Any]:
    """Return the callable of a `called_name`: a function, or for a bare name a tensor method."""
    module, *path = name.split(".")
    if not path:
        return lambda tensor, *args, **kwargs: getattr(tensor, name)(*args, **kwargs)
    return functools.reduce(getattr, path, importlib.import_module(module))  # type: ignore[return-value]


# ----------------------------------------------------------------------------------------------------- in-place writes


@dataclass(frozen=True)
class _Write:
    """The in-place write of a node. targets: changed tensors. reason: why it cannot change another tensor, or ""."""

    targets: tuple[fx.Node, ...]
    reason: str = ""
    hidden: bool = False  # neither name nor arguments of the node show the write

    @property
    def target(self) -> fx.Node:
        return self.targets[0]


def _write(node: fx.Node) -> _Write | None:
    """Return the in-place write of the node, None if it changes nothing."""
    name = op_name(node)
    if _runs_hidden_code(node):
        return _Write(tuple(node.all_input_nodes), f"{name or node.op} changes its inputs inside", hidden=True)
    if name in _RUNNING_STATISTICS:
        statistics = tuple(n for n in node.all_input_nodes if n is not first_tensor(node))
        return _Write(statistics, f"{name} changes its running statistics", hidden=True) if statistics else None
    targets = tuple(n for n in _targets(node) if isinstance(n, fx.Node) and (fake(n) is None or _tensors(fake(n))))
    return _Write(targets, _why_not(node, targets)) if targets else None


def _targets(node: fx.Node) -> list[Any]:
    """Return the arguments that the node changes in place, by its schema, its keywords, or its name."""
    results: list[Any] = []
    if overloads := _overloads(node):
        for position, parameter in ((i, p) for o in overloads for i, p in enumerate(o._schema.arguments)):
            if parameter.alias_info is not None and parameter.alias_info.is_write:
                is_positional = len(node.args) > position and not parameter.kwarg_only
                results.append(node.args[position] if is_positional else node.kwargs.get(parameter.name))
    elif node.kwargs.get("out") is not None:
        results.append(node.kwargs["out"])
    elif _is_named_in_place(node) or _asks_inplace(node):
        results.append(first_tensor(node))
    return list(dict.fromkeys(torch.utils._pytree.tree_leaves(results)))


def _overloads(node: fx.Node) -> list[OpOverload]:
    """Return the op that the node calls, or all overloads if the graph names a packet, `torch.ops.aten.add_`."""
    target: Any = node.target
    if isinstance(target, OpOverloadPacket):
        return [getattr(target, name) for name in target.overloads()]
    return [target] if isinstance(target, OpOverload) else []


def _is_named_in_place(node: fx.Node) -> bool:
    name = op_name(node)
    if getattr(node.target, "__module__", "") == "_operator":  # and_, or_ and not_ end in an underscore too
        return node.target is operator.setitem or node.target in _OPERATORS
    return name.endswith("_") and not name.endswith("__")


def _asks_inplace(node: fx.Node) -> bool:
    """Return whether the node passes `inplace=True` to a function."""
    position = _inplace_position(node.target) if node.op == "call_function" else None
    if position is None:
        return False
    return bool(node.kwargs.get("inplace", position < len(node.args) and node.args[position]))


@functools.cache
def _inplace_position(target: Any) -> int | None:
    try:
        names = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


def _why_not(node: fx.Node, targets: tuple[fx.Node, ...]) -> str:
    name = op_name(node)
    if any(overload.namespace != "aten" for overload in _overloads(node)):
        return f"the custom op {node.target} changes its argument in place; it needs the tensor itself"
    if name in _FORM and not is_idle(node):
        return f"{name} changes the form of the tensor, not its values"
    if len(targets) > 1 or not isinstance(fake(targets[0]), (Tensor, type(None))):
        return f"{name} changes several tensors at once"
    if not called_name(node) or targets[0] not in (first_tensor(node), node.kwargs.get("out")):
        return f"{name} cannot be called by name on another tensor"
    return ""


def is_idle(node: fx.Node) -> bool:
    """Return whether a node is a `detach_` of a tensor without gradient: torch.export adds one after each constant."""
    return op_name(node) == "detach_" and not node_needs_gradient(first_tensor(node))


def _runs_hidden_code(node: fx.Node) -> bool:
    """Return whether a node calls code outside this graph that changes, or may change, a tensor."""
    if not isinstance(node.target, HigherOrderOperator):
        return node.op == "call_module"
    names = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
    bodies = [getattr(node.graph.owning_module, name, None) for name in names]
    inside = (n for body in bodies if isinstance(body, fx.GraphModule) for n in body.graph.nodes)
    return "mutation" in op_name(node) or any(_write(n) for n in inside)


def first_tensor(node: fx.Node) -> Any:
    """Return the tensor that a call operates on."""
    return argument(node, 0, "input", "self")


def behind_first(args: Any, kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call without the first."""
    return tuple(args[1:]), {k: v for k, v in kwargs.items() if args or k not in ("input", "self")}


def plain_operation(node: fx.Node) -> Call | None:
    """Return the out-of-place operation with the result that the node writes, None if torch has none."""
    name, args, kwargs = op_name(node), node.args, dict(node.kwargs)
    if name in RANDOM:
        return None
    if name == "copy_":  # a clone would have no gradient, but the written tensor has one
        source, target = argument(node, 1, "src"), first_tensor(node)
        loses_gradient = node_needs_gradient(target) and isinstance(source, fx.Node) and not node_needs_gradient(source)
        return None if loses_gradient else ("call_function", torch.clone, (source,), {})
    if kwargs.pop("out", None) is not None:
        return None if isinstance(node.target, OpOverload) else ("call_function", node.target, args, kwargs)
    if node.target in _OPERATORS:
        return "call_function", _OPERATORS[node.target], args, kwargs
    if node.op == "call_function" and (position := _inplace_position(node.target)) is not None:
        if position < len(args):
            return "call_function", node.target, (*args[:position], False, *args[position + 1 :]), kwargs
        return "call_function", node.target, args, {**kwargs, "inplace": False}
    if node.op == "call_method" and hasattr(Tensor, name[:-1]):
        return "call_method", name[:-1], args, kwargs
    function = _function_without_underscore(node)
    return None if function is None else ("call_function", function, args, kwargs)


def _function_without_underscore(node: fx.Node) -> Any:
    name = op_name(node)
    if isinstance(node.target, OpOverload):
        return getattr(getattr(torch.ops.aten, name[:-1], None), node.target._overloadname, None)
    homes = (torch, torch._C._nn, torch.ops.aten)
    known = (m for m in homes if node.op == "call_method" or getattr(m, name, None) == node.target)
    return next((f for home in known if (f := getattr(home, name[:-1], None)) is not None), None)


# ------------------------------------------------------------------------------------------------------------- aliasing


class GraphMemory:
    """The memory of a graph: a tree of views for each storage, and the nodes that write it.

    storage: node -> its storage. roots: storage -> the node that made it. parent, depth: the tree. same: node -> the
    node with the identical tensor (the argument of an in-place result, the source of a view that changes nothing).
    writes: in-place node -> its write. problems: storage -> why it must be written in place. final: copies into inputs
    at the end, which may stay.
    """

    def __init__(self, program: Program) -> None:
        self.storage: dict[fx.Node, int] = {}
        self.roots: dict[int, fx.Node] = {}
        self.parent: dict[fx.Node, fx.Node] = {}
        self.depth: dict[fx.Node, int] = {}
        self.same: dict[fx.Node, fx.Node] = {}
        self.writes: dict[fx.Node, _Write] = {}
        self.problems: dict[int, str] = {}
        self.autocast: set[fx.Node] = set()
        self._modes: dict[int, set[Any]] = {}
        for node, grad, autocast in with_modes(program.graph):
            write = _write(node) if node.op.startswith("call_") else None
            self._place(node, write)
            for key in self._keys((node, *(write.targets if write else ()))):
                self._modes.setdefault(key, set()).add(grad)
            if autocast:
                self.autocast.add(node)
        self._find_problems(program)
        self._find_unrepeatable_views()
        self.final = self._final_copies(program.graph)

    def itself(self, node: fx.Node) -> fx.Node:
        """Return the node that represents `node` in the tree."""
        return self.same.get(node, node)

    def common(self, a: fx.Node, b: fx.Node) -> fx.Node:
        """Return the last tree node of which both are views."""
        while a is not b:
            if self.depth[a] >= self.depth[b]:
                a = self.parent[a]
            else:
                b = self.parent[b]
        return a

    def path(self, start: fx.Node, end: fx.Node) -> list[fx.Node]:
        """Return the views that lead from `start` to `end`."""
        steps: list[fx.Node] = []
        while end is not start:
            steps.append(end)
            end = self.parent[end]
        return steps[::-1]

    def reason(self, node: fx.Node) -> str:
        """Return why an in-place node must stay, "" if it need not."""
        write = self.writes[node]
        if write.target not in self.storage:
            return write.reason or f"the memory of {write.target.name} is not known"
        return write.reason or self.problems.get(self.storage[write.target], "")

    def _keys(self, nodes: Iterable[fx.Node]) -> set[int]:
        return {self.storage[n] for n in nodes if n in self.storage}

    def _spoil(self, keys: Iterable[int], reason: str) -> None:
        for key in keys:
            self.problems.setdefault(key, reason)

    def _place(self, node: fx.Node, write: _Write | None) -> None:
        """Add a node to the tree of its storage, and record its write."""
        visible = write is not None and not write.hidden
        value, source = fake(node), write.target if write and visible else first_tensor(node)
        keys = set() if node.op == "output" else storages(value)
        if not keys and (value is None or _tensors(value)) and node.users:
            self._spoil(self._keys(node.all_input_nodes), f"what {node.name} returns is not known")
        for key in keys:
            sources = [n for n in node.all_input_nodes if self.storage.get(n) == key]
            if source in sources:
                self._add_view(node, source, visible)
            elif sources:
                self._spoil([key], f"{node.name} shares memory with an argument that is not its first")
            elif key in self.roots:
                names = f"{self.roots[key].name} and {node.name}"
                self._spoil([key], f"{names} share memory, neither as a view of the other")
            elif isinstance(value, Tensor):
                self.roots[key], self.storage[node], self.depth[node] = node, key, 0
        if write and write.reason:
            self._spoil(self._keys(write.targets), write.reason)
        if write and visible:
            self.writes[node] = write

    def _add_view(self, node: fx.Node, source: fx.Node, is_write: bool) -> None:
        self.storage[node] = self.storage[source]
        source = self.itself(source)
        cuts_gradient = op_name(node) in ("detach", *_NOT_REPEATABLE)
        if is_write or (not cuts_gradient and _is_same(fake(node), fake(source))):
            self.same[node] = source
        else:
            self.parent[node], self.depth[node] = source, self.depth[source] + 1

    def _find_problems(self, program: Program) -> None:
        """Record storages that are not the graph's own, or whose gradient depends on where they are written."""
        pointers, transformed = Counter(map(_pointer, program.values.values())), transformed_nodes(program.graph)
        for key in self._keys(write.target for write in self.writes.values()):
            root = self.roots[key]
            pointer = _pointer(program.values.get(root.name)) if root.op == "placeholder" else 0
            if program.is_parameter(root) or root.op == "get_attr":
                self._spoil([key], f"{root.name} is a parameter or constant of the model")
            if pointer and pointers[pointer] > 1:
                self._spoil([key], f"another input shares the memory of {root.name}")
        for node, key in self.storage.items():
            if len(self._modes[key]) > 1 and node_needs_gradient(node):
                self._spoil([key], f"{node.name} is made, viewed or written under another gradient mode")
            if node in transformed and (node in self.parent or node in self.writes):
                self._spoil([key], f"{node.name} is made inside a function transform")

    def _find_unrepeatable_views(self) -> None:
        changed = self._keys(write.target for write in self.writes.values())
        for node in self.parent:
            others = self._keys(n for n in node.all_input_nodes if n is not first_tensor(node))
            if not called_name(node) or op_name(node) in _NOT_REPEATABLE or others & changed:
                self._spoil(self._keys([node]), f"the view {node.name} cannot be made again from another tensor")

    def _final_copies(self, graph: fx.Graph) -> set[fx.Node]:
        """Return copies into inputs that are followed only by views for the output, as this pass itself leaves them."""
        *nodes, output = graph.nodes
        views: set[fx.Node] = set()
        while nodes and nodes[-1] in self.parent:
            views.add(nodes.pop())
        copies: list[fx.Node] = []
        while nodes and op_name(nodes[-1]) == "copy_" and self.writes[nodes[-1]].target.op == "placeholder":
            copies.append(nodes.pop())
        inputs = {self.writes[copy].target for copy in copies}
        read = [n for copy in copies for n in copy.all_input_nodes if n not in inputs]
        read += [n for n in output.all_input_nodes if n.op != "placeholder" and n not in views]
        if len(inputs) < len(copies) or self._keys(inputs) & self._keys(read):
            return set()
        return {copy for copy in copies if not self.reason(copy)}


def with_modes(graph: fx.Graph) -> Iterator[tuple[fx.Node, Any, int]]:
    """Yield nodes with their gradient mode and autocast depth."""
    grad: Any = next((not n.args[0] for n in graph.nodes if op_name(n) == "_set_grad_enabled"), True)
    autocast = 0
    for node in graph.nodes:
        name = op_name(node)
        grad = node.args[0] if name == "_set_grad_enabled" else grad
        autocast += (name == "_enter_autocast") - (name == "_exit_autocast")
        yield node, grad, autocast


def _tensors(value: Any) -> list[Tensor]:
    return [v for v in torch.utils._pytree.tree_leaves(value) if isinstance(v, Tensor)]


def node_needs_gradient(node: fx.Node) -> bool:
    """Return whether a node's value requires a gradient."""
    return any(tensor.requires_grad for tensor in _tensors(fake(node)))


def storages(value: Any) -> set[int]:
    """Return the storages of the tensors in a fake value; none if a tensor has no storage."""
    try:
        return {tensor.untyped_storage()._cdata for tensor in _tensors(value)}
    except (RuntimeError, NotImplementedError):
        return set()


def _pointer(value: Any) -> int:
    """Return the address of a real tensor's memory, 0 if unknown."""
    try:
        real = isinstance(value, Tensor) and not isinstance(value, FakeTensor)
        return value.untyped_storage().data_ptr() if real else 0
    except (RuntimeError, NotImplementedError):
        return 0


def form_of(value: Tensor) -> tuple[Any, ...]:
    """Return dtype, sizes and strides of a tensor, symbols as text, because comparing them would add a guard."""
    sizes = [str(size) for size in (*value.shape, *value.stride())]
    return value.dtype, value.device, value.is_conj(), value.is_neg(), *sizes


def _is_same(value: Any, source: Any) -> bool:
    """Return whether two fake values of one storage are the identical tensor."""
    if not isinstance(value, Tensor) or not isinstance(source, Tensor):
        return False
    return form_of(value) == form_of(source) and str(value.storage_offset()) == str(source.storage_offset())
