"""Every spelling of attention becomes one `fhopt::attention` node.

    before                                              after
    s = q @ k.transpose(-1, -2)                         o = fhopt.attention(q, k, v, mask, scale=c)
    s = s * c + mask
    p = softmax(s, -1); p = dropout(p)
    o = p @ v

A core is a call of scaled_dot_product_attention, or a softmax over the last axis between two contractions. Repetition
of kv heads (repeat_interleave, expand + reshape) is undone by *running* the candidates, not by recognising spellings.
Each rewrite is checked the same way: the old region and the new node run on the same random numbers, and on a mismatch
the region stays as it is, with a reason.

Letters: B batch, H query heads, G kv heads, S queries, T keys, D and E head sizes of keys and values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fhopt.errors import Miss
from fhopt.ops import attention_reference
from fhopt.passes.graph import (
    Evaluator,
    Program,
    changed_in_place,
    example_shape,
    fake,
    is_in_place,
    op_name,
    run_region,
    shape,
)

SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax"})
CONTRACTION = frozenset({"matmul", "bmm"})
SAME_VALUE = frozenset({"to", "type", "type_as", "float", "contiguous", "clone", "_to_copy", "alias", "detach"})
DROPOUT = frozenset({"dropout", "native_dropout"})
LEAST_MASK = -1e4  # additive mask values below this mean "may not attend"


@dataclass
class Core:
    """What a rewrite needs: the operands, the score features, and the node whose users take the result."""

    output: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    key_is_transposed: bool = False
    mask: fx.Node | None = None
    fill: bool = False  # mask says where NOT to attend (masked_fill)
    scale: float = 1.0
    is_causal: bool = False
    softcap: float = 0.0
    dropout: float = 0.0
    is_call: bool = False  # a call of scaled_dot_product_attention


@dataclass(frozen=True)
class Normalize:
    """The pass. `tolerance` is the largest relative difference that the check by execution lets through."""

    name: str = "normalize"
    tolerance: float = 1e-5

    def candidates(self, program: Program) -> list[fx.Node]:
        """Nodes that may be the core of an attention, in graph order."""
        return [n for n in program.graph.nodes if op_name(n) in SOFTMAX | {"scaled_dot_product_attention"}]

    def match(self, node: fx.Node, base: Evaluator) -> Core:
        """The core at `node`, checked by execution. Raises Miss."""
        core = _match_sdpa(node) if op_name(node) == "scaled_dot_product_attention" else _match_softmax(node)
        _check_shapes(core)
        _undo_repetition(core, base)
        _verify(core, base, self.tolerance)
        return core

    def rewrite(self, program: Program, core: Core) -> fx.Node:
        """Put the canonical node in place of the core; returns it."""
        graph = program.graph
        with graph.inserting_before(core.output):
            key = _transposed(graph, core.key) if core.key_is_transposed else core.key
            mask = _inverted(graph, core.mask) if core.fill and core.mask is not None else core.mask
            options = {k: v for k, v in _options(core).items() if v}
            arguments = (core.query, key, core.value) + ((mask,) if mask is not None else ())
            node = graph.call_function(torch.ops.fhopt.attention.default, arguments, options)
        node.meta = dict(core.output.meta)
        core.output.replace_all_uses_with(node)
        return node


# --------------------------------------------------------------------------------------------------- matching


def _match_sdpa(node: fx.Node) -> Core:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    scale, head = given.get("scale"), shape(given["query"])
    if scale is None and head is not None:
        scale = 1 / math.sqrt(head[-1])
    if not isinstance(scale, (int, float)):
        raise Miss(f"the scale is computed in the graph ({scale}); expected a number", node)
    return Core(
        node,
        given["query"],
        given["key"],
        given["value"],
        mask=given.get("attn_mask"),
        scale=float(scale),
        is_causal=bool(given.get("is_causal", False)),
        dropout=float(given.get("dropout_p", 0.0)),
        is_call=True,
    )


@dataclass
class _Score:
    """Features gathered on the way from the softmax back to the contraction."""

    scale: float = 1.0
    softcap: float = 0.0
    mask: fx.Node | None = None
    fill: bool = False


def _match_softmax(node: fx.Node) -> Core:
    axis = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    rank = len(shape(node) or ())
    if axis not in (-1, rank - 1):
        raise Miss(f"softmax over axis {axis}; expected the last", node)
    score = _Score()
    contraction = _walk_scores(_node(node.args[0]), score)
    output, dropout = _walk_weights(node)
    query, key = _node(contraction.args[0]), _node(contraction.args[1])
    scale = score.scale * (score.softcap or 1.0)  # cap * tanh(x / cap): the division was gathered into the scale
    return Core(
        output, query, key, _node(output.args[1]), True, score.mask, score.fill, scale,
        softcap=score.softcap, dropout=dropout,
    )  # fmt: skip


def _node(argument: Any) -> fx.Node:
    if not isinstance(argument, fx.Node):
        raise Miss(f"expected a tensor, found {argument!r}")
    return argument


def _walk_scores(node: fx.Node, score: _Score) -> fx.Node:
    """From the softmax's input back to q k^T, gathering scale, softcap and mask. Raises Miss."""
    for _ in range(32):
        name = op_name(node)
        if name in CONTRACTION:
            return node
        if is_in_place(node):
            raise Miss(f"scores are changed in place by {name}", node)
        node = _score_step(node, name, score)
    raise Miss("no contraction within 32 steps before the softmax", node)


def _score_step(node: fx.Node, name: str, score: _Score) -> fx.Node:
    if name in SAME_VALUE:
        return _node(node.args[0])
    if name in {"mul", "truediv", "div"} and isinstance(node.args[1], (int, float)):
        factor = float(node.args[1]) if name == "mul" else 1 / float(node.args[1])
        score.scale *= factor
        return _node(node.args[0])
    if name == "tanh":
        if score.softcap or score.scale <= 0:
            raise Miss("tanh on the scores that is not a softcap", node)
        score.softcap, score.scale = score.scale, 1.0
        return _node(node.args[0])
    if name == "add" and score.mask is None and len(node.args) == 2:
        scores, score.mask = _split_addends(node)
        return scores
    if name == "masked_fill" and score.mask is None and float(_number(node.args[2])) <= LEAST_MASK:
        score.mask, score.fill = _node(node.args[1]), True
        return _node(node.args[0])
    if name == "where" and score.mask is None and float(_number(node.args[2])) <= LEAST_MASK:
        score.mask = _node(node.args[0])
        return _node(node.args[1])
    raise Miss(f"{name or node.op} between the contraction and the softmax is not understood", node)


def _number(argument: Any) -> float:
    return float(argument) if isinstance(argument, (int, float)) else math.inf


def _split_addends(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(scores, mask): the scores are the addend that leads to a contraction through scalings."""
    first, second = _node(node.args[0]), _node(node.args[1])
    for scores, mask in ((first, second), (second, first)):
        current = scores
        while op_name(current) in SAME_VALUE | {"mul", "truediv", "div", "tanh"} and isinstance(
            current.args[0], fx.Node
        ):
            current = current.args[0]
        if op_name(current) in CONTRACTION:
            return scores, mask
    raise Miss("neither addend of the scores comes from a contraction", node)


def _walk_weights(node: fx.Node) -> tuple[fx.Node, float]:
    """From the softmax forward to p v: (output node, dropout). Raises Miss."""
    dropout = 0.0
    current = node
    for _ in range(8):
        follower = [u for u in current.users if op_name(u) in SAME_VALUE | DROPOUT | CONTRACTION]
        if len(follower) != 1:
            raise Miss(f"{len(follower)} contractions take the attention weights; expected one", node)
        user = follower[0]
        if op_name(user) in CONTRACTION:
            if user.args[0] is not current:
                raise Miss("the attention weights are not the left operand of the second contraction", user)
            return user, dropout
        if op_name(user) in DROPOUT and _is_training(user):
            dropout = float(_number(user.kwargs.get("p", user.args[1] if len(user.args) > 1 else 0.5)))
        current = user
    raise Miss("no contraction after the softmax", node)


def _is_training(node: fx.Node) -> bool:
    return bool(node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True))


# --------------------------------------------------------------------------------------------------- checking


def _check_shapes(core: Core) -> None:
    shapes = [shape(n) for n in (core.query, core.key, core.value)]
    if any(s is None or len(s) != 4 for s in shapes):
        raise Miss(
            f"operands have shapes {shapes}; expected three of rank 4 [batch, heads, tokens, head size]", core.output
        )
    heads, groups = shapes[0][1], shapes[1][1]  # type: ignore[index]
    if not isinstance(heads, int) or not isinstance(groups, int) or heads % groups:
        raise Miss(f"{heads} query heads on {groups} kv heads", core.output)


def _undo_repetition(core: Core, base: Evaluator) -> None:
    """Move key and value back to before a repetition of kv heads, where execution shows that there is one."""
    heads = int(shape(core.query)[1])  # type: ignore[index]
    found = _before_repetition(core.key, heads, base)
    if found is not None:
        core.key, swapped = found
        core.key_is_transposed = core.key_is_transposed != swapped
    found = _before_repetition(core.value, heads, base)
    if found is not None and not found[1]:
        core.value = found[0]
    if shape(core.key)[1] != shape(core.value)[1]:  # type: ignore[index]
        raise Miss("keys and values have different numbers of heads after undoing repetition", core.output)


def _before_repetition(node: fx.Node, heads: int, base: Evaluator) -> tuple[fx.Node, bool] | None:
    """The nearest ancestor [B, G, ., .] with G < H of which `node` is `repeat_interleave(H/G, 1)`, if any.

    The second result tells whether the last two axes were exchanged on the way.
    """
    current = node
    for _ in range(8):
        inputs = [n for n in current.all_input_nodes if isinstance(fake(n), Tensor)]
        if len(inputs) != 1 or is_in_place(current):
            return None
        current = inputs[0]
        found = shape(current)
        if found is None or len(found) != 4 or not isinstance(found[1], int) or found[1] >= heads or heads % found[1]:
            continue
        swapped = _repetition(current, node, heads, base)
        if swapped is not None:
            return current, swapped
    return None


def _repetition(source: fx.Node, node: fx.Node, heads: int, base: Evaluator) -> bool | None:
    """None when `node` is no repetition of `source`, else whether it is also transposed."""
    probe = _random(source)
    try:
        result = run_region(base, {source: probe}, node)
    except Exception:  # any failure of the region means that it is not a plain repetition
        return None
    repeated = probe.repeat_interleave(heads // probe.shape[1], 1)
    for swapped, expected in ((False, repeated), (True, repeated.mT)):
        if result.shape == expected.shape and torch.equal(result, expected):
            return swapped
    return None


def _random(node: fx.Node) -> Tensor:
    """Random float64 numbers of the shape of `node`, on its device."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(example_shape(node), generator=generator, dtype=torch.float64)
    return value.to(fake(node).device)


def _verify(core: Core, base: Evaluator, tolerance: float) -> None:
    """Run the old region and the canonical op on the same random float64 operands. Raises Miss on a difference."""
    nodes = {n: _random(n) + i for i, n in enumerate(dict.fromkeys((core.query, core.key, core.value)))}
    writer = changed_in_place(base.program, nodes, core.output)
    if writer is not None:
        raise Miss(f"scores are changed in place by {op_name(writer)}", writer)
    if core.dropout:
        if core.is_call:
            return  # the call says what it does, and two random masks never agree
        raise Miss("dropout on the attention weights is active; expected evaluation or dropout 0", core.output)
    q, k, v = nodes[core.query], nodes[core.key], nodes[core.value]
    mask = _random_mask(core)
    if mask is not None and core.mask is not None and core.mask not in nodes:
        nodes[core.mask] = mask
        mask = ~mask if core.fill else mask
    try:
        old = run_region(base, nodes, core.output)
        new = attention_reference(q, k.mT if core.key_is_transposed else k, v, mask, **_options(core))
    except Exception as error:
        raise Miss(
            f"the region could not be run for the check ({type(error).__name__}: {error})", core.output
        ) from error
    bound = tolerance if fake(core.query).dtype in (torch.float32, torch.float64) else 3e-2
    difference = float((old - new).abs().max() / old.abs().max().clamp_min(1e-30))
    if not difference <= bound:
        raise Miss(f"the canonical op differs by {difference:.1e} relative, more than {bound:.0e}", core.output)


def _random_mask(core: Core) -> Tensor | None:
    """Other numbers for the mask than today's: a bias may be zero now and not after training."""
    if core.mask is None:
        return None
    numbers = _random(core.mask)
    if fake(core.mask).dtype != torch.bool:
        return numbers
    allowed = numbers > 0
    allowed[..., 0] = True  # every query may see something
    return ~allowed if core.fill else allowed


def _options(core: Core) -> dict[str, Any]:
    return dict(scale=core.scale, is_causal=core.is_causal, softcap=core.softcap, dropout=core.dropout)


def _transposed(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """node.transpose(-1, -2), reusing the node that `node` was transposed from."""
    if op_name(node) == "transpose" and set(node.args[1:]) in ({-1, -2}, {2, 3}) and isinstance(node.args[0], fx.Node):
        return node.args[0]
    return _with_fake(graph.call_method("transpose", (node, -1, -2)), lambda t: t.transpose(-1, -2), node)


def _inverted(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return _with_fake(graph.call_function(torch.logical_not, (node,)), torch.logical_not, node)


def _with_fake(node: fx.Node, function: Any, source: fx.Node) -> fx.Node:
    """Give a new node the fake value that its operation would have made."""
    value = fake(source)
    if isinstance(value, Tensor):
        node.meta["example_value"] = node.meta["val"] = function(value)
    return node
