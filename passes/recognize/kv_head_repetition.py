"""Removal of kv-head repetition in any spelling: the core gets keys and values from before the repetition.

    before                                              after
    k = repeat_kv(k)   [B, G, T, D] -> [B, H, T, D]     o = fhopt.attention(q, k, v)      with k, v [B, G, T, D]
    o = fhopt.attention(q, k, v)

A lossless cast after the repetition is dropped: the core computes in the widest dtype of its operands. No spelling is
matched: an ancestor with fewer heads is run on random values, and each head of the result is compared with each of its
heads. If heads are shared in an order other than blocks, the queries are reordered accordingly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fhopt.passes.graph.evaluate import Evaluator, Region, example_shape, random_like
from fhopt.passes.graph.nodes import FLOATS, fake, op_name
from fhopt.passes.recognize.layout import JOINS, MOVEMENT, Steps, arrange
from fhopt.passes.recognize.node_roles import is_fixed
from fhopt.passes.recognize.scores import DIVISION, MULTIPLICATION

TAKES = MOVEMENT | JOINS | {"index", "gather", "clone", "take_along_dim"}
CASTS = frozenset({"float", "double", "to", "_to_copy", "type"})
EQUAL = 1e-12  # relative; tolerates several float64 roundings of a factor
DEPTH = 10  # search depth upstream of a repeated key, in nodes


@dataclass
class Operand:
    """One input of a core, and the methods that convert it to [B, heads, tokens, channels]."""

    node: fx.Node
    steps: Steps = ()

    @property
    def sizes(self) -> torch.Size:
        """Example size of [B, heads, tokens, channels]."""
        return arrange(torch.empty(example_shape(self.node), device="meta"), self.steps).shape


@dataclass(frozen=True)
class Repeated:
    """An operand before its repetition, and the kv head of each query head.

    factor: applied to it after the repetition.
    """

    operand: Operand
    heads: tuple[int, ...]
    factor: float = 1.0

    @property
    def order(self) -> tuple[int, ...] | None:
        """Query heads sorted by kv head; None if they are sorted already."""
        order = tuple(sorted(range(len(self.heads)), key=lambda h: self.heads[h]))
        return order if order != tuple(range(len(order))) else None


def before_repetition(operand: Operand, heads: int, base: Evaluator) -> Repeated | None:
    """Return the nearest ancestor with fewer heads that gives the operand by selecting heads and scaling.

    None without such an ancestor.
    """
    final = operand.sizes
    if final[1] != heads or heads == 1:
        return None
    current, factor = operand.node, 1.0
    for _ in range(DEPTH):
        inputs = [n for n in current.all_input_nodes if isinstance(fake(n), Tensor)]
        number = _scale(current)
        if not inputs or (number is None and op_name(current) not in TAKES and not _widens(current, inputs[0])):
            return None
        current, factor = inputs[0], factor * (number or 1.0)
        for steps in _ways_to(example_shape(current), final):
            taken = _heads_taken(current, steps, operand, factor, base)
            if taken is not None:
                return Repeated(Operand(current, steps), taken, factor)
    return None


def _widens(node: fx.Node, source: fx.Node) -> bool:
    """Return whether the node losslessly casts its one tensor to a wider dtype."""
    before, after = fake(source), fake(node)
    if op_name(node) not in CASTS or before.shape != after.shape or before.device != after.device:
        return False
    floats = {t for t in (before.dtype, after.dtype) if t.is_floating_point} <= set(FLOATS)  # 8-bit: no promotion
    return floats and bool(torch.promote_types(before.dtype, after.dtype) == after.dtype)


def _scale(node: fx.Node) -> float | None:
    """Return the nonzero number by which the node multiplies its one tensor; None for any other operation."""
    divides = op_name(node) in DIVISION
    if not (divides or op_name(node) in MULTIPLICATION) or len(node.args) != 2 or node.kwargs:
        return None
    numbers = [a for a in node.args if isinstance(a, (int, float)) and a]
    if len(numbers) != 1 or (divides and numbers[0] is not node.args[1]):
        return None
    return 1 / numbers[0] if divides else float(numbers[0])


def _ways_to(sizes: tuple[int, ...], final: torch.Size) -> list[Steps]:
    """Return the axis permutations that give [B, fewer heads, T, D]."""
    if len(sizes) == 3:
        return [(("unsqueeze", (1,)),)] if sizes == (final[0], final[2], final[3]) else []
    if len(sizes) != 4:
        return []
    fitting: list[Steps] = []
    for order in ((0, 1, 2, 3), (0, 2, 1, 3), (0, 1, 3, 2), (0, 2, 3, 1), (0, 3, 1, 2)):
        b, h, t, d = (sizes[i] for i in order)
        if (b, t, d) == (final[0], final[2], final[3]) and h < final[1] and final[1] % h == 0:
            fitting.append(() if order == (0, 1, 2, 3) else (("permute", order),))
    return fitting


def _selects(side: fx.Node) -> bool:
    """Return whether a side is an integer or boolean tensor, which selects elements."""
    value = fake(side)
    return isinstance(value, Tensor) and not value.is_floating_point()


def _heads_taken(
    source: fx.Node, steps: Steps, operand: Operand, factor: float, base: Evaluator
) -> tuple[int, ...] | None:
    """For each head of the operand, return the head of `source` that it is `factor` times; None for anything else."""
    probe = random_like(source)
    region = Region(base, [source], operand.node)
    if not all(is_fixed(side) for side in region.sides if _selects(side)):
        return None
    try:
        result = arrange(region.run({source: probe}), operand.steps)
    except Exception:  # if the region fails, it is not a plain repetition
        return None
    few = arrange(probe, steps) * factor
    taken = []
    for head in range(result.shape[1]):
        equal = [g for g in range(few.shape[1]) if torch.allclose(result[:, head], few[:, g], rtol=EQUAL, atol=0)]
        if not equal:
            return None
        taken.append(equal[0])
    counts = {taken.count(g) for g in range(few.shape[1])}
    return tuple(taken) if len(counts) == 1 else None
