"""Spellings of norms and rotary embeddings of queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.spellings.blocks import WINDOW, B, C, D, H, Heads, Spellings, T, angles, attend, split

SPELLINGS = Spellings()
heads, whole = SPELLINGS.heads, SPELLINGS.whole


def rms(t: Tensor, gain: Tensor) -> Tensor:
    return t * torch.rsqrt(t.float().pow(2).mean(-1, keepdim=True) + 1e-6).type_as(t) * gain


@heads(has=dict(gain=lambda: nn.Parameter(torch.rand(2, C) + 0.5)))
def norm_before_split(m: Any, x: Tensor) -> Heads:
    """RMSNorm by hand over all heads at once: OLMo 2."""
    return split(rms(m.q(x), m.gain[0])), split(rms(m.k(x), m.gain[1])), split(m.v(x))


@heads(has=dict(norm_q=lambda: nn.RMSNorm(D), norm_k=lambda: nn.RMSNorm(D)))
def norm_after_split(m: Any, x: Tensor) -> Heads:
    """nn.RMSNorm per head, before the transpose: Qwen 3, Gemma 3."""
    q, k = m.norm_q(m.q(x).view(B, T, H, D)), m.norm_k(m.k(x).view(B, T, H, D))
    return q.transpose(1, 2), k.transpose(1, 2), split(m.v(x))


@heads(has=dict(norm_q=lambda: nn.LayerNorm(D), norm_k=lambda: nn.LayerNorm(D)))
def layer_norm_after_split(m: Any, x: Tensor) -> Heads:
    """nn.LayerNorm per head: ViT-22B, timm's qk_norm, Persimmon."""
    q, k, v = m.split(x)
    return m.norm_q(q), m.norm_k(k), v


@whole()
def unit_length_before_split(m: Any, x: Tensor) -> Tensor:
    """F.normalize over all heads at once, a fixed factor of 20."""
    q, k = split(F.normalize(m.q(x), dim=-1)), split(F.normalize(m.k(x), dim=-1))
    return m.join(attend(q, k, split(m.v(x)), scale=20.0))


def turns(size: int = D) -> dict[str, Callable[[], Tensor]]:
    """Return makers of cos and sin [T, size / 2]."""
    return dict(cos=lambda: angles(size).cos(), sin=lambda: angles(size).sin())


def rotate_half(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of channels i and i + D/2. cos, sin: [T, D / 2]."""
    first, second = t.chunk(2, dim=-1)
    return t * torch.cat([cos, cos], -1) + torch.cat([-second, first], -1) * torch.cat([sin, sin], -1)


@heads(has=turns())
def rope_half(m: Any, x: Tensor) -> Heads:
    """rotate_half: Llama in transformers."""
    q, k, v = m.split(x)
    return rotate_half(q, m.cos, m.sin), rotate_half(k, m.cos, m.sin), v


@heads(has=turns())
def rope_half_without_negation(m: Any, x: Tensor) -> Heads:
    """x1 cos - x2 sin, x2 cos + x1 sin, joined: gpt-oss, torchtitan's kernels."""

    def rotate(t: Tensor) -> Tensor:
        first, second = t[..., : D // 2], t[..., D // 2 :]
        return torch.cat([first * m.cos - second * m.sin, second * m.cos + first * m.sin], dim=-1)

    q, k, v = m.split(x)
    return rotate(q), rotate(k), v


@heads()
def rope_interleaved(m: Any, x: Tensor) -> Heads:
    """Channels 2i and 2i + 1 are a pair; stack, flatten; angles made in the graph: GPT-J, GLM."""
    frequency = 100.0 ** (-torch.arange(0, D, 2, dtype=torch.float32) / D)
    angle = torch.einsum("i,j->ij", torch.arange(T, dtype=torch.float32), frequency).repeat_interleave(2, dim=-1)

    def rotate(t: Tensor) -> Tensor:
        turned = torch.stack([-t[..., 1::2], t[..., ::2]], dim=-1).flatten(-2)
        return t * angle.cos() + turned * angle.sin()

    q, k, v = m.split(x)
    return rotate(q), rotate(k), v


@heads(has=turns())
def rope_before_transpose(m: Any, x: Tensor) -> Heads:
    """Rotate pairs [.., D/2, 2] with heads after tokens: gpt-fast."""
    cos, sin = m.cos[:, None], m.sin[:, None]  # [T, 1, D / 2]

    def rotate(t: Tensor) -> Tensor:
        pairs = t.view(B, T, H, D).reshape(B, T, H, -1, 2)
        even, odd = pairs[..., 0], pairs[..., 1]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(3).transpose(1, 2)

    return rotate(m.q(x)), rotate(m.k(x)), split(m.v(x))


@heads(has=dict(turn=lambda: torch.polar(torch.ones(T, D // 2), angles())))
def rope_complex(m: Any, x: Tensor) -> Heads:
    """view_as_complex times a complex table: llama's reference code."""

    def rotate(t: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(t.float().reshape(B, H, T, -1, 2)) * m.turn).flatten(3)

    q, k, v = m.split(x)
    return rotate(q).type_as(q), rotate(k).type_as(k), v


@heads(has=turns())
def rope_written_in_place(m: Any, x: Tensor) -> Heads:
    """Write the results to every second channel of an empty tensor."""

    def rotate(t: Tensor) -> Tensor:
        out, even, odd = torch.empty_like(t), t[..., ::2], t[..., 1::2]
        out[..., ::2] = even * m.cos - odd * m.sin
        out[..., 1::2] = odd * m.cos + even * m.sin
        return out

    q, k, v = m.split(x)
    return rotate(q), rotate(k), v


@heads(has=turns(4))
def rope_partial(m: Any, x: Tensor) -> Heads:
    """Rotate only the first 4 of 8 channels: GPT-NeoX, Phi, StableLM."""

    def rotate(t: Tensor) -> Tensor:
        return torch.cat([rotate_half(t[..., :4], m.cos, m.sin), t[..., 4:]], dim=-1)

    q, k, v = m.split(x)
    return rotate(q), rotate(k), v


@heads(has=turns())
def rope_gathered(m: Any, x: Tensor) -> Heads:
    """Look up cos and sin by position ids."""
    position = torch.arange(T).unsqueeze(0)
    cos, sin = m.cos[position].unsqueeze(1), m.sin[position].unsqueeze(1)  # [1, 1, T, D / 2]
    q, k, v = m.split(x)
    return rotate_half(q, cos, sin), rotate_half(k, cos, sin), v


@heads(has=turns(4))
def rope_axial(m: Any, x: Tensor) -> Heads:
    """Rotate half of the channels by row, half by column, on a grid of 3 rows and 4 columns: vision RoPE."""
    row, column = torch.arange(T) // WINDOW, torch.arange(T) % WINDOW

    def rotate(t: Tensor) -> Tensor:
        by_row = rotate_half(t[..., :4], m.cos[row], m.sin[row])
        return torch.cat([by_row, rotate_half(t[..., 4:], m.cos[column], m.sin[column])], dim=-1)

    q, k, v = m.split(x)
    return rotate(q), rotate(k), v


@whole(
    has=dict(
        turns(4), q=lambda: nn.Linear(C, H * 12), kv_a=lambda: nn.Linear(C, 16 + 4), norm=lambda: nn.RMSNorm(16),
        kv_b=lambda: nn.Linear(16, H * 16),
    ),
    sites=0,
    reason="already latent",
)  # fmt: skip
def latent_keys(m: Any, x: Tensor) -> Tensor:
    """Write keys of 8 + 4 channels into an empty tensor; all heads share the rotated 4: DeepSeek."""
    q = m.q(x).view(B, T, H, 12).transpose(1, 2)
    latent, shared = m.kv_a(x).split([16, 4], dim=-1)
    k_plain, v = m.kv_b(m.norm(latent)).view(B, T, H, 16).transpose(1, 2).split([8, 8], dim=-1)
    q = torch.cat([q[..., :8], rotate_half(q[..., 8:], m.cos, m.sin)], dim=-1)
    k = k_plain.new_empty(B, H, T, 12)
    k[..., :8].copy_(k_plain)
    k[..., 8:].copy_(rotate_half(shared.unsqueeze(1), m.cos, m.sin).expand(-1, H, -1, -1))
    return m.join(attend(q, k, v, is_causal=True))
