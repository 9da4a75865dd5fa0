"""Detection of the latents that a model already caches: the narrowest tensors that determine keys and values.

    z = norm(down(x))        [B, T, R]       narrowest_latents(k, v) -> (z, r)
    r = rope(x)              [B, T, P]
    k, v = split(up(z)); k = cat(k, r)

A latent has one row per token, and keys and values are affine functions of it. The latents are a minimum cut of the
graph upstream of keys and values; of equally narrow cuts, the one nearest to the attention. No spelling of a step is
matched: each node is run on random float64 values, and belongs to the expansion if it is affine.

Letters: B batch, T tokens, R latent width, P width of a rotated part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx

from fhopt.errors import Miss
from fhopt.passes.graph.evaluate import Evaluator, Region, example_shape, random_like, signature, smaller
from fhopt.passes.graph.nodes import fake, is_in_place, op_name, shape
from fhopt.passes.recognize.node_roles import Kind, Roles, view_root

BLANK = frozenset({"new_empty", "empty_like", "new_zeros", "zeros_like", "empty"})  # evaluated as 0
REACH = 200  # search depth upstream of keys and values, in nodes
ENOUGH = 40  # tokens for running steps, if the example has more


def narrowest_latents(key: fx.Node, value: fx.Node, roles: Roles, base: Evaluator) -> tuple[fx.Node, ...]:
    """Return the narrowest latents upstream of keys and values, those of the values first.

    Raises Miss if keys and values themselves are as narrow.
    """
    flow, stops = _flow(key, value, roles, base)
    own = [numbers_per_token(n, key) for n in dict.fromkeys((key, value))]
    alone = [_cut(flow, [n], key) for n in (key, value)]
    narrow = [sum(numbers_per_token(n, key) for n in cut) for cut in alone]
    if narrow[0] >= own[0] and narrow[1] < own[-1] and stops:
        raise Miss(f"keys or values are not affine in a latent: {max(stops).name} is not affine", max(stops))
    cut = _cut(flow, [key, value], key)
    width = sum(numbers_per_token(n, key) for n in cut)
    if width >= sum(own):
        raise Miss(
            f"no latent is narrower than keys and values: they have {sum(own)} elements per token, the latent {width}",
            key,
        )
    return tuple(sorted(cut, key=lambda n: (n not in alone[1], n)))


def _flow(key: fx.Node, value: fx.Node, roles: Roles, base: Evaluator) -> tuple[nx.DiGraph, list[fx.Node]]:
    """Return the flow network of affine steps leading to keys and values, and the nodes that are not affine.

    A node is an edge from (node, 0) to (node, 1) with capacity = elements per token; "start" is the source.
    """
    flow: nx.DiGraph = nx.DiGraph()
    stops: list[fx.Node] = []
    seen, stack = set[fx.Node](), [key, value]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        width = numbers_per_token(node, key)
        flow.add_edge(
            (node, 0), (node, 1), **({"capacity": 2**20 * width + 1} if width else {})
        )  # the +1 prefers few tensors
        inputs = _moving(node, roles)
        if not inputs or len(seen) > REACH or not _is_affine(node, key, roles, base):
            flow.add_edge("start", (node, 0))
            stops += [node] if inputs else []
            continue
        flow.add_edges_from(((source, 1), (node, 0)) for source in inputs)
        stack.extend(inputs)
    return flow, stops


def _cut(flow: nx.DiGraph, ends: list[fx.Node], key: fx.Node) -> list[fx.Node]:
    """Return the narrowest nodes between "start" and `ends`; of several such sets, the one nearest to `ends`."""
    whole = flow.copy()
    whole.add_edges_from(((end, 1), "end") for end in ends)
    try:
        _, (far, near) = nx.minimum_cut(whole, "start", "end")  # near: the side of `ends`, as small as possible
    except nx.NetworkXUnbounded as error:
        raise Miss("keys or values depend on a tensor without a token axis, and no latent lies between", key) from error
    return [n for n in dict.fromkeys(n[0] for n in near if n != "end") if (n, 0) in far]


def _moving(node: fx.Node, roles: Roles) -> list[fx.Node]:
    """Return the tensors `node` is computed from, except weights, indices and tensors used only for their shape."""
    moving: dict[fx.Node, None] = {}
    stack = [] if op_name(node) in BLANK else list(node.all_input_nodes)
    while stack:
        source = stack.pop()
        value = fake(source)
        if isinstance(value, Tensor):
            if roles.kind(source) == Kind.ACTIVATION and not _is_whole(value) and op_name(source) not in BLANK:
                moving[source] = None
        elif isinstance(value, (tuple, list)):  # of several tensors, such as a split
            stack.extend(source.all_input_nodes)
    return list(moving)


def _is_whole(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex())


def _is_affine(node: fx.Node, key: fx.Node, roles: Roles, base: Evaluator) -> bool:
    """Return whether `node` is affine in its inputs at every position, by running it on random values."""
    if is_in_place(node) or not isinstance(fake(node), Tensor):
        return False
    inputs = _moving(node, roles)
    blank = [n for n in node.all_input_nodes if op_name(n) in BLANK]
    region = Region(base, [*inputs, *blank], node)
    if any(_varies_by_token(side, key) for side in region.sides):
        return False
    fact = ("affine", signature(region, roles.describe))
    if fact not in roles.known:
        tokens = example_shape(key)[2]
        tries = ({tokens: ENOUGH}, {}) if tokens > ENOUGH else ({},)
        roles.known[fact] = any(_holds(region, inputs, blank, reduced) for reduced in tries)
    return bool(roles.known[fact])


def _holds(region: Region, inputs: list[fx.Node], blank: list[fx.Node], reduced: Mapping[int, int]) -> bool:
    """Return whether f(a + b) = f(a) + f(b) - f(0) for the region, on random values."""
    try:
        with smaller(reduced):
            zeros = {n: torch.zeros_like(random_like(n)) for n in (*inputs, *blank)}
            first, second = ({n: random_like(n, 2 * i + j) for i, n in enumerate(inputs)} for j in range(2))
            both = {n: first[n] + second[n] for n in inputs}
            one, other, total, zero = (region.run(zeros | x) for x in (first, second, both, {}))
    except Exception:  # user code may raise anything
        return False
    bound = 1e-6 * float(total.abs().max().clamp_min(1e-30))  # sides are float32
    return bool(((total - one - other + zero).abs() <= bound).all())


def _varies_by_token(side: fx.Node, key: fx.Node) -> bool:
    """Return whether a side input may differ between tokens: it has a token axis and is not stored."""
    sizes = shape(side)
    stored = view_root(side).op in {"placeholder", "get_attr"}
    return sizes is not None and not stored and any(_is_same(n, shape(key)[2]) for n in sizes)  # type: ignore[index]


def _is_same(one: Any, other: Any) -> bool:
    """Return whether two sizes are equal, without adding a guard on a symbol."""
    left, right = (x.node.expr if isinstance(x, torch.SymInt) else x for x in (one, other))
    return bool(left == right)


def token_axes(node: fx.Node, key: fx.Node) -> list[tuple[int, int]]:
    """Return the pairs of axes of `node` that may be batch and tokens."""
    sizes, expected = shape(node), shape(key)
    if sizes is None or expected is None:
        return []
    batch, tokens = ([i for i, n in enumerate(sizes) if _is_same(n, expected[axis])] for axis in (0, 2))
    return [(b, t) for b in batch for t in tokens if b != t]


def numbers_per_token(node: fx.Node, key: fx.Node) -> int:
    """Return the elements per token of a node, 0 without a token axis."""
    value = fake(node)
    if not isinstance(value, Tensor) or not value.is_floating_point() or not token_axes(node, key):
        return 0
    return math.prod(example_shape(node)) // (example_shape(key)[0] * example_shape(key)[2])
