"""The meaning of each axis of queries, keys, values and scores: batch, heads, tokens, channels.

    scores [B*H, S, T] of a bmm         (batch heads) (queries) (keys)
    scores "bgnst" of an einsum         (batch) (kv heads) (query heads of a kv head) (queries) (keys)

The softmax runs over the key axis. An axis whose index comes from features of the projection is a head axis; one whose
index comes from its rows is batch or queries; if it comes from both, the axis fuses several.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fhopt.errors import Miss
from fhopt.passes.graph.evaluate import Evaluator, Region, example_shape
from fhopt.passes.graph.nodes import fake, op_name, shape
from fhopt.passes.recognize.contraction import Contraction
from fhopt.passes.recognize.layout import (
    MOVEMENT,
    Layout,
    Steps,
    arrangement,
    axis_values,
    coordinates,
    moved,
    read_layout,
)
from fhopt.passes.recognize.node_roles import Kind, Roles
from fhopt.passes.recognize.readable import check_operands
from fhopt.passes.recognize.softmax import Softmax


@dataclass
class Axes:
    """The atoms of one attention, and the layouts of its tensors in atoms."""

    batch: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)  # heads of the keys
    shares: list[str] = field(default_factory=list)  # query heads per kv head
    queries: list[str] = field(default_factory=list)
    keys: str = ""
    channels: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)  # of atoms; -1: the remaining size
    split: dict[str, tuple[str, str]] = field(default_factory=dict)  # label of a fused axis -> its two atoms
    inner: dict[str, int] = field(default_factory=dict)  # label -> size of its second atom in the example

    def layout(self, labels: tuple[str, ...]) -> Layout:
        """Return the labels of a contraction as atoms."""
        return tuple(self.split.get(x, (x,) if x else ()) for x in labels)

    def canonical(self, kind: str) -> Layout:
        """Return [batch, heads, tokens, channels] of "query" or "key", [batch, heads, queries, keys] of "scores"."""
        heads = tuple(self.groups) + (tuple(self.shares) if kind != "key" else ())
        tokens = (self.keys,) if kind == "key" else tuple(self.queries)
        last = (self.keys,) if kind == "scores" else tuple(self.channels)
        return (tuple(self.batch), heads, tokens, last)

    def steps(self, source: Layout, target: Layout) -> Steps:
        """Return the tensor methods that convert one layout to another. Raises Miss if they need a symbolic size."""
        try:
            return arrangement(source, target, self.sizes)
        except KeyError as error:
            raise Miss(f"the size of axis {error} is symbolic; expected a number") from error


def key_label(softmax: Softmax, product: Contraction, base: Evaluator) -> str:
    """Return the label of the product over which the softmax runs. Raises Miss."""
    region = Region(base, [product.node], softmax.scores)
    labels = []
    for label in (x for x in product.axes if x and x not in product.shared):
        position = product.axes.index(label)
        probe = coordinates(example_shape(product.node), position)
        placed = moved(base, {product.node: probe}, region.nodes, softmax.scores)
        if placed is None:
            raise Miss("the path from the query-key matmul to the softmax is not recognized", softmax.scores)
        row = axis_values(placed, softmax.axis)
        row = row[row >= 0]
        if row.numel() == probe.shape[position] and bool((row == torch.arange(row.numel())).all()):
            labels.append(label)
    wide = [x for x in labels if example_shape(product.node)[product.axes.index(x)] > 1]
    if not wide and len(labels) > 1:
        raise Miss(
            "there is only one key, whose weight is always 1; expected several, as with a larger input", softmax.scores
        )
    if len(wide or labels) != 1:
        raise Miss("the softmax does not run over the keys of this matmul", softmax.scores)
    return (wide or labels)[0]


def read_axes(product: Contraction, keys: str, roles: Roles, base: Evaluator) -> Axes:
    """Classify the product's labels (queries on the left) by the origin of the query axes. Raises Miss."""
    check_operands(product.left, product.right)
    axes = Axes(keys=keys, channels=[x for x in product.left_axes if x in product.summed])
    for node, labels in ((product.left, product.left_axes), (product.right, product.right_axes)):
        known = zip(labels, shape(node) or (), strict=True)
        axes.sizes |= {x: n for x, n in known if x and isinstance(n, int)}
    origin = origins(product.left, roles, base)
    part = {x: origin.get(i, Origin()) for i, x in enumerate(product.left_axes) if x}
    if roles.kind(product.left) == Kind.WEIGHT:
        part |= _known_by_keys(product, keys, roles, base)
    _check_tokens(product, keys, part, roles, base)
    shared = [x for x in product.axes if x in product.shared]
    for label in product.axes:
        if not label or label == keys:
            continue
        if label not in product.left_axes:
            axes.batch.append(label)  # queries are the same for the whole batch
            continue
        rows, heads = (axes.batch, axes.groups) if label in product.shared else (axes.queries, axes.shares)
        where = part[label]
        if where.kind in {"rows heads", "heads rows"}:
            _split(axes, label, where, rows, heads)
        elif where.kind == "heads" or (label in shared and _is_head_by_place(label, shared, part)):
            heads.append(label)
        else:
            rows.append(label)
    return axes


def _known_by_keys(product: Contraction, keys: str, roles: Roles, base: Evaluator) -> dict[str, Origin]:
    """Return the origins of the shared axes of learned queries, whose head axes only the keys show. Raises Miss."""
    origin = origins(product.right, roles, base)
    part = {x: origin[i] for i, x in enumerate(product.right_axes) if x and x != keys and i in origin}
    own = [x for x, where in part.items() if x not in product.left_axes and "heads" in where.kind]
    if own:
        raise Miss("the heads of the keys share their learned queries; expected queries of each head", product.node)
    return {x: where for x, where in part.items() if x in product.shared}


def _check_tokens(product: Contraction, keys: str, part: Mapping[str, Origin], roles: Roles, base: Evaluator) -> None:
    """Raise Miss if both axes of the scores are channels: each channel attends to channels, over all tokens."""
    free = [x for x in product.axes if x in part and x not in product.shared]
    if not free or any(part[x].kind != "heads" for x in free):
        return
    if origins(product.right, roles, base).get(product.right_axes.index(keys), Origin()).kind == "heads":
        raise Miss(
            "the softmax runs over channels, as in cross-covariance attention (XCiT); expected one over tokens",
            product.node,
        )


def _is_head_by_place(label: str, shared: list[str], part: Mapping[str, Origin]) -> bool:
    """Return whether a label is the last of several shared axes: the head axis if nothing else identifies it."""
    is_known = any("heads" in part[x].kind for x in shared)
    return not part[label].kind and not is_known and len(shared) > 1 and label == shared[-1]


def _split(axes: Axes, label: str, where: Origin, rows: list[str], heads: list[str]) -> None:
    row, head = f"{label} rows", f"{label} heads"
    axes.split[label] = (row, head) if where.kind == "rows heads" else (head, row)
    axes.inner[label] = where.heads if where.kind == "rows heads" else where.rows
    axes.sizes |= {row: -1, head: where.heads}
    rows.append(row)
    heads.append(head)


@dataclass(frozen=True)
class Origin:
    """The origin of the indices along one axis: "heads", "rows", both with the outer one first, or "" (unknown)."""

    kind: str = ""
    heads: int = 1
    rows: int = 1


def origins(query: fx.Node, roles: Roles, base: Evaluator) -> dict[int, Origin]:
    """Return for each axis of the queries whether it comes from features or from rows of the projection."""
    projections = [p for p in roles.cut(query).projections if isinstance(fake(p.node), Tensor)]
    if not projections:
        return {}
    region = Region(base, [p.node for p in projections], query)
    placed = []
    for of_features in (True, False):
        values = {p.node: _numbered(example_shape(p.node), p.features, of_features) for p in projections}
        placed.append(moved(base, values, region.nodes, query) if query not in values else values[query])
    features, rows = placed
    if features is None or rows is None:
        return {}
    return {axis: _origin(axis_values(features, axis), axis_values(rows, axis)) for axis in range(features.dim())}


def _numbered(sizes: tuple[int, ...], features: tuple[int, ...], of_features: bool) -> Tensor:
    """Return indices 0, 1, ... over the feature axes, or over the other axes, constant along the rest."""
    chosen = [i for i in range(len(sizes)) if (i in features) == of_features]
    count = math.prod(sizes[i] for i in chosen)
    numbers = torch.arange(count).reshape([n if i in chosen else 1 for i, n in enumerate(sizes)])
    return numbers.expand(sizes)


def _origin(features: Tensor, rows: Tensor) -> Origin:
    of_features, of_rows = bool((features != features[:1]).any()), bool((rows != rows[:1]).any())
    if not of_features or not of_rows:
        return Origin("heads" if of_features else "rows" if of_rows else "")
    for kind, fast, slow in (("rows heads", features, rows), ("heads rows", rows, features)):
        inner = int((slow != slow[:1]).nonzero()[0])
        outer = len(slow) // inner
        if outer * inner == len(slow) and torch.equal(fast[:inner].repeat(outer), fast):
            return Origin(kind, inner if kind == "rows heads" else outer, outer if kind == "rows heads" else inner)
    return Origin()


def layout_at(end: fx.Node, product: Contraction, axes: Axes, base: Evaluator) -> Layout:
    """Return the atoms of each axis of `end`, computed from the scores of `product`. Raises Miss on an unknown path."""
    region = Region(base, [product.node], end)
    sizes, sources = example_shape(product.node), axes.layout(product.axes)
    if all(example_shape(n) == sizes for n in region.nodes if isinstance(fake(n), Tensor)) and not any(
        op_name(n) in MOVEMENT - {"contiguous"} for n in region.nodes
    ):
        return sources
    probes: dict[str, Tensor] = {}
    for atom, position, split in _places(product.axes, axes):
        placed = moved(base, {product.node: coordinates(sizes, position, split)}, region.nodes, end)
        if placed is None:
            raise Miss("the path from the attention weights to the second matmul is not recognized", end)
        probes[atom] = placed
    return _with_single(read_layout(probes), probes, example_shape(end), end)


def _places(labels: tuple[str, ...], axes: Axes) -> Iterator[tuple[str, int, tuple[int, int] | None]]:
    """Yield each atom, the axis of the product that contains it, and its (divisor, modulus) in that axis's index."""
    for position, label in enumerate(labels):
        if label in axes.split:
            outer, inner = axes.split[label]
            yield outer, position, (axes.inner[label], 2**62)
            yield inner, position, (1, axes.inner[label])
        elif label:
            yield label, position, None


def _with_single(layout: Layout, probes: Mapping[str, Tensor], sizes: tuple[int, ...], node: fx.Node) -> Layout:
    """Assign size-1 atoms, which coordinates cannot show, to axes of size 1; the rest goes to a neighbour's axis.

    Raises Miss on an atom in two axes.
    """
    placed = [a for axis in layout for a in axis]
    if len(set(placed)) != len(placed):
        raise Miss("an axis of the scores is split before the second matmul", node)
    left = [a for a in probes if a not in placed and not bool(probes[a].any())]
    axes = [[left.pop(0)] if not a and size == 1 and left else [*a] for a, size in zip(layout, sizes, strict=True)]
    order = [*probes]
    for atom in left:  # in a batch of one, an axis of batch and heads shows only its heads
        before, behind = order[: order.index(atom)][::-1], order[order.index(atom) :]
        near = next((a for a in (*before, *behind) if any(a in axis for axis in axes)), None)
        for axis in axes:
            if near in axis:
                axis.insert(axis.index(near) + (near in before), atom)
    return tuple(map(tuple, axes))


def value_steps(mix: Contraction, weights: Layout, axes: Axes) -> tuple[Steps, Steps]:
    """Return the steps for the values, and from the canonical result to the product's layout. Raises Miss."""
    check_operands(mix.right)
    held = dict(zip(mix.left_axes, weights, strict=True))
    if len(mix.summed) != 1 or held[next(iter(mix.summed))] != (axes.keys,):
        raise Miss("the second matmul does not sum over the keys only", mix.node)
    channels = [x for x in mix.right_axes if x and x not in mix.left_axes and x in mix.axes]
    for label, size in zip(mix.right_axes, shape(mix.right) or (), strict=True):
        if isinstance(size, int) and label in channels:
            axes.sizes.setdefault(f"value {label}", size)
    atoms = {**held, **{x: (f"value {x}",) for x in channels}, "": ()}
    layout = tuple(atoms[x] for x in mix.right_axes)
    last = tuple(f"value {x}" for x in channels)
    batch, groups, shares = tuple(axes.batch), tuple(axes.groups), tuple(axes.shares)
    repeated = any(a in axis for axis in layout for a in shares)
    value = axes.steps(layout, (batch, groups + shares if repeated else groups, (axes.keys,), last))
    result = tuple(atoms.get(x, ()) for x in mix.axes)
    whole = (batch, groups + shares, tuple(axes.queries), last)
    if sorted(a for axis in result for a in axis) != sorted(a for axis in whole for a in axis):
        raise Miss("the second matmul sums over heads or queries, or adds axes", mix.node)
    return value, axes.steps(whole, result)
