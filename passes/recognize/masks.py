"""The kind of a mask, determined from its value, because the same mask has many spellings.

none | causal | sliding | chunked | block | causal block | padding | alibi | relative | additive | bool

A graph of few tokens cannot show a longer window: if the layer's KV-cache type is known, it decides ("sliding",
"chunked").
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from fhopt.plan.cache_size import CacheLayer
from fhopt.plan.site import AttentionSite

ENOUGH = 256  # max tokens for telling groups from other patterns
MIN_BIAS = -1e4  # additive values below this mean "may not attend"
PATTERNS = ("none", "causal", "sliding", "causal block", "bool")  # kinds that may hide a longer window in a short graph


def windowed(site: AttentionSite, layers: Iterable[CacheLayer]) -> AttentionSite:
    """Return a site with the mask and window of its layer's KV cache, if known.

    A bias of another kind keeps its name and only gets the window.
    """
    layer = next((layer for layer in layers if layer.window and layer.has(site.name)), None)
    if layer is None or site.kind != "self":
        return site
    return replace(site, mask=layer.mask if site.mask in PATTERNS else site.mask, window=layer.window)


def mask_kind(mask: Tensor) -> tuple[str, int]:
    """Return (kind, window) of a mask that broadcasts to [B, H, S, T], bool (True may attend) or additive.

    window: number of tokens that a sliding mask lets a query attend to; 0 without such a limit.
    """
    allowed = mask if mask.dtype == torch.bool else mask > MIN_BIAS
    if mask.dtype != torch.bool and bool((mask[allowed] != 0).any()):
        return _bias_kind(mask.double(), allowed), 0
    return _pattern_kind(allowed)


def _pattern_kind(allowed: Tensor) -> tuple[str, int]:
    queries, keys = allowed.shape[-2:]
    if bool(allowed.all()):
        return "none", 0
    if queries == 1 or keys == 1 or not bool(allowed.any()):
        return "bool", 0
    past = (
        torch.arange(queries, device=allowed.device)[:, None]
        + keys
        - queries
        - torch.arange(keys, device=allowed.device)
    )  # age of the key, [S, T]
    causal = past >= 0
    if bool((allowed == causal).all()):
        return "causal", 0
    if not bool((allowed & ~causal).any()):
        window = int(past[allowed.expand(*allowed.shape[:-2], queries, keys)[(0,) * (allowed.dim() - 2)]].max()) + 1
        if bool((allowed == (causal & (past < window))).all()):
            return "sliding", window
    if bool((allowed == allowed[..., :1, :]).all()):
        return "padding", 0
    if queries == keys and _is_equivalence((allowed | allowed.mT)[..., -ENOUGH:, -ENOUGH:]):
        together = allowed | allowed.mT
        if bool((allowed == together).all()):
            return "block", 0
        if bool((allowed == (together & causal)).all()):
            return "causal block", 0
    return "bool", 0


def _is_equivalence(related: Tensor) -> bool:
    """Return whether the relation is reflexive and transitive: a token attends to exactly the tokens of its group."""
    numbers = related.double()
    reflexive = bool(related.diagonal(dim1=-2, dim2=-1).all())
    return reflexive and bool(((numbers @ numbers > 0) == related).all())


def _bias_kind(bias: Tensor, allowed: Tensor) -> str:
    """Return "alibi" for a bias linear in the key's position, "relative" for one of the distance, else "additive"."""
    queries, keys = bias.shape[-2:]
    scale = bias[allowed].abs().max().clamp_min(1e-30)
    steps = bias.diff(dim=-1)
    both = allowed[..., 1:] & allowed[..., :-1]
    if bool(both.any()):
        slope = steps.masked_fill(~both, -torch.inf).amax((-1, -2), keepdim=True)
        if bool(((steps - slope)[both].abs() <= 1e-5 * scale).all()):
            return "alibi"
    if queries > 1 and keys > 1:
        same = allowed[..., 1:, 1:] & allowed[..., :-1, :-1]
        drift = bias[..., 1:, 1:] - bias[..., :-1, :-1]
        if bool(same.any()) and bool((drift[same].abs() <= 1e-5 * scale).all()):
            return "relative"
    return "additive"
