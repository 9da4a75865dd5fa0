"""The origin of each axis of a tensor, and the conversion of tensors to [batch, heads, tokens, channels].

An *atom* is an axis that no operation splits further: a batch axis, kv heads, the query heads of one kv head, queries,
keys, channels. Every axis of a tensor is a tuple of atoms, row-major: `[B*H, S, D]` is `(b h) (s) (d)`. The atoms of an
axis are found by *running* the data-movement operations on coordinates; all other operations leave layouts unchanged
and are skipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fhopt.passes.graph.evaluate import Evaluator, example_shape
from fhopt.passes.graph.nodes import argument, fake, op_name

Layout = tuple[tuple[str, ...], ...]  # the atoms of each axis
Steps = tuple[tuple[str, tuple[Any, ...]], ...]  # tensor methods, applied in order
MOVEMENT_NAMES = (
    "t transpose permute view reshape getitem T mT contiguous chunk split split_with_sizes squeeze unsqueeze numpy_T "
    "slice select expand expand_as flatten unflatten movedim moveaxis swapaxes swapdims adjoint repeat "
    "repeat_interleave unbind narrow view_as reshape_as _unsafe_view tile broadcast_to roll flip unfold index_select "
    "tensor_split unsafe_chunk unsafe_split"
)
MOVEMENT = frozenset(MOVEMENT_NAMES.split())
JOINS = frozenset({"cat", "concat", "stack", "view_as_complex", "view_as_real", "pad", "written"})


# --------------------------------------------------------------------------------------------------- arrangement


def arrangement(source: Layout, target: Layout, sizes: Mapping[str, int]) -> Steps:
    """Return the methods that convert a tensor from layout `source` to `target`; none if they are equal.

    `sizes` gives the size of each atom that must be split from others or added (-1: the remaining size). Atoms missing
    from `source` are added by expansion. Raises KeyError if a required size is unknown.
    """
    steps: list[tuple[str, tuple[Any, ...]]] = []
    atoms: list[str] = []
    for axis in source:
        if len(axis) != 1:
            steps.append(
                ("unflatten", (len(atoms), tuple(sizes[a] for a in axis))) if axis else ("squeeze", (len(atoms),))
            )
        atoms.extend(axis)
    wanted = [atom for axis in target for atom in axis]
    for atom in wanted:
        if atom not in atoms:
            steps += [("unsqueeze", (len(atoms),)), ("expand", (*[-1] * len(atoms), sizes[atom]))]
            atoms.append(atom)
    order = tuple(atoms.index(atom) for atom in wanted)
    if order != tuple(range(len(order))):
        steps.append(("permute", order))
    for position, axis in enumerate(target):
        if not axis:
            steps.append(("unsqueeze", (position,)))
        elif len(axis) > 1:
            steps.append(("flatten", (position, position + len(axis) - 1)))
    return tuple(steps)


def arrange(tensor: Tensor, steps: Steps) -> Tensor:
    """Apply the steps."""
    for method, arguments in steps:
        tensor = getattr(tensor, method)(*arguments)
    return tensor


# --------------------------------------------------------------------------------------------------- tracing axes


def coordinates(shape: Sequence[int], axis: int, split: tuple[int, int] | None = None) -> Tensor:
    """Return the index along one axis for every element, as a view of one row.

    split: (divisor, modulus) of the returned part of the index.
    """
    row = torch.arange(shape[axis])
    if split is not None:
        row = row // split[0] % split[1]
    return row.reshape(-1, *[1] * (len(shape) - axis - 1)).expand(tuple(shape))


def moved(base: Evaluator, values: Mapping[fx.Node, Tensor], path: Iterable[fx.Node], end: fx.Node) -> Tensor | None:
    """Return the values that arrive at `end` if `path` (in graph order) only moves data; None if unknown.

    Elements joined from elsewhere are -1.
    """
    known: dict[fx.Node, Any] = dict(values)
    for node in path:
        if node in known:
            continue
        known[node] = _moved_through(base, node, known)
    value = known.get(end)
    return value if isinstance(value, Tensor) else None


def _moved_through(base: Evaluator, node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
    inputs = [n for n in node.all_input_nodes if known.get(n) is not None]
    if not inputs:
        return None
    name = op_name(node)
    if name == "written" and inputs == [node.args[0]]:  # writing over some elements moves nothing
        return known[inputs[0]]
    if name in MOVEMENT | JOINS:
        try:
            return _run_movement(base, node, name, known)
        except Exception:  # an operation that cannot run on integers does more than move data
            return None
    if not isinstance(fake(node), Tensor):
        return None
    shape = example_shape(node)
    for source in inputs:  # pointwise: the operand of the result's shape gives the coordinates
        value = known[source]
        if isinstance(value, Tensor) and value.shape == shape:
            return value
    for source in inputs:
        value = known[source]
        if isinstance(value, Tensor) and _broadcasts(value.shape, shape) and example_shape(source) != ():
            return value.expand(shape)
    return None


def _run_movement(base: Evaluator, node: fx.Node, name: str, known: Mapping[fx.Node, Any]) -> Any:
    if name == "view_as_complex":
        return known[node.all_input_nodes[0]].select(-1, 0)
    if name == "view_as_real":
        value = known[node.all_input_nodes[0]]
        return torch.stack((value, value), -1)
    if name == "pad":
        return torch.nn.functional.pad(known[node.all_input_nodes[0]], argument(node, 1, "pad"), value=-1)

    def load(source: fx.Node) -> Any:
        if known.get(source) is not None:
            return known[source]
        value = fake(source)
        if isinstance(value, Tensor) and (value.dtype.is_floating_point or name in JOINS):
            return torch.full((), -1).expand(example_shape(source))
        return base.example(source)

    arguments: Any
    arguments, options = fx.node.map_arg((node.args, node.kwargs), load)
    arguments, options = base.sized(name, arguments, options)
    if name in {"view", "_unsafe_view"}:  # coordinates are views of one row; what can be viewed can be reshaped
        return torch.reshape(arguments[0], _sizes(arguments[1:]))
    if node.op == "call_method":
        return getattr(arguments[0], str(node.target))(*arguments[1:], **options)
    target: Any = node.target
    return target(*arguments, **options)


def _sizes(arguments: Sequence[Any]) -> Sequence[int]:
    """Return the sizes of view(2, -1) and of view((2, -1))."""
    return arguments[0] if len(arguments) == 1 and isinstance(arguments[0], (tuple, list)) else arguments


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))


def read_layout(probes: Mapping[str, Tensor]) -> Layout:
    """Return the atoms of each axis of a tensor, given the moved coordinates of each atom."""
    rank = next(iter(probes.values())).dim()
    return tuple(_axis_atoms(probes, axis) for axis in range(rank))


def _axis_atoms(probes: Mapping[str, Tensor], axis: int) -> tuple[str, ...]:
    """Return the atoms that vary along one axis, the slowest first."""
    changes: dict[str, int] = {}
    for atom, value in probes.items():
        row = axis_values(value, axis)
        row = row[row >= 0]
        different = (row != row[:1]).nonzero()
        if different.numel():
            changes[atom] = int(different[0])
    return tuple(sorted(changes, key=lambda atom: -changes[atom]))


def axis_values(value: Tensor, axis: int) -> Tensor:
    """Return the values along one axis, at index 0 of all others."""
    for other in reversed(range(value.dim())):
        if other != axis:
            value = value.select(other, 0)
    return value
