"""latent_k16b8x32b4_v32b3x16b16_bfloat16_cap_ab5d923f

Latent attention for one latent format, in plain torch operations:

    x[t] = cap(scale * q . z_K[t]) + mask[t]      cap(x) = softcap tanh(x / softcap)
    lse  = log sum_t exp(x[t])
    o    = sum_t exp(x[t] - lse) z_V[t]           o = 0 and lse = -inf where every token is masked

    q [B,H,S,R_K]   z_K [B,J,T,R_K]   z_V [B,J',T,R_V]   mask [B,H,S,T]   ->   o [B,H,S,R_V]   lse [B,H,S]

    B batch, H query heads, J latent heads (H/J query heads share one; keys and values may differ in J), S queries,
    T tokens, R channels of a latent.

    channels of a key row:    16 x 8, 32 x 4 bits
    channels of a value row:  32 x 3, 16 x 16 bits

A code u of b bits represents (u - (2^b - 1)/2) * step * scale[token]; 16 bits are a float16 without scale.
A tier is stored as bit planes: one for 1, 2, 4 and 8 bits, two for 3 = 2 + 1, 5 = 4 + 1 and 6 = 4 + 2, the wider
one first and with the high-order bits. A plane holds its part of all codes of the tier, low-order codes first.
"""

import math

import torch
from torch import Tensor

TILE = 1024  # tokens unpacked at a time: unpacked latents of full length never exist
VALUE_WIDTH = 48  # R_V


def latent_attention(
    query: Tensor,
    key: Tensor,
    key_scale: Tensor | None,
    value: Tensor,
    value_scale: Tensor | None,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float = 0.0,
    **_tiers: object,
) -> tuple[Tensor, Tensor]:
    """Shapes above; mask bool or additive, broadcastable. Returns o in the dtype of query and lse in float32."""
    batch, heads, queries, _ = query.shape
    tokens = key.shape[2]
    bias = None if mask is None else additive(mask).expand(batch, heads, queries, tokens)
    scaled = query.float() * scale
    top = scaled.new_full((batch, heads, queries, 1), -math.inf)  # largest logit so far
    total = torch.zeros_like(top)  # sum of exp(logit - top)
    output = scaled.new_zeros((batch, heads, queries, VALUE_WIDTH))  # sum of exp(logit - top) * value
    for begin in range(0, tokens, TILE):
        tile = slice(begin, begin + TILE)
        keys = unpack_key(key[:, :, tile])  # [B, J, t, R_K]
        logits = grouped_matmul(scaled, keys.transpose(-1, -2))  # [B, H, S, t]
        logits = logits * per_head(key_scale[:, :, tile], heads)
        logits = softcap * torch.tanh(logits / softcap)
        if bias is not None:
            logits = logits + bias[..., tile]
        new_top = torch.maximum(top, logits.amax(-1, keepdim=True))
        base = new_top.masked_fill(new_top == -math.inf, 0.0)  # all masked so far: weights are 0, not NaN
        weights = torch.exp(logits - base)
        shrink = torch.exp(top - base)
        total = total * shrink + weights.sum(-1, keepdim=True)
        values = unpack_value(value[:, :, tile], value_scale[:, :, tile])  # [B, J', t, R_V]
        output = output * shrink + grouped_matmul(weights, values)  # [B, H, S, R_V]
        top = new_top
    output = output / total.masked_fill(total == 0, 1.0)
    return output.to(query.dtype), (top + torch.log(total)).squeeze(-1)


def additive(mask: Tensor) -> Tensor:
    """Convert a mask to an additive one: bool (True = may attend) becomes 0 and -inf."""
    if mask.dtype != torch.bool:
        return mask.float()
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)


def grouped_matmul(rows: Tensor, latents: Tensor) -> Tensor:
    """[B,H,S,m] x [B,J,m,n] -> [B,H,S,n]: the H/J query heads of a latent head become extra queries."""
    b, h, s, m = rows.shape
    j, n = latents.shape[1], latents.shape[3]
    return torch.matmul(rows.reshape(b, j, h // j * s, m), latents).reshape(b, h, s, n)


def unpack_key(rows: Tensor) -> Tensor:
    """Bytes [B,J,t,bytes] -> latents without the token's scale, float32 [B,J,t,R]."""
    tiers = [
        (rows[..., 0:16].float() - 127.5) * 0.02,
        (codes4(rows[..., 16:32]).float() - 7.5) * 0.25,
    ]
    return torch.cat(tiers, -1)


def unpack_value(rows: Tensor, scale: Tensor) -> Tensor:
    """Bytes [B,J,t,bytes] -> latents, float32 [B,J,t,R]."""
    factor = scale.float().unsqueeze(-1)
    tiers = [
        (codes3(rows[..., 0:12]).float() - 3.5) * 0.5 * factor,
        float16_of(rows[..., 12:44]),
    ]
    return torch.cat(tiers, -1)


def codes1(rows: Tensor) -> Tensor:
    """Bytes [...,n] -> codes of 1 bits, uint8 [...,8*n], low-order ones first."""
    codes = [(rows >> shift) & 1 for shift in range(0, 8, 1)]
    return torch.stack(codes, -1).flatten(-2)


def codes2(rows: Tensor) -> Tensor:
    """Bytes [...,n] -> codes of 2 bits, uint8 [...,4*n], low-order ones first."""
    codes = [(rows >> shift) & 3 for shift in range(0, 8, 2)]
    return torch.stack(codes, -1).flatten(-2)


def codes3(rows: Tensor) -> Tensor:
    """Bytes [...,3*n] -> codes of 3 bits, uint8 [...,8*n]: a plane of 2 bits, then one of 1."""
    end = rows.shape[-1] // 3 * 2
    return codes2(rows[..., :end]) << 1 | codes1(rows[..., end:])


def codes4(rows: Tensor) -> Tensor:
    """Bytes [...,n] -> codes of 4 bits, uint8 [...,2*n], low-order ones first."""
    codes = [(rows >> shift) & 15 for shift in range(0, 8, 4)]
    return torch.stack(codes, -1).flatten(-2)


def float16_of(rows: Tensor) -> Tensor:
    """Bytes [...,2n] that hold float16 -> float32 [...,n]; copied, since a view must start at an even byte."""
    return rows.clone(memory_format=torch.contiguous_format).view(torch.float16).float()


def per_head(scale: Tensor, heads: int) -> Tensor:
    """Scales [B,J,t] -> float32 [B,H,1,t]: the H/J query heads of a latent head share one."""
    return scale.float().repeat_interleave(heads // scale.shape[1], 1).unsqueeze(2)
