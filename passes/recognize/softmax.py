"""Softmax in any spelling: its input, its output, its axis.

    softmax(x, -1)      log_softmax(x, -1).exp()      e = exp(x - x.amax(-1, True)); e / e.sum(-1, True)
    exp(x - x.logsumexp(-1, True))                    e @ v / e.sum(-1, True)         e / (1 + e.sum(-1, True))

Hand-written ones are found from the exponential: its dominator is the input, the post-dominator of its sum is the
output. Both are then compared with `torch.softmax` on random values, with random values for all other inputs, including
the shift subtracted from the scores: softmax is invariant to shifts along its axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx

from fhopt.errors import Miss
from fhopt.passes.graph.evaluate import Evaluator, Region, example_shape, random_like, window
from fhopt.passes.graph.nodes import LOG_SOFTMAX, SOFTMAX, argument, fake, op_name
from fhopt.passes.recognize.draws import random_sides
from fhopt.passes.recognize.node_roles import Roles
from fhopt.passes.recognize.sum_floor import check_floor

EXPONENTIAL = frozenset({"exp", "exp2"})
OTHER_WEIGHTS = frozenset({"sigmoid", "relu", "elu", "softplus", "sparsemax"})  # other kinds of attention
DIVISION = frozenset({"div", "truediv", "divide", "true_divide"})
CARRIERS = frozenset({"detach", "getitem", "to", "float", "clone", "contiguous", "unsqueeze", "alias"})


@dataclass(frozen=True)
class Softmax:
    """A softmax, weights = softmax(scores) over `axis`.

    extra: zero logits that the sum also includes (softmax plus one). divider: the node that normalizes the weights, if
    that happens only after the second matmul. gain: factor of the scores (for a base other than e). shift: subtracted
    from the scores, constant along the axis. overflows: the exponentials are not finite for large scores, nor is the
    model's result.
    """

    scores: fx.Node
    weights: fx.Node
    axis: int
    extra: int = 0
    divider: fx.Node | None = None
    gain: float = 1.0
    shift: fx.Node | None = None
    overflows: bool = False


def is_candidate(node: fx.Node) -> bool:
    """Return whether a node may be a softmax: an exponential only if it is summed."""
    if op_name(node) in SOFTMAX | LOG_SOFTMAX:
        return True
    return is_exponential(node) and (_sum_after(node) is not None or _logsumexp_before(node) is not None)


def is_exponential(node: fx.Node) -> bool:
    """Return whether a node is the exponential of a tensor, other than of a log-softmax."""
    if op_name(node) not in EXPONENTIAL or not isinstance(fake(node), Tensor) or not node.all_input_nodes:
        return False
    return op_name(node.all_input_nodes[0]) not in LOG_SOFTMAX


def read_softmax(node: fx.Node, roles: Roles, base: Evaluator) -> Softmax:
    """Match the softmax at a candidate. Raises Miss if it is something else."""
    name = op_name(node)
    if name in SOFTMAX | LOG_SOFTMAX:
        axis = argument(node, 1, "dim")
        source = argument(node, 0, "input", "self")
        if not isinstance(axis, int) or not isinstance(source, fx.Node):
            raise Miss("the softmax has no single axis; expected dim", node)
        weights = node if name in SOFTMAX else _exponential_of(node)
        axis = axis % len(example_shape(node))
        scores, shift = _without_shift(source, axis)
        return Softmax(scores, weights, axis, shift=shift)
    return _read_hand_written(node, roles, base)


def _exponential_of(node: fx.Node) -> fx.Node:
    users = [u for u in node.users if op_name(u) == "exp"]
    if len(users) != 1:
        raise Miss("log_softmax without an exponential; expected attention weights", node)
    return users[0]


def _sum_after(node: fx.Node) -> fx.Node | None:
    """Return the sum of the exponential over one axis, also through casts."""
    stack = [(node, 0)]
    while stack:
        current, depth = stack.pop()
        for user in current.users:
            if op_name(user) == "sum" and isinstance(_axis(user), int):
                return user
            if depth < 2 and op_name(user) in {"to", "float", "type_as", "abs", "masked_fill", "mul"}:
                stack.append((user, depth + 1))
    return None


def _logsumexp_before(node: fx.Node) -> fx.Node | None:
    source = node.all_input_nodes[0]
    if op_name(source) not in {"sub", "subtract"} or len(source.all_input_nodes) != 2:
        return None
    return next((n for n in source.all_input_nodes if op_name(n) == "logsumexp"), None)


def _axis(node: fx.Node) -> int | None:
    axis = argument(node, 1, "dim", "axis")
    if isinstance(axis, (list, tuple)) and len(axis) == 1:
        axis = axis[0]
    return axis % len(example_shape(node.all_input_nodes[0])) if isinstance(axis, int) else None


def _read_hand_written(node: fx.Node, roles: Roles, base: Evaluator) -> Softmax:
    total = _logsumexp_before(node) or _sum_after(node)
    assert total is not None, "only candidates are read"
    axis = _axis(total)
    if axis is None:
        raise Miss("the exponentials are summed over several axes; expected one", total)
    gain = math.log(2) if op_name(node) == "exp2" else 1.0
    scores, shift = _without_shift(node.all_input_nodes[0], axis)
    if op_name(total) == "logsumexp":
        return _checked(Softmax(scores, node, axis, gain=gain), roles, base)
    overflows = shift is None or not _is_largest(shift, scores)
    weights = _post_dominator(node, total)
    if weights is None:
        raise Miss("exponentials are summed but not divided by the sum; expected a softmax", total)
    check_floor(node, total, weights)
    if example_shape(weights) == example_shape(node) and not _contracts(node, weights):
        softmax = Softmax(scores, weights, axis, gain=gain, shift=shift, overflows=overflows)
        return _checked(softmax, roles, base)
    return Softmax(
        scores, node, axis, divider=weights, gain=gain, shift=shift, overflows=overflows
    )  # normalized after the second matmul; checked as part of the core


def _without_shift(node: fx.Node, axis: int) -> tuple[fx.Node, fx.Node | None]:
    """Return x and f(x) of `x - f(x)` if f(x) is constant along the axis; else the node itself and None."""
    if op_name(node) in {"sub", "subtract"} and len(node.all_input_nodes) == 2 and len(node.args) == 2:
        first, second = node.all_input_nodes
        shift = example_shape(second) if isinstance(fake(second), Tensor) else ()
        if len(shift) == len(example_shape(node)) and shift[axis] == 1 and _depends(second, first):
            return first, second
    return node, None


def _is_largest(node: fx.Node, scores: fx.Node, or_zero: bool = False) -> bool:
    """Return whether a shift is the largest score, so that no exponential overflows; or_zero: or at least 0."""
    while node.all_input_nodes and (op_name(node) in CARRIERS or (or_zero and _is_at_least_zero(node))):
        node = node.all_input_nodes[0]
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    while source is not None and source is not scores and op_name(source) in CARRIERS and source.all_input_nodes:
        source = source.all_input_nodes[0]
    return op_name(node) in {"amax", "max"} and source is scores


def _is_at_least_zero(node: fx.Node) -> bool:
    is_bound = op_name(node) in {"clamp", "clamp_min"} and argument(node, 1, "min") == 0
    return op_name(node) == "relu" or (is_bound and argument(node, 2, "max") is None)


def _post_dominator(node: fx.Node, total: fx.Node) -> fx.Node | None:
    """Return the division of the exponential by its sum."""
    frontier, seen = [total], {total}
    for _ in range(24):
        if not frontier:
            return None
        current = min(frontier)
        frontier.remove(current)
        if op_name(current) in DIVISION and _depends(current.all_input_nodes[0], node):
            return current
        for user in current.users:
            if user not in seen and isinstance(fake(user), Tensor):
                seen.add(user)
                frontier.append(user)
    return None


def _depends(node: fx.Node, on: fx.Node) -> bool:
    if node is on:
        return True
    graph = nx.DiGraph(window(on, node))
    return node in graph and on in graph and nx.has_path(graph, on, node)


def _contracts(start: fx.Node, end: fx.Node) -> bool:
    """Return whether a product with another tensor lies between the exponential and the numerator."""
    from fhopt.passes.recognize.contraction import read_contraction

    graph = nx.DiGraph(window(start, end))
    between = nx.descendants(graph, start) & nx.ancestors(graph, end)
    return any(op_name(n) != "sum" and read_contraction(n) is not None for n in between)


def _checked(softmax: Softmax, roles: Roles, base: Evaluator) -> Softmax:
    """Compare it with torch.softmax, then with softmax plus one. Raises Miss."""
    scores = random_like(softmax.scores, 3)
    values: dict[fx.Node, Any] = {softmax.scores: scores}
    if softmax.shift is not None:
        sizes = [1 if axis == softmax.axis else n for axis, n in enumerate(scores.shape)]
        values[softmax.shift] = random_like(softmax.scores, 4)[tuple(slice(n) for n in sizes)]
    try:
        region = Region(base, values, softmax.weights)
        result = region.run({**random_sides(region, roles), **values})
    except Exception as error:  # user code may raise anything
        raise Miss(f"the exponentials could not be run ({type(error).__name__}: {error})", softmax.weights) from error
    scores = scores * softmax.gain
    if _close(result, torch.softmax(scores, softmax.axis)):
        return softmax
    powers = scores.exp()
    if _close(result, powers / (1 + powers.sum(softmax.axis, keepdim=True))):
        shift = softmax.shift
        overflows = shift is None or not _is_largest(shift, softmax.scores, or_zero=True)
        return replace(softmax, extra=1, overflows=overflows)
    raise Miss(
        "exponentials divided by a sum are not a softmax; expected their own sum, or that plus one", softmax.weights
    )


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-6)
