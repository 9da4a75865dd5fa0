"""Queries without allowed keys: whether they can occur, and what the model's softmax and mask values give for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx

from fhopt.passes.graph.evaluate import Region, example_shape
from fhopt.passes.graph.nodes import fake, is_floating, op_name
from fhopt.passes.recognize.layout import JOINS, MOVEMENT
from fhopt.passes.recognize.node_roles import is_fixed, view_root
from fhopt.passes.recognize.scores import ABSORBING
from fhopt.passes.recognize.selections import SELECTION
from fhopt.passes.recognize.softmax import Softmax
from fhopt.passes.recognize.validity import BOUNDS, CASTS, GROWS, NEW, SAME

MASK_NAMES = (
    "rsub neg log log2 log1p tril triu zeros ones full tensor scalar_tensor logical_not logical_and logical_or "
    "bitwise_not bitwise_and bitwise_or and_ or_ invert eq ne lt le gt ge arange index gather cumsum"
)
CLOSE = 4.0  # ratio of levels
MASKS = 1e3  # the smallest number that hides scores
MASKING = MOVEMENT | JOINS | SELECTION | CASTS | BOUNDS | GROWS | SAME | NEW | frozenset(MASK_NAMES.split())


def empty_rows_give_nan(softmax: Softmax, scores: Region, form: str, mask: fx.Node | None) -> bool:
    """Return whether a query without allowed keys can occur, and the model's softmax gives NaN for it.

    A row of -inf does. It can occur if a mask, or a bias computed from an input or a buffer, may be -inf; not if a bias
    is computed from parameters, from activations, or from a single finite mask value.
    """
    if not form or op_name(softmax.weights) == "_safe_softmax":
        return False
    if mask is not None and fake(mask).dtype == torch.bool:
        return not (is_fixed(mask) and bool(scores.base.value(mask).any(-1).all()))
    sides = [n for n in scores.sides if isinstance(fake(n), Tensor)]
    if all(is_fixed(side) for side in sides):
        zero = torch.zeros(example_shape(scores.inputs[0]), dtype=torch.float64)
        return bool((scores.run({scores.inputs[0]: zero}) == -math.inf).all(softmax.axis).any())
    levels = 0
    for node in _mask_computation(scores):
        if _may_be_infinite(node, scores):
            return True
        levels += sum(v <= ABSORBING for v in _literals(node, float))
    return levels > 1


def bias_may_be_infinite(scores: Region, fill: fx.Node) -> bool:
    """Return whether a bias of scores may be -inf for all keys of a query, apart from the scores masked by `fill`."""
    values = {*fill.all_input_nodes} - {*scores.nodes, *scores.inputs}  # that overwrite scores

    def is_finite(node: fx.Node) -> bool:
        if node in values or _is_condition(node):
            return True
        return is_fixed(node) and bool((scores.base.value(node) > -math.inf).any(-1).all())

    return any(_may_be_infinite(n, scores) for n in _mask_computation(scores, is_finite) if n is not fill)


def has_close_levels(scores: Region, has_gradient: bool) -> bool:
    """Return whether a bias may be close to the value that overwrites scores: keys of both kinds then share weights.

    A larger bias may absorb that value, which only gradients reveal.
    """
    fills = [n for n in scores.nodes if op_name(n) in SELECTION]
    sources = {view_root(a) for n in fills for a in n.all_input_nodes if is_floating(a)} - {*scores.nodes}
    written = [size for n in (*fills, *sources) for size in _large_numbers(n, scores)]
    others = {*scores.nodes, *sources}
    bias = [n for n in _mask_computation(scores, _is_condition) if n not in others]
    given = [n for n in bias if _is_given(n, scores) and not _is_small_table(n, scores)]
    added = [size for n in bias for size in _large_numbers(n, scores)]
    if given and any(has_gradient or size < -ABSORBING for size in written):
        return True
    return any(size / CLOSE <= x and (has_gradient or x <= size * CLOSE) for size in written for x in added)


def _is_given(node: fx.Node, scores: Region) -> bool:
    """Return whether a node is a float input or buffer of the model, whose values may be anything."""
    return node.op == "placeholder" and is_floating(node) and not scores.base.program.is_parameter(node)


def _is_small_table(node: fx.Node, scores: Region) -> bool:
    """Return whether a node is a buffer of a model whose values are too small for a mask, such as ALiBi biases."""
    is_buffer = node.name in scores.base.program.buffers
    return is_buffer and bool((scores.base.value(node).abs() < MASKS).all())


def _large_numbers(node: fx.Node, scores: Region) -> list[float]:
    """Return the absolute values of a node's numbers that are large enough for a mask."""
    if op_name(node) in MOVEMENT | {"arange"}:
        return []
    if is_fixed(node) and is_floating(node):
        return [size for size in scores.base.value(node).double().abs().unique().tolist() if MASKS <= size < math.inf]
    return [abs(v) for v in _literals(node, int, float) if MASKS <= abs(v) < math.inf]


def _may_be_infinite(node: fx.Node, scores: Region) -> bool:
    """Return whether an operation or input of a bias computation may give -inf."""
    if _is_given(node, scores) or op_name(node) in {"log", "log2", "log1p"} or node.op == "get_attr":
        return True
    return any(v == -math.inf or v < -scores.overflow_limit for v in _literals(node, float))


def _literals(node: fx.Node, *types: type) -> list[float]:
    """Return the numbers among a node's arguments that have one of these types."""
    return [v for v in torch.utils._pytree.tree_leaves((node.args, node.kwargs)) if type(v) in types]


def _is_condition(node: fx.Node) -> bool:
    return not is_floating(node)


def _mask_computation(scores: Region, excludes: Callable[[fx.Node], bool] | None = None) -> Iterator[fx.Node]:
    """Yield the nodes a bias is computed from, back to inputs and to non-mask operations: products, lookups, norms."""
    seen, stack = {*scores.inputs}, [*scores.nodes]
    while stack:
        node = stack.pop()
        if node in seen or (excludes is not None and excludes(node)):
            continue
        seen.add(node)
        if node.op in {"placeholder", "get_attr"} or op_name(node) in MASKING:
            yield node
            stack.extend(n for n in node.all_input_nodes if isinstance(fake(n), Tensor))
