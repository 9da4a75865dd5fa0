"""Attention to tokens that are not latents: attention sinks, residual window (exact or in 8 bits) and new tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fhopt.attention.cache_view import AnyLatents
from fhopt.attention.operands import AttentionOperands, with_means
from fhopt.ops import algebra, latent_attention, prefill_attention
from fhopt.ops import masks as ops_masks


def exact_parts(operands: AttentionOperands) -> list[tuple[Tensor, Tensor]]:
    """Attend to the window in 8 bits, to exact tokens and to further logits, each where there are any.

    Returns (output [B,H,S,E], lse [B,H,S]) of each.
    """
    query, key, value, masks = operands.query, operands.key, operands.value, operands.masks
    key_window, value_window = operands.key_side.window, operands.value_side.window
    numbers = operands.numbers
    parts: list[tuple[Tensor, Tensor]] = []
    if key_window is not None and value_window is not None:
        options = algebra.group_options(_window_groups(query), _window_groups(value)) | numbers
        rounded = latent_attention.latent_attention(query, *key_window, *value_window, masks.window, **options)
        parts.append(with_means(operands, *rounded))
    if key.shape[2] and prefill_attention.is_gpu_prefill(query, key, value, masks.exact):
        parts.append(torch.ops.fhopt.open_attention(query, key, value, masks.exact, causal=operands.causal, **numbers))
    elif key.shape[2]:
        options = algebra.uncoded_options()
        parts.append(
            latent_attention.latent_attention(query, key, None, value, None, masks.exact, **options, **numbers)
        )
    if operands.sinks is not None:
        blank = query.new_zeros((*query.shape[:3], value.shape[3]))
        lse = operands.sinks.to(torch.promote_types(query.dtype, torch.float32)).expand(query.shape[:3])
        parts.append((blank, lse))
    return parts


def joint_lse(parts: list[tuple[Tensor, Tensor]]) -> Tensor | None:
    """Return the log of the weight of all parts [B,H,S]; None where there is no part."""
    if len(parts) < 2:
        return parts[0][1] if parts else None
    return torch.stack([lse for _, lse in parts], -1).logsumexp(-1)


def split_off(mask: Tensor | None, start: int, count: int) -> tuple[Tensor | None, Tensor | None]:
    """Split a mask over keys in two: without the `count` keys from `start` on, and of these alone."""
    if mask is None or count == 0:
        return mask, None
    end = start + count
    return torch.cat([mask[..., :start], mask[..., end:]], -1), mask[..., start:end]


def _window_groups(like: Tensor) -> algebra.BitGroups:
    """Return the bit group of a window in 8 bits (`ops.packing.round_rows`) of tokens as wide as `like`."""
    return algebra.BitGroups([8], [like.shape[-1]], [1.0])


def attend_open_tokens(
    query: Tensor, key: Tensor, value: Tensor, latents: AnyLatents, *, scale: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Attend to sinks, window and new tokens, of which the newest S queries see those before them.

    query [B,H,S,D]; key, value: the exact ones. Returns (output [B,H,S,E], lse [B,H,S]).
    """
    keys, values = latents.key.open(key, latents.sinks), latents.value.open(value, latents.sinks)
    mask = ops_masks.causal_mask(query.shape[2], keys.shape[2], query.device)
    options: Any = dict(**algebra.uncoded_options(), scale=scale, softcap=softcap)
    return latent_attention.latent_attention(query, keys, None, values, None, mask, **options)
