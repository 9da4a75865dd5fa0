"""Attention masks: additive, causal, by length, by page list, split over parts of the keys.

Letters: B batch, H query heads, G kv heads, S queries, T keys, D head size, U units, N pages of a list.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Convert a mask to an additive one of `dtype`: bool (True = may attend) becomes 0 and -inf."""
    if mask is None or mask.dtype != torch.bool:
        return mask if mask is None else mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -math.inf)


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """Build a causal mask, bool [S,T]: query i sees key j if j <= i + T - S (the last query sees all keys)."""
    ones = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return ones.tril(keys - queries)


def within(lengths: Tensor | None, tokens: int, mask: Tensor | None) -> Tensor | None:
    """Restrict `mask` [B,H,S,T] to the first `lengths` (int64, [B] or scalar) of T = `tokens` tokens."""
    if lengths is None:
        return mask
    seen = torch.arange(tokens, device=lengths.device) < lengths.reshape(-1, 1, 1, 1)
    return seen if mask is None else restricted(mask, seen)


def listed(pages: Tensor | None, page_tokens: int, heads: int, tokens: int, mask: Tensor | None) -> Tensor | None:
    """Restrict `mask` [B,H,S,T] to the tokens of listed pages.

    pages, integers [B,U,N]: page p is the tokens from p * page_tokens on, -1 is no page; query head h uses list h*U//H.
    Raises ValueError for empty pages, or if U does not divide H.
    """
    if pages is None:
        return mask
    if page_tokens < 1 or heads % pages.shape[1]:
        raise ValueError(
            f"pages {tuple(pages.shape)} of {page_tokens} tokens for {heads} query heads; expected [B, U, N], U a "
            "divisor of the heads, and pages of at least one token."
        )
    count = -(-tokens // page_tokens)
    places = torch.where(pages < 0, count, pages).long()  # the last entry takes -1
    selected = torch.zeros((*pages.shape[:2], count + 1), dtype=torch.bool, device=pages.device).scatter_(
        2, places, True
    )
    seen = selected[..., :count].repeat_interleave(page_tokens, 2)[..., :tokens]
    seen = seen.repeat_interleave(heads // pages.shape[1], 1).unsqueeze(2)  # [B, H, 1, T]
    return seen if mask is None else restricted(mask, seen)


def total_mask(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """Combine a mask and the flag `is_causal` into one mask for q [B,H,S,D] on k [B,G,T,D]; None: no mask.

    Causal means j <= i, as in `F.scaled_dot_product_attention`.
    """
    if not is_causal:
        return mask
    triangle = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    return triangle if mask is None else restricted(mask, triangle)


def split_mask(
    query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, sinks: int, recent: int
) -> tuple[Tensor, Tensor]:
    """Split a mask in two: for exact keys, and for keys attended through latents.

    Query i is at key position p = i + T - S. Exact: the first `sinks` keys and those with |p - j| < recent.
    """
    queries, keys = query.shape[2], key.shape[2]
    position = torch.arange(queries, device=query.device).unsqueeze(1) + (keys - queries)
    column = torch.arange(keys, device=query.device).unsqueeze(0)
    near = (column < sinks) | ((position - column).abs() < recent)  # [S, T]
    allowed = total_mask(query, key, mask, is_causal)
    return (near, ~near) if allowed is None else (restricted(allowed, near), restricted(allowed, ~near))


def restricted(mask: Tensor, allowed: Tensor) -> Tensor:
    """Restrict a bool or additive mask to `allowed` (bool)."""
    return mask & allowed if mask.dtype == torch.bool else mask.masked_fill(~allowed, -math.inf)


def converted(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast an additive mask. Finite values and their gradients survive: only -inf makes rows of NaN."""
    limit = torch.finfo(dtype).max
    if torch.finfo(mask.dtype).max <= limit:
        return mask.to(dtype)
    beyond = (mask.clamp(-limit, limit) - mask).detach()
    return torch.where(mask.isinf(), mask, mask + beyond).to(dtype)


def open_rows(mask: Tensor) -> Tensor:
    """Return which queries have at least one key, bool [...,S,1], for a bool or additive mask [...,S,T]."""
    allowed = mask if mask.dtype == torch.bool else mask > -math.inf
    return allowed.any(-1, keepdim=True)


def nan_without_keys(result: Tensor, mask: Tensor) -> Tensor:
    """Multiply rows [B,H,S,E] of queries without keys by NaN, as a softmax of -inf gives."""
    return result * torch.where(open_rows(mask), 1.0, math.nan).to(result.dtype)


def nan_of_values(result: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    """Set rows [B,H,S,E] of queries without keys to NaN, with a gradient only to values [B,G,T,E].

    This matches models that overwrite scores: no gradient flows into queries and keys of such a row.
    """
    seen = open_rows(mask)
    poison = torch.where(seen, 0.0, math.nan).to(result.dtype)
    mean = value.mean(2, keepdim=True).repeat_interleave(result.shape[1] // value.shape[1], 1)
    return torch.where(seen, result, poison * mean)


def visible(bias: Tensor, allowed: Tensor) -> Tensor:
    """Restrict a bias to visible keys: allowed (bool), and with a bias above those of all other keys of the row.

    The scores of other keys are overwritten by finite values, which win where every allowed key has a lower bias.
    """
    overwritten = bias.masked_fill(allowed, -math.inf).amax(-1, keepdim=True)
    return restricted(bias, allowed & (bias > overwritten))


def with_levels(bias: Tensor, seen: Tensor) -> Tensor:
    """Return a bias as restricted by `visible` (`seen`), except in rows without visible keys: it less its maximum.

    In such rows finite values overwrite the scores and determine the weights.
    """
    levels = bias - bias.amax(-1, keepdim=True)  # -1e9 in float32 would swamp the logarithm of a sum
    return torch.where(open_rows(seen), seen, levels)


def seeing(query: Tensor, seen: Tensor) -> Tensor:
    """Zero queries [B,H,S,D] without keys in a mask, so that their scores are the bias."""
    return query * open_rows(seen).to(query.dtype)
