"""Image models, and attention in the style of einops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.handwritten.parts import C, D, H, PreNorm, layers


class RearrangedAttention(nn.Module):
    """The ops of `rearrange(t, "b n (h d) -> b h n d")`; to_qkv, attend, to_out."""

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
    """qkv.reshape.permute.unbind, norms that may be identities, a switch between SDPA and explicit scores."""

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
