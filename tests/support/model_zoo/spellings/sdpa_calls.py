"""Spellings of scaled_dot_product_attention calls."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.spellings.blocks import B, C, D, G, H, N, Spellings, T, alibi, float_triangle, fold

SPELLINGS = Spellings()
core, whole = SPELLINGS.core, SPELLINGS.whole


@core(has=dict(mask=float_triangle))
def sdpa_positional(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Pass every argument but the scale by position."""
    return F.scaled_dot_product_attention(q, k, v, m.mask, 0.0, False, scale=0.3)


@core()
def sdpa_keywords(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Pass every argument by name."""
    return F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=m.triangle, dropout_p=0.0)


@core()
def sdpa_causal(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """is_causal=True."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@core(has=dict(mask=alibi))
def sdpa_with_float_mask(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Pass a float mask that broadcasts over queries."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=m.mask)


@core(kv_heads=G)
def sdpa_grouped(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """enable_gqa=True."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@whole(heads=1, kv_heads=1, head_dim=C)
def sdpa_of_rank_3(m: Any, x: Tensor) -> Tensor:
    """One head without a head axis: [B, T, D]."""
    return m.o(F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x)))


@core()
def sdpa_on_folded_heads(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B*H, T, D]: BART's layout with SDPA."""
    return F.scaled_dot_product_attention(fold(q), fold(k), fold(v)).view(B, H, T, D)


@core(kv_heads=G)
def sdpa_of_rank_5(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Broadcast keys over the queries of their group."""
    o = F.scaled_dot_product_attention(q.view(B, G, N, T, D), k.unsqueeze(2), v.unsqueeze(2))
    return o.reshape(B, H, T, D)


@whole()
def sdpa_between_transposes(m: Any, x: Tensor) -> Tensor:
    """Heads after tokens; transposes in the call."""
    q, k, v = (p(x).view(B, T, H, D) for p in (m.q, m.k, m.v))
    o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    return m.o(o.contiguous().view(B, T, C))


@core()
def sdpa_of_chosen_backend(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Call inside the context manager that chooses a kernel."""
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)
