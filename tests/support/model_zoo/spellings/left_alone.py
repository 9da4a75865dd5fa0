"""Spellings that are not rewritten, for a reason that the finder reports."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.functional import weight
from model_zoo.spellings.blocks import B, C, D, H, Spellings, T, scores

SPELLINGS = Spellings()
core, whole = SPELLINGS.core, SPELLINGS.whole


@core(sites=0, has=dict(before=weight(H, H, fan=H), after=weight(H, H, fan=H)))
def talking_heads(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads are mixed before and after the softmax."""
    weights = torch.einsum("bhst,hg->bgst", scores(q, k), m.before).softmax(-1)
    return torch.einsum("bhst,hg->bgst", weights, m.after) @ v


@core(sites=0, has=dict(after=lambda: nn.Conv2d(H, H, 1, bias=False)))
def heads_mixed_after_softmax(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Mix the heads of the weights by a 1x1 convolution: DeepViT, CaiT."""
    return m.after(scores(q, k).softmax(-1)) @ v


@core(sites=0, has=dict(importance=lambda: torch.linspace(0, 1, H).view(1, H, 1, 1)))
def head_mask(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Weights times a number per head: BERT's head_mask."""
    return (scores(q, k).softmax(-1) * m.importance) @ v


@core(sites=0, has=dict(decay=lambda: 0.9 ** (torch.arange(T)[:, None] - torch.arange(T)).abs()))
def gate_after_softmax(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Weights times a decay with the distance, not renormalized."""
    return (scores(q, k).softmax(-1) * m.decay) @ v


@core(sites=0)
def masked_and_normalised_again(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(s * mask) * mask over its sum: AllenNLP's masked_softmax."""
    weights = (scores(q, k) * m.triangle).softmax(-1) * m.triangle
    return (weights / (weights.sum(-1, keepdim=True) + 1e-13)) @ v


@core(sites=0)
def sigmoid_attention(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """sigmoid(s - log T) instead of a softmax."""
    return torch.sigmoid(scores(q, k) - math.log(T)) @ v


@core(sites=0)
def squared_relu_attention(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """relu(s)**2 over T: Primer's gated attention unit."""
    return (F.relu(scores(q, k)).square() / T) @ v


@core(sites=0)
def top_k_sparse(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keep only the four best keys of a query."""
    s = scores(q, k)
    least = s.topk(4, dim=-1).values[..., -1:]
    return s.masked_fill(s < least, float("-inf")).softmax(-1) @ v


@core(sites=0, explained=0)
def sparsemax(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Project the scores onto the simplex, entmax of alpha 2."""
    s = scores(q, k)
    ordered = s.sort(dim=-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    rank = torch.arange(1, T + 1)
    size = (ordered * rank > excess).sum(-1, keepdim=True)
    return (s - excess.gather(-1, size - 1) / size).clamp(min=0) @ v


@core(sites=0, explained=2, has=dict(share=lambda: nn.Parameter(torch.tensor(0.4))))
def differential_attention(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Multiply values by the difference of two softmaxes: Differential Transformer."""
    (q1, q2), (k1, k2) = q.chunk(2, dim=-1), k.chunk(2, dim=-1)
    return ((q1 @ k1.mT / 2).softmax(-1) - m.share * (q2 @ k2.mT / 2).softmax(-1)) @ v


@core(sites=0)
def distance_attention(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Take the softmax of minus the distance: Lipschitz attention."""
    return (-torch.cdist(q, k)).softmax(-1) @ v


@core(sites=0)
def softmax_over_both_axes(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Multiply the softmaxes over keys and over queries: dual softmax of LoFTR, with values."""
    s = scores(q, k)
    return (s.softmax(-1) * s.softmax(-2)) @ v


@whole(sites=0, has=dict(temperature=lambda: nn.Parameter(torch.full((H, 1, 1), 3.0))))
def channel_attention(m: Any, x: Tensor) -> Tensor:
    """Channels attend to channels, the contraction runs over tokens: XCiT, Restormer."""
    q, k, v = (p(x).view(B, T, H, D).permute(0, 2, 3, 1) for p in (m.q, m.k, m.v))  # [B, H, D, T]
    weights = ((F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT) * m.temperature).softmax(-1)  # [B, H, D, D]
    return m.o((weights @ v).permute(0, 3, 1, 2).reshape(B, T, C))
