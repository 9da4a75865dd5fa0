"""Attention on the latents that a model already caches: their decoders are absorbed into queries and outputs.

    before (DeepSeek-V2 decodes one token)                after
    z = cat(cache, norm(down(x)))       [B, 1, T, R]      q~ = absorb(q, D_K)                          [B, H, S, R + P]
    r = cat(cache, rope(x))             [B, 1, T, P]      o~, lse = latent_attention(q~, cat(z, r), z, mask)
    k, v = split(up(z)); k = cat(k, r)  [B, G, T, D or E] o = expand(o~, D_V)
    o = fhopt.attention(q, k, v, mask)

`recognize.kept_latents` finds the latents, `recognize.latent_expansion` computes D_K and D_V from the weights of each
call (`Bound`); they are never baked into the graph.

Offsets: k = D_K z + c_K and v = D_V z + c_V. The term q . c_K is equal for all tokens and cancels in the softmax; c_V
is added to the result.

Exact (DeepSeek-V2, section 2.1.2: weight absorption), and applied if it takes fewer multiplications: for one query, or
a few, on many tokens. Prefill uses expanded keys once per prompt token, and is not rewritten.

Letters: B batch, H query heads, G kv heads, S queries, T tokens, D and E head sizes of keys and values, R latent width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fhopt.errors import Miss
from fhopt.ops import algebra, masks
from fhopt.passes.graph.evaluate import Evaluator, example_shape
from fhopt.passes.graph.nodes import add_constant, call, call_method, fake, remove_dead_code, shape
from fhopt.passes.graph.program import Bound, Program
from fhopt.passes.recognize.kept_latents import narrowest_latents
from fhopt.passes.recognize.latent_expansion import LatentAxes, LatentSide, behind, example_size, read_side
from fhopt.passes.recognize.node_roles import Kind, Roles


@dataclass(frozen=True)
class KeptLatents:
    """An attention whose keys and values are expanded from latents."""

    node: fx.Node
    key: LatentSide
    value: LatentSide


@dataclass(frozen=True)
class AbsorbProjection:
    """The pass `absorb_projection`, for inference.

    tolerance: relative, of the comparison with an affine map. margin: required reduction factor of multiplications if
    the number of queries is not fixed.
    """

    name: str = "absorb_projection"
    tolerance: float = 1e-9
    margin: float = 4.0

    def candidates(self, program: Program) -> list[fx.Node]:
        """Return the canonical attention nodes."""
        return [n for n in program.graph.nodes if n.target is torch.ops.fhopt.attention.default]

    def match(self, node: fx.Node, program: Program, roles: Roles, base: Evaluator) -> KeptLatents:
        """Match the latents of keys and values of `node`. Raises Miss if none is narrower, or it would be slower."""
        _check_options(node)
        _check_lengths(node)
        key, value = _operands(node)[1:]
        latents = narrowest_latents(key, value, roles, base)
        _check_alone(node, latents, roles)
        sides = (read_side(x, latents, key, program, roles, self.tolerance) for x in (key, value))
        kept = KeptLatents(node, *sides)
        if kept.key.facts.shifted and node.kwargs.get("softcap"):
            raise Miss("keys have an offset, which does not cancel in a softmax with a softcap", node)
        self._check_cost(kept)
        return kept

    def rewrite(self, program: Program, kept: KeptLatents) -> fx.Node:
        """Replace `node` by attention on the latents and return the latent_attention node."""
        node, query = kept.node, _operands(kept.node)[0]
        mask = node.args[3] if len(node.args) > 3 else None
        with program.graph.inserting_before(node):
            key, value = _both_sides(program, kept, fake(query).dtype)
            if node.kwargs.get("is_causal"):
                mask = call(program, masks.total_mask, (query, key, mask, True))
            decode_k = _constant(program, node, kept.key, "key_decode", 0)
            absorbed = call(program, algebra.absorb, (query, decode_k))
            shared = dict(scale=node.kwargs["scale"], softcap=node.kwargs.get("softcap", 0.0))
            options = {**algebra.uncoded_options(), **shared}
            arguments = (absorbed, key, None, value, None, mask)
            latent = call(program, torch.ops.fhopt.latent_attention.default, arguments, options)
            decode_v = _constant(program, node, kept.value, "value_decode", 0)
            output = call(program, algebra.expand, (call(program, algebra.first, (latent,)), decode_v))
            if kept.value.facts.shifted:
                offset = _constant(program, node, kept.value, "value_offset", 1)
                output = call(program, shifted, (output, call(program, algebra.second, (latent,)), offset))
        node.replace_all_uses_with(output)
        program.graph.erase_node(node)
        remove_dead_code(program)
        return latent

    def _check_cost(self, kept: KeptLatents) -> None:
        """Raise Miss if attention on latents takes more multiplications than expanding them."""
        query, key, value = _operands(kept.node)
        _, heads, queries, size_k = example_shape(query)
        size_v, tokens = example_shape(value)[3], example_shape(key)[2]
        width_k, width_v = kept.key.width, kept.value.width
        products = kept.key.facts.products + kept.value.facts.products
        expanded = tokens * products + queries * tokens * heads * (size_k + size_v)
        absorbed = queries * heads * (size_k * width_k + size_v * width_v + tokens * (width_k + width_v))
        is_fixed = isinstance(shape(query)[2], int)  # type: ignore[index]
        margin = 1.0 if is_fixed else self.margin
        if absorbed * margin >= expanded:
            counts = f"{absorbed} multiplications on latents, {expanded} on expanded keys and values"
            expected = "fewer" if is_fixed else f"{margin:g} times fewer, because the number of queries is not fixed"
            sizes = f"{queries} queries, {tokens} tokens"
            raise Miss(f"attention on latents would be slower: {counts} ({sizes}); expected {expected}", kept.node)


def shifted(output: Tensor, lse: Tensor, offset: Tensor) -> Tensor:
    """Add offsets c [G, E] to an output [B, H, S, E], except where lse [B, H, S] is -inf: no key is attended to."""
    each = offset.to(output.dtype).repeat_interleave(output.shape[1] // offset.shape[0], 0).unsqueeze(1)  # [H, 1, E]
    return output + each.where(lse.unsqueeze(-1) > -math.inf, 0.0)


# -------------------------------------------------------------------------------------------------------------- checks


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    query, key, value = (a for a in node.args[:3] if isinstance(a, fx.Node))
    return query, key, value


def _check_options(node: fx.Node) -> None:
    if len(node.args) > 4 and node.args[4] is not None:
        raise Miss("the attention has sink logits besides its keys; expected none, latents do not hold them", node)
    if node.kwargs.get("dropout"):
        raise Miss("attention dropout is active; expected evaluation or dropout 0", node)
    if len({example_shape(operand)[0] for operand in _operands(node)}) > 1:
        raise Miss("queries, keys and values have different batch sizes", node)


def _check_lengths(node: fx.Node) -> None:
    """Raise Miss for a prefill, in which absorption costs more than expanding the tokens."""
    queries, tokens = (example_shape(operand)[2] for operand in _operands(node)[:2])
    if queries >= tokens:
        sizes = f"{queries} queries, {tokens} tokens"
        raise Miss(f"attention on latents would be slower: {sizes}; expected fewer queries than tokens", node)


def _check_alone(node: fx.Node, latents: tuple[fx.Node, ...], roles: Roles) -> None:
    """Raise Miss if another node uses the expanded keys or values, which would then be computed anyway."""
    operands = _operands(node)[1:]
    expanded = {n for end in operands for n in behind(end, latents) if example_size(n) is None}
    inside = {n for n in expanded if roles.kind(n) == Kind.ACTIVATION} - {*latents}
    for user in sorted({user for one in inside for user in one.users} - inside - {node, *latents}):
        for one in latents:
            if user in behind(one, ()):
                raise Miss(f"keys or values are not affine in a latent: {one.name} is not affine", one)
        raise Miss(f"{user.name} also reads the expanded keys or values", user)


# ------------------------------------------------------------------------------------------------------------- rewrite


def _joined(program: Program, side: LatentSide, dtype: torch.dtype) -> fx.Node:
    """Concatenate the latents of a side to [B, 1, T, R], in the dtype of the queries."""
    parts = [_rows(program, n, p, dtype) for n, p in zip(side.nodes, side.expansion.latents, strict=True)]
    return parts[0] if len(parts) == 1 else call(program, torch.cat, (parts, -1))


def _rows(program: Program, node: fx.Node, axes: LatentAxes, dtype: torch.dtype) -> fx.Node:
    """Convert a latent to [B, 1, T, R] in `dtype`; return the node itself if it has this form."""
    if fake(node).dtype != dtype:
        node = call_method(program, "to", node, dtype)
    if (axes.order, len(axes.sizes)) == ((0, 2, 1, 3), 4) and axes.sizes[1] == 1:
        return node
    if axes.order != tuple(range(len(axes.sizes))):
        node = call_method(program, "permute", node, axes.order)
    if len(axes.sizes) == 2:
        node = call_method(program, "unsqueeze", node, -1)
    elif len(axes.sizes) > 3:
        node = call_method(program, "flatten", node, 2)
    return call_method(program, "unsqueeze", node, 1)


def _both_sides(program: Program, kept: KeptLatents, dtype: torch.dtype) -> tuple[fx.Node, fx.Node]:
    """Return the latents for scores and for the weighted sum; one node if both sides share them."""
    joined = {side.nodes: _joined(program, side, dtype) for side in (kept.key, kept.value)}
    key, value = (_channels(program, joined[side.nodes], side) for side in (kept.key, kept.value))
    return key, value


def _channels(program: Program, latent: fx.Node, side: LatentSide) -> fx.Node:
    """Return the channels of a latent that a side uses."""
    if side.width == sum(p.width for p in side.expansion.latents):
        return latent
    return call_method(program, "narrow", latent, -1, side.facts.first, side.width)


def _constant(program: Program, node: fx.Node, side: LatentSide, name: str, which: int) -> fx.Node:
    """Add an input that holds D (`which` 0) or c (1), computed from the weights of each call."""
    expansion, facts = side.expansion, side.facts
    value = fake(node)
    dtype, device = value.dtype, value.device

    def make(*weights: Tensor) -> Tensor:
        matrix = expansion.maps(weights, device)[which]
        matrix = matrix[..., facts.first : facts.last] if which == 0 else matrix
        return matrix.to(dtype).contiguous()

    example = make(*(program.values[source].detach() for source in side.sources))
    return add_constant(program, f"{node.name}_{name}", example, Bound(side.sources, make))
