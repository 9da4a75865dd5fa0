"""What caches do to a token, written as slowly and plainly as possible."""

from __future__ import annotations

import torch
from torch import Tensor

from fhopt import ops
from fhopt.spec import SidePlan, SitePlan


def naive_latent(x: Tensor, plan: SidePlan) -> Tensor:
    """What coding leaves of the latent of one token x [B,G,1,D]."""
    latent = ops.encode(x, plan.encode)
    if not plan.tiers:
        return latent
    bits, widths, steps = ops.tier_arguments(plan)
    codes, scale = ops.pack_reference(latent, bits, widths, steps)
    return ops.unpack_reference(codes, scale, bits, widths, steps).to(x.dtype)


def naive_code(key: Tensor, value: Tensor, plan: SitePlan) -> tuple[Tensor, Tensor]:
    """One token's key and value as their latents keep them."""
    if plan.is_shared:
        z_k = z_v = naive_latent(torch.cat([key, value], -1), plan.key)
    else:
        z_k, z_v = naive_latent(key, plan.key), naive_latent(value, plan.value)
    return ops.decode(z_k, plan.key.decode), ops.decode(z_v, plan.value.decode)


def naive_round(x: Tensor) -> Tensor:
    """Each head of one token x [B,G,1,D] on a grid of 256 values around zero."""
    step = (x.float().abs().amax(-1, keepdim=True) / 127.5).half().float()
    codes = (x.float() / step + 128).floor().clamp(0, 255)  # the sum rounds: at an edge it decides
    return ((codes - 127.5) * step).to(x.dtype)
