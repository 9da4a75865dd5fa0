"""Check of a recognized attention: its canonical form is proved, and compared with the region that it replaces.

`validity` proves from the operators that the canonical form holds for all values. The check then runs the old region
and the canonical op on the same random float64 values and compares outputs and gradients; it draws every operand and
every other input several times.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fhopt.errors import Miss
from fhopt.ops import masks
from fhopt.ops.attention import attention_reference
from fhopt.passes.certificate import Checked
from fhopt.passes.graph.evaluate import Evaluator, Region, example_shape, random_like, signature
from fhopt.passes.graph.nodes import (
    fake,
    op_name,
    storage_root,
)
from fhopt.passes.prepare.memory import node_needs_gradient
from fhopt.passes.recognize.canonical import Core, columns_around, inverse_order
from fhopt.passes.recognize.draws import DRAWS, LARGE, MILD, is_binary, mask_draws, random_sides
from fhopt.passes.recognize.empty_rows import bias_may_be_infinite, empty_rows_give_nan, has_close_levels
from fhopt.passes.recognize.layout import arrange
from fhopt.passes.recognize.node_roles import Roles
from fhopt.passes.recognize.scores import Scores
from fhopt.passes.recognize.validity import prove

DOUBLE_TOLERANCE = 1e-9


def check_canonical(core: Core, roles: Roles, base: Evaluator, tolerance: float) -> None:
    """Prove that the canonical form holds for all values, and check it numerically. Raises Miss.

    The old region and the canonical op run on the same random float64 values, for several draws. tolerance: largest
    relative difference in models of lower precision; in float64 models 1e-6 added to a sum is more than rounding.
    """
    if fake(core.output).dtype == torch.float64:
        tolerance = min(tolerance, DOUBLE_TOLERANCE)
    if core.dropout:
        if core.is_call:
            return  # the semantics of a call are known, and two random masks never agree
        raise Miss("attention dropout is active; expected evaluation or dropout 0", core.output)
    operands = tuple(dict.fromkeys((core.query.node, core.key.node, core.value.node)))
    try:
        region = Region(base, operands, core.output)
        _check_untouched(region, roles)
        inside = set(region.nodes)
        beside = [s for s in core.scores.region.sides if s in inside] if core.scores else []  # bias from queries
        region = Region(base, (*operands, *beside), core.output)
        _prove(core, region, roles)
        key = ("verified", signature(region, roles.describe), _facts(core, region))
        if key not in roles.known:
            roles.known[key] = _run_draws(core, region, roles, base, tolerance)
        core.checked = roles.known[key]
    except Miss:
        raise
    except Exception as error:
        raise Miss(
            f"the attention could not be run for the check ({type(error).__name__}: {error})", core.output
        ) from error


def _prove(core: Core, region: Region, roles: Roles) -> None:
    """Prove the form, and record the output of rows without keys. Raises Miss."""
    proof = prove(region, core.softmax, roles)
    core.steps, core.zeroed = tuple(proof.steps), proof.zeroed is not None
    if proof.zeroed is not None and core.scores is not None and bias_may_be_infinite(core.scores.region, proof.zeroed):
        raise Miss(
            "the bias may be -inf in rows whose weights are set to zero again, where the model gives NaN; expected a "
            "finite bias",
            proof.zeroed,
        )
    has_gradient = node_needs_gradient(core.output)
    if core.scores is not None and core.hides and has_close_levels(core.scores.region, has_gradient):
        raise Miss(
            "a bias may have about the value that overwrites masked scores, so that both kinds of keys share the "
            "weights of a row; expected one mask value, or values that differ by more than 4x",
            core.output,
        )
    if core.softmax is None or core.scores is None or core.sinks or proof.zeroed or proof.hides_nan:
        return
    mask = core.mask.node if core.mask is not None else None
    core.empty_is_nan = empty_rows_give_nan(core.softmax, core.scores.region, core.scores.form, mask)


def _run_draws(core: Core, region: Region, roles: Roles, base: Evaluator, tolerance: float) -> Checked:
    """Compare the region and the canonical op on every draw. Raises Miss on a difference."""
    overflows = core.softmax is not None and core.softmax.overflows
    draws = [d for d in DRAWS if d != LARGE or not overflows]
    draws += mask_draws(region)
    differences, slopes = [], []
    for draw in draws:
        known = {**random_sides(region, roles, draw), **_random_operands(region, draw)}
        differentiable = draw != LARGE and node_needs_gradient(core.output)
        leaves = [v for n, v in known.items() if differentiable and _is_float(v) and node_needs_gradient(n)]
        for leaf in leaves:
            leaf.requires_grad_()
        old, new = region.run(known, differentiable), _canonical(core, known, base, differentiable)
        differences.append(_difference(old.detach(), new.detach(), must_be_finite=draw == MILD))
        if differences[-1] > tolerance:
            break
        if leaves and old.requires_grad:
            slopes.append(_gradient_difference(old, new, leaves))
    for error, what in ((max(differences), ""), (max(slopes, default=0.0), "gradients of ")):
        if error > tolerance:
            raise Miss(
                f"{what}the canonical op differ{'' if what else 's'} by {error:.1e} (relative); expected at most "
                f"{tolerance:.0e}",
                core.output,
            )
    _check_cancelled(core, region, roles, base)
    return Checked(len(draws), max(differences), max(slopes, default=None))


def _random_operands(region: Region, draw: str) -> dict[fx.Node, Tensor]:
    size = 30.0 if draw == LARGE else 1.0
    return {n: size * (random_like(n, i) + 0.1 * i) for i, n in enumerate(region.inputs)}


def _check_cancelled(core: Core, region: Region, roles: Roles, base: Evaluator) -> None:
    """Raise Miss for a side value that cancels unless it is 0, such as x in e * x / (e * x).sum(-1)."""
    sides, operands = random_sides(region, roles, MILD), _random_operands(region, MILD)
    factors = Counter(node for node, _ in core.factors)
    for side, value in sides.items():
        if factors[side] == 1 or not _is_float(value) or is_binary(side):
            continue
        drawn = {**sides, side: torch.zeros_like(value), **operands}
        old, new = region.run(drawn), _canonical(core, drawn, base, False)
        if bool((new.isfinite() & ~old.isfinite()).any()):
            raise Miss(
                f"the result is not finite if {side.name} is 0, and otherwise {side.name} cancels; expected values "
                "that do not cancel",
                core.output,
            )


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _facts(core: Core, region: Region) -> tuple[Any, ...]:
    """Return everything about a core that the check depends on, in layer-independent terms."""
    places = {n: i for i, n in enumerate((*region.inputs, *region.sides, *region.nodes))}
    operands = [(places.get(o.node), o.steps) for o in (core.query, core.key, core.value)]
    mask = (places.get(core.mask.node), core.mask.steps) if core.mask else None
    scores = core.scores and (core.scores.form, core.scores.sinks, core.scores.start)
    rows = (core.zeroed, core.empty_is_nan, core.hides, core.levels, core.blocks)
    factors = tuple((places.get(n), divides) for n, divides in core.factors)
    rest = (core.order, core.bias_steps, core.output_steps, core.extra, factors)
    return (repr(operands), repr(mask), scores, rows, repr(core.options), repr(rest))


def _check_untouched(region: Region, roles: Roles) -> None:
    """Raise Miss if a write that could not be functionalized changes a tensor of the region in place."""
    for node in (*region.inputs, *region.nodes, *region.sides) if roles.changed else ():
        writer = roles.changed.get(storage_root(node))
        if writer is not None:
            raise Miss(
                f"{op_name(writer)} changes {node.name} in place; expected a change that functionalize can replace",
                writer,
            )


def _difference(old: Tensor, new: Tensor, must_be_finite: bool) -> float:
    """Return the largest relative difference; infinite if only one of the two is finite somewhere."""
    if old.shape != new.shape or not torch.equal(old.isfinite(), new.isfinite()):
        return math.inf
    known = old.isfinite()
    if not bool(known.any()):
        return math.inf if must_be_finite else 0.0
    return float((old - new)[known].abs().max() / old[known].abs().max().clamp_min(1e-30))


def _gradient_difference(old: Tensor, new: Tensor, leaves: list[Tensor]) -> float:
    """Return the largest difference of the gradients of all leaves, relative to the largest gradient."""
    direction = torch.randn(old.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(old.device)
    try:
        expected = torch.autograd.grad(old, leaves, direction, allow_unused=True)
    except RuntimeError:  # a region without a gradient, such as an inference-only op
        return 0.0
    if not all(g is None or bool(g.isfinite().all()) for g in expected):
        return 0.0  # a row of NaN: the operands that its NaN reaches depend on the order of operations
    found = torch.autograd.grad(new, leaves, direction, allow_unused=True)
    pairs = [
        tuple(torch.zeros_like(leaf) if g is None else g for g in both)
        for leaf, *both in zip(leaves, expected, found, strict=True)
    ]
    size = max(float(a.abs().max()) for a, _ in pairs)
    error = max(float((a - b).abs().nan_to_num(math.inf).max()) for a, b in pairs)
    return error / max(size, 1e-30) if error else 0.0


def _canonical(core: Core, values: Mapping[fx.Node, Any], base: Evaluator, differentiable: bool) -> Tensor:
    """Compute the graph inserted by `insert_canonical` for these values, in the old layout."""

    def value(node: fx.Node) -> Any:
        known = values[node] if node in values else base.example(node)
        known = torch.as_tensor(known)
        return known.double() if known.is_floating_point() else known

    with torch.set_grad_enabled(differentiable):
        query, key, values_in_order = (arrange(value(o.node), o.steps) for o in (core.query, core.key, core.value))
        for node, divides in core.factors:
            query = query / value(node) if divides else query * value(node)
        mask, sinks, allowed = _canonical_mask(core, value, values, differentiable)
        if core.order is not None:
            query = query[:, list(core.order)]
            mask, sinks, allowed = (None if m is None else _by_head(m, core.order) for m in (mask, sinks, allowed))
        if allowed is not None and mask is not None:
            bias, mask = mask, masks.visible(mask, allowed)
            if core.levels:
                query, mask = masks.seeing(query, mask), masks.with_levels(bias, mask)
        result = attention_reference(query, key, values_in_order, mask, sinks, **core.options)
        if core.empty_is_nan and mask is not None:
            blocks = core.blocks
            result = (
                masks.nan_of_values(result, mask, values_in_order) if blocks else masks.nan_without_keys(result, mask)
            )
        if core.order is not None:
            result = result[:, list(inverse_order(core.order))]
        return arrange(result, core.output_steps)


def _canonical_mask(
    core: Core, value: Any, values: Mapping[fx.Node, Any], differentiable: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return mask, sink logits, and where scores are not overwritten (if that matters)."""
    mask: Tensor | None = None
    sinks: Tensor | None = None
    allowed: Tensor | None = None
    if core.mask is not None:
        mask = arrange(value(core.mask.node), core.mask.steps)
        mask = ~mask if core.scores is not None and core.scores.form == "fill" else mask
    elif core.scores is not None and (core.scores.form or core.scores.sinks):
        assert core.product is not None
        region, product = core.scores.region, core.product.node
        known = {s: value(s) if _is_tensor(s) else values[s] for s in region.sides if _is_tensor(s) or s in values}
        zero = torch.zeros(example_shape(product), dtype=torch.float64)
        bias = region.run({product: zero, **known}, differentiable)
        mask, sinks = _split_sinks(arrange(bias, core.bias_steps), core.scores)
        if core.hides:
            found = region.run({product: zero + math.nan, **known}).isnan()
            allowed = _split_sinks(arrange(found.double(), core.bias_steps), core.scores)[0]
            allowed = None if allowed is None else allowed != 0
    if core.extra:
        sinks = torch.zeros((1, 1, 1, 1), dtype=torch.float64)
    return mask, sinks, allowed


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(fake(node), Tensor)


def _split_sinks(bias: Tensor, scores: Scores) -> tuple[Tensor | None, Tensor | None]:
    if not scores.sinks:
        return bias, None
    keys = bias.shape[-1] - scores.sinks
    mask = bias.narrow(-1, scores.start, keys) if scores.form else None
    return mask, columns_around(bias, scores.start, keys)


def _by_head(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    return tensor if tensor.dim() < 3 or tensor.shape[-3] == 1 else tensor.index_select(-3, torch.tensor(order))
