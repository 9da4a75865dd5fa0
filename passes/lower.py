"""Hand the canonical ops back as plain torch functions, which inductor traces through and fuses.

before                                       after
fhopt.attention(q, k, v, mask)               attention_reference(...)          -> F.scaled_dot_product_attention
fhopt.latent_attention(q~, codes, ...)       latent_attention_reference(...)   -> matmul, softmax, matmul
                                             (coded operands keep the op: its kernel is generated per tier)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fhopt import ops
from fhopt.passes.graph import Program

_PLAIN: dict[Any, Callable[..., Any]] = {
    torch.ops.fhopt.attention.default: ops.attention_reference,
    torch.ops.fhopt.latent_attention.default: ops.latent_attention_reference,
}


@dataclass(frozen=True)
class Lower:
    """The pass."""

    name: str = "lower"

    def candidates(self, program: Program) -> list[fx.Node]:
        """Canonical nodes that plain torch ops serve best."""
        return [n for n in program.graph.nodes if n.target in _PLAIN and not _is_coded(n)]

    def rewrite(self, program: Program, node: fx.Node) -> None:
        """Exchange the target; arguments stay as they are."""
        node.target = _PLAIN[node.target]


def _is_coded(node: fx.Node) -> bool:
    return bool(node.kwargs.get("key_bits") or node.kwargs.get("value_bits"))
