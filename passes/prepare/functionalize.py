"""Functionalization of in-place changes: pure def-use graphs, with copies into inputs only at the end.

    before                                             after
    %v = .view(%x, 16)                                 %mul = .mul(%x, 2)
    %mul_ = .mul_(%x, 2)                               %v_1 = .view(%mul, 16)
    %left = getitem(%k, [..., :16])                    %written = written(%k, [[getitem, ...]], 'copy_', [%v_1])
    %copy_ = .copy_(%left, %v)                         %index_copy = .index_copy(%cache, 0, %at, %written)
    %index_copy_ = .index_copy_(%cache, 0, %at, %k)    %sum_1 = .sum(%index_copy)
    %sum_1 = .sum(%cache)                              %copy__default = aten.copy_.default(%cache, %index_copy)
    return [%sum_1]                                    return [%sum_1]

Two nodes share memory exactly if their fake values have one storage. The nodes of a storage form a tree: the node that
made it, its views, their views. A backward walk finds for each write its base: the smallest tensor of the tree that
contains everything used later. A forward walk then replaces the write by a new value of the base; a view used later is
repeated directly after that value. A write of a whole base becomes the plain operation, any other becomes `written`,
which works on a copy. torch.func.functionalize does this to aten ops below autograd; this pass does it to graphs of
torch functions and methods, which stay differentiable and readable.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fhopt.errors import Miss
from fhopt.passes.graph.nodes import copy_node, fake, fake_mode, inheriting_gradient, on_fakes, op_name
from fhopt.passes.graph.program import Program
from fhopt.passes.prepare.memory import (
    RANDOM,
    GraphMemory,
    Step,
    behind_first,
    called_name,
    first_tensor,
    form_of,
    is_idle,
    named_callable,
    node_needs_gradient,
    plain_operation,
    storages,
)


@dataclass(frozen=True)
class Functionalized:
    """The result of `Functionalize.run`: number of in-place nodes removed, and the remaining ones, with reasons."""

    changed: int
    left: tuple[Miss, ...]


@dataclass(frozen=True)
class Functionalize:
    """The pass `functionalize`: exact, one backward and one forward walk. Replaces all writes of a storage, or none."""

    name: str = "functionalize"

    def candidates(self, program: Program) -> list[fx.Node]:
        """Return the nodes that change a tensor in place, except copies into inputs at the very end."""
        memory = GraphMemory(program)
        return [node for node in memory.writes if node not in memory.final]

    def run(self, program: Program) -> Functionalized:
        """Rewrite `program` in place. Nodes that must change their tensor in place keep their position."""
        memory = GraphMemory(program)
        left = tuple(Miss(reason, node) for node in memory.writes if (reason := memory.reason(node)))
        changed = len(memory.writes) - len(memory.final) - len(left)
        if changed:
            stay = {miss.node for miss in left}
            targets = (write.target for node, write in memory.writes.items() if node not in stay)
            _Rewriting(program, memory, {memory.storage[target] for target in targets}).run()
        return Functionalized(changed, left)


# -------------------------------------------------------------------------------------------- writes as pure functions


def written(
    base: Tensor,
    path: Iterable[Step],
    operation: str,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """Copy `base` and apply `operation` to the view of the copy that `path` leads to; `base` stays unchanged.

    path: views, first to last. operation: name of the op that changes its first argument in place, or its `out` if
    `kwargs` has one. A name without a dot is a method's, any other is qualified. Traceable and differentiable.
    Raises RuntimeError if the view would be a copy.
    """
    options, path = dict(kwargs or {}), tuple(path)
    result = _copy(base)
    view = _view(result, path)
    if storages(view) != storages(result):  # a reshape of other strides than in the traced graph copies
        result = base.clone(memory_format=torch.contiguous_format)
        view = _view(result, path)
        if storages(view) != storages(result):
            raise RuntimeError(f"{operation} writes to a copy; expected a view of strides {base.stride()}")
    if "out" in options:
        named_callable(operation)(*args, **{**options, "out": view})
    else:
        named_callable(operation)(view, *args, **options)
    return result


def _view(tensor: Tensor, path: Iterable[Step]) -> Tensor:
    for name, others, options in path:
        tensor = named_callable(name)(tensor, *others, **options)
    return tensor


def _copy(base: Tensor) -> Tensor:
    """Copy a tensor with its strides: with others, a view of it could become a copy, or a copy a view.

    An expanded tensor gets memory for all its elements: later passes may replace the written value by it.
    """
    copied = base.clone()
    if copied.stride() == base.stride() or 0 in base.stride():
        return copied
    return base.new_empty_strided(base.size(), base.stride()).copy_(base)


# ----------------------------------------------------------------------------------------------------------- rewriting


class _Rewriting:
    """The rewriting of all writes to the storages in `chosen`.

    targets: write -> the tree node that it changes. bases: write -> the node of which it makes a new value; a write
    without a base is unused. version: storage -> number of its values so far. base: storage -> the node that is up to
    date, with its views. known: node -> (version, the node that holds its value).
    """

    def __init__(self, program: Program, memory: GraphMemory, chosen: set[int]) -> None:
        self.program, self.graph, self.memory = program, program.graph, memory
        self.mode = fake_mode(program)
        self.output = next(iter(reversed(program.graph.nodes)))
        self.roots = {key: memory.roots[key] for key in memory.roots if key in chosen}
        self.inputs = {key: root for key, root in self.roots.items() if root.op == "placeholder"}
        writes = ((node, memory.itself(write.target)) for node, write in memory.writes.items())
        self.targets = {node: target for node, target in writes if self._is_ours(target)}
        self.views = {n for n in (*memory.parent, *memory.same) if self._is_ours(n) and n not in self.targets}
        self.bases: dict[fx.Node, fx.Node] = {}
        self.version = dict.fromkeys(self.roots, 0)
        self.base = dict(self.roots)
        self.known = {root: (0, root) for root in self.roots.values()}

    def run(self) -> None:
        """Plan from the end, replace from the start, write inputs back, and drop unused nodes."""
        *nodes, _ = self.graph.nodes
        self._plan()
        for node in nodes:
            self._replace(node)
        self._write_back()
        for node in reversed(nodes):
            if (node in self.targets or node in self.views) and not node.users:
                self.graph.erase_node(node)

    def _is_ours(self, node: fx.Node) -> bool:
        return self.memory.storage.get(node) in self.roots

    # ---- backward: later uses

    def _plan(self) -> None:
        """Find the base of each write: the last common source of the written node and of everything used later."""
        needed: dict[int, fx.Node] = dict(self.inputs)  # storage -> what must be up to date from here on
        for node in reversed(self.graph.nodes):
            if node in self.targets:
                self._plan_write(node, needed)
            elif node in self.views and node in self.memory.parent:
                self._plan_view(node, needed)
            for read in self._reads(node):
                key = self.memory.storage[read]
                needed[key] = self.memory.common(needed.get(key, read), read)

    def _plan_view(self, node: fx.Node, needed: dict[int, fx.Node]) -> None:
        """Require a view's source instead of the view before the view exists."""
        later = needed.get(self.memory.storage[node])
        if later is not None and self.memory.common(later, node) is node:
            needed[self.memory.storage[node]] = self.memory.parent[node]

    def _plan_write(self, node: fx.Node, needed: dict[int, fx.Node]) -> None:
        target = self.targets[node]
        key = self.memory.storage[target]
        if is_idle(node) or (key not in needed and not _draws(node)):  # random draws keep their order, used or not
            return
        base = self.memory.common(needed.get(key, target), target)
        while not isinstance(fake(base), Tensor):  # the items of a chunk are views of a tuple
            base = self.memory.parent[base]
        self.bases[node] = needed[key] = base

    def _reads(self, node: fx.Node) -> list[fx.Node]:
        """Return the tree nodes whose value `node` uses. The output node returns inputs without using their value."""
        results = [n for n in node.all_input_nodes if self._is_ours(n)]
        if node in self.targets:
            results.remove(self.memory.writes[node].target)
        elif node in self.views:
            results.remove(first_tensor(node))
        elif node is self.output:
            results = [n for n in results if self.memory.storage[n] not in self.inputs]
        return [self.memory.itself(n) for n in results]

    # ---- forward: new values

    def _replace(self, node: fx.Node) -> None:
        if node in self.targets:
            self._replace_write(node)
        elif node not in self.views:
            self._update(node)
        elif node in self.memory.parent and self._is_current(self.memory.parent[node]):
            self._update(node)
            version = self.version[self.memory.storage[node]]
            if version:  # the fake value must share memory with what the node is a view of now
                value = inheriting_gradient(node, self._evaluate(node.op, node.target, node.args, node.kwargs))
                node.meta.update(example_value=value, val=value)
            self.known[node] = (version, node)

    def _replace_write(self, node: fx.Node) -> None:
        if (base := self.bases.get(node)) is None:
            return
        key = self.memory.storage[base]
        with self.graph.inserting_before(node):
            value = self._as_plain(node, base) or self._as_written(node, base)
        self._set(key, base, value)

    def _set(self, key: int, base: fx.Node, value: fx.Node) -> None:
        self.version[key] += 1
        self.base[key], self.known[base] = base, (self.version[key], value)

    def _as_plain(self, node: fx.Node, base: fx.Node) -> fx.Node | None:
        """Insert the plain operation if its result has the same dtype, device, sizes and strides.

        Not under autocast, which would change the dtype. Not if the operation saves an input for its gradient, which
        could then not be written back: `written` saves a copy.
        """
        plain = plain_operation(node) if base is self.targets[node] and node not in self.memory.autocast else None
        saved = self._current(base).op == "placeholder" and any(map(node_needs_gradient, node.all_input_nodes))
        if plain is None or saved:
            return None
        op, target, args, kwargs = plain
        args, kwargs = self._updated((args, kwargs))
        try:
            value = self._evaluate(op, target, args, kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
            return None
        fits = isinstance(value, Tensor) and form_of(value) == form_of(fake(base))
        return self._make(op, target, args, kwargs, value, node) if fits else None

    def _as_written(self, node: fx.Node, base: fx.Node) -> fx.Node:
        """Insert a call of `written`, which works on a copy of the base."""
        args, kwargs = self._updated((node.args, node.kwargs))
        if self.memory.writes[node].target is node.kwargs.get("out"):
            kwargs = {**kwargs, "out": None}
        else:
            args, kwargs = behind_first(args, kwargs)
        steps = self.memory.path(base, self.targets[node])
        path = [(called_name(step), *behind_first(step.args, step.kwargs)) for step in steps]
        arguments = (self._current(base), path, called_name(node), args, kwargs)
        with on_fakes(self.mode):
            value = _copy(fake(base))
        return self._make("call_function", written, arguments, {}, value, node)

    def _write_back(self) -> None:
        """Copy the last values into the inputs; outputs that alias an input are recomputed from the input."""
        last = {self.memory.storage[target]: node for node, target in self.targets.items()}
        copy = torch.ops.aten.copy_.default
        for key, root in self.inputs.items():
            if self.version[key]:
                with self.graph.inserting_before(self.output):
                    self._make("call_function", copy, (root, self.known[root][1]), {}, fake(root), last[key])
                self._set(key, root, root)
        self._update(self.output)

    # ---- nodes

    def _is_current(self, node: fx.Node) -> bool:
        """Return whether the value of a tree node is up to date, or follows from one that is."""
        base = self.base[self.memory.storage[node]]
        return self.memory.common(base, node) is base

    def _current(self, node: fx.Node) -> fx.Node:
        """Return the node that holds the current value of `node`; a view is repeated right after its source."""
        node = self.memory.itself(node)
        version = self.version[self.memory.storage[node]]
        known, current = self.known.get(node, (-1, node))
        if known == version:
            return current
        source = self._current(self.memory.parent[node])
        behind_input = source.op == "placeholder"  # then its copy was written last, at the end
        with self.graph.inserting_before(self.output) if behind_input else self.graph.inserting_after(source):
            made = copy_node(self.program, node, {first_tensor(node): source})
        self.known[node] = (version, made)
        return made

    def _updated(self, arguments: Any) -> Any:
        return fx.node.map_arg(arguments, lambda n: self._current(n) if self._is_ours(n) else n)

    def _update(self, node: fx.Node) -> None:
        node.args, node.kwargs = self._updated((node.args, node.kwargs))

    def _evaluate(self, op: str, target: Any, args: Any, kwargs: Any) -> Any:
        """Compute the fake value of a call."""
        known, options = fx.node.map_arg((args, kwargs), fake)
        function = named_callable(target) if op == "call_method" else target
        with on_fakes(self.mode):
            return function(*known, **options)

    def _make(self, op: str, target: Any, args: Any, kwargs: Any, value: Any, origin: fx.Node) -> fx.Node:
        """Create a node with its fake value and the metadata of `origin`."""
        node = self.graph.create_node(op, target, tuple(args), dict(kwargs))
        value = inheriting_gradient(node, value)
        node.meta = {**origin.meta, "example_value": value, "val": value}
        return node


def _draws(node: fx.Node) -> bool:
    """Return whether a node draws random numbers."""
    return op_name(node) in RANDOM or "dropout" in op_name(node)
