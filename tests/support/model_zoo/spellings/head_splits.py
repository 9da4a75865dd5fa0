"""Spellings of the split of channels into heads, and of fused projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from model_zoo.spellings.blocks import B, C, D, G, H, Heads, N, Spellings, T, scores, split

SPELLINGS = Spellings()
heads, whole = SPELLINGS.heads, SPELLINGS.whole


@heads()
def split_by_reshape_and_permute(m: Any, x: Tensor) -> Heads:
    """reshape, permute."""
    q, k, v = (p(x).reshape(B, T, H, D).permute(0, 2, 1, 3) for p in (m.q, m.k, m.v))
    return q, k, v


@heads()
def split_by_unflatten(m: Any, x: Tensor) -> Heads:
    """unflatten, transpose: torchtune, torch's own tutorials."""
    q, k, v = (p(x).unflatten(-1, (H, D)).transpose(1, 2) for p in (m.q, m.k, m.v))
    return q, k, v


@heads()
def split_by_chunk(m: Any, x: Tensor) -> Heads:
    """Chunks of the channels, stacked on a new axis."""
    q, k, v = (torch.stack(p(x).chunk(H, dim=-1), dim=1) for p in (m.q, m.k, m.v))
    return q, k, v


@whole()
def split_by_chunk_into_batch(m: Any, x: Tensor) -> Tensor:
    """Move heads into the batch by chunk and cat, and back: the Transformer in TensorFlow style."""
    q, k, v = (torch.cat(p(x).chunk(H, dim=2), dim=0) for p in (m.q, m.k, m.v))  # [H*B, T, D]
    o = torch.bmm(scores(q, k).softmax(-1), v)
    return m.o(torch.cat(o.chunk(H, dim=0), dim=2))


def fused(width: int = 3 * C) -> dict[str, Callable[[], nn.Module]]:
    return dict(qkv=lambda: nn.Linear(C, width))


@heads(has=fused())
def fused_split(m: Any, x: Tensor) -> Heads:
    """One projection, torch.split into q, k, v: GPT-2, nanoGPT."""
    q, k, v = torch.split(m.qkv(x), C, dim=2)
    return split(q), split(k), split(v)


@heads(has=fused())
def fused_chunk(m: Any, x: Tensor) -> Heads:
    """One projection, chunk(3), heads by view."""
    q, k, v = (split(t) for t in m.qkv(x).chunk(3, dim=-1))
    return q, k, v


@heads(has=fused())
def fused_unbind(m: Any, x: Tensor) -> Heads:
    """One projection, [B, T, 3, H, D] unbound: flash-attention's callers."""
    q, k, v = m.qkv(x).view(B, T, 3, H, D).unbind(2)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


@heads(has=fused())
def fused_permute_and_index(m: Any, x: Tensor) -> Heads:
    """One projection, [3, B, H, T, D] indexed: Swin, the first ViT of timm."""
    qkv = m.qkv(x).reshape(B, T, 3, H, D).permute(2, 0, 3, 1, 4)
    return qkv[0], qkv[1], qkv[2]


@heads(has=fused())
def fused_key_first(m: Any, x: Tensor) -> Heads:
    """Order the parts k, q, v."""
    k, q, v = m.qkv(x).split(C, dim=-1)
    return split(q), split(k), split(v)


@heads(has=fused())
def fused_per_head(m: Any, x: Tensor) -> Heads:
    """[H, 3, D]: q, k, v of a head are adjacent: GPT-NeoX, Bloom."""
    q, k, v = m.qkv(x).view(B, T, H, 3 * D).transpose(1, 2).chunk(3, dim=-1)
    return q, k, v


@heads(has=fused((H + 2 * G) * D), kv_heads=G)
def fused_grouped(m: Any, x: Tensor) -> Heads:
    """[G, N + 2, D]: the queries of a group, its key, its value: Falcon's new decoder, InternLM 2."""
    qkv = m.qkv(x).view(B, T, G, N + 2, D)
    q, k, v = qkv[..., :-2, :], qkv[..., [-2], :], qkv[..., [-1], :]
    return q.flatten(2, 3).transpose(1, 2), k.flatten(2, 3).transpose(1, 2), v.flatten(2, 3).transpose(1, 2)


@heads(has=fused((H + 2 * G) * D), kv_heads=G)
def fused_uneven_split(m: Any, x: Tensor) -> Heads:
    """One projection, split into unequal parts: Phi-3, gpt-fast."""
    q, k, v = m.qkv(x).split([H * D, G * D, G * D], dim=-1)
    return split(q), split(k), split(v)


@heads(has=dict(kv=lambda: nn.Linear(C, 2 * C)))
def fused_key_value(m: Any, x: Tensor) -> Heads:
    """to_q separately, to_kv together: lucidrains, PVT."""
    k, v = m.kv(x).chunk(2, dim=-1)
    return split(m.q(x)), split(k), split(v)
