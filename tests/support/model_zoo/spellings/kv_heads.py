"""Spellings of kv heads that several query heads share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from model_zoo.spellings.blocks import LOWEST, SCALE, B, C, D, G, H, N, Spellings, T, attend, scores

SPELLINGS = Spellings()
core, whole = SPELLINGS.core, SPELLINGS.whole


@core(kv_heads=G)
def repeat_interleave(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """repeat_interleave on axis 1: gpt-fast, Cohere."""
    return attend(q, k.repeat_interleave(N, dim=1), v.repeat_interleave(N, dim=1))


@core(kv_heads=G)
def expand_and_reshape(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Expand and reshape: repeat_kv of Llama."""
    k, v = (t[:, :, None].expand(B, G, N, T, D).reshape(B, H, T, D) for t in (k, v))
    return scores(q, k).softmax(-1) @ v


@core(kv_heads=G)
def repeat_on_new_axis(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """unsqueeze, repeat, view."""
    k, v = (t.unsqueeze(2).repeat(1, 1, N, 1, 1).view(B, H, T, D) for t in (k, v))
    return scores(q, k).softmax(-1) @ v


@core(kv_heads=0)
def tiled_heads(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Repeat on axis 1: query head h uses kv head h % G, not h // N."""
    return scores(q, k.repeat(1, N, 1, 1)).softmax(-1) @ v.repeat(1, N, 1, 1)


@core(kv_heads=G, read_heads=H, has=dict(owner=lambda: torch.arange(H) // N))
def heads_by_index_select(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """index_select with a buffer of each query's head, which may change: Bark, tensor-parallel code."""
    return attend(q, k.index_select(1, m.owner), v.index_select(1, m.owner))


@core(kv_heads=G)
def heads_by_indexing(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Index with numbers made in the graph."""
    owner = torch.arange(H) // N
    return scores(q, k[:, owner]).softmax(-1) @ v[:, owner]


@core(kv_heads=G)
def heads_by_gather(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Gather on the head axis."""
    owner = (torch.arange(H) // N).view(1, H, 1, 1).expand(B, H, T, D)
    return attend(q, k.gather(1, owner), v.gather(1, owner))


@core(kv_heads=G)
def stacked_heads(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Stack the same tensor, then flatten."""
    k, v = (torch.stack([t] * N, dim=2).flatten(1, 2) for t in (k, v))
    return attend(q, k, v)


@core(kv_heads=G)
def heads_repeated_as_by_einops(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Reshape, expand, reshape, as `repeat(k, "b g t d -> b (g n) t d")` of einops does."""
    k, v = (t.reshape(B, G, 1, T, D).expand(-1, -1, N, -1, -1).reshape(B, G * N, T, D) for t in (k, v))
    return torch.einsum("b h i j, b h j d -> b h i d", scores(q, k).softmax(-1), v)


@core(kv_heads=G)
def broadcast_over_groups(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, G, N, S, D] @ [B, G, 1, D, T]: keys broadcast in the matmul."""
    s = (q.view(B, G, N, T, D) @ k.unsqueeze(2).transpose(-1, -2)) * SCALE
    return (s.masked_fill(~m.triangle, -math.inf).softmax(-1) @ v.unsqueeze(2)).flatten(1, 2)


@core(kv_heads=G)
def groups_as_queries(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Treat the query heads of a group as more queries of its kv head: [B, G, N*S, D]."""
    s = (q.reshape(B, G, N * T, D) @ k.mT) * SCALE
    return (s.softmax(-1) @ v).view(B, H, T, D)


@core(kv_heads=1)
def multi_query(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One kv head that broadcasts: Falcon-7B, PaLM."""
    return scores(q, k).softmax(-1) @ v


@whole(kv_heads=1)
def multi_query_einsum(m: Any, x: Tensor) -> Tensor:
    """One kv head without an axis for it."""
    q, k, v = m.q(x).view(B, T, H, D), m.k(x), m.v(x)
    weights = (torch.einsum("bshd,btd->bhst", q, k) * SCALE).softmax(-1)
    return m.o(torch.einsum("bhst,btd->bshd", weights, v).flatten(-2))


@whole(kv_heads=1)
def multi_query_folded_into_tokens(m: Any, x: Tensor) -> Tensor:
    """Fold heads into queries of one kv head, tokens first: GPT-BigCode."""
    q, k, v = m.q(x).view(B, T * H, D), m.k(x), m.v(x)
    s = torch.bmm(q, k.transpose(1, 2)).view(B, T, H, T) * SCALE
    weights = s.masked_fill(~m.triangle[:, None, :], LOWEST).softmax(-1)
    return m.o(torch.bmm(weights.view(B, T * H, T), v).view(B, T, C))
