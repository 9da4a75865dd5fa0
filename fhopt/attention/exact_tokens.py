"""Attention to the tokens that are kept as they came: attention sinks, residual window, new tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fhopt.attention.cache_view import AnyLatents
from fhopt.ops import algebra, latent_attention, prefill_attention
from fhopt.ops import masks as ops_masks


def exact_parts(
    query: Tensor, key: Tensor, value: Tensor, window: tuple[Tensor | None, ...], masks: tuple[Tensor | None, ...],
    sinks: Tensor | None, causal: bool, numbers: dict[str, float],
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """(output, lse) of the window, of the open tokens and of further logits, each where there are any."""
    near, inside = masks
    parts: list[tuple[Tensor, Tensor]] = []
    keys, key_scale, values, value_scale = window
    if keys is not None and values is not None:
        options = _window_options(query, value) | numbers
        parts.append(latent_attention.latent_attention(query, keys, key_scale, values, value_scale, inside, **options))
    if key.shape[2] and prefill_attention.serves(query, key, value, near):
        parts.append(torch.ops.fhopt.open_attention(query, key, value, near, causal=causal, **numbers))
    elif key.shape[2]:
        options = algebra.latent_options(None, None)
        parts.append(latent_attention.latent_attention(query, key, None, value, None, near, **options, **numbers))
    if sinks is not None:
        blank = query.new_zeros((*query.shape[:3], value.shape[3]))
        lse = sinks.to(torch.promote_types(query.dtype, torch.float32)).expand(query.shape[:3])
        parts.append((blank, lse))
    return parts


def joint_lse(parts: list[tuple[Tensor, Tensor]]) -> Tensor | None:
    """Log of the weight of all parts [B,H,S]; None where there is none."""
    if len(parts) < 2:
        return parts[0][1] if parts else None
    return torch.stack([lse for _, lse in parts], -1).logsumexp(-1)


def split_off(mask: Tensor | None, start: int, count: int) -> tuple[Tensor | None, Tensor | None]:
    """A mask over keys without `count` of them from `start` on, and that over these."""
    if mask is None or count == 0:
        return mask, None
    end = start + count
    return torch.cat([mask[..., :start], mask[..., end:]], -1), mask[..., start:end]


def _window_options(query: Tensor, value: Tensor) -> dict[str, Any]:
    """Keyword arguments of `fhopt::latent_attention` for a window of 8 bits (`ops.round_rows`)."""
    widths, steps = [query.shape[-1]], [1.0]
    key: dict[str, Any] = dict(key_bits=[8], key_widths=widths, key_steps=steps)
    return key | dict(value_bits=[8], value_widths=[value.shape[-1]], value_steps=steps)


def open_part(
    query: Tensor, key: Tensor, value: Tensor, latents: AnyLatents, *, scale: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(output [B,H,S,E], lse [B,H,S]) of the open tokens, of which the newest S queries see those before them."""
    near = latents.key.open(key, latents.sinks), latents.value.open(value, latents.sinks)
    mask = ops_masks.causal_mask(query.shape[2], near[0].shape[2], query.device)
    options: Any = dict(**algebra.latent_options(None, None), scale=scale, softcap=softcap)
    return latent_attention.latent_attention(query, near[0], None, near[1], None, mask, **options)
