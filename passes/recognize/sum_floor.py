"""Whether a lower bound on the sum of exponentials can ever take effect.

e = exp(x - x.amax(-1, True))       the sum is at least 1: a floor of 1e-12 is never reached, 1e-12 more is rounding
e = exp(x)                          all scores may be -100: the weights then sum to less than 1
w = e / e.sum(-1, True).clamp_min(1e-12)
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from fhopt.errors import Miss
from fhopt.passes.graph.nodes import VIEWS, argument, op_name

FLOORS = frozenset({"clamp_min", "clamp", "clip", "maximum", "max"})
ADDITIONS = frozenset({"add", "iadd"})
SUBTRACTIONS = frozenset({"sub", "subtract"})
KEEPS = frozenset({"abs", "float", "double", "to", "type_as"})  # do not change exponentials
MAXIMA = frozenset({"amax", "max"})
SMALL = 1e-6  # within rounding of a sum of at least 1


def check_floor(exponential: fx.Node, total: fx.Node, divider: fx.Node) -> None:
    """Raise Miss if the sum has a lower bound that small scores can reach."""
    raised = next((n for n in _steps(argument(divider, 1, "other"), total) if _raises_sum(n)), None)
    if raised is None or (_is_shifted(exponential) and _is_whole(exponential, total) and _number(raised) <= SMALL):
        return
    raise Miss(
        f"{op_name(raised)} bounds the sum of the exponentials from below, which changes results for small "
        "scores; expected scores minus their maximum, or an unbounded sum",
        raised,
    )


def _steps(node: object, back_to: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes from one back to another, each by its first input."""
    while isinstance(node, fx.Node) and node is not back_to:
        yield node
        node = node.all_input_nodes[0] if node.all_input_nodes else None


def _raises_sum(node: fx.Node) -> bool:
    name = op_name(node)
    if name in ADDITIONS:  # the numerical check detects larger numbers, and tensors
        return any(isinstance(a, (int, float)) and a < 1 for a in node.args)
    return name in FLOORS


def _number(node: fx.Node) -> float:
    """Return the number that a node adds, or the lower bound it applies; infinite if it is not one literal."""
    others = [a for a in (*node.args, *node.kwargs.values()) if a is not None and a is not node.all_input_nodes[0]]
    return float(others[0]) if len(others) == 1 and isinstance(others[0], (int, float)) else float("inf")


def _is_whole(exponential: fx.Node, total: fx.Node) -> bool:
    """Return whether all of the exponentials are summed unmodified."""
    return all(n is total or op_name(n) in KEEPS for n in _steps(total, exponential))


def _is_shifted(exponential: fx.Node) -> bool:
    """Return whether the exponentials are of values minus their maximum, so that the largest one is 1."""
    source = exponential.all_input_nodes[0]
    numbers, maximum = argument(source, 0, "input", "self"), argument(source, 1, "other")
    if op_name(source) not in SUBTRACTIONS or not isinstance(maximum, fx.Node):
        return False
    return any(
        op_name(n) in MAXIMA and n.all_input_nodes[0] is numbers
        for n in _steps(maximum, numbers)
        if op_name(n) in VIEWS | MAXIMA
    )
