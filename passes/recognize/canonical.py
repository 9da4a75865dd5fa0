"""One recognized attention: the data for its rewrite, its numerical check, and the canonical node that replaces it.

    before                                              after
    scores = ...; weights = softmax(scores)             m = <the score function of zeros>
    o = weights @ v                                     o = fhopt.attention(q, k, v, m, scale=c)

Before any change, `validity` proves from the operators that the canonical form holds for all values. The check then
runs the old region and the canonical op on the same random float64 values and compares outputs and gradients; it draws
every operand and every other input several times.

Rows: a query without allowed keys gets NaN, zero, or an average weighted by the values that overwrite its scores, as
in the model (`Core.empty_is_nan`, `zeroed`, `levels`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fhopt.errors import Miss
from fhopt.ops import masks
from fhopt.ops.attention import attention_reference, blank_scores
from fhopt.passes.certificate import Certificate, Checked, ReplacedNode
from fhopt.passes.graph.evaluate import Evaluator, Region, example_shape, random_like, signature
from fhopt.passes.graph.nodes import (
    call,
    call_method,
    copy_node,
    fake,
    fake_mode,
    on_fakes,
    op_name,
    shape,
    storage_root,
)
from fhopt.passes.graph.program import Program
from fhopt.passes.prepare.memory import node_needs_gradient
from fhopt.passes.recognize.contraction import Contraction
from fhopt.passes.recognize.draws import DRAWS, LARGE, MILD, random_sides
from fhopt.passes.recognize.empty_rows import empty_rows_give_nan
from fhopt.passes.recognize.kv_head_repetition import Operand
from fhopt.passes.recognize.layout import Steps, arrange
from fhopt.passes.recognize.node_roles import Roles
from fhopt.passes.recognize.result_strides import LAYOUTS, in_order, is_layout_seen, memory_order
from fhopt.passes.recognize.scores import Scores
from fhopt.passes.recognize.softmax import Softmax
from fhopt.passes.recognize.validity import prove


@dataclass
class Core:
    """One recognized attention: its operands, its score function, and the node that its result replaces.

    order: query heads sorted by kv head, None if they are sorted already. bias_steps: convert a computed bias to
    [B, H, S, T]. bias_is_small: it is computed from one zero element, else from zeros of full size.
    """

    output: fx.Node
    query: Operand
    key: Operand
    value: Operand
    scale: float
    scores: Scores | None = None
    product: Contraction | None = None
    mask: Operand | None = None
    bias_steps: Steps = ()
    bias_is_small: bool = False
    extra: int = 0
    factors: tuple[tuple[fx.Node, bool], ...] = ()
    is_causal: bool = False
    softcap: float = 0.0
    dropout: float = 0.0
    order: tuple[int, ...] | None = None
    output_steps: Steps = ()
    softmax: Softmax | None = None
    is_call: bool = False  # a call of scaled_dot_product_attention, whose semantics are known
    zeroed: bool = False  # rows without keys give zero
    empty_is_nan: bool = False  # rows without keys give NaN
    conditions: tuple[str, ...] = ()
    steps: tuple[ReplacedNode, ...] = ()
    checked: Checked | None = None

    @property
    def levels(self) -> bool:
        """Whether scores are overwritten by finite values that determine the weights of a row without keys.

        If these values absorb any score added to them, this matters only for gradients: none may flow into that score.
        """
        if self.scores is None or not self.scores.levels or self.zeroed or self.sinks:
            return False
        return not self.scores.absorbing or node_needs_gradient(self.output)

    @property
    def blocks(self) -> bool:
        """Whether the NaN of a row without keys reaches only the gradient of values."""
        return self.scores is not None and self.scores.blocks and node_needs_gradient(self.output)

    @property
    def hides(self) -> bool:
        """Whether the locations of overwritten scores must be known, not only the new values."""
        scores = self.scores
        if scores is None or scores.form != "computed":
            return False
        return self.levels or self.zeroed or (scores.levels and not scores.absorbing)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the canonical op."""
        return dict(scale=self.scale, is_causal=self.is_causal, softcap=self.softcap, dropout=self.dropout)

    @property
    def sinks(self) -> int:
        """Softmax columns without a key."""
        return self.extra + (self.scores.sinks if self.scores else 0)


# --------------------------------------------------------------------------------------------------- checks


def check_canonical(core: Core, roles: Roles, base: Evaluator, tolerance: float) -> None:
    """Prove that the canonical form holds for all values, and check it numerically. Raises Miss.

    The old region and the canonical op run on the same random float64 values, for several draws.
    """
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
    core.steps, core.zeroed = tuple(proof.steps), proof.zeroed
    if core.softmax is None or core.scores is None or core.sinks or proof.zeroed or proof.hides_nan:
        return
    mask = core.mask.node if core.mask is not None else None
    core.empty_is_nan = empty_rows_give_nan(core.softmax, core.scores.region, core.scores.form, mask)


def _run_draws(core: Core, region: Region, roles: Roles, base: Evaluator, tolerance: float) -> Checked:
    """Compare the region and the canonical op on every draw. Raises Miss on a difference."""
    overflows = core.softmax is not None and core.softmax.overflows
    draws = [d for d in DRAWS if d != LARGE or not overflows]
    differences, slopes = [], []
    for draw in draws:
        size = 30.0 if draw == LARGE else 1.0
        values = {n: size * (random_like(n, i) + 0.1 * i) for i, n in enumerate(region.inputs)}
        known = {**random_sides(region, roles, draw), **values}
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
    return Checked(len(draws), max(differences), max(slopes, default=None))


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
            query = masks.seeing(query, allowed) if core.levels else query
            mask = (masks.with_levels if core.levels else masks.restricted)(mask, allowed)
        result = attention_reference(query, key, values_in_order, mask, sinks, **core.options)
        if core.empty_is_nan and mask is not None:
            blocks = core.blocks
            result = (
                masks.nan_of_values(result, mask, values_in_order) if blocks else masks.nan_without_keys(result, mask)
            )
        if core.order is not None:
            result = result[:, list(_inverse(core.order))]
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
    return mask, _around(bias, scores.start, keys)


def _around(bias: Tensor, start: int, keys: int) -> Tensor:
    """Return the columns before and after the keys."""
    return torch.cat((bias[..., :start], bias[..., start + keys :]), -1)


def _by_head(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    return tensor if tensor.dim() < 3 or tensor.shape[-3] == 1 else tensor.index_select(-3, torch.tensor(order))


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(h) for h in range(len(order)))


# --------------------------------------------------------------------------------------------------- rewrite


def insert_canonical(program: Program, core: Core) -> fx.Node:
    """Replace the core by the canonical node; return the node."""
    with program.graph.inserting_before(core.output):
        operands = [_insert(program, o.node, o.steps) for o in (core.query, core.key, core.value)]
        operands[0] = _scaled(program, operands[0], core)
        operands = _one_dtype(program, operands)
        mask, sinks, allowed = _insert_mask(program, core, operands)
        if allowed is not None and mask is not None:
            operands[0] = call(program, masks.seeing, (operands[0], allowed)) if core.levels else operands[0]
            mask = call(program, masks.with_levels if core.levels else masks.restricted, (mask, allowed))
        options = {k: v for k, v in core.options.items() if v}
        rest = (mask, sinks) if sinks is not None else (mask,) if mask is not None else ()
        node = call(program, torch.ops.fhopt.attention.default, (*operands, *rest), options)
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if key in core.output.meta:
                node.meta[key] = core.output.meta[key]
        result = node
        if core.empty_is_nan and mask is not None:
            only_values = (masks.nan_of_values, (node, mask, operands[2]))
            result = call(program, *(only_values if core.blocks else (masks.nan_without_keys, (node, mask))))
        result = _insert_result(program, result, node, core)
    core.output.replace_all_uses_with(result)
    return node


def _insert(program: Program, node: fx.Node, steps: Steps) -> fx.Node:
    for method, arguments in steps:
        node = call_method(program, method, node, *arguments)
    return node


def _scaled(program: Program, query: fx.Node, core: Core) -> fx.Node:
    """Apply the score factors to the queries, and sort query heads by kv head."""
    for node, divides in core.factors:
        query = call(program, torch.div if divides else torch.mul, (query, node))
    return query if core.order is None else call(program, _take_heads, (query, list(core.order)))


def _take_heads(tensor: Tensor, order: list[int]) -> Tensor:
    """Reorder the heads of [B, H, ., .]."""
    return tensor.index_select(1, torch.tensor(order, device=tensor.device))


def _one_dtype(program: Program, operands: list[fx.Node]) -> list[fx.Node]:
    """Cast queries, keys and values to their widest dtype."""
    types = [fake(n).dtype for n in operands]
    widest = types[0]
    for other in types[1:]:
        widest = torch.promote_types(widest, other)
    return [n if t == widest else call_method(program, "to", n, widest) for n, t in zip(operands, types, strict=True)]


def _insert_mask(
    program: Program, core: Core, operands: list[fx.Node]
) -> tuple[fx.Node | None, fx.Node | None, fx.Node | None]:
    """Insert mask, sink logits, and where scores are not overwritten; see `_canonical_mask`."""
    mask: fx.Node | None = None
    sinks: fx.Node | None = None
    allowed: fx.Node | None = None
    if core.mask is not None:
        mask = _insert(program, core.mask.node, core.mask.steps)
        if core.scores is not None and core.scores.form == "fill":
            mask = call(program, torch.logical_not, (mask,))
    elif core.scores is not None and (core.scores.form or core.scores.sinks):
        mask, sinks = _insert_bias(program, core, 0.0)
        if core.hides:
            unknown = _insert_bias(program, core, math.nan)[0]
            allowed = unknown and call(program, torch.isnan, (unknown,))
    if core.extra:
        sinks = call_method(program, "new_zeros", operands[0], (1, 1, 1, 1))
    dtype = fake(operands[0]).dtype
    if mask is not None and fake(mask).dtype not in (torch.bool, dtype):
        mask = call(program, masks.converted, (mask, dtype))
    if core.order is not None:
        mask, sinks, allowed = (_in_order(program, n, core.order) for n in (mask, sinks, allowed))
    return mask, sinks, allowed


def _in_order(program: Program, node: fx.Node | None, order: tuple[int, ...]) -> fx.Node | None:
    sizes = example_shape(node) if node is not None else ()
    return node if len(sizes) < 4 or sizes[1] == 1 or node is None else call(program, _take_heads, (node, list(order)))


def _insert_bias(program: Program, core: Core, score: float) -> tuple[fx.Node | None, fx.Node | None]:
    """Insert the region evaluated on scores that all equal `score`: one element if all broadcasts, else full size.

    Zeros give the bias; NaN survives where the region does not overwrite scores.
    """
    assert core.scores is not None and core.product is not None
    bias = None
    if core.bias_is_small:
        bias = _try_small_bias(program, core, score)
    if bias is None:
        product = core.product
        axes = [list(a) for a in (product.left_axes, product.right_axes, product.axes)]
        blank = call(program, blank_scores, (product.left, product.right, *axes))
        bias = _repeat_region(program, core, call(program, torch.add, (blank, score)) if score else blank)
    bias = _insert(program, bias, core.bias_steps)
    if not core.scores.sinks:
        return bias, None
    columns = shape(bias)[-1]  # type: ignore[index]
    if not isinstance(columns, int):
        raise Miss("sink columns with a symbolic number of keys; expected a fixed number", core.output)
    keys, start = columns - core.scores.sinks, core.scores.start
    sinks = call(program, _around, (bias, start, keys))
    return (call_method(program, "narrow", bias, -1, start, keys) if core.scores.form else None), sinks


def _try_small_bias(program: Program, core: Core, score: float) -> fx.Node | None:
    assert core.product is not None
    before = core.output.prev
    try:
        kind = fake(core.product.node)  # independent of the queries, so that the mask does not depend on them
        like = {"dtype": kind.dtype, "device": kind.device}
        blank = call(program, torch.full, ((1, 1, 1, 1), score), like)
        bias = _repeat_region(program, core, blank)
        if len(example_shape(bias)) == 4:
            return bias
    except Exception:  # an operation that needs the full shape
        pass
    while core.output.prev is not before:
        program.graph.erase_node(core.output.prev)
    return None


def _repeat_region(program: Program, core: Core, scores: fx.Node) -> fx.Node:
    assert core.scores is not None and core.product is not None
    mapping: dict[fx.Node, Any] = {core.product.node: scores}
    for node in core.scores.region.nodes:
        mapping[node] = copy_node(program, node, mapping)
    return mapping[core.scores.region.end]


def _insert_result(program: Program, result: fx.Node, node: fx.Node, core: Core) -> fx.Node:
    if core.order is not None:
        result = call(program, _take_heads, (result, list(_inverse(core.order))))
    result = _insert(program, result, core.output_steps)
    wanted = fake(core.output).dtype
    result = result if fake(result).dtype == wanted else call_method(program, "to", result, wanted)
    return _with_strides(program, result, node, core)


def _with_strides(program: Program, result: fx.Node, node: fx.Node, core: Core) -> fx.Node:
    """Restore the memory order of the core's original result, if a user of the result depends on it."""
    with on_fakes(fake_mode(program)):
        canonical = [fake(node), *(in_order(fake(node), order) for order in LAYOUTS)]  # all memory orders
        layouts = [arrange(tensor, core.output_steps).to(fake(result).dtype) for tensor in canonical]
    if not is_layout_seen(program, core.output, layouts):
        return result
    return call(program, in_order, (result, memory_order(fake(core.output))))


# --------------------------------------------------------------------------------------------------- certificate


def certificate(core: Core) -> Certificate:
    """Return the evidence for a core that `check_canonical` accepted."""
    operands = tuple((role, _symbolic(o.node)) for role, o in (("q", core.query), ("k", core.key), ("v", core.value)))
    levels = "the mean of the values whose mask is weakest" if core.levels else ""
    rows = "zero" if core.zeroed or core.is_call else levels or ("NaN" if core.empty_is_nan else "")
    return Certificate(operands, core.steps, rows, core.conditions, core.checked)


def _symbolic(node: fx.Node) -> str:
    """Format a shape with the symbols of its sizes: `[s0, 4, s1, 64]`."""
    sizes = (n.node.expr if isinstance(n, torch.SymInt) else n for n in shape(node) or ())
    return f"[{', '.join(map(str, sizes))}]"
