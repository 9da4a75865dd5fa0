"""Proof, from operators and literal arguments only, that an attention equals its canonical form for all values.

    q, k, v -> ... -> scores -> ... -> softmax -> ... -> o            every node on a path from an operand to o

A compiled graph runs again with other values, so nothing may be dropped because of the values of one call. Every node
through which an operand flows must be of one of these kinds; anything else raises Miss at that node:

    movement    moves elements by sizes, literals, or an index made of literals only
    cast        to a floating dtype
    analytic    a real-analytic function of its inputs: sums, products, exponentials, tanh, softmax, contractions
    selection   replaces elements by a mask that does not depend on the operands
    range       a bound that no value can cross: relu(softmax(s)), clamp at the limits of the dtype
    shift       is subtracted before a softmax and constant along its axis
    off         inactive dropout

Two analytic functions that agree at random points agree everywhere (with probability one), so the numerical check
(`canonical`), which draws every input and every side value, is a proof for regions that pass this test.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fhopt.errors import Miss
from fhopt.passes.certificate import ReplacedNode
from fhopt.passes.graph.evaluate import Region, example_shape
from fhopt.passes.graph.nodes import SOFTMAX, argument, fake, op_name, source_line
from fhopt.passes.prepare.flex import body_of, score_mod
from fhopt.passes.recognize.layout import JOINS, MOVEMENT
from fhopt.passes.recognize.node_roles import Roles, condition_key, is_fixed
from fhopt.passes.recognize.scores import DIVISION, MASKED, MULTIPLICATION
from fhopt.passes.recognize.selections import (
    REPLACING,
    SELECTION,
    choices_of,
    conditions_of,
    new_value,
    written_operation,
)
from fhopt.passes.recognize.softmax import EXPONENTIAL, Softmax

INDEXED = frozenset({"index", "gather", "take_along_dim", "index_select", "getitem", "take"})
SAME = frozenset({"contiguous", "clone", "alias", "detach", "dropout", "native_dropout", "feature_dropout", "Identity"})
CASTS = frozenset({"to", "type", "type_as", "float", "double", "half", "bfloat16", "_to_copy"})
ANALYTIC_NAMES = (
    "add sub rsub subtract mul multiply div truediv divide true_divide neg negative exp exp2 expm1 log log2 log1p tanh "
    "sigmoid softmax _softmax _safe_softmax log_softmax _log_softmax logsumexp matmul __matmul__ bmm mm linear einsum "
    "tensordot inner baddbmm addmm sum mean pow square sqrt rsqrt reciprocal sin cos tril triu addcmul "
    "scaled_dot_product_attention attention vecdot linalg_vecdot linalg_matmul linalg_multi_dot chain_matmul"
)
ANALYTIC = frozenset(ANALYTIC_NAMES.split())
SIZE_OF = frozenset({"expand_as", "view_as", "reshape_as", "type_as"})  # use only the form of their second tensor
NEW_NAMES = "zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty blank_scores"
NEW = frozenset(NEW_NAMES.split())
BOUND_NAMES = "clamp clip clamp_min clamp_max maximum minimum relu abs nan_to_num hardtanh max min"
BOUNDS = frozenset(BOUND_NAMES.split())
SHIFT_NAMES = "amax max amin min mean sum logsumexp isinf isfinite isnan eq ne where masked_fill"
SHIFTS = frozenset(SHIFT_NAMES.split())
GROWS = MULTIPLICATION | DIVISION | {"pow", "add", "sub", "subtract", "addcmul"}
Interval = tuple[float, float]
ALL: Interval = (-math.inf, math.inf)
_RANGES: dict[str, Interval] = {"tanh": (-1.0, 1.0), "sigmoid": (0.0, 1.0), "exp": (0.0, math.inf)} | dict.fromkeys(
    SOFTMAX, (0.0, 1.0)
)


@dataclass
class Proof:
    """The steps of a proof.

    zeroed: the node that masks scores whose weights are set to zero again, so that rows without keys give zero.
    hides_nan: NaN weights become zero.
    """

    steps: list[ReplacedNode]
    zeroed: fx.Node | None = None
    hides_nan: bool = False


def prove(region: Region, softmax: Softmax | None, roles: Roles) -> Proof:
    """Prove that the canonical form of a region, from operands to result, holds for all values. Raises Miss."""
    return _Prover(region, softmax, roles).run()


class _Prover:
    """One walk over a region, in graph order. ranges: bounds of the values of a node, if known."""

    def __init__(self, region: Region, softmax: Softmax | None, roles: Roles) -> None:
        self.region, self.softmax, self.roles = region, softmax, roles
        self.flows = set(region.inputs)  # nodes whose values, not only sizes, depend on the operands
        self.shifts = _shift_nodes(region, softmax)
        self.weights = _weight_nodes(region, softmax)
        self.fills: list[fx.Node] = []
        self.ranges: dict[fx.Node, Interval] = {}
        self.proof = Proof([])

    def run(self) -> Proof:
        for node in self.region.nodes:
            if self._flows(node):
                rule = self.rule(node)
                self.flows.add(node)
                self.proof.steps.append(ReplacedNode(node.name, op_name(node), rule, source_line(node)))
        return self.proof

    def _flows(self, node: fx.Node) -> bool:
        """Return whether the values of an operand flow into a node."""
        if op_name(node) in NEW or not (isinstance(fake(node), Tensor) or _is_several(fake(node))):
            return False
        sources = node.all_input_nodes[:1] if op_name(node) in SIZE_OF else node.all_input_nodes
        return any(n in self.flows for n in sources)

    def rule(self, node: fx.Node) -> str:
        """Return the rule by which a node preserves the canonical form. Raises Miss."""
        name = op_name(node)
        self._check_gradient(node)
        if node in self.shifts:
            return self._shift(node, name)
        if node.target is score_mod:
            return self._body(node)
        if _is_complex(node):
            raise Miss(f"{name} computes complex numbers; expected real ones", node)
        for kinds, prove_kind in (
            (SAME, self._same), (CASTS, self._cast), (BOUNDS, self._bound), (SELECTION, self._selection),
            (MOVEMENT | JOINS | INDEXED, self._movement), (ANALYTIC, self._analytic),
        ):  # fmt: skip
            if name in kinds:
                return prove_kind(node, name)
        raise Miss(
            f"{name} lies between the operands and the result; expected only operations that keep the canonical form "
            "for all values",
            node,
        )

    # ------------------------------------------------------------------------------------------------ rules

    def _same(self, node: fx.Node, name: str) -> str:
        if "dropout" in name and _is_active(node):
            raise Miss("attention dropout is active; expected evaluation or dropout 0", node)
        self._inherit(node)
        return "off: dropout is not active" if "dropout" in name else "identity"

    def _cast(self, node: fx.Node, name: str) -> str:
        if not fake(node).dtype.is_floating_point:
            raise Miss(f"a cast to {fake(node).dtype} rounds; expected floating-point numbers", node)
        self._inherit(node)
        return f"cast: to {str(fake(node).dtype).removeprefix('torch.')}"

    def _movement(self, node: fx.Node, name: str) -> str:
        for side in self._side_tensors(node) if name not in SIZE_OF | JOINS else ():
            if not is_fixed(side):
                raise Miss(
                    f"{name} gathers by the index {side.name}, whose values may change between calls; expected an "
                    "index made of literals",
                    node,
                )
        self._inherit(node, joins=name in JOINS)
        return "movement"

    def _analytic(self, node: fx.Node, name: str) -> str:
        if node in self.weights and name in GROWS:
            rule = self._weights_rule(node, name)
            if rule:
                return rule
        of_largest = name == "sum" and self._holds_largest(node.all_input_nodes[0])
        self.ranges[node] = (1.0, math.inf) if of_largest else _RANGES.get(name) or self._scaled(node, name)
        return "analytic: checked at random points"

    def _holds_largest(self, node: fx.Node) -> bool:
        """Return whether a tensor is the exponentials of scores minus their maximum: one in each row is 1."""
        if self.softmax is None or self.softmax.shift is None or self.softmax.overflows or self.softmax.extra:
            return False
        while op_name(node) in CASTS | {"abs"} and node.all_input_nodes:
            node = node.all_input_nodes[0]
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        return op_name(node) in EXPONENTIAL and source is not None and self.softmax.shift in source.all_input_nodes

    def _selection(self, node: fx.Node, name: str) -> str:
        if name == "written" and (operation := written_operation(node)) not in REPLACING:
            if operation not in ANALYTIC or node in self.weights:
                raise Miss(f"{operation} changes elements in place; expected a mask, or sums and products", node)
            return "analytic: checked at random points"
        conditions = conditions_of(node, name)
        for condition in conditions:
            if condition in self.flows:
                raise Miss(f"{name} selects by {condition.name}, which depends on the scores; expected a mask", node)
        if node in self.weights:
            return self._zero(node, conditions[0] if conditions else None)
        single = next((c for c in conditions if not is_fixed(c) and math.prod(example_shape(c)) == 1), None)
        if single is not None:
            raise Miss(
                f"{name} selects by {single.name}, a single boolean that hides every score or none; expected "
                "a mask with a value for each key",
                node,
            )
        index = next((c for c in conditions if not is_fixed(c) and fake(c).dtype != torch.bool), None)
        value = self._literal(new_value(node, name)) if index is not None else -math.inf
        if index is not None and (value is None or value > MASKED):
            raise Miss(
                f"{name} replaces scores at the index {index.name}, whose values may change between calls; expected a "
                "mask value, such as -inf",
                node,
            )
        self.fills.append(node)
        self._inherit(node, joins=True)
        return "selection: by a mask that does not depend on the operands"

    def _body(self, node: fx.Node) -> str:
        """Return the rule for the score_mod of flex attention, which maps each score. Raises Miss."""
        graph = body_of(node.args[1], self.region.base.program).graph
        flows = {next(n for n in graph.nodes if n.op == "placeholder")}
        for inner in graph.nodes:
            if inner.op in {"placeholder", "output"} or not flows & set(inner.all_input_nodes):
                continue
            name, conditions = op_name(inner), conditions_of(inner, op_name(inner))
            selects = name in {"masked_fill", "where"} and not flows & set(conditions)
            if not selects and name not in ANALYTIC | CASTS | SAME:
                raise Miss(f"the score function of flex attention calls {name}; expected analytic functions", node)
            flows.add(inner)
        return "analytic: the score function of flex attention, checked at random points"

    def _bound(self, node: fx.Node, name: str) -> str:
        source = next(n for n in node.all_input_nodes if n in self.flows)
        low, high = self.ranges.get(source, ALL)
        if name == "nan_to_num":
            becomes = argument(node, 1, "nan") or 0.0
            if node not in self.weights or not math.isfinite(low + high) or becomes != 0:
                raise Miss("nan_to_num changes scores that are not finite; expected zeros of NaN, in weights", node)
            self.proof.hides_nan = True
            self.ranges[node] = (low, high)
            return "range: weights are finite; rows without keys are zero"
        lower, upper = self._literal_bounds(node, name)
        limit = torch.finfo(fake(source).dtype).max if fake(source).dtype.is_floating_point else 0.0
        if lower > max(low, -limit) or upper < min(high, limit):
            raise Miss(
                f"{name} clips values beyond its bounds, which values here may cross; expected bounds that "
                "nothing crosses",
                node,
            )
        self.ranges[node] = (low, high)
        return f"range: values lie within [{low:g}, {high:g}]" if math.isfinite(low) else "range: limits of the dtype"

    def _shift(self, node: fx.Node, name: str) -> str:
        if name not in SHIFTS | SAME | CASTS | MOVEMENT | BOUNDS:
            raise Miss(
                f"{name} computes the offset that is subtracted before the softmax; expected a maximum or a mean", node
            )
        return "shift: constant along the axis of the softmax, which does not change it"

    # ---------------------------------------------------------------------------------------------- weights

    def _weights_rule(self, node: fx.Node, name: str) -> str:
        """Return the rule for arithmetic on weights: by a literal, or by the mask of the scores. Raises Miss."""
        others = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, fx.Node) and a not in self.flows]
        if not others:
            return ""  # literals; the numerical check finds those that change anything
        if name in MULTIPLICATION and len(others) == 1 and self._hides(others[0], keeps=True):
            self.proof.zeroed = self.fills[0]
            self._inherit(node)
            return "selection: the mask that hid these scores"
        verb = {"mul": "multiplied by", "multiply": "multiplied by", "pow": "raised to", "add": "added to"}.get(
            name, "divided by" if name in DIVISION else f"changed ({name}) by"
        )
        raise Miss(
            f"the weights are {verb} {others[0].name}, whose values may change between calls; expected weights "
            "that reach the second matmul unchanged",
            node,
        )

    def _keeps(self, node: fx.Node) -> bool:
        """Return whether a selection passes the operand through if its condition is true."""
        return op_name(node) == "where" and choices_of(node)[0] in self.flows

    def _zero(self, node: fx.Node, condition: fx.Node | None) -> str:
        """Return the rule for weights set to zero where scores were masked. Raises Miss."""
        keeps = self._keeps(node)
        value = argument(node, 2, "value") if op_name(node) == "masked_fill" else None
        value = choices_of(node)[int(keeps)] if op_name(node) == "where" else value
        if condition is None or self._literal(value) != 0 or not self._hides(condition, keeps):
            raise Miss(
                f"{op_name(node)} replaces weights after the softmax; expected zeros by the mask that hid the scores",
                node,
            )
        self.proof.zeroed = self.fills[0]
        self._inherit(node)
        return "selection: the mask that hid these scores"

    def _hides(self, condition: fx.Node, keeps: bool) -> bool:
        """Return whether the scores have one mask, and `condition` is that mask (`keeps`: or its complement)."""
        if len(self.fills) != 1 or self.softmax is None or op_name(self.softmax.weights) not in SOFTMAX:
            return False
        fill = self.fills[0]
        hidden = conditions_of(fill, op_name(fill))
        if len(hidden) != 1 or fake(fill).shape != fake(self.softmax.weights).shape:
            return False
        between = Region(self.region.base, [fill], self.softmax.weights).nodes
        if any(op_name(n) in (MOVEMENT | JOINS) - {"contiguous"} for n in between):
            return False
        number, parity = condition_key(hidden[0], self.roles)
        return condition_key(condition, self.roles) == (number, parity ^ (keeps != self._keeps(fill)))

    # ---------------------------------------------------------------------------------------------- helpers

    def _check_gradient(self, node: fx.Node) -> None:
        """Raise Miss if a gradient that the canonical node would propagate ends here."""
        flows = [n for n in node.all_input_nodes if n in self.flows and _takes_gradient(n)]
        if not flows or node in self.shifts:
            return
        if op_name(node) == "detach":
            raise Miss("detach ends the gradient inside the attention; expected gradients through all of it", node)
        if not self.roles.has_gradient(node) and self.roles.has_gradient(self.region.end):
            raise Miss(
                f"{op_name(node)} runs without gradients, and the result with them; expected one mode for all of the "
                "attention",
                node,
            )

    def _side_tensors(self, node: fx.Node) -> Iterator[fx.Node]:
        yield from (n for n in node.all_input_nodes if n not in self.flows and isinstance(fake(n), Tensor))

    def _inherit(self, node: fx.Node, joins: bool = False) -> None:
        """Set a node's range to that of its inputs; with `joins`, only if all of them have one."""
        known = [self.ranges.get(n, ALL) for n in node.all_input_nodes if n in self.flows]
        if joins and (len(known) < len(node.all_input_nodes) or op_name(node) in SELECTION):
            known = [ALL]
        if known:
            self.ranges[node] = (min(low for low, _ in known), max(high for _, high in known))

    def _scaled(self, node: fx.Node, name: str) -> Interval:
        """Return the range of a value times a positive literal."""
        numbers = [a for a in node.args[:2] if isinstance(a, (int, float))]
        flows = [a for a in node.args[:2] if isinstance(a, fx.Node) and a in self.ranges]
        if name not in MULTIPLICATION | DIVISION or len(numbers) != 1 or len(flows) != 1 or not numbers[0] > 0:
            return ALL
        by = 1 / numbers[0] if name in DIVISION else float(numbers[0])
        if name in DIVISION and flows[0] is not node.args[0]:
            return ALL
        low, high = self.ranges[flows[0]]
        return low * by, high * by

    def _literal_bounds(self, node: fx.Node, name: str) -> Interval:
        """Return the bounds that a node applies. Raises Miss if they are not literals."""
        if name == "relu":
            return 0.0, math.inf
        if name == "abs":
            return 0.0, math.inf
        if name == "hardtanh":
            return float(argument(node, 1, "min_val", default=-1.0)), float(argument(node, 2, "max_val", default=1.0))
        if name in {"max", "min"} and not isinstance(argument(node, 1, "other"), fx.Node):
            raise Miss(f"{name} reduces an axis; expected operations that keep each score", node)
        if name in {"maximum", "max", "clamp_min"}:
            return self._number(node, argument(node, 1, "other", "min")), math.inf
        if name in {"minimum", "min", "clamp_max"}:
            return -math.inf, self._number(node, argument(node, 1, "other", "max"))
        low, high = argument(node, 1, "min"), argument(node, 2, "max")
        return (
            -math.inf if low is None else self._number(node, low),
            math.inf if high is None else self._number(node, high),
        )

    def _number(self, node: fx.Node, value: Any) -> float:
        known = self._literal(value)
        if known is None:
            raise Miss(f"{op_name(node)} has a bound that may change from call to call; expected a literal", node)
        return known

    def _literal(self, value: Any) -> float | None:
        """Return a number, or the single element of a tensor computed from literals; None for anything else."""
        if isinstance(value, (int, float)):
            return float(value)
        if not isinstance(value, fx.Node) or not isinstance(fake(value), Tensor) or not is_fixed(value):
            return None
        known = torch.as_tensor(self.region.base.example(value))
        return float(known) if known.numel() == 1 else None


# ------------------------------------------------------------------------------------------------------ node facts


def _is_several(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value)


def _is_complex(node: fx.Node) -> bool:
    value = fake(node)
    return isinstance(value, Tensor) and value.is_complex()


def _takes_gradient(node: fx.Node) -> bool:
    value = fake(node)
    return isinstance(value, Tensor) and value.requires_grad


def _is_active(node: fx.Node) -> bool:
    is_on = argument(node, 2, "training", "train", default=True)
    return bool(is_on) and float(argument(node, 1, "p", default=0.5)) > 0


def _shift_nodes(region: Region, softmax: Softmax | None) -> set[fx.Node]:
    """Return the nodes that only compute the value subtracted before the softmax."""
    if softmax is None or softmax.shift is None:
        return set()
    inside, found = set(region.nodes), {softmax.shift}
    for node in sorted(inside, reverse=True):
        if node in found:
            found.update(n for n in node.all_input_nodes if n in inside and set(n.users) & inside <= found)
    return found


def _weight_nodes(region: Region, softmax: Softmax | None) -> set[fx.Node]:
    """Return the nodes downstream of the softmax, if it normalizes the weights."""
    if softmax is None or softmax.divider is not None:
        return set()
    found = {softmax.weights}
    for node in region.nodes:
        if node not in found and any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found - {softmax.weights}
