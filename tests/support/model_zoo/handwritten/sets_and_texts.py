"""Encoders of sets, text and audio, and an encoder-decoder."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.handwritten.decoders import NanoAttention
from model_zoo.handwritten.diffusion import SelfOrCross
from model_zoo.handwritten.parts import LAYERS, C, D, H, PreNorm, T, V, layers, perceptron


class PerceiverLatents(nn.Module):
    """Learned latents attend to the input, then to each other; output queries attend to them: Perceiver IO."""

    def __init__(self) -> None:
        super().__init__()
        self.latents, self.queries = nn.Parameter(torch.randn(6, C)), nn.Parameter(torch.randn(3, C))
        self.read, self.think, self.write = SelfOrCross(C, False), SelfOrCross(C, True), SelfOrCross(C, True)
        self.norm, self.mlp = nn.LayerNorm(C), perceptron()

    def forward(self, x: Tensor) -> Tensor:
        z = self.latents.unsqueeze(0).expand(x.shape[0], -1, -1)
        z = z + self.read(self.norm(z), x)
        z = z + self.think(self.norm(z))
        return self.write(self.queries.expand(x.shape[0], -1, -1), z + self.mlp(z))


class SetBlock(nn.Module):
    """Heads by split and cat on the batch, a residual on the projected queries: the MAB of the Set Transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc_q, self.fc_k, self.fc_v, self.fc_o = (nn.Linear(C, C) for _ in range(4))
        self.ln0, self.ln1 = nn.LayerNorm(C), nn.LayerNorm(C)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (torch.cat(t.split(D, 2), 0) for t in (self.fc_q(x), self.fc_k(y), self.fc_v(y)))
        a = torch.softmax(q.bmm(k.transpose(1, 2)) / math.sqrt(D), 2)
        o = self.ln0(torch.cat((q + a.bmm(v)).split(x.size(0), 0), 2))
        return self.ln1(o + F.relu(self.fc_o(o)))


class SetTransformer(nn.Module):
    """Induced attention (two sites via 5 learned points), then pooling by 2 learned seeds (one site)."""

    def __init__(self) -> None:
        super().__init__()
        self.points, self.seeds = nn.Parameter(torch.randn(1, 5, C)), nn.Parameter(torch.randn(1, 2, C))
        self.gather, self.spread, self.pool = SetBlock(), SetBlock(), SetBlock()

    def forward(self, x: Tensor) -> Tensor:
        x = self.spread(x, self.gather(self.points.repeat(x.size(0), 1, 1), x))
        return self.pool(self.seeds.repeat(x.size(0), 1, 1), x)


class RelativeBias(nn.Module):
    """No scale; a logarithmically bucketed bias that the first layer computes for all: T5's encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.relative_attention_bias = nn.Embedding(V, C), nn.Embedding(8, H)
        self.q, self.k, self.v, self.o = (layers(lambda: nn.Linear(C, C, bias=False)) for _ in range(4))
        self.norm = layers(lambda: nn.RMSNorm(C))

    @staticmethod
    def buckets(t: int) -> Tensor:
        distance = torch.arange(t)[None, :] - torch.arange(t)[:, None]
        after, near = (distance > 0).long() * 4, distance.abs()
        far = 2 + (torch.log(near.float() / 2) / math.log(16 / 2) * 2).long()
        return after + torch.where(near < 2, near, torch.min(far, torch.full_like(far, 3)))

    def forward(self, ids: Tensor) -> Tensor:
        x, (b, t) = self.embed(ids), ids.shape
        bias = self.relative_attention_bias(self.buckets(t)).permute([2, 0, 1]).unsqueeze(0)
        bias = bias + (1.0 - (ids != 0)[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        for i, norm in enumerate(self.norm):
            y = norm(x)
            q, k, v = (p[i](y).view(b, -1, H, D).transpose(1, 2) for p in (self.q, self.k, self.v))
            scores = torch.matmul(q, k.transpose(3, 2))
            scores += bias
            weights = F.dropout(F.softmax(scores.float(), dim=-1).type_as(scores), p=0.1, training=self.training)
            x = x + self.o[i](torch.matmul(weights, v).transpose(1, 2).contiguous().view(b, -1, C))
        return x


def scale_into_weights(model: RelativeBias) -> None:
    """Fold T5's scale into the initialization."""
    with torch.no_grad():
        for q in model.q:
            q.weight *= D**-0.5


class ShiftedRelativeAttention(nn.Module):
    """(q + u) k^T + shift((q + w) r^T): Transformer-XL, Conformer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear_q, self.linear_k, self.linear_v, self.linear_out = (nn.Linear(C, C) for _ in range(4))
        self.linear_pos = nn.Linear(C, C, bias=False)
        self.pos_bias_u, self.pos_bias_v = nn.Parameter(torch.randn(H, D) / 2), nn.Parameter(torch.randn(H, D) / 2)

    @staticmethod
    def shift(x: Tensor) -> Tensor:
        """[B, H, T, 2T-1] by distance -> [B, H, T, T] by key."""
        b, h, t, n = x.shape
        padded = torch.cat([torch.zeros((b, h, t, 1), dtype=x.dtype), x], dim=-1).view(b, h, n + 1, t)
        return padded[:, :, 1:].view_as(x)[:, :, :, :t]

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.linear_q(x).view(b, t, H, D)
        k, v = (p(x).view(b, t, H, D).transpose(1, 2) for p in (self.linear_k, self.linear_v))
        p = self.linear_pos(positions).view(1, -1, H, D).transpose(1, 2)  # [1, H, 2T-1, D]
        content = torch.matmul((q + self.pos_bias_u).transpose(1, 2), k.transpose(-2, -1))
        place = self.shift(torch.matmul((q + self.pos_bias_v).transpose(1, 2), p.transpose(-2, -1)))
        attn = torch.softmax((content + place) / math.sqrt(2 * D), dim=-1)
        return self.linear_out(torch.matmul(attn, v).transpose(1, 2).contiguous().view(b, -1, C))


class Conformer(nn.Module):
    """One block: half an MLP, relative attention, a gated convolution, half an MLP."""

    positions: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.ff1, self.ff2, self.attn = perceptron(), perceptron(), ShiftedRelativeAttention()
        self.norms = layers(lambda: nn.LayerNorm(C), 5)
        self.pointwise1, self.pointwise2 = nn.Conv1d(C, 2 * C, 1), nn.Conv1d(C, C, 1)
        self.depthwise = nn.Conv1d(C, C, 3, padding=1, groups=C)
        angle = torch.arange(T - 1, -T, -1)[:, None] * 100.0 ** (-torch.arange(0, C, 2) / C)
        self.register_buffer("positions", torch.stack([angle.sin(), angle.cos()], dim=-1).view(1, -1, C) * 2**0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.ff1(self.norms[0](x))
        x = x + self.attn(self.norms[1](x), self.positions)
        h = F.glu(self.pointwise1(self.norms[2](x).transpose(1, 2)), dim=1)
        x = x + self.pointwise2(F.silu(self.depthwise(h))).transpose(1, 2)
        return self.norms[4](x + 0.5 * self.ff2(self.norms[3](x)))


class OneLayerManyTimes(nn.Module):
    """The same module applied twice: ALBERT."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(V, C), PreNorm(NanoAttention(False))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for _ in range(LAYERS):
            x = self.layer(x)
        return x


class EncoderDecoder(nn.Module):
    """One encoder layer; one decoder layer with causal and cross attention; a padding mask for the source."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(V, C), nn.Linear(C, V)
        self.encoder, self.decoder, self.cross = (nn.ModuleDict(self.projections()) for _ in range(3))
        self.norms = layers(lambda: nn.LayerNorm(C), 3)

    @staticmethod
    def projections() -> dict[str, nn.Module]:
        return {name: nn.Linear(C, C) for name in ("query", "key", "value", "out")}

    @staticmethod
    def attend(p: nn.ModuleDict, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            p[name](t).view(t.shape[0], -1, H, D).transpose(1, 2)
            for name, t in (("query", x), ("key", y), ("value", y))
        )
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(D)
        p_attn = scores.masked_fill(mask == 0, -1e9).softmax(dim=-1)
        return p["out"](torch.matmul(p_attn, v).transpose(1, 2).contiguous().view(x.shape[0], -1, C))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        keep = (source != 0)[:, None, None, :]
        causal = torch.tril(torch.ones(1, 1, target.shape[1], target.shape[1], dtype=torch.uint8))
        memory, x = self.embed(source), self.embed(target)
        memory = self.norms[0](memory + self.attend(self.encoder, memory, memory, keep))
        x = self.norms[1](x + self.attend(self.decoder, x, x, causal))
        return self.out(self.norms[2](x + self.attend(self.cross, x, memory, keep)))
