"""Attention in parts or in other forms: landmarks, buckets, chunks, slots, additive scores."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.handwritten.parts import B, C, D, H, T


class ProjectedAttention(nn.Module):
    """to_q, to_k, to_v, to_out around `mix(q, k, v) -> o`, all [B, H, T, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(C, C) for _ in range(4))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).view(B, T, H, D).transpose(1, 2) for p in (self.to_q, self.to_k, self.to_v))
        return self.to_out(self.mix(q * D**-0.5, k, v).transpose(1, 2).reshape(B, T, C))


class Nystrom(ProjectedAttention):
    """Three softmaxes via landmarks, the middle one inverted by iteration: Nystromformer.

    The last kernel times the values is attention of the landmarks; the other two softmaxes are not attention.
    """

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_marks, k_marks = (t.reshape(B, H, 4, T // 4, D).mean(-2) for t in (q, k))
        first, last = (q @ k_marks.mT).softmax(-1), (q_marks @ k.mT).softmax(-1)
        return (first @ self.inverse((q_marks @ k_marks.mT).softmax(-1))) @ (last @ v)

    @staticmethod
    def inverse(a: Tensor) -> Tensor:
        one = torch.eye(a.shape[-1], dtype=a.dtype)
        z = a.mT / (a.abs().sum(-1).max() * a.abs().sum(-2).max())
        for _ in range(6):
            az = a @ z
            z = 0.25 * z @ (13 * one - az @ (15 * one - az @ (7 * one - az)))
        return z


class Agents(ProjectedAttention):
    """Pooled queries attend to all tokens, then all tokens to the pooled: two attentions in a row: Agent Attention."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        agents = q.reshape(B, H, 4, T // 4, D).mean(-2) * D**0.5
        read = (agents * D**-0.5 @ k.mT).softmax(-1) @ v
        return (q @ agents.mT).softmax(-1) @ read


class UnfoldedNeighbours(ProjectedAttention):
    """Each query has its own five keys, unfolded from the padded sequence: local attention for images and audio."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (F.pad(t, (0, 0, 2, 2)).unfold(2, 5, 1) for t in (k, v))  # [B, H, T, D, 5]
        inside = F.pad(torch.ones(T, dtype=torch.bool), (2, 2)).unfold(0, 5, 1)  # [T, 5]
        scores = torch.einsum("bhtd,bhtdw->bhtw", q, k).masked_fill(~inside, float("-inf"))
        return torch.einsum("bhtw,bhtdw->bhtd", scores.softmax(-1), v)


class BucketsAndBefore(ProjectedAttention):
    """Buckets of four queries attend to their own bucket and the previous one: lucidrains' local attention."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q.reshape(B * H, 3, 4, D)
        k, v = (F.pad(t.reshape(B * H, T, D), (0, 0, 4, 0)).unfold(1, 8, 4).transpose(2, 3) for t in (k, v))
        place = F.pad(torch.arange(T), (4, 0), value=-1).unfold(0, 8, 4)  # [3, 8]
        mine = torch.arange(T).view(3, 4, 1)
        seen = (place[:, None] <= mine) & (place[:, None] >= 0)  # [3, 4, 8]
        scores = torch.einsum("b w i d, b w j d -> b w i j", q, k).masked_fill(~seen, -torch.finfo(q.dtype).max)
        return torch.einsum("b w i j, b w j d -> b w i d", scores.softmax(-1), v).reshape(B, H, T, D)


class ChunkedQueries(ProjectedAttention):
    """A loop over chunks of queries, concatenated: sliced attention, one site per chunk."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([(part @ k.mT).softmax(-1) @ v for part in q.split(4, dim=2)], dim=2)


class OnlineSoftmax(ProjectedAttention):
    """A loop over blocks of keys with a running maximum and sum: flash attention in plain torch."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o, total, top = torch.zeros_like(q), q.new_zeros(B, H, T, 1), q.new_full((B, H, T, 1), -math.inf)
        for keys, values in zip(k.split(4, dim=2), v.split(4, dim=2), strict=True):
            s = q @ keys.mT
            higher = torch.maximum(top, s.amax(-1, keepdim=True))
            p, shrink = (s - higher).exp(), (top - higher).exp()
            o, total, top = o * shrink + p @ values, total * shrink + p.sum(-1, keepdim=True), higher
        return o / total


class SlotAttention(nn.Module):
    """Softmax over queries, then weights normalized over keys; twice: Slot Attention."""

    def __init__(self) -> None:
        super().__init__()
        self.slots, self.norm = nn.Parameter(torch.randn(5, C)), nn.LayerNorm(C)
        self.to_q, self.to_k, self.to_v = (nn.Linear(C, C) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        slots, k, v = self.slots.expand(B, -1, -1), self.to_k(x), self.to_v(x)
        for _ in range(2):
            attn = (torch.einsum("bid,bjd->bij", self.to_q(self.norm(slots)), k) * C**-0.5).softmax(dim=1) + 1e-8
            slots = slots + torch.einsum("bjd,bij->bid", v, attn / attn.sum(dim=-1, keepdim=True))
        return slots


class AdditiveAttention(nn.Module):
    """w^T tanh(W q + U k): Bahdanau et al. 2015; the weights are also the pointer distribution."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.score = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, 1)
        self.out = nn.Linear(2 * C, C)

    def forward(self, state: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.query(state).unsqueeze(1) + self.key(memory))
        weights = self.score(hidden).squeeze(-1).softmax(dim=-1)  # [B, T]
        context = torch.bmm(weights.unsqueeze(1), memory).squeeze(1)
        return self.out(torch.cat([state, context], dim=-1)).tanh(), weights


class GraphAttention(nn.Module):
    """leaky_relu(a1 h_i + a2 h_j) on the edges of a dense graph: GAT."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.a1, self.a2 = nn.Linear(C, C, bias=False), nn.Linear(D, 1), nn.Linear(D, 1)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = self.w(x).view(B, T, H, D).transpose(1, 2)
        e = F.leaky_relu(self.a1(h) + self.a2(h).transpose(-1, -2), 0.2)  # [B, H, T, T]
        attention = torch.where(edges.unsqueeze(1) > 0, e, -9e15 * torch.ones_like(e)).softmax(dim=-1)
        return F.elu(torch.matmul(attention, h)).transpose(1, 2).flatten(2)
