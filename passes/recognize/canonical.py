"""One recognized attention: what a rewrite needs, its check by execution, and the canonical node that replaces it.

    before                                              after
    scores = ...; weights = softmax(scores)             m = <the score function of zeros>
    o = weights @ v                                     o = fhopt.attention(q, k, v, m, scale=c)

The check runs the old region and the canonical op on the same random numbers, in float64, before anything is changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fhopt.errors import Miss
from fhopt.ops.attention import attention_reference, blank_scores
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
from fhopt.passes.recognize.contraction import Contraction
from fhopt.passes.recognize.kv_head_repetition import Operand
from fhopt.passes.recognize.layout import Steps, arrange
from fhopt.passes.recognize.node_roles import Roles
from fhopt.passes.recognize.result_strides import LAYOUTS, in_order, is_layout_seen, memory_order
from fhopt.passes.recognize.scores import LEAST, Scores, random_sides


@dataclass
class Core:
    """One recognized attention: its operands, its score function, and the node whose users take the result.

    order: query heads sorted by kv head, None where they are sorted already. bias_steps: how a computed bias becomes
    [B, H, S, T]. bias_is_small: it is computed from one element of zeros, else from zeros of full size.
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
    is_call: bool = False  # a call of scaled_dot_product_attention, which says what it does

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the canonical op."""
        return dict(scale=self.scale, is_causal=self.is_causal, softcap=self.softcap, dropout=self.dropout)

    @property
    def sinks(self) -> int:
        """Columns of the softmax that belong to no key."""
        return self.extra + (self.scores.sinks if self.scores else 0)


# --------------------------------------------------------------------------------------------------- checking


def check_canonical(core: Core, roles: Roles, base: Evaluator, tolerance: float) -> None:
    """Run the old region and the canonical op on the same random float64 operands. Raises Miss on a difference."""
    if core.dropout:
        if core.is_call:
            return  # the call says what it does, and two random masks never agree
        raise Miss("attention dropout is active; expected evaluation or dropout 0", core.output)
    operands = tuple(dict.fromkeys((core.query.node, core.key.node, core.value.node)))
    differences = []
    try:
        region = Region(base, operands, core.output)
        _check_untouched(region, roles)
        inside = set(region.nodes)
        beside = [s for s in core.scores.region.sides if s in inside] if core.scores else []  # a bias made of queries
        region = Region(base, (*operands, *beside), core.output)
        key = ("verified", signature(region, roles.describe), _facts(core, region))
        if key in roles.known:
            return
        values = {n: random_like(n, i) + 0.1 * i for i, n in enumerate((*operands, *beside))}
        for is_random in (True, False):
            sides = random_sides(region, roles) if is_random else {}
            known = {n: v for n, v in sides.items() if v.dtype != torch.bool} | values  # rows that see something
            old, (new, seen) = region.run(known), _canonical(core, known, base)
            differences.append(_difference(old, new, seen))
            if differences[-1] <= tolerance:
                if is_random:
                    roles.known[key] = True
                return
    except Miss:
        raise
    except Exception as error:
        raise Miss(
            f"the attention could not be run for the check ({type(error).__name__}: {error})", core.output
        ) from error
    difference = min(differences)
    raise Miss(
        f"the canonical op differs by {difference:.1e} (relative); expected at most {tolerance:.0e}", core.output
    )


def _facts(core: Core, region: Region) -> tuple[Any, ...]:
    """Return everything about a core that the check depends on, in terms that layers share."""
    places = {n: i for i, n in enumerate((*region.inputs, *region.sides, *region.nodes))}
    operands = [(places.get(o.node), o.steps) for o in (core.query, core.key, core.value)]
    mask = (places.get(core.mask.node), core.mask.steps) if core.mask else None
    scores = core.scores and (core.scores.form, core.scores.sinks, core.scores.start)
    factors = tuple((places.get(n), divides) for n, divides in core.factors)
    rest = (core.order, core.bias_steps, core.output_steps, core.extra, factors)
    return (repr(operands), repr(mask), scores, repr(core.options), repr(rest))


def _check_untouched(region: Region, roles: Roles) -> None:
    """Raise Miss where something that could not be made functional changes a tensor of the region in place."""
    for node in (*region.inputs, *region.nodes) if roles.changed else ():
        writer = roles.changed.get(storage_root(node))
        if writer is not None:
            raise Miss(
                f"{op_name(writer)} changes {node.name} in place; expected a change that functionalize can replace",
                writer,
            )


def _difference(old: Tensor, new: Tensor, seen: Tensor) -> float:
    """Return the largest relative difference over queries that attend to something."""
    if old.shape != new.shape:
        return math.inf
    known = seen & old.isfinite()
    if not bool(known.any()):
        return math.inf
    error = (old - new)[known].abs().max() / old[known].abs().max().clamp_min(1e-30)
    return float(error) if bool(error.isfinite()) else math.inf


def _canonical(core: Core, values: Mapping[fx.Node, Tensor], base: Evaluator) -> tuple[Tensor, Tensor]:
    """Compute the canonical op for these values in the old layout, and which of its rows attend to anything."""

    def value(node: fx.Node) -> Tensor:
        known = values[node] if node in values else base.example(node)
        known = torch.as_tensor(known)
        return known.double() if known.is_floating_point() else known

    query, key, values_in_order = (arrange(value(o.node), o.steps) for o in (core.query, core.key, core.value))
    for node, divides in core.factors:
        query = query / value(node) if divides else query * value(node)
    mask, sinks = _canonical_mask(core, value)
    if core.order is not None:
        query = query[:, list(core.order)]
        mask, sinks = (None if m is None else _by_head(m, core.order) for m in (mask, sinks))
    result = attention_reference(query, key, values_in_order, mask, sinks, **core.options)
    if core.order is not None:
        result = result[:, list(_inverse(core.order))]
    return arrange(result, core.output_steps), arrange(_seen(mask, result), core.output_steps)


def _seen(mask: Tensor | None, result: Tensor) -> Tensor:
    """Return which rows of the result have a query that may attend to at least one key, bool."""
    if mask is None:
        return torch.ones_like(result, dtype=torch.bool)
    allowed = mask if mask.dtype == torch.bool else mask > -LEAST
    return allowed.any(-1, keepdim=True).expand(*result.shape[:-1], 1).expand(result.shape)


def _canonical_mask(core: Core, value: Any) -> tuple[Tensor | None, Tensor | None]:
    mask: Tensor | None = None
    sinks: Tensor | None = None
    if core.mask is not None:
        mask = arrange(value(core.mask.node), core.mask.steps)
        mask = ~mask if core.scores is not None and core.scores.form == "fill" else mask
    elif core.scores is not None and (core.scores.form or core.scores.sinks):
        assert core.product is not None
        region = core.scores.region
        zero = torch.zeros(example_shape(core.product.node), dtype=torch.float64)
        bias = region.run({core.product.node: zero, **{s: value(s) for s in region.sides if _is_tensor(s)}})
        mask, sinks = _split_sinks(arrange(bias, core.bias_steps), core.scores)
    if core.extra:
        sinks = torch.zeros((1, 1, 1, 1), dtype=torch.float64)
    return mask, sinks


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(fake(node), Tensor)


def _split_sinks(bias: Tensor, scores: Scores) -> tuple[Tensor | None, Tensor | None]:
    if not scores.sinks:
        return bias, None
    keys = bias.shape[-1] - scores.sinks
    mask = bias.narrow(-1, scores.start, keys) if scores.form else None
    return mask, _around(bias, scores.start, keys)


def _around(bias: Tensor, start: int, keys: int) -> Tensor:
    """Return the columns before and behind those of the keys."""
    return torch.cat((bias[..., :start], bias[..., start + keys :]), -1)


def _by_head(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    return tensor if tensor.dim() < 3 or tensor.shape[-3] == 1 else tensor.index_select(-3, torch.tensor(order))


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(h) for h in range(len(order)))


# --------------------------------------------------------------------------------------------------- rewriting


def insert_canonical(program: Program, core: Core) -> fx.Node:
    """Put the canonical node in place of the core; returns it."""
    with program.graph.inserting_before(core.output):
        operands = [_insert(program, o.node, o.steps) for o in (core.query, core.key, core.value)]
        operands[0] = _scaled(program, operands[0], core)
        operands = _one_dtype(program, operands)
        mask, sinks = _insert_mask(program, core, operands)
        operands[0] = _only_seeing(program, operands[0], mask, core)
        options = {k: v for k, v in core.options.items() if v}
        rest = (mask, sinks) if sinks is not None else (mask,) if mask is not None else ()
        node = call(program, torch.ops.fhopt.attention.default, (*operands, *rest), options)
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if key in core.output.meta:
                node.meta[key] = core.output.meta[key]
        result = _insert_result(program, node, core)
    core.output.replace_all_uses_with(result)
    return node


def _insert(program: Program, node: fx.Node, steps: Steps) -> fx.Node:
    for method, arguments in steps:
        node = call_method(program, method, node, *arguments)
    return node


def _scaled(program: Program, query: fx.Node, core: Core) -> fx.Node:
    """Apply the factors of the scores to the queries, and order heads by their kv heads."""
    for node, divides in core.factors:
        query = call(program, torch.div if divides else torch.mul, (query, node))
    return query if core.order is None else call(program, _take_heads, (query, list(core.order)))


def _only_seeing(program: Program, query: fx.Node, mask: fx.Node | None, core: Core) -> fx.Node:
    """Set queries that may attend to nothing to zero, where a filled mask lets no gradient through for them.

    Their scores are all equal either way.
    """
    fills = core.scores is not None and core.scores.replaces and mask is not None and core.product is not None
    if not fills or not any(program.values[name].requires_grad for name in program.parameters):
        return query
    return call(program, seeing, (query, mask))


def seeing(query: Tensor, mask: Tensor) -> Tensor:
    """Set queries [B, H, S, D] to zero where an additive mask [B, H, S, T] leaves no key."""
    return query * (mask > -LEAST).any(-1, keepdim=True).to(query.dtype)


def _take_heads(tensor: Tensor, order: list[int]) -> Tensor:
    """Return the heads of [B, H, ., .] in another order."""
    return tensor.index_select(1, torch.tensor(order, device=tensor.device))


def _one_dtype(program: Program, operands: list[fx.Node]) -> list[fx.Node]:
    """Cast queries, keys and values to their widest dtype."""
    types = [fake(n).dtype for n in operands]
    widest = types[0]
    for other in types[1:]:
        widest = torch.promote_types(widest, other)
    return [n if t == widest else call_method(program, "to", n, widest) for n, t in zip(operands, types, strict=True)]


def _insert_mask(program: Program, core: Core, operands: list[fx.Node]) -> tuple[fx.Node | None, fx.Node | None]:
    mask: fx.Node | None = None
    sinks: fx.Node | None = None
    if core.mask is not None:
        mask = _insert(program, core.mask.node, core.mask.steps)
        if core.scores is not None and core.scores.form == "fill":
            mask = call(program, torch.logical_not, (mask,))
    elif core.scores is not None and (core.scores.form or core.scores.sinks):
        mask, sinks = _insert_bias(program, core)
    if core.extra:
        sinks = call_method(program, "new_zeros", operands[0], (1, 1, 1, 1))
    dtype = fake(operands[0]).dtype
    if mask is not None and fake(mask).dtype not in (torch.bool, dtype):
        mask = call_method(program, "to", mask, dtype)
    if core.order is not None:
        mask, sinks = (_in_order(program, n, core.order) for n in (mask, sinks))
    return mask, sinks


def _in_order(program: Program, node: fx.Node | None, order: tuple[int, ...]) -> fx.Node | None:
    sizes = example_shape(node) if node is not None else ()
    return node if len(sizes) < 4 or sizes[1] == 1 or node is None else call(program, _take_heads, (node, list(order)))


def _insert_bias(program: Program, core: Core) -> tuple[fx.Node | None, fx.Node | None]:
    """Repeat the region on scores of zeros: one element where everything broadcasts, else of full size."""
    assert core.scores is not None and core.product is not None
    bias = None
    if core.bias_is_small:
        bias = _try_small_bias(program, core)
    if bias is None:
        product = core.product
        axes = [list(a) for a in (product.left_axes, product.right_axes, product.axes)]
        zeros = call(program, blank_scores, (product.left, product.right, *axes))
        bias = _repeat_region(program, core, zeros)
    bias = _insert(program, bias, core.bias_steps)
    if not core.scores.sinks:
        return bias, None
    columns = shape(bias)[-1]  # type: ignore[index]
    if not isinstance(columns, int):
        raise Miss("sink columns with a symbolic number of keys; expected a fixed number", core.output)
    keys, start = columns - core.scores.sinks, core.scores.start
    sinks = call(program, _around, (bias, start, keys))
    return (call_method(program, "narrow", bias, -1, start, keys) if core.scores.form else None), sinks


def _try_small_bias(program: Program, core: Core) -> fx.Node | None:
    assert core.product is not None
    before = core.output.prev
    try:
        kind = fake(core.product.node)  # nothing of the queries: the mask stays a matter of its own
        zeros = call(program, torch.zeros, ((1, 1, 1, 1),), {"dtype": kind.dtype, "device": kind.device})
        bias = _repeat_region(program, core, zeros)
        if len(example_shape(bias)) == 4:
            return bias
    except Exception:  # an operation that needs the full shape
        pass
    while core.output.prev is not before:
        program.graph.erase_node(core.output.prev)
    return None


def _repeat_region(program: Program, core: Core, zeros: fx.Node) -> fx.Node:
    assert core.scores is not None and core.product is not None
    mapping: dict[fx.Node, Any] = {core.product.node: zeros}
    for node in core.scores.region.nodes:
        mapping[node] = copy_node(program, node, mapping)
    return mapping[core.scores.region.end]


def _insert_result(program: Program, node: fx.Node, core: Core) -> fx.Node:
    result = node
    if core.order is not None:
        result = call(program, _take_heads, (result, list(_inverse(core.order))))
    result = _insert(program, result, core.output_steps)
    wanted = fake(core.output).dtype
    result = result if fake(result).dtype == wanted else call_method(program, "to", result, wanted)
    return _with_strides(program, result, node, core)


def _with_strides(program: Program, result: fx.Node, node: fx.Node, core: Core) -> fx.Node:
    """Keep the order of axes in memory that the core's result had, where anything sees it."""
    with on_fakes(fake_mode(program)):
        canonical = [fake(node), *(in_order(fake(node), order) for order in LAYOUTS)]  # as it comes here, or elsewhere
        layouts = [arrange(tensor, core.output_steps).to(fake(result).dtype) for tensor in canonical]
    if not is_layout_seen(program, core.output, layouts):
        return result
    return call(program, in_order, (result, memory_order(fake(core.output))))
