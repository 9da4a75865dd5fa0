"""Spellings of the two contractions: queries with keys, weights with values."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model_zoo.functional import weight
from model_zoo.spellings.blocks import (
    LOWEST,
    SCALE,
    B,
    C,
    D,
    G,
    H,
    N,
    Spellings,
    T,
    fold,
    folded_alibi,
    scores,
    table_index,
)

SPELLINGS = Spellings()
core, whole = SPELLINGS.core, SPELLINGS.whole


@core()
def matmul_function(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch.matmul twice, the scores divided by sqrt(D): BERT, the annotated Transformer."""
    return torch.matmul(F.softmax(torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(D), dim=-1), v)


@core()
def at_operator(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Use the operator @ and .mT."""
    return ((q @ k.mT) * SCALE).softmax(-1) @ v


@core()
def matmul_method(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Tensor methods throughout."""
    return q.matmul(k.permute(0, 1, 3, 2)).mul(SCALE).softmax(dim=-1).matmul(v)


@core()
def bmm_on_folded_heads(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Use bmm on [B*H, T, D]: BART before sdpa, CLIP, diffusers."""
    weights = torch.bmm(fold(q) * SCALE, fold(k).transpose(1, 2)).softmax(-1)
    return torch.bmm(weights, fold(v)).view(B, H, T, D)


@core(has=dict(alibi=folded_alibi))
def baddbmm_positional(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Use baddbmm, whose addend is half of ALiBi."""
    weights = torch.baddbmm(m.alibi, fold(q), fold(k).transpose(1, 2), beta=0.5, alpha=SCALE).softmax(-1)
    return torch.bmm(weights, fold(v)).view(B, H, T, D)


@core(has=dict(alibi=folded_alibi))
def baddbmm_with_keywords(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Call the method baddbmm without a positional argument: Bloom."""
    scored = m.alibi.baddbmm(batch1=fold(q), batch2=fold(k).transpose(1, 2), beta=1.0, alpha=SCALE)
    weights = F.softmax(scored.view(B, H, T, T).masked_fill(~m.triangle, LOWEST), dim=-1, dtype=torch.float32)
    return torch.bmm(weights.view(B * H, T, T), fold(v)).view(B, H, T, D)


@core()
def baddbmm_on_nothing(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Set beta = 0 on uninitialized memory, to use alpha: Megatron, diffusers without a mask."""
    nothing = torch.empty(B * H, T, T, dtype=q.dtype, device=q.device)
    weights = torch.baddbmm(nothing, fold(q), fold(k).transpose(-1, -2), beta=0, alpha=SCALE).softmax(-1)
    return torch.bmm(weights, fold(v)).view(B, H, T, D)


@core()
def einsum(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Use einsum for both contractions."""
    weights = (torch.einsum("bhid,bhjd->bhij", q, k) * SCALE).softmax(dim=-1)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


@core()
def einsum_with_spaces(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Spaces in the equation: x-transformers and code derived from it."""
    weights = (torch.einsum("b h i d, b h j d -> b h i j", q, k) * SCALE).softmax(dim=-1)
    return torch.einsum("b h i j, b h j d -> b h i d", weights, v)


@whole()
def einsum_without_transpose(m: Any, x: Tensor) -> Tensor:
    """Keep heads after tokens: Flax habits, the plain path of flash-attention's tests."""
    q, k, v = (p(x).view(B, T, H, D) for p in (m.q, m.k, m.v))
    weights = torch.softmax(torch.einsum("bshd,bthd->bhst", q, k) * SCALE, dim=-1)
    return m.o(torch.einsum("bhst,bthd->bshd", weights, v).reshape(B, T, C))


@core()
def einsum_with_ellipsis(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Batch axes without names."""
    weights = (torch.einsum("...id,...jd->...ij", q, k) * SCALE).softmax(-1)
    return torch.einsum("...ij,...jd->...id", weights, v)


@core()
def einsum_with_sublists(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Call einsum with lists of numbers instead of an equation."""
    weights = (torch.einsum(q, [0, 1, 2, 4], k, [0, 1, 3, 4], [0, 1, 2, 3]) * SCALE).softmax(-1)
    return torch.einsum(weights, [0, 1, 2, 3], v, [0, 1, 3, 4], [0, 1, 2, 4])


@core(kv_heads=G)
def einsum_grouped(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Put the queries of a group on a separate axis, without repeating keys: T5X, Gemma in JAX style."""
    weights = (torch.einsum("bgnsd,bgtd->bgnst", q.view(B, G, N, T, D), k) * SCALE).softmax(-1)
    return torch.einsum("bgnst,bgtd->bgnsd", weights, v).reshape(B, H, T, D)


@core()
def multiply_and_sum(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Both contractions as a broadcast product and a sum: teaching code."""
    weights = ((q[..., None, :] * k[..., None, :, :]).sum(-1) * SCALE).softmax(-1)
    return (weights[..., None] * v[..., None, :, :]).sum(-2)


@whole(heads=1, kv_heads=1, head_dim=C, inputs=lambda: (torch.randn(T, C),))
def inner_and_tensordot(m: Any, x: Tensor) -> Tensor:
    """One sequence, one head, no batch: torch.inner, then torch.tensordot."""
    q, k, v = m.q(x), m.k(x), m.v(x)
    return m.o(torch.tensordot((torch.inner(q, k) * C**-0.5).softmax(-1), v, dims=1))


@whole(heads=1, kv_heads=1, head_dim=C, inputs=lambda: (torch.randn(T, C),))
def linear_on_activations(m: Any, x: Tensor) -> Tensor:
    """F.linear with the keys as weight, then mm; one sequence, one head, no batch."""
    weights = (F.linear(m.q(x), m.k(x)) / C**0.5).softmax(dim=1)
    return m.o(torch.mm(weights, m.v(x)))


@whole()
def keys_permuted_at_once(m: Any, x: Tensor) -> Tensor:
    """k.permute(0, 2, 3, 1) splits heads and transposes in one step: GPT-1, minGPT's ancestors."""
    q, v = (p(x).view(B, T, H, D).permute(0, 2, 1, 3) for p in (m.q, m.v))
    k = m.k(x).view(B, T, H, D).permute(0, 2, 3, 1)  # [B, H, D, T]
    return m.join(F.softmax(torch.matmul(q, k) / math.sqrt(D), dim=-1) @ v)


@core()
def key_major(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores [B, H, T, S], softmax over the rows, values on the left."""
    weights = ((k @ q.transpose(-2, -1)) * SCALE).softmax(dim=-2)
    return (v.transpose(-2, -1) @ weights).transpose(-2, -1)


@whole()
def key_major_einsum(m: Any, x: Tensor) -> Tensor:
    """Scores [B, H, T, S] and a softmax over axis 2 out of an einsum."""
    q, k, v = (p(x).view(B, T, H, D) for p in (m.q, m.k, m.v))
    weights = (torch.einsum("bjhd,bihd->bhji", k, q) * SCALE).softmax(dim=2)
    return m.o(torch.einsum("bhji,bjhd->bihd", weights, v).reshape(B, T, C))


@core(has=dict(table=weight(2 * T - 1, D, fan=1), index=table_index))
def relative_key_embeddings(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Add the product of queries and distance embeddings: Shaw et al. 2018, BERT's relative_key."""
    distances = m.table[m.index]  # [S, T, D]
    return ((q @ k.mT + torch.einsum("bhid,ijd->bhij", q, distances)) / math.sqrt(D)).softmax(-1) @ v


@whole()
def einsum_into_tokens_first(m: Any, x: Tensor) -> Tensor:
    """Put heads after tokens in the second contraction."""
    q, k, v = m.split(x)
    return m.o(torch.einsum("bhst,bhtd->bshd", scores(q, k).softmax(-1), v).flatten(2))


@core()
def values_on_the_left(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """v^T times the transposed weights."""
    return torch.matmul(v.transpose(2, 3), scores(q, k).softmax(-1).transpose(2, 3)).transpose(2, 3)


@whole(has=dict(w_o=weight(H, D, C)))
def einsum_with_output_projection(m: Any, x: Tensor) -> Tensor:
    """Weights, values and W_o in one einsum of three operands."""
    q, k, v = m.split(x)
    return torch.einsum("bhqs,bhsd,hde->bqe", scores(q, k).softmax(-1), v, m.w_o)


@core()
def weights_zeroed_again(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Set some weights to zero after the softmax: DeBERTa's XSoftmax."""
    weights = scores(q, k).masked_fill(~m.triangle, LOWEST).softmax(-1)
    return weights.masked_fill(~m.triangle, 0.0) @ v
