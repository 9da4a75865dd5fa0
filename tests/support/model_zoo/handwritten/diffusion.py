"""Attention of diffusion models."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.handwritten.images import ImageAttention
from model_zoo.handwritten.parts import C, D, H, perceptron


class PixelAttention(nn.Module):
    """GroupNorm, 1x1 convolutions, one head as wide as the image: the U-Net of latent diffusion."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, C)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(C, C, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        b, c, height, width = h.shape
        q = self.q(h).reshape(b, c, height * width).permute(0, 2, 1)
        k, v = self.k(h).reshape(b, c, height * width), self.v(h).reshape(b, c, height * width)
        w = F.softmax(torch.bmm(q, k) * int(c) ** (-0.5), dim=2)
        return x + self.proj_out(torch.bmm(v, w.permute(0, 2, 1)).reshape(b, c, height, width))


class ChannelFirstAttention(nn.Module):
    """qkv as Conv1d, heads in the batch, "bct,bcs->bts", square root of the scale on both sides: guided diffusion."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj_out = nn.GroupNorm(4, C), nn.Conv1d(C, 3 * C, 1), nn.Conv1d(C, C, 1)

    def forward(self, image: Tensor) -> Tensor:
        b, c, *spatial = image.shape
        x = image.reshape(b, c, -1)
        qkv = self.qkv(self.norm(x))
        q, k, v = qkv.reshape(b * H, 3 * D, qkv.shape[-1]).split(D, dim=1)
        scale = 1 / math.sqrt(math.sqrt(D))
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
        weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
        h = torch.einsum("bts,bcs->bct", weight, v).reshape(b, -1, x.shape[-1])
        return (x + self.proj_out(h)).reshape(b, c, *spatial)


class SelfOrCross(nn.Module):
    """to_q, to_k, to_v; keys and values from `context` if there is one; heads in the batch, or SDPA."""

    def __init__(self, context: int, fused: bool) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(n, C, bias=False) for n in (C, context, context))
        self.to_out, self.fused = nn.ModuleList([nn.Linear(C, C), nn.Dropout(0.0)]), fused

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        b = x.shape[0]
        q, k, v = (t.view(b, -1, H, D).transpose(1, 2) for t in (self.to_q(x), self.to_k(context), self.to_v(context)))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False)
        else:
            q, k, v = (t.reshape(b * H, -1, D) for t in (q, k, v))
            empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device)
            scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=D**-0.5)
            y = torch.bmm(scores.softmax(dim=-1), v).view(b, H, -1, D)
        y = y.transpose(1, 2).reshape(b, -1, C)
        for part in self.to_out:
            y = part(y)
        return y


class ConditionedBlock(nn.Module):
    """Self attention, cross attention to a text, GEGLU: Stable Diffusion's transformer block."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.attn1, self.attn2 = SelfOrCross(C, fused), SelfOrCross(24, fused)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(C) for _ in range(3))
        self.gate, self.ff = nn.Linear(C, 4 * C), nn.Linear(2 * C, C)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), text) + x
        h, gate = self.gate(self.norm3(x)).chunk(2, dim=-1)
        return self.ff(h * F.gelu(gate)) + x


class ModulatedBlock(nn.Module):
    """adaLN: the condition gives shift, scale and gate of both branches: DiT."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(C, elementwise_affine=False) for _ in range(2))
        self.attn, self.mlp = ImageAttention(True), perceptron()
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(C, 6 * C))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)
