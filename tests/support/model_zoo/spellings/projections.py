"""Spellings of the projections to queries, keys, values and output."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.functional import settled, weight
from model_zoo.spellings.blocks import SCALE, WINDOW, WINDOWS, B, C, D, G, H, Heads, Spellings, T, scores, split

SPELLINGS = Spellings()
heads, whole = SPELLINGS.heads, SPELLINGS.whole


@heads(has=dict(w=weight(3 * C, C)))
def slices_of_one_weight(m: Any, x: Tensor) -> Heads:
    """F.linear with rows of one weight: fairseq, nn.MultiheadAttention."""
    q, k, v = (split(F.linear(x, m.w[i * C : (i + 1) * C])) for i in range(3))
    return q, k, v


@heads()
def concatenated_weights(m: Any, x: Tensor) -> Heads:
    """torch.cat of three weights, one matmul: pipelines that fuse at run time."""
    w, b = torch.cat([m.q.weight, m.k.weight, m.v.weight]), torch.cat([m.q.bias, m.k.bias, m.v.bias])
    q, k, v = (split(t) for t in F.linear(x, w, b).chunk(3, dim=-1))
    return q, k, v


@heads(has=dict(w=weight(C, 3 * C), b=weight(3 * C)))
def addmm_projection(m: Any, x: Tensor) -> Heads:
    """Use addmm on flattened tokens with a weight [in, out]: GPT-2's Conv1D."""
    q, k, v = torch.addmm(m.b, x.view(-1, C), m.w).view(B, T, 3 * C).split(C, dim=2)
    return split(q), split(k), split(v)


@heads(has=dict(w=weight(3, C, C)))
def matmul_projection(m: Any, x: Tensor) -> Heads:
    """Compute x @ W with the matrices of q, k and v in one parameter."""
    q, k, v = split(x @ m.w[0]), split(x @ m.w[1]), split(torch.matmul(x, m.w[2]))
    return q, k, v


@heads(has=dict(w_q=weight(C, H, D), w_k=weight(C, G, D), w_v=weight(C, G, D)), kv_heads=G)
def einsum_projection(m: Any, x: Tensor) -> Heads:
    """Weights with an axis for heads: "btc,chd->bthd", JAX's DenseGeneral."""
    q, k, v = (torch.einsum("btc,chd->bthd", x, w).transpose(1, 2) for w in (m.w_q, m.w_k, m.w_v))
    return q, k, v


@whole(has=dict(w_q=weight(H, C, D), w_k=weight(H, C, D), w_v=weight(H, C, D), w_o=weight(H, D, C)))
def broadcast_projection(m: Any, x: Tensor) -> Tensor:
    """Project x [B, 1, T, C] @ W [H, C, D] and back by [H, D, C], summed over heads: TransformerLens."""
    q, k, v = x.unsqueeze(1) @ m.w_q, x.unsqueeze(1) @ m.w_k, x.unsqueeze(1) @ m.w_v
    return ((scores(q, k).softmax(-1) @ v) @ m.w_o).sum(1)


@whole(has=dict.fromkeys("qkvo", lambda: nn.Conv1d(C, C, 1)), inputs=lambda: (torch.randn(B, C, T),))
def conv1d_projection(m: Any, x: Tensor) -> Tensor:
    """Convolutions of width 1 on [B, C, T]: VITS, Glow-TTS."""
    q, k, v = (p(x).view(B, H, D, T).transpose(2, 3) for p in (m.q, m.k, m.v))
    o = torch.matmul(F.softmax(torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(D), dim=-1), v)
    return m.o(o.transpose(2, 3).contiguous().view(B, C, T))


def image() -> tuple[Any, ...]:
    return (torch.randn(B, C, WINDOWS, WINDOW),)


@whole(
    has=dict(q=lambda: nn.Conv2d(C, D, 1), k=lambda: nn.Conv2d(C, D, 1), v=lambda: nn.Conv2d(C, C, 1), gamma=weight(1)),
    inputs=image, heads=1, kv_heads=1,
)  # fmt: skip
def conv2d_projection(m: Any, x: Tensor) -> Tensor:
    """Attention over pixels, keys narrower than values, no scale, bmm(v, weights^T), no output projection: SAGAN."""
    q, k, v = m.q(x).flatten(2).transpose(1, 2), m.k(x).flatten(2), m.v(x).flatten(2)
    weights = torch.softmax(torch.bmm(q, k) * SCALE, dim=-1)  # [B, S, T]
    return m.gamma * torch.bmm(v, weights.permute(0, 2, 1)).view_as(x) + x


@whole(has=dict(qkv=lambda: nn.Conv2d(C, 3 * C, 1, bias=False), o=lambda: nn.Conv2d(C, C, 1)), inputs=image)
def channels_before_pixels(m: Any, x: Tensor) -> Tensor:
    """[B, H, D, pixels] throughout, "bhdi,bhdj->bhij": attention in lucidrains' diffusion models."""
    q, k, v = (t.reshape(B, H, D, T) for t in m.qkv(x).chunk(3, dim=1))
    weights = torch.einsum("b h d i, b h d j -> b h i j", q * SCALE, k).softmax(dim=-1)
    o = torch.einsum("b h i j, b h d j -> b h i d", weights, v)
    return m.o(o.permute(0, 1, 3, 2).reshape(x.shape))


def normed_linear() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(settled(nn.Linear(C, C)))


@heads(has=dict.fromkeys("qk", normed_linear))
def weight_norm(m: Any, x: Tensor) -> Heads:
    """Weights computed by a parametrization."""
    return m.split(x)


@heads(has=dict(a=weight(2, 4, C), b=weight(2, C, 4, fan=8)))
def low_rank_adapters(m: Any, x: Tensor) -> Heads:
    """Sum a linear map and one of rank 4 for q and v: LoRA."""
    q = m.q(x) + F.linear(F.linear(x, m.a[0]), m.b[0]) * 2.0
    v = m.v(x) + (x @ m.a[1].T @ m.b[1].T) * 2.0
    return split(q), split(m.k(x)), split(v)


@heads(has=dict(codes=lambda: torch.randint(-127, 128, (3 * C, C), dtype=torch.int8), steps=weight(3 * C, 1)))
def dequantised_weights(m: Any, x: Tensor) -> Heads:
    """Dequantize 8-bit weights with a learned step per row in the graph."""
    q, k, v = F.linear(x, m.codes.to(x.dtype) / 73.0 * m.steps.abs()).chunk(3, dim=-1)
    return split(q), split(k), split(v)


@heads(has=dict(where=weight(T, C, fan=4)))
def positions_on_queries_and_keys(m: Any, x: Tensor) -> Heads:
    """Add positions before q and k, not before v: DETR."""
    q, k, _ = m.split(x + m.where)
    return q, k, split(m.v(x))


@whole()
def shared_keys_and_values(m: Any, x: Tensor) -> Tensor:
    """Use one projection as both key and value: Reformer's cousins."""
    q, kv = split(m.q(x)), split(m.k(x))
    return m.join(scores(q, kv).softmax(-1) @ kv)


@whole()
def shared_queries_and_keys(m: Any, x: Tensor) -> Tensor:
    """Use one projection as both query and key, each token masked from itself unless it is its only key: Reformer."""
    q, v = split(m.q(x)), split(m.v(x))
    s = (q @ F.normalize(q, dim=-1).mT).masked_fill(torch.eye(T, dtype=torch.bool), -5e4)
    return m.join(s.softmax(-1) @ v)


@whole(has=dict(v=lambda: nn.Linear(C, H * 6), o=lambda: nn.Linear(H * 6, C)))
def values_of_another_size(m: Any, x: Tensor) -> Tensor:
    """6 channels per value head, 8 per key head."""
    q, k, v = split(m.q(x)), split(m.k(x)), m.v(x).view(B, T, H, 6).transpose(1, 2)
    return m.o((scores(q, k).softmax(-1) @ v).transpose(1, 2).reshape(B, T, H * 6))


@heads(has=dict(k=lambda: nn.Conv1d(C, C, 3, padding=1, groups=C)))
def convolved_keys(m: Any, x: Tensor) -> Heads:
    """Convolve keys depth-wise before attention, as in CvT."""
    return split(m.q(x)), split(m.k(x.transpose(1, 2)).transpose(1, 2)), split(m.v(x))


@whole(has=dict(shrink=lambda: nn.Conv1d(C, C, 2, stride=2), norm=lambda: nn.LayerNorm(C)))
def strided_keys(m: Any, x: Tensor) -> Tensor:
    """Use every second token as a key: spatial reduction of PVT and Segformer."""
    fewer = m.norm(m.shrink(x.transpose(1, 2)).transpose(1, 2))
    return m.join(scores(split(m.q(x)), split(m.k(fewer))).softmax(-1) @ split(m.v(fewer)))


@whole(has=dict(e=weight(T, 5, fan=T), f=weight(T, 5, fan=T)))
def projected_tokens(m: Any, x: Tensor) -> Tensor:
    """Mix 12 keys into 5: Linformer."""
    q, k, v = m.split(x)
    k, v = torch.einsum("bhtd,tr->bhrd", k, m.e), torch.einsum("bhtd,tr->bhrd", v, m.f)
    return m.join(scores(q, k * 2).softmax(-1) @ v)
