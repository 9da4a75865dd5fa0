"""Absorption of the decoders of keys and values into queries and outputs: keys and values are never reconstructed.

    before                                                        after
    o, lse = latent_attention(q, decode(z_k, D_k),                q~ = absorb(q, D_k)
                              decode(z_v, D_v), mask)             o~, lse = latent_attention(q~, z_k, z_v, mask)
                                                                  o = expand(o~, D_v)

q . (D_K z) = (D_K^T q) . z, and a weighted sum commutes with D_V (DeepSeek-V2, section 2.1.2: weight absorption).
If z is `unpack(packed, scale)`, the packed latents become the operands, and the scales fold into logits and weights.
If keys and values are decoded from one z, it is both operands: latent_attention(q~, z, scale, z, scale).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fhopt.ops import algebra
from fhopt.passes.graph.nodes import call, remove_dead_code
from fhopt.passes.graph.program import Program


@dataclass
class Expanded:
    """A latent_attention node whose key and value are decoded latents."""

    node: fx.Node
    key: fx.Node  # the decode nodes
    value: fx.Node


@dataclass(frozen=True)
class Absorb:
    """The pass `absorb`: exact, applicable wherever `compress` (or a cache) left a decode before an attention."""

    name: str = "absorb"

    def candidates(self, program: Program) -> list[fx.Node]:
        """Return the latent_attention nodes with decoded keys and values."""
        op = torch.ops.fhopt.latent_attention.default
        return [n for n in program.graph.nodes if n.target is op and _is_decode(n.args[1]) and _is_decode(n.args[3])]

    def match(self, node: fx.Node) -> Expanded:
        """Return the operands to absorb."""
        key, value = node.args[1], node.args[3]
        assert isinstance(key, fx.Node) and isinstance(value, fx.Node)
        return Expanded(node, key, value)

    def rewrite(self, program: Program, expanded: Expanded) -> fx.Node:
        """Absorb the decoders and return the new latent_attention node."""
        node = expanded.node
        with program.graph.inserting_before(node):
            query = call(program, algebra.absorb, (node.args[0], expanded.key.args[1]))
            key, key_scale, key_tiers = _packed_latent(expanded.key.args[0])
            value, value_scale, value_tiers = _packed_latent(expanded.value.args[0])
            options = {**node.kwargs, **_tiers("key", key_tiers), **_tiers("value", value_tiers)}
            arguments = (query, key, key_scale, value, value_scale, node.args[5])
            latent = call(program, torch.ops.fhopt.latent_attention.default, arguments, options)
            output = call(program, algebra.expand, (call(program, algebra.first, (latent,)), expanded.value.args[1]))
            pair = call(program, algebra.pair, (output, call(program, algebra.second, (latent,))))
        node.replace_all_uses_with(pair)
        program.graph.erase_node(node)
        remove_dead_code(program)
        return latent


def _is_decode(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and argument.target is algebra.decode


def _packed_latent(latent: Any) -> tuple[Any, Any, tuple[Any, Any, Any]]:
    """Return (packed latents or latent, scale, (bits, widths, steps)) of a latent, packed if it was unpacked."""
    if isinstance(latent, fx.Node) and latent.target is torch.ops.fhopt.unpack.default:
        packed, scale, *tiers = latent.args
        return packed, scale, (tiers[0], tiers[1], tiers[2])
    return latent, None, ([], [], [])


def _tiers(side: str, tiers: tuple[Any, Any, Any]) -> dict[str, Any]:
    return {f"{side}_bits": tiers[0], f"{side}_widths": tiers[1], f"{side}_steps": tiers[2]}
