"""`fhopt::attention`: grouped-query attention q [B,H,S,D], k [B,G,T,D], v [B,G,T,E] -> o [B,H,S,E].

Letters: B batch, H query heads, G kv heads, S queries, T keys, D and E head size of keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fhopt.ops.masks import additive, restricted

_LIB = torch.library.Library("fhopt", "FRAGMENT")
_LIB.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask=None, Tensor? sinks=None, *, float scale, "
    "bool is_causal=False, float softcap=0.0, float dropout=0.0) -> Tensor"
)


def blank_scores(
    left: Tensor, right: Tensor, left_axes: Sequence[str], right_axes: Sequence[str], axes: Sequence[str]
) -> Tensor:
    """Return zeros of the shape of a contraction of `left` and `right`, as an expanded scalar.

    left_axes, right_axes, axes: a label per axis of the operands and the result, "" for an axis of size 1.
    """
    sizes = dict((*zip(left_axes, left.shape, strict=True), *zip(right_axes, right.shape, strict=True)))
    dtype = torch.promote_types(left.dtype, right.dtype)
    return left.new_zeros((), dtype=dtype).expand([sizes[x] if x else 1 for x in axes])


# --------------------------------------------------------------------------------------------------- fhopt::attention


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    is_causal: bool = False,
    softcap: float = 0.0,
    dropout: float = 0.0,
    fused: bool = True,
) -> Tensor:
    """Compute softmax(cap(scale q k^T) + mask) v with grouped kv heads; differentiable. Shapes: module docstring.

    `is_causal` aligns the first query with the first key, as `F.scaled_dot_product_attention` does. `sinks`,
    broadcastable to [B,H,S,n]: n sink logits, which take weight but have no value (softmax plus one). softcap: 0 for
    none, else logits become softcap tanh(logits / softcap). fused: False to avoid `F.scaled_dot_product_attention` (see
    `passes.rewrite.lower`). Raises ValueError if H is not a multiple of G.
    """
    heads, groups = query.shape[1], key.shape[1]
    if heads % groups:
        raise ValueError(f"{heads} query heads are not a multiple of {groups} kv heads")
    if fused and softcap == 0.0 and sinks is None:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal, scale=scale, enable_gqa=heads != groups
        )
    if is_causal:
        triangle = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        mask = triangle if mask is None else restricted(mask, triangle)
    logits = grouped_scores(query * scale, key)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    bias = additive(mask, logits.dtype)
    logits = logits if bias is None else logits + bias
    if sinks is not None:
        logits = torch.cat((logits, sinks.to(logits.dtype).expand(*logits.shape[:3], -1)), -1)
    exact = logits if logits.dtype == torch.float64 else logits.float()
    weights = safe_softmax(exact)[0][..., : key.shape[2]].to(query.dtype)
    weights = torch.dropout(weights, dropout, dropout > 0)
    return grouped_mix(weights, value)


def grouped_scores(query: Tensor, key: Tensor) -> Tensor:
    """Compute scores q [B,H,S,D] . k [B,G,T,D] -> [B,H,S,T]; the H/G query heads of a kv head become extra queries."""
    b, h, s, d = query.shape
    g, t = key.shape[1], key.shape[2]
    grouped = query.reshape(b, g, h // g * s, d)
    return torch.matmul(grouped, key.transpose(-1, -2)).reshape(b, h, s, t)


def grouped_mix(weights: Tensor, value: Tensor) -> Tensor:
    """Compute weighted sums of values: p [B,H,S,T] . v [B,G,T,E] -> [B,H,S,E]."""
    b, h, s, t = weights.shape
    g, e = value.shape[1], value.shape[3]
    return torch.matmul(weights.reshape(b, g, h // g * s, t), value).reshape(b, h, s, e)


def safe_softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Compute softmax and log-sum-exp over the last axis: (weights [..., T], lse [...]).

    A row of -inf gives zero weights, an lse of -inf, and no NaN in the backward pass.
    """
    if not logits.shape[-1]:
        return logits, logits.new_full(logits.shape[:-1], -math.inf)
    top = logits.detach().amax(-1, keepdim=True)
    top = torch.where(top == -math.inf, 0.0, top)
    powers = torch.exp(logits - top)
    total = powers.sum(-1, keepdim=True)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = (total.log() + top).masked_fill(empty, -math.inf).squeeze(-1)
    return powers / total, lse


_LIB.impl("attention", attention_reference, "CompositeImplicitAutograd")
