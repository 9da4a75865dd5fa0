"""Attention to tokens without latents: attention sinks, residual window (exact or 8-bit) and new tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fhopt.attention.cache_view import AnyLatents
from fhopt.attention.operands import AttentionOperands, with_means
from fhopt.ops import algebra, latent_attention, prefill_attention
from fhopt.ops import masks as ops_masks


def exact_parts(operands: AttentionOperands) -> list[tuple[Tensor, Tensor]]:
    """Attend to the 8-bit window, to exact tokens and to sink logits, as far as present.

    Returns a pair (output [B,H,S,E], lse [B,H,S]) for each.
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
    """Return output and lse of a sink logit, broadcastable to [B,H,S]. value [B,G,_,E]: gives the shape."""
    blank = query.new_zeros((*query.shape[:3], value.shape[3]))
    return blank, sinks.to(torch.promote_types(query.dtype, torch.float32)).expand(query.shape[:3])


def _window_part(operands: AttentionOperands) -> tuple[Tensor, Tensor]:
    """Attend to the 8-bit window, without adding the means back."""
    query, mask, (keys, values) = operands.query, operands.masks.window, (operands.key_side, operands.value_side)
    assert keys.window is not None and values.window is not None
    options = algebra.group_options(_window_groups(query), _window_groups(operands.value)) | operands.numbers
    rows = *keys.window, None, *values.window, None, mask, None
    rebuilt = prefill_attention.attend_on_cpu("rebuilt_attention", query, *rows, **options)
    if rebuilt is not None:
        return rebuilt
    return latent_attention.latent_attention(query, *keys.window, *values.window, mask, **options)


def joint_lse(parts: list[tuple[Tensor, Tensor]]) -> Tensor | None:
    """Return the joint log-sum-exp of all parts [B,H,S]; None without parts."""
    if len(parts) < 2:
        return parts[0][1] if parts else None
    return torch.stack([lse for _, lse in parts], -1).logsumexp(-1)


def split_off(mask: Tensor | None, start: int, count: int) -> tuple[Tensor | None, Tensor | None]:
    """Split a mask over keys: without the `count` keys from `start` on, and only these."""
    if mask is None or count == 0:
        return mask, None
    end = start + count
    return torch.cat([mask[..., :start], mask[..., end:]], -1), mask[..., start:end]


def _window_groups(like: Tensor) -> algebra.BitGroups:
    """Return the bit group of an 8-bit window (`ops.packing.round_rows`) with the head size of `like`."""
    return algebra.BitGroups([8], [like.shape[-1]], [1.0])


def attend_open_tokens(
    query: Tensor, key: Tensor, value: Tensor, latents: AnyLatents, *, scale: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Attend causally to sinks, window and new tokens, with the newest S tokens as queries.

    query [B,H,S,D]; key, value: of exact tokens. Returns (output [B,H,S,E], lse [B,H,S]).
    """
    keys, values = latents.key.open(key, latents.sinks), latents.value.open(value, latents.sinks)
    mask = ops_masks.causal_mask(query.shape[2], keys.shape[2], query.device)
    options: Any = dict(**algebra.uncoded_options(), scale=scale, softcap=softcap)
    return latent_attention.latent_attention(query, keys, None, values, None, mask, **options)
