"""A contraction of two tensors in any spelling: which axes are shared, summed, or from one operand only.

    torch.matmul(q, k.mT)                       left (b0, b1, m, k)   right (b0, b1, k, n)   result (b0, b1, m, n)
    torch.einsum("b i h d, b j h d -> b h i j", q, k)
    (q[..., :, None, :] * k[..., None, :, :]).sum(-1)
    F.linear(x, w)      torch.inner(q, k)      torch.linalg.vecdot(q[..., :, None, :], k[..., None, :, :])

All later stages work on labels, independently of the spelling of a product.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fhopt.passes.graph.evaluate import example_shape
from fhopt.passes.graph.nodes import argument, fake, op_name

MATMUL = frozenset({"matmul", "linalg_matmul", "bmm", "mm", "__matmul__", "linear"})
VECDOT = frozenset({"linalg_vecdot", "vecdot"})
PERMUTATIONS = frozenset({"transpose", "permute", "t", "T", "mT", "swapaxes", "swapdims", "movedim", "adjoint"})
Axes = tuple[str, ...]  # one label per axis; "" for a broadcast axis of size one


@dataclass(frozen=True)
class Contraction:
    """A product result[axes] = sum of left[left_axes] * right[right_axes] over the labels missing from `axes`."""

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_axes: Axes
    right_axes: Axes
    axes: Axes

    @property
    def summed(self) -> frozenset[str]:
        """Labels that are summed over."""
        return (frozenset(self.left_axes) & frozenset(self.right_axes)) - frozenset(self.axes) - {""}

    @property
    def shared(self) -> frozenset[str]:
        """Labels of both operands that are also in the result: batch and heads."""
        return frozenset(self.left_axes) & frozenset(self.right_axes) & frozenset(self.axes) - {""}

    def swapped(self) -> Contraction:
        """Return the contraction with its operands exchanged."""
        return replace(
            self, left=self.right, right=self.left, left_axes=self.right_axes, right_axes=self.left_axes
        )  # fmt: skip


def read_contraction(node: fx.Node) -> Contraction | None:
    """Parse the contraction that `node` computes, None for anything else."""
    name = op_name(node)
    if name == "einsum":
        result = _read_einsum(node)
    elif name in MATMUL:
        result = _read_matmul(node, name)
    elif name == "inner":
        result = _read_inner(node)
    elif name in VECDOT:
        result = _read_vecdot(node)
    elif name == "tensordot":
        result = _read_tensordot(node)
    elif name == "sum":
        result = _read_sum(node)
    else:
        return None
    return result and replace(
        result, **_peeled(result.left, result.left_axes, "left"), **_peeled(result.right, result.right_axes, "right")
    )


def _tensor(candidate: Any) -> bool:
    return isinstance(candidate, fx.Node) and isinstance(fake(candidate), Tensor)


def _read_matmul(node: fx.Node, name: str) -> Contraction | None:
    left, right = (argument(node, 0, "input", "self"), argument(node, 1, "other", "mat2", "weight"))
    if not _tensor(left) or not _tensor(right) or (name == "linear" and argument(node, 2, "bias") is not None):
        return None
    a, b = example_shape(left), example_shape(right)
    if min(len(a), len(b)) < 2:
        return None
    if name == "linear":
        free = tuple(f"m{i}" for i in range(len(a) - 1))
        return Contraction(node, left, right, (*free, "k"), ("n", "k"), (*free, "n"))
    batch = max(len(a), len(b)) - 2
    result = example_shape(node)[:batch]
    left_batch, right_batch = (_aligned(s[:-2], result) for s in (a, b))
    labels = tuple(f"b{i}" for i in range(batch))
    return Contraction(node, left, right, (*left_batch, "m", "k"), (*right_batch, "k", "n"), (*labels, "m", "n"))


def _read_inner(node: fx.Node) -> Contraction | None:
    """Parse the inner products of all rows of two tensors: result[left rows, right rows]."""
    left, right = argument(node, 0, "input", "self"), argument(node, 1, "other")
    if not _tensor(left) or not _tensor(right) or min(len(example_shape(n)) for n in (left, right)) < 1:
        return None
    rows, others = (
        tuple(f"{side}{i}" for i in range(len(example_shape(n)) - 1))
        for side, n in zip("mn", (left, right), strict=True)
    )
    return Contraction(node, left, right, (*rows, "k"), (*others, "k"), (*rows, *others))


def _read_vecdot(node: fx.Node) -> Contraction | None:
    """Parse a broadcast product of two tensors, summed over one axis."""
    left, right = argument(node, 0, "x", "input", "self"), argument(node, 1, "y", "other")
    if not _tensor(left) or not _tensor(right):
        return None
    sizes = [example_shape(n) for n in (left, right)]
    return _summed_product(node, left, right, torch.broadcast_shapes(*sizes), argument(node, 2, "dim", default=-1))


def _aligned(shape: Sequence[int], result: Sequence[int]) -> Axes:
    """Return labels b0, b1, ... of batch axes, right-aligned as in broadcasting; "" for a broadcast axis."""
    offset = len(result) - len(shape)
    return tuple("" if n == 1 and result[offset + i] != 1 else f"b{offset + i}" for i, n in enumerate(shape))


def _read_tensordot(node: fx.Node) -> Contraction | None:
    left, right = argument(node, 0, "a", "self"), argument(node, 1, "b", "other")
    dims = argument(node, 2, "dims", "dims_self", default=2)
    if not _tensor(left) or not _tensor(right):
        return None
    ranks = [len(example_shape(n)) for n in (left, right)]
    if isinstance(dims, int):
        pairs = [(ranks[0] - dims + i, i) for i in range(dims)]
    else:
        first: Any
        second: Any
        first, second = dims if node.op != "call_function" or len(dims) == 2 else (dims, node.args[3])
        pairs = [(i % ranks[0], j % ranks[1]) for i, j in zip(first, second, strict=True)]
    summed = {j: f"m{i}" for i, j in pairs}
    a = tuple(f"m{i}" for i in range(ranks[0]))
    b = tuple(summed.get(j, f"n{j}") for j in range(ranks[1]))
    return Contraction(node, left, right, a, b, tuple(x for x in (*a, *b) if x not in summed.values()))


def _read_einsum(node: fx.Node) -> Contraction | None:
    equation: Any
    rest: Any
    equation, *rest = node.args
    if not isinstance(equation, str):
        equation, rest = _from_sublists(node.args)
    operands = rest[0] if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else rest
    if not isinstance(equation, str) or len(operands) != 2 or not all(_tensor(o) for o in operands):
        return None
    left, right = operands
    shapes = [example_shape(left), example_shape(right)]
    parsed = parse_einsum(equation, [len(s) for s in shapes])
    if parsed is None:
        return None
    (a, b), result = parsed
    sizes: dict[str, int] = {}
    for labels, shape in ((a, shapes[0]), (b, shapes[1])):
        for label, size in zip(labels, shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
    narrowed = [
        tuple("" if n == 1 and sizes[x] > 1 else x for x, n in zip(labels, shape, strict=True))
        for labels, shape in ((a, shapes[0]), (b, shapes[1]))
    ]
    return Contraction(node, left, right, narrowed[0], narrowed[1], result)


def _from_sublists(arguments: tuple[Any, ...]) -> tuple[str, list[Any]]:
    """Convert einsum(a, [0, 1], b, [1, 2], [0, 2]) to an equation; "" without axes of the result."""
    operands, lists = list(arguments[0::2]), list(arguments[1::2])
    if len(arguments) % 2 == 0 or not all(isinstance(i, int) for term in lists for i in term):
        return "", []
    result = operands.pop()
    terms = ["".join(string.ascii_letters[i] for i in term) for term in (*lists, result)]
    return ",".join(terms[:-1]) + "->" + terms[-1], operands


def parse_einsum(equation: str, ranks: Sequence[int]) -> tuple[list[Axes], Axes] | None:
    """Return the labels of operands and result; None for diagonals (a label twice in one operand)."""
    text = equation.replace(" ", "")
    inputs, arrow, output = text.partition("->")
    terms = inputs.split(",")
    widest = max((r - len(t.replace("...", "")) for t, r in zip(terms, ranks, strict=True) if "..." in t), default=0)
    dots = tuple(f"...{i}" for i in range(widest))

    def labels(term: str, rank: int) -> Axes:
        head, result, tail = term.partition("...")
        middle = dots[len(dots) - (rank - len(head) - len(tail)) :] if result else ()
        return (*head, *middle, *tail)

    operands = [labels(t, r) for t, r in zip(terms, ranks, strict=True)]
    if any(len(set(o)) != len(o) for o in operands):
        return None
    if not arrow:  # implicit result: every label that occurs once, in alphabetical order
        once = [x for x in string.ascii_letters if inputs.count(x) == 1]
        output = ("..." if "..." in inputs else "") + "".join(sorted(once))
    return operands, labels(output, len(output.replace("...", "")) + len(dots))


def _read_sum(node: fx.Node) -> Contraction | None:
    """Parse (a * b).sum(axis), with broadcasting."""
    product, axis = argument(node, 0, "input", "self"), argument(node, 1, "dim", "axis")
    if not isinstance(product, fx.Node) or op_name(product) not in {"mul", "multiply"} or not _tensor(product):
        return None
    left, right = argument(product, 0, "input", "self"), argument(product, 1, "other")
    axes = [axis] if isinstance(axis, int) else list(axis or ())
    if not _tensor(left) or not _tensor(right) or len(axes) != 1:
        return None
    return _summed_product(node, left, right, example_shape(product), axes[0], bool(argument(node, 2, "keepdim")))


def _summed_product(
    node: fx.Node, left: fx.Node, right: fx.Node, full: Sequence[int], axis: int, keep: bool = False
) -> Contraction | None:
    """Parse a broadcast product of shape `full`, summed over one axis."""
    summed = axis % len(full)
    a, b = (_aligned(example_shape(n), full) for n in (left, right))
    if f"b{summed}" not in a or f"b{summed}" not in b:
        return None
    result = tuple("" if i == summed else f"b{i}" for i in range(len(full)) if keep or i != summed)
    return Contraction(node, left, right, a, b, result)


def _peeled(node: fx.Node, axes: Axes, side: str) -> dict[str, Any]:
    """Return the operand before axis permutations: `k.transpose(-1, -2)` is k with its labels permuted."""
    while op_name(node) in PERMUTATIONS and len(node.all_input_nodes) == 1:
        source = node.all_input_nodes[0]
        order = permutation(node, len(example_shape(source)))
        if order is None:
            break
        before = [""] * len(order)
        for position, origin in enumerate(order):
            before[origin] = axes[position]
        node, axes = source, tuple(before)
    return {side: node, f"{side}_axes": axes}


def permutation(node: fx.Node, rank: int) -> tuple[int, ...] | None:
    """Return the input axis of each output axis if the node only permutes axes, by running it; None otherwise."""
    probe = torch.empty(tuple(range(2, rank + 2)), device="meta")
    arguments, options = fx.node.map_arg((node.args, node.kwargs), lambda n: probe)
    try:
        target: Any = getattr(torch.Tensor, str(node.target)) if node.op == "call_method" else node.target
        result = target(*arguments, **options)
    except (RuntimeError, TypeError, IndexError, NotImplementedError):
        return None
    return tuple(n - 2 for n in result.shape) if isinstance(result, Tensor) and result.dim() == rank else None
