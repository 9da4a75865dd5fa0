"""Decoders: nanoGPT, gpt-fast, the first Llama, PaLM, shared caches, absorbed latents."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.handwritten.parts import B, C, D, G, H, M, PreNorm, V, layers, perceptron


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
    """Grouped heads, fused wqkv, RoPE on real pairs, a cache module."""

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
    """Tables of angles and masks as buffers, both indexed by input_pos [S]."""

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
    """Complex RoPE, caches [B, M, G, D] written and read by slices, repeat_kv."""

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
    """Start position as a number; a mask only if there is more than one token."""

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
    """One projection each for q, k, v and the gated MLP; attention and MLP are added: PaLM."""

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
    """The second layer attends to the keys and values of the first: YOCO, Gemma 3n."""

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
