"""Reference implementations of cache operations on one token, as plain and slow as possible."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fhopt.ops import algebra, packing
from fhopt.plan.site_plan import SidePlan, SitePlan


def naive_latent(x: Tensor, plan: SidePlan) -> Tensor:
    """Quantize and dequantize the latent of one token x [B,G,1,D]."""
    latent = algebra.encode(x, plan.encode)
    if not plan.tiers:
        return latent
    bits, widths, steps = algebra.bit_groups(plan)
    codes, scale = packing.pack_reference(latent, bits, widths, steps)
    return packing.unpack_reference(codes, scale, bits, widths, steps).to(x.dtype)


def naive_code(key: Tensor, value: Tensor, plan: SitePlan) -> tuple[Tensor, Tensor]:
    """Return one token's key and value as reconstructed from their latents."""
    if plan.is_shared:
        z_k = z_v = naive_latent(torch.cat([key, value], -1), plan.key)
    else:
        z_k, z_v = naive_latent(key, plan.key), naive_latent(value, plan.value)
    return algebra.decode(z_k, plan.key.decode), algebra.decode(z_v, plan.value.decode)


def naive_round(x: Tensor) -> Tensor:
    """Round each head of one token x [B,G,1,D] to a grid of 256 values around zero."""
    step = (x.float().abs().amax(-1, keepdim=True) / 127.5).half().float()
    codes = (x.float() / step + 128).floor().clamp(0, 255)  # adding first matters: the sum rounds, which decides ties
    return ((codes - 127.5) * step).to(x.dtype)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float) -> Tensor:
    """Attend in float64, one head at a time."""
    q, k, v = q.double(), k.double(), v.double()
    outputs = []
    for head in range(q.shape[1]):
        group = head * k.shape[1] // q.shape[1]
        logits = q[:, head] @ k[:, group].mT * scale
        logits = cap * torch.tanh(logits / cap) if cap else logits
        if mask is not None:
            logits = logits.masked_fill(~mask.expand(q.shape[0], q.shape[1], *logits.shape[1:])[:, head], -math.inf)
        outputs.append(logits.softmax(-1) @ v[:, head * v.shape[1] // q.shape[1]])
    return torch.stack(outputs, 1)
