"""Lowering of canonical ops to torch functions, which inductor traces through and fuses, or to an fhopt kernel.

    before                                       after
    fhopt.attention(q, k, v, mask)               attention_reference(...)          -> F.scaled_dot_product_attention
      few queries on many keys, on a CPU         first(fhopt.latent_attention(q, k, None, v, None, mask))
    fhopt.latent_attention(q~, z, ...)           latent_attention_reference(...)   -> matmul, softmax, matmul
                                                 (packed latents keep the op: its kernel is generated)

On CPU, scaled_dot_product_attention loads the keys once per query head: with few queries 3 to 11 times slower than
loading them once for all query heads of a kv head. The kernel for latents without bit groups does the latter; inductor
would fuse plain matmuls back into the slow call.

In training, attention with a numeric mask computed from an input or a buffer stays unfused (see `_may_hide_rows`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fhopt.ops import algebra, attention, latent_attention, masks
from fhopt.passes.graph.evaluate import example_shape
from fhopt.passes.graph.nodes import call, fake, op_name, shape
from fhopt.passes.graph.program import Program
from fhopt.passes.recognize.softmax import EXPONENTIAL

FEW = 48  # max rows (queries x query heads per kv head) for which loading keys once is faster
FEW_ABSORBED = 256  # the same if the alternative is two plain matmuls
MANY = 256  # min keys for which the kernel is faster
SIZED_NAMES = "blank_scores ones_like zeros_like full_like empty_like new_ones new_zeros new_full new_empty"
ONLY_SIZED = frozenset(SIZED_NAMES.split())  # calls that ignore the values of their tensor
_PLAIN: dict[Any, Callable[..., Any]] = {
    torch.ops.fhopt.attention.default: attention.attention_reference,
    torch.ops.fhopt.latent_attention.default: latent_attention.latent_attention_reference,
}


@dataclass(frozen=True)
class Lower:
    """The pass `lower`. training: the graph stays differentiable."""

    training: bool = False
    name: str = "lower"

    def candidates(self, program: Program) -> list[fx.Node]:
        """Return the canonical nodes to run as plain torch ops or with the kernel for latents without bit groups."""
        return [n for n in program.graph.nodes if n.target in _PLAIN and not _is_packed(n)]

    def rewrite(self, program: Program, node: fx.Node) -> str:
        """Lower the node and return "kernel" or "torch"."""
        is_exact = node.target is torch.ops.fhopt.attention.default
        if not self.training and is_exact and is_decoding(node):
            return _to_kernel(program, node)
        if not self.training and not is_exact and _is_small(node.args[0], node.args[1], FEW_ABSORBED):
            return "kernel"
        if self.training and is_exact and _may_hide_rows(program, node):
            node.kwargs = {**node.kwargs, "fused": False}
        node.target = _PLAIN[node.target]
        return "torch"


def is_decoding(node: fx.Node) -> bool:
    """Return whether a node is exact attention of few queries on many keys, on a CPU, without sinks and dropout."""
    plain = not node.kwargs.get("dropout") and (len(node.args) < 5 or node.args[4] is None)
    return plain and _is_small(node.args[0], node.args[1])


def _is_small(query: Any, key: Any, few: int = FEW) -> bool:
    """Return whether rows are few and fixed in number, and keys many, of a dtype that kernels support."""
    value, sizes = fake(query), shape(query)
    if not isinstance(value, Tensor) or value.device.type != "cpu" or value.dtype == torch.float64 or sizes is None:
        return False
    if not all(isinstance(n, int) for n in sizes[1:3]):
        return False
    kept = example_shape(key)
    return int(sizes[1]) // kept[1] * int(sizes[2]) <= few and kept[2] >= MANY


def _to_kernel(program: Program, node: fx.Node) -> str:
    query, key, value = node.args[:3]
    mask = node.args[3] if len(node.args) > 3 else None
    numbers = dict(scale=node.kwargs["scale"], softcap=node.kwargs.get("softcap", 0.0))
    with program.graph.inserting_before(node):
        if node.kwargs.get("is_causal"):
            mask = call(program, masks.total_mask, (query, key, mask, True))
        options = {**algebra.uncoded_options(), **numbers}
        pair = call(program, torch.ops.fhopt.latent_attention.default, (query, key, None, value, None, mask), options)
        result = call(program, algebra.first, (pair,))
    node.replace_all_uses_with(result)
    program.graph.erase_node(node)
    return "kernel"


def _may_hide_rows(program: Program, node: fx.Node) -> bool:
    """Return whether a numeric mask is an input or a buffer, which may mask all keys of a query.

    The weights of such a row are uniform, but not in the backward pass of scaled_dot_product_attention: it stores
    max + log(sum), which rounds to the max, so that gradients become T times too large.
    """
    mask = node.args[3] if len(node.args) > 3 else None
    if not isinstance(mask, fx.Node) or fake(mask).dtype == torch.bool:
        return False
    seen, stack = {mask}, [mask]
    while stack:
        at = stack.pop()
        if at.op == "placeholder" and at.name not in program.parameters:
            return True
        sources = [] if op_name(at) in ONLY_SIZED else at.all_input_nodes
        tensors = [n for n in sources if n not in seen and isinstance(fake(n), Tensor)]  # sizes excluded
        seen.update(tensors)
        stack.extend(tensors)
    return False


def _is_packed(node: fx.Node) -> bool:
    return bool(node.kwargs.get("key_bits") or node.kwargs.get("value_bits"))


def is_spelled_out(graph: fx.Graph) -> bool:
    """Return whether a graph computes attention from a softmax or exponentials rather than fused attention."""
    names = {op_name(node) for node in graph.nodes}
    return bool(names & EXPONENTIAL) or any("softmax" in name or "softmin" in name for name in names)
