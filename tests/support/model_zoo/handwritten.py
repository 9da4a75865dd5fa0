"""Whole small models in the styles that people write them, two layers where not said otherwise.

Letters: B batch, H query heads, G kv heads, S queries, T keys, D head size, C = H * D channels, V words, M the tokens
that a cache has room for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo import Case, Entry
from model_zoo.spellings import settled

B, H, G, T, D, V, M = 2, 4, 2, 12, 8, 50, 16
C, LAYERS = H * D, 2


def words(count: int = T) -> Tensor:
    return torch.randint(1, V, (B, count))


def states(*shape: int) -> Tensor:
    return torch.randn(B, *(shape or (T, C)))


def perceptron(width: int = C) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


def layers(make: Callable[[], nn.Module], count: int = LAYERS) -> nn.ModuleList:
    return nn.ModuleList([make() for _ in range(count)])


# --------------------------------------------------------------------------------------------------- decoders


class NanoAttention(nn.Module):
    """Fused c_attn, split, view and transpose; a tril buffer, or sdpa."""

    bias: Tensor

    def __init__(self, flash: bool) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.attn_dropout, self.resid_dropout = nn.Dropout(0.1), nn.Dropout(0.1)
        self.flash = flash
        if not flash:
            self.register_buffer("bias", torch.tril(torch.ones(M, M)).view(1, 1, M, M))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = (part.view(b, t, H, c // H).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))
        if self.flash:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=None, dropout_p=0.1 if self.training else 0, is_causal=True
            )
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
            y = self.attn_dropout(F.softmax(att, dim=-1)) @ v
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c)))


class PreNorm(nn.Module):
    """x + attention(norm(x)), x + perceptron(norm(x))."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = nn.LayerNorm(C), attention, nn.LayerNorm(C), perceptron()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """Learned positions, tied embeddings."""

    def __init__(self, flash: bool) -> None:
        super().__init__()
        self.wte, self.wpe, self.ln_f = nn.Embedding(V, C), nn.Embedding(M, C), nn.LayerNorm(C)
        self.h = layers(lambda: PreNorm(NanoAttention(flash)))
        self.lm_head = nn.Linear(C, V, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx: Tensor) -> Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1), device=idx.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def frequencies() -> Tensor:
    return torch.outer(torch.arange(M), 100.0 ** (-torch.arange(0, D, 2) / D))  # [M, D / 2]


class KVCache(nn.Module):
    """Buffers [B, G, M, D], written by index assignment."""

    k_cache: Tensor
    v_cache: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k_cache", torch.randn(B, G, M, D))
        self.register_buffer("v_cache", torch.randn(B, G, M, D))

    def update(self, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k_out, v_out = self.k_cache, self.v_cache
        k_out[:, :, input_pos] = k
        v_out[:, :, input_pos] = v
        return k_out, v_out


class FastAttention(nn.Module):
    """Grouped heads, fused wqkv, real pairs for RoPE, a cache module."""

    def __init__(self) -> None:
        super().__init__()
        self.wqkv, self.wo = nn.Linear(C, (H + 2 * G) * D, bias=False), nn.Linear(C, C, bias=False)
        self.kv_cache = KVCache()

    def forward(self, x: Tensor, freqs: Tensor, mask: Tensor, input_pos: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.wqkv(x).split([H * D, G * D, G * D], dim=-1)
        q = self.rotate(q.view(b, t, H, D), freqs)
        k = self.rotate(k.view(b, t, G, D), freqs)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v.view(b, t, G, D)))
        k, v = self.kv_cache.update(input_pos, k, v)
        k, v = k.repeat_interleave(H // G, dim=1), v.repeat_interleave(H // G, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0)
        return self.wo(y.transpose(1, 2).contiguous().view(b, t, C))

    @staticmethod
    def rotate(x: Tensor, freqs: Tensor) -> Tensor:
        pairs = x.float().reshape(*x.shape[:-1], -1, 2)
        freqs = freqs.view(1, pairs.size(1), 1, pairs.size(3), 2)
        turned = [
            pairs[..., 0] * freqs[..., 0] - pairs[..., 1] * freqs[..., 1],
            pairs[..., 1] * freqs[..., 0] + pairs[..., 0] * freqs[..., 1],
        ]
        return torch.stack(turned, -1).flatten(3).type_as(x)


class FastBlock(nn.Module):
    """RMSNorm, attention; RMSNorm, SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.attention_norm, self.ffn_norm = FastAttention(), nn.RMSNorm(C), nn.RMSNorm(C)
        self.w1, self.w2, self.w3 = nn.Linear(C, 48), nn.Linear(48, C), nn.Linear(C, 48)

    def forward(self, x: Tensor, freqs: Tensor, mask: Tensor, input_pos: Tensor) -> Tensor:
        h = x + self.attention(self.attention_norm(x), freqs, mask, input_pos)
        y = self.ffn_norm(h)
        return h + self.w2(F.silu(self.w1(y)) * self.w3(y))


class GPTFast(nn.Module):
    """Tables of angles and masks as buffers, both read at input_pos [S]."""

    freqs_cis: Tensor
    causal_mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings, self.norm, self.output = nn.Embedding(V, C), nn.RMSNorm(C), nn.Linear(C, V)
        self.layers = layers(FastBlock)
        angles = frequencies()
        self.register_buffer("freqs_cis", torch.stack([angles.cos(), angles.sin()], dim=-1))
        self.register_buffer("causal_mask", torch.tril(torch.ones(M, M, dtype=torch.bool)))

    def forward(self, idx: Tensor, input_pos: Tensor) -> Tensor:
        mask, freqs = self.causal_mask[None, None, input_pos], self.freqs_cis[input_pos]
        x = self.tok_embeddings(idx)
        for layer in self.layers:
            x = layer(x, freqs, mask, input_pos)
        return self.output(self.norm(x))


class LlamaAttention(nn.Module):
    """Complex RoPE, caches [B, M, G, D] that are sliced to be written and to be read, repeat_kv."""

    cache_k: Tensor
    cache_v: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wo = nn.Linear(C, C, bias=False), nn.Linear(C, C, bias=False)
        self.wk, self.wv = nn.Linear(C, G * D, bias=False), nn.Linear(C, G * D, bias=False)
        self.register_buffer("cache_k", torch.randn(B, M, G, D), persistent=False)
        self.register_buffer("cache_v", torch.randn(B, M, G, D), persistent=False)

    def forward(self, x: Tensor, start: int, turn: Tensor, mask: Tensor | None) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.wq(x).view(b, t, H, D), self.wk(x).view(b, t, G, D), self.wv(x).view(b, t, G, D)
        q, k = self.rotate(q, turn), self.rotate(k, turn)
        self.cache_k[:b, start : start + t] = k
        self.cache_v[:b, start : start + t] = v
        keys, values = self.repeat(self.cache_k[:b, : start + t]), self.repeat(self.cache_v[:b, : start + t])
        q, keys, values = q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        scores = torch.matmul(q, keys.transpose(2, 3)) / math.sqrt(D)
        if mask is not None:
            scores = scores + mask
        weights = F.softmax(scores.float(), dim=-1).type_as(q)
        return self.wo(torch.matmul(weights, values).transpose(1, 2).contiguous().view(b, t, -1))

    @staticmethod
    def rotate(x: Tensor, turn: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn.view(1, x.shape[1], 1, -1)).flatten(3).type_as(x)

    @staticmethod
    def repeat(x: Tensor) -> Tensor:
        b, t, g, d = x.shape
        return x[:, :, :, None, :].expand(b, t, g, H // G, d).reshape(b, t, H, d)


class LlamaBlock(nn.Module):
    """RMSNorm before attention and perceptron, a mask that may be None."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.attention_norm = LlamaAttention(), nn.RMSNorm(C)
        self.feed_forward, self.ffn_norm = perceptron(), nn.RMSNorm(C)

    def forward(self, x: Tensor, start: int, turn: Tensor, mask: Tensor | None) -> Tensor:
        h = x + self.attention(self.attention_norm(x), start, turn, mask)
        return h + self.feed_forward(self.ffn_norm(h))


class Llama(nn.Module):
    """Start position as a number; a mask only where there is more than one token."""

    freqs_cis: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings, self.norm, self.output = nn.Embedding(V, C), nn.RMSNorm(C), nn.Linear(C, V)
        self.layers = layers(LlamaBlock)
        self.register_buffer("freqs_cis", torch.polar(torch.ones(M, D // 2), frequencies()), persistent=False)

    def forward(self, tokens: Tensor, start: int) -> Tensor:
        h, t = self.tok_embeddings(tokens), tokens.shape[1]
        turn, mask = self.freqs_cis[start : start + t], None
        if t > 1:
            mask = torch.triu(torch.full((t, t), float("-inf"), device=tokens.device), diagonal=1)
            mask = torch.hstack([torch.zeros((t, start), device=tokens.device), mask]).type_as(h)
        for layer in self.layers:
            h = layer(h, start, turn, mask)
        return self.output(self.norm(h)).float()


class ParallelBlock(nn.Module):
    """One projection for q, one k, one v and the gated perceptron; attention and perceptron are added: PaLM."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fused = nn.LayerNorm(C), nn.Linear(C, C + D + D + 4 * C, bias=False)
        self.attn_out, self.ff_out = nn.Linear(C, C, bias=False), nn.Linear(2 * C, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v, ff = self.fused(self.norm(x)).split((C, D, D, 4 * C), dim=-1)
        q = q.reshape(b, t, H, D).permute(0, 2, 1, 3) * D**-0.5
        sim = torch.einsum("b h i d, b j d -> b h i j", q, k)
        future = torch.ones((t, t), device=x.device, dtype=torch.bool).triu(1)
        attn = sim.masked_fill(future, -torch.finfo(sim.dtype).max).softmax(dim=-1)
        out = torch.einsum("b h i j, b j d -> b h i d", attn, v).permute(0, 2, 1, 3).reshape(b, t, C)
        left, gate = ff.chunk(2, dim=-1)
        return x + self.attn_out(out) + self.ff_out(F.silu(gate) * left)


class SharedCache(nn.Module):
    """The second layer reads the keys and values of the first: YOCO, Gemma 3n."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = layers(lambda: nn.Linear(C, C)), layers(lambda: nn.Linear(C, C))
        self.k, self.v = nn.Linear(C, G * D), nn.Linear(C, G * D)

    def forward(self, x: Tensor) -> Tensor:
        k, v = (p(x).unflatten(-1, (G, D)).transpose(1, 2) for p in (self.k, self.v))
        for q, o in zip(self.q, self.o, strict=True):
            query = q(x).unflatten(-1, (H, D)).transpose(1, 2)
            y = F.scaled_dot_product_attention(query, k, v, is_causal=True, enable_gqa=True)
            x = x + o(y.transpose(1, 2).flatten(2))
        return x


class AbsorbedLatentAttention(nn.Module):
    """Scores are a sum of two contractions: queries with cached latents, rotary queries with shared keys: DeepSeek."""

    kv_cache: Tensor
    pe_cache: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wkv_a, self.kv_norm = nn.Linear(C, H * 12), nn.Linear(C, 16 + 4), nn.RMSNorm(16)
        self.wkv_b, self.wo = nn.Linear(16, H * 16, bias=False), nn.Linear(C, C)
        self.register_buffer("kv_cache", torch.randn(B, M, 16))
        self.register_buffer("pe_cache", torch.randn(B, M, 4))

    def forward(self, x: Tensor, start: int) -> Tensor:
        end = start + x.shape[1]
        q_nope, q_pe = self.wq(x).view(B, -1, H, 12).split([8, 4], dim=-1)
        kv, k_pe = self.wkv_a(x).split([16, 4], dim=-1)
        self.kv_cache[:, start:end] = self.kv_norm(kv)
        self.pe_cache[:, start:end] = k_pe
        up = self.wkv_b.weight.view(H, 16, 16)
        q_nope = torch.einsum("bshd,hdc->bshc", q_nope, up[:, :8])
        scores = torch.einsum("bshc,btc->bsht", q_nope, self.kv_cache[:, :end])
        scores = (scores + torch.einsum("bshr,btr->bsht", q_pe, self.pe_cache[:, :end])) * 12**-0.5
        y = torch.einsum("bsht,btc->bshc", scores.softmax(dim=-1, dtype=torch.float32), self.kv_cache[:, :end])
        return self.wo(torch.einsum("bshc,hdc->bshd", y, up[:, 8:]).flatten(2))


# --------------------------------------------------------------------------------------------------- einops and vision


class RearrangedAttention(nn.Module):
    """What `rearrange(t, "b n (h d) -> b h n d")` leaves; to_qkv, attend, to_out."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.dropout = nn.Softmax(dim=-1), nn.Dropout(0.1)
        self.to_qkv = nn.Linear(C, 3 * C, bias=False)
        self.to_out = nn.Sequential(nn.Linear(C, C), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (t.reshape(b, n, H, D).permute(0, 2, 1, 3) for t in self.to_qkv(x).chunk(3, dim=-1))
        dots = torch.matmul(q, k.transpose(-1, -2)) * D**-0.5
        out = torch.matmul(self.dropout(self.attend(dots)), v)
        return self.to_out(out.permute(0, 2, 1, 3).reshape(b, n, C))


class NullKeyAttention(nn.Module):
    """Null key and value, normed q and k with gains, ALiBi, einsum with spaces, masks padded for the null key."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(C, C, bias=False) for _ in range(4))
        self.null_kv = nn.Parameter(torch.randn(2, H, 1, D))
        self.q_gain, self.k_gain = nn.Parameter(1.7 + torch.rand(H, 1, D)), nn.Parameter(1.7 + torch.rand(H, 1, D))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (p(x).reshape(b, n, H, D).permute(0, 2, 1, 3) for p in (self.to_q, self.to_k, self.to_v))
        null_k, null_v = (t.expand(b, -1, -1, -1) for t in self.null_kv)
        k, v = torch.cat((null_k, k), dim=-2), torch.cat((null_v, v), dim=-2)
        q, k = F.normalize(q, p=2, dim=-1) * self.q_gain, F.normalize(k, p=2, dim=-1) * self.k_gain
        dots = torch.einsum("b h i d, b h j d -> b h i j", q, k)
        distance = (torch.arange(n)[None, :] - torch.arange(n)[:, None]).abs()
        slopes = 2.0 ** (-8.0 * torch.arange(1, H + 1) / H)
        dots = dots + F.pad(-slopes[:, None, None] * distance, (1, 0))
        future = F.pad(torch.ones((n, n), dtype=torch.bool).triu(1), (1, 0), value=False)
        dots = dots.masked_fill(future, -torch.finfo(dots.dtype).max)
        attn = F.softmax(dots, dim=-1, dtype=torch.float32).type(dots.dtype)
        out = torch.einsum("b h i j, b h j d -> b h i d", attn, v)
        return self.to_out(out.permute(0, 2, 1, 3).reshape(b, n, C))


class ImageAttention(nn.Module):
    """qkv.reshape.permute.unbind, norms that may be identities, a switch between sdpa and scores."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.qkv, self.proj, self.fused_attn = nn.Linear(C, 3 * C), nn.Linear(C, C), fused
        self.q_norm, self.k_norm, self.attn_drop = nn.Identity(), nn.Identity(), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            attn = (q * D**-0.5) @ k.transpose(-2, -1)
            x = self.attn_drop(attn.softmax(dim=-1)) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


class ImageTransformer(nn.Module):
    """Patches by convolution, a class token, learned positions."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.patch_embed, self.head = nn.Conv2d(3, C, 4, stride=4), nn.Linear(C, 10)
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, C)), nn.Parameter(torch.randn(1, 10, C) / 2)
        self.blocks, self.norm = layers(lambda: PreNorm(ImageAttention(fused))), nn.LayerNorm(C)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch_embed(image).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class ShiftedWindows(nn.Module):
    """A grid of 4 x 4 tokens in windows of 2 x 2: cyclic shift, mask of the shifted windows, relative bias table."""

    index: Tensor
    attn_mask: Tensor | None

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj, self.shift = nn.LayerNorm(C), nn.Linear(C, 3 * C), nn.Linear(C, C), shift
        self.softmax, self.table = nn.Softmax(dim=-1), nn.Parameter(torch.randn(9, H))
        places = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        offset = places[:, :, None] - places[:, None, :] + 1
        self.register_buffer("index", offset[0] * 3 + offset[1])
        region = torch.tensor([0, 0, 1, 2]) * 3
        numbers = self.windows((region[:, None] + torch.tensor([0, 0, 1, 2])).view(1, 4, 4, 1)).squeeze(-1)
        apart = numbers.unsqueeze(1) != numbers.unsqueeze(2)  # [windows, N, N]
        self.register_buffer("attn_mask", apart * -100.0 if shift else None)

    @staticmethod
    def windows(x: Tensor) -> Tensor:
        """[B, 4, 4, c] -> [B * 4, 4, c]."""
        return x.view(-1, 2, 2, 2, 2, x.shape[-1]).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, x.shape[-1])

    def attention(self, x: Tensor) -> Tensor:
        rows, n, _ = x.shape
        qkv = self.qkv(x).reshape(rows, n, 3, H, D).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q * D**-0.5) @ k.transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
        attn = attn + bias.unsqueeze(0)
        if self.attn_mask is not None:
            count = self.attn_mask.shape[0]
            attn = attn.view(rows // count, count, H, n, n) + self.attn_mask.unsqueeze(1).unsqueeze(0)
            attn = attn.view(-1, H, n, n)
        return self.proj((self.softmax(attn) @ v).transpose(1, 2).reshape(rows, n, C))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.shift:
            y = torch.roll(y, shifts=(-self.shift, -self.shift), dims=(1, 2))
        y = self.attention(self.windows(y)).view(-1, 2, 2, 2, 2, C).permute(0, 1, 3, 2, 4, 5).reshape(x.shape)
        if self.shift:
            y = torch.roll(y, shifts=(self.shift, self.shift), dims=(1, 2))
        return x + y


class RowsThenColumns(nn.Module):
    """[B, R, W, C]: attention within rows, then within columns."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns = RearrangedAttention(), RearrangedAttention()

    def forward(self, x: Tensor) -> Tensor:
        b, r, w, c = x.shape
        x = x + self.rows(x.reshape(b * r, w, c)).view(b, r, w, c)
        turned = x.transpose(1, 2).reshape(b * w, r, c)
        return x + self.columns(turned).view(b, w, r, c).transpose(1, 2)


# --------------------------------------------------------------------------------------------------- diffusion


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
    """qkv as Conv1d, heads in the batch, "bct,bcs->bts", the root of the scale on both sides: guided diffusion."""

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
    """to_q, to_k, to_v; keys and values from `context` where there is one; heads in the batch, or sdpa."""

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
    """adaLN: shift, scale and gate of both branches come from the condition: DiT."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(C, elementwise_affine=False) for _ in range(2))
        self.attn, self.mlp = ImageAttention(True), perceptron()
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(C, 6 * C))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Threaded(nn.Module):
    """Layers that each take what the last one gave, and the same condition."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = layers(make)

    def forward(self, x: Tensor, *condition: Any) -> Tensor:
        for layer in self.layers:
            x = layer(x, *condition)
        return x


# --------------------------------------------------------------------------------------------------- sets and texts


class Latents(nn.Module):
    """Learned latents read the input, attend to each other, and are read by output queries: Perceiver IO."""

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
    """Induced attention (two sites through 5 learned points), then pooling by 2 learned seeds (one)."""

    def __init__(self) -> None:
        super().__init__()
        self.points, self.seeds = nn.Parameter(torch.randn(1, 5, C)), nn.Parameter(torch.randn(1, 2, C))
        self.gather, self.spread, self.pool = SetBlock(), SetBlock(), SetBlock()

    def forward(self, x: Tensor) -> Tensor:
        x = self.spread(x, self.gather(self.points.repeat(x.size(0), 1, 1), x))
        return self.pool(self.seeds.repeat(x.size(0), 1, 1), x)


class RelativeBias(nn.Module):
    """No scale; logarithmic buckets, a bias that the first layer makes for all: T5's encoder."""

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
    """T5 has its scale in the initialisation."""
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
    """One block: half a perceptron, relative attention, a gated convolution, half a perceptron."""

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
    """The same module twice: ALBERT."""

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


# --------------------------------------------------------------------------------------------------- parts of attention


class Projected(nn.Module):
    """to_q, to_k, to_v, to_out around `mix(q, k, v) -> o`, all [B, H, T, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(C, C) for _ in range(4))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).view(B, T, H, D).transpose(1, 2) for p in (self.to_q, self.to_k, self.to_v))
        return self.to_out(self.mix(q * D**-0.5, k, v).transpose(1, 2).reshape(B, T, C))


class Nystrom(Projected):
    """Three softmaxes around landmarks, the middle one inverted by iteration: Nystromformer.

    The last kernel times the values is an attention of the landmarks; the other two softmaxes are none.
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


class Agents(Projected):
    """Pooled queries read all tokens, all tokens read the pooled: two attentions in a row: Agent Attention."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        agents = q.reshape(B, H, 4, T // 4, D).mean(-2) * D**0.5
        read = (agents * D**-0.5 @ k.mT).softmax(-1) @ v
        return (q @ agents.mT).softmax(-1) @ read


class UnfoldedNeighbours(Projected):
    """Each query has five keys of its own, unfolded out of the padded text: local attention for images and sound."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (F.pad(t, (0, 0, 2, 2)).unfold(2, 5, 1) for t in (k, v))  # [B, H, T, D, 5]
        inside = F.pad(torch.ones(T, dtype=torch.bool), (2, 2)).unfold(0, 5, 1)  # [T, 5]
        scores = torch.einsum("bhtd,bhtdw->bhtw", q, k).masked_fill(~inside, float("-inf"))
        return torch.einsum("bhtw,bhtdw->bhtd", scores.softmax(-1), v)


class BucketsAndBefore(Projected):
    """Buckets of four queries; keys of their own bucket and of the one before: lucidrains' local attention."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q.reshape(B * H, 3, 4, D)
        k, v = (F.pad(t.reshape(B * H, T, D), (0, 0, 4, 0)).unfold(1, 8, 4).transpose(2, 3) for t in (k, v))
        place = F.pad(torch.arange(T), (4, 0), value=-1).unfold(0, 8, 4)  # [3, 8]
        mine = torch.arange(T).view(3, 4, 1)
        seen = (place[:, None] <= mine) & (place[:, None] >= 0)  # [3, 4, 8]
        scores = torch.einsum("b w i d, b w j d -> b w i j", q, k).masked_fill(~seen, -torch.finfo(q.dtype).max)
        return torch.einsum("b w i j, b w j d -> b w i d", scores.softmax(-1), v).reshape(B, H, T, D)


class ChunkedQueries(Projected):
    """A loop over chunks of queries, joined by cat: sliced attention, one site a chunk."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([(part @ k.mT).softmax(-1) @ v for part in q.split(4, dim=2)], dim=2)


class OnlineSoftmax(Projected):
    """A loop over blocks of keys with a running maximum and sum: flash attention in plain torch."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o, total, top = torch.zeros_like(q), q.new_zeros(B, H, T, 1), q.new_full((B, H, T, 1), -math.inf)
        for keys, values in zip(k.split(4, dim=2), v.split(4, dim=2), strict=True):
            s = q @ keys.mT
            higher = torch.maximum(top, s.amax(-1, keepdim=True))
            p, shrink = (s - higher).exp(), (top - higher).exp()
            o, total, top = o * shrink + p @ values, total * shrink + p.sum(-1, keepdim=True), higher
        return o / total


class Slots(nn.Module):
    """Softmax over queries, then weights normalised over keys; twice: Slot Attention."""

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


# --------------------------------------------------------------------------------------------------- additive scores


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


# --------------------------------------------------------------------------------------------------- entries


def _model(
    name: str,
    make: Callable[[], nn.Module],
    inputs: Callable[[], tuple[Any, ...]],
    sites: int,
    finish: Callable[[Any], None] | None = None,
    **traits: Any,
) -> Entry:
    """An entry of `make()`, settled and then finished."""

    def build() -> Case:
        torch.manual_seed(1)
        model = settled(make())
        if finish:
            finish(model)
        return Case(model, inputs())

    shapes = dict(heads=H, kv_heads=H, head_dim=D) if sites else {}
    return Entry(name, "hand-written", build, sites, **(shapes | traits))


def _both(
    name: str, make: Callable[[bool], nn.Module], inputs: Callable[[], tuple[Any, ...]], sites: int
) -> list[Entry]:
    """An entry with a softmax and one with sdpa."""
    return [
        _model(name, partial(make, fused), inputs, sites, implementation=implementation)
        for implementation, fused in (("eager", False), ("sdpa", True))
    ]


def _read() -> tuple[Any, ...]:
    return (words(),)


def _edges() -> Tensor:
    near = (torch.arange(T)[:, None] - torch.arange(T)).abs() < 3
    return near.float().expand(B, T, T)


_GROUPED: dict[str, Any] = dict(kv_heads=G)
_ONE_HEAD: dict[str, Any] = dict(heads=1, kv_heads=1, head_dim=C)

ENTRIES: list[Entry] = [
    *_both("nanogpt", NanoGPT, _read, LAYERS),
    _model("gpt_fast", GPTFast, lambda: (words(), torch.arange(T)), LAYERS, step="prefill", **_GROUPED),
    _model("gpt_fast", GPTFast, lambda: (words(1), torch.tensor([T])), LAYERS, step="decode static", **_GROUPED),
    _model("llama_original", Llama, lambda: (words(), 0), LAYERS, step="prefill", **_GROUPED),
    _model("llama_original", Llama, lambda: (words(1), T), LAYERS, step="decode static", **_GROUPED),
    _model("palm_block", lambda: Threaded(ParallelBlock), lambda: (states(),), LAYERS, kv_heads=1),
    _model("shared_cache", SharedCache, lambda: (states(),), LAYERS, **_GROUPED),
    _model("absorbed_latents", AbsorbedLatentAttention, lambda: (states(1, C), T), 1, step="decode static", kv_heads=1,
           head_dim=0),
    _model("einops", lambda: Threaded(lambda: PreNorm(RearrangedAttention())), lambda: (states(),), LAYERS),
    _model("null_key", lambda: Threaded(lambda: PreNorm(NullKeyAttention())), lambda: (states(),), LAYERS),
    *_both("image_transformer", ImageTransformer, lambda: (states(3, 12, 12),), LAYERS),
    _model("windows", lambda: nn.Sequential(ShiftedWindows(0), ShiftedWindows(1)), lambda: (states(4, 4, C),), 2),
    _model("axial", RowsThenColumns, lambda: (states(3, 4, C),), 2),
    _model("latent_diffusion", PixelAttention, lambda: (states(C, 3, 4),), 1, **_ONE_HEAD),
    _model("guided_diffusion", ChannelFirstAttention, lambda: (states(C, 3, 4),), 1),
    *_both("stable_diffusion", ConditionedBlock, lambda: (states(), states(7, 24)), 2),
    _model("dit", lambda: Threaded(ModulatedBlock), lambda: (states(), states(C)), LAYERS),
    _model("perceiver", Latents, lambda: (states(),), 3),
    _model("set_transformer", SetTransformer, lambda: (states(),), 3),
    _model("t5_encoder", RelativeBias, _read, LAYERS, finish=scale_into_weights),
    _model("conformer", Conformer, lambda: (states(),), 1),
    _model("albert", OneLayerManyTimes, _read, LAYERS),
    _model("encoder_decoder", EncoderDecoder, lambda: (words(), words(9)), 3),
    _model("agents", Agents, lambda: (states(),), 2),
    _model("unfolded_neighbours", UnfoldedNeighbours, lambda: (states(),), 1),
    _model("buckets_and_before", BucketsAndBefore, lambda: (states(),), 1),
    _model("chunked_queries", ChunkedQueries, lambda: (states(),), T // 4),
    _model("nystrom", Nystrom, lambda: (states(),), 3),
    _model("online_softmax", OnlineSoftmax, lambda: (states(),), 0, explained=1),
    _model("slots", Slots, lambda: (states(),), 0, explained=2),
    _model("additive", AdditiveAttention, lambda: (states(C), states()), 0),
    _model("graph_attention", GraphAttention, lambda: (states(), _edges()), 0),
]  # fmt: skip

__all__ = ["ENTRIES"]
