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
    numbers = operands.numbers
    parts: list[tuple[Tensor, Tensor]] = []
    if operands.key_side.rounded:
        parts.append(with_means(operands, *_window_part(operands)))
    if key.shape[2] and prefill_attention.is_prefill(query, key, value, masks.exact):
        options = numbers | {"causal": operands.causal}
        parts.append(torch.ops.fhopt.open_attention(query, key, value, masks.exact, **options))
    elif key.shape[2]:
        options = algebra.uncoded_options() | numbers
        parts.append(latent_attention.latent_attention(query, key, None, value, None, masks.exact, **options))
    if operands.sinks is not None:
        parts.append(no_token(query, value, operands.sinks))
    return parts


def no_token(query: Tensor, value: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a logit, broadcastable to [B,H,S], gives that takes weight and has no value [B,G,_,E]."""
    blank = query.new_zeros((*query.shape[:3], value.shape[3]))
    return blank, sinks.to(torch.promote_types(query.dtype, torch.float32)).expand(query.shape[:3])


def _window_part(operands: AttentionOperands) -> tuple[Tensor, Tensor]:
    """Attend to the window in 8 bits, without the means that it is differences from."""
    query, mask, (keys, values) = operands.query, operands.masks.window, (operands.key_side, operands.value_side)
    assert keys.window is not None and values.window is not None
    options = algebra.group_options(_window_groups(query), _window_groups(operands.value)) | operands.numbers
    rows = *keys.window, None, *values.window, None, mask, None
    rebuilt = prefill_attention.attend_on_cpu("rebuilt_attention", query, *rows, **options)
    if rebuilt is not None:
        return rebuilt
    return latent_attention.latent_attention(query, *keys.window, *values.window, mask, **options)


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
