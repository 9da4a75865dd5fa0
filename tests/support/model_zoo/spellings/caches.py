"""Spellings of decode steps with a KV cache, of cross-attention and of learned queries."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model_zoo.functional import weight
from model_zoo.spellings.blocks import SCALE, B, C, D, G, H, Heads, N, P, Spellings, attend, scores, split, tokens

SPELLINGS = Spellings()
whole = SPELLINGS.whole


def decode_step(
    kv_heads: int, *more: Callable[[], Tensor], layout: str = "heads first"
) -> Callable[[], tuple[Any, ...]]:
    """Maker of a new token, keys and values of P earlier ones (or P slots, the last two free), and `more`."""
    shape = (B, kv_heads, P, D) if layout == "heads first" else (B, P, kv_heads, D)
    return lambda: (torch.randn(B, 1, C), torch.randn(shape), torch.randn(shape), *(make() for make in more))


@whole(inputs=decode_step(G), kv_heads=G, step="decode")
def cache_by_cat(m: Any, x: Tensor, past_k: Tensor, past_v: Tensor) -> Heads:
    """Take the past as an input, return it with the new token: GPT-2, DynamicCache."""
    q, k, v = m.split(x)
    k, v = torch.cat([past_k, k], dim=-2), torch.cat((past_v, v), dim=-2)
    return m.join(attend(q, k, v)), k, v


@whole(inputs=decode_step(G), kv_heads=G, step="decode")
def cache_by_cat_and_eager_scores(m: Any, x: Tensor, past_k: Tensor, past_v: Tensor) -> Heads:
    """Concatenate the past, then repeat heads and take a softmax."""
    q, k, v = m.split(x)
    k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
    k_all, v_all = k.repeat_interleave(N, 1), v.repeat_interleave(N, 1)
    return m.join(scores(q, k_all).softmax(-1) @ v_all), k, v


@whole(inputs=decode_step(H, layout="tokens first"), step="decode")
def cache_by_cat_tokens_first(m: Any, x: Tensor, past_k: Tensor, past_v: Tensor) -> Heads:
    """Cache in the layout [B, T, H, D]: TransformerLens, Flax habits."""
    q, k, v = (p(x).view(B, 1, H, D) for p in (m.q, m.k, m.v))
    k, v = torch.cat([past_k, k], dim=1), torch.cat([past_v, v], dim=1)
    weights = (torch.einsum("bshd,bthd->bhst", q, k) * SCALE).softmax(-1)
    return m.o(torch.einsum("bhst,bthd->bshd", weights, v).reshape(B, 1, C)), k, v


@whole(inputs=decode_step(H, lambda: torch.tensor([P - 2])), step="decode static")
def cache_by_index_copy(m: Any, x: Tensor, cache_k: Tensor, cache_v: Tensor, position: Tensor) -> Tensor:
    """index_copy_ into a buffer, then attend to it: StaticCache."""
    q, k, v = m.split(x)
    cache_k.index_copy_(2, position, k)
    cache_v.index_copy_(2, position, v)
    return m.join(attend(q, cache_k, cache_v, attn_mask=torch.arange(P)[None, :] <= position))


@whole(inputs=decode_step(G, lambda: torch.tensor([P - 2])), kv_heads=G, step="decode static")
def cache_by_index_put(m: Any, x: Tensor, cache_k: Tensor, cache_v: Tensor, position: Tensor) -> Tensor:
    """cache[:, :, position] = k with a tensor as position: gpt-fast."""
    q, k, v = m.split(x)
    cache_k[:, :, position] = k
    cache_v[:, :, position] = v
    s = scores(q, cache_k.repeat_interleave(N, 1)).masked_fill(torch.arange(P) > position, -math.inf)
    return m.join(s.softmax(-1) @ cache_v.repeat_interleave(N, 1))


@whole(inputs=decode_step(H, layout="heads first"), step="decode static")
def cache_by_slice(m: Any, x: Tensor, cache_k: Tensor, cache_v: Tensor) -> Tensor:
    """cache[:, :, p:p+1] = k with a number as position; attend to the filled part only."""
    q, k, v = m.split(x)
    position = P - 2
    cache_k[:, :, position : position + 1] = k
    cache_v[:, :, position : position + 1] = v
    return m.join(attend(q, cache_k[:, :, : position + 1], cache_v[:, :, : position + 1]))


@whole(inputs=decode_step(H), step="decode static")
def cache_rolled(m: Any, x: Tensor, cache_k: Tensor, cache_v: Tensor) -> Tensor:
    """Drop the oldest token and copy_ the rolled window back: sliding StaticCache."""
    q, k, v = m.split(x)
    window_k, window_v = cache_k.roll(-1, dims=2), cache_v.roll(-1, dims=2)
    window_k[:, :, -1:] = k
    window_v[:, :, -1:] = v
    cache_k.copy_(window_k)
    cache_v.copy_(window_v)
    return m.join(attend(q, window_k, window_v))


@whole(inputs=lambda: (*tokens(), torch.randn(B, P, C)))
def cross(m: Any, x: Tensor, memory: Tensor) -> Tensor:
    """Project keys and values from another sequence."""
    return m.join(scores(split(m.q(x)), split(m.k(memory))).softmax(-1) @ split(m.v(memory)))


@whole(inputs=lambda: (*tokens(), torch.randn(B, H, P, D), torch.randn(B, H, P, D)))
def cross_with_bare_keys(m: Any, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys and values are already projected: decoding with a cross-attention cache."""
    return m.join(attend(split(m.q(x)), k, v))


@whole(has=dict(seeds=weight(5, C, fan=1)))
def learned_queries(m: Any, x: Tensor) -> Tensor:
    """Project queries from a parameter: Q-Former, Perceiver."""
    q = split(m.q(m.seeds.expand(B, -1, -1)))
    return m.join(scores(q, split(m.k(x))).softmax(-1) @ split(m.v(x)))


@whole(has=dict(seeds=weight(H, 5, D, fan=1)))
def bare_learned_queries(m: Any, x: Tensor) -> Tensor:
    """Use a parameter as queries, without projection: pooling by learned queries."""
    return m.join(attend(m.seeds.expand(B, -1, -1, -1), split(m.k(x)), split(m.v(x))))
