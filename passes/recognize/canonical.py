"""One recognized attention: the data for its rewrite, and the canonical node that replaces it.

    before                                              after
    scores = ...; weights = softmax(scores)             m = <the score function of zeros>
    o = weights @ v                                     o = fhopt.attention(q, k, v, m, scale=c)

Before any change, `canonical_check` proves that the canonical form holds for all values, and compares the two.

Rows: a query without allowed keys gets NaN, zero, or an average weighted by the values that overwrite its scores, as
in the model (`Core.empty_is_nan`, `zeroed`, `levels`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fhopt.errors import Miss
from fhopt.ops import masks
from fhopt.ops.attention import blank_scores
from fhopt.passes.certificate import Certificate, Checked, ReplacedNode
from fhopt.passes.graph.evaluate import example_shape
from fhopt.passes.graph.nodes import (
    call,
    call_method,
    copy_node,
    fake,
    fake_mode,
    on_fakes,
    shape,
)
from fhopt.passes.graph.program import Program
from fhopt.passes.prepare.memory import node_needs_gradient
from fhopt.passes.recognize.contraction import Contraction
from fhopt.passes.recognize.kv_head_repetition import Operand
from fhopt.passes.recognize.layout import Steps, arrange
from fhopt.passes.recognize.result_strides import LAYOUTS, in_order, is_layout_seen, memory_order
from fhopt.passes.recognize.scores import Scores
from fhopt.passes.recognize.softmax import Softmax


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


# --------------------------------------------------------------------------------------------------- rewrite


def insert_canonical(program: Program, core: Core) -> fx.Node:
    """Replace the core by the canonical node; return the node."""
    with program.graph.inserting_before(core.output):
        operands = [_insert(program, o.node, o.steps) for o in (core.query, core.key, core.value)]
        operands[0] = _scaled(program, operands[0], core)
        operands = _one_dtype(program, operands)
        mask, sinks, allowed = _insert_mask(program, core, operands)
        if allowed is not None and mask is not None:
            bias, mask = mask, call(program, masks.visible, (mask, allowed))
            if core.levels:
                operands[0] = call(program, masks.seeing, (operands[0], mask))
                mask = call(program, masks.with_levels, (bias, mask))
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
    sinks = call(program, columns_around, (bias, start, keys))
    return (call_method(program, "narrow", bias, -1, start, keys) if core.scores.form else None), sinks


def columns_around(bias: Tensor, start: int, keys: int) -> Tensor:
    """Return the columns before and after the keys."""
    return torch.cat((bias[..., :start], bias[..., start + keys :]), -1)


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


def inverse_order(order: tuple[int, ...]) -> tuple[int, ...]:
    """Return the permutation that undoes an order of heads."""
    return tuple(order.index(h) for h in range(len(order)))


def _insert_result(program: Program, result: fx.Node, node: fx.Node, core: Core) -> fx.Node:
    if core.order is not None:
        result = call(program, _take_heads, (result, list(inverse_order(core.order))))
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
