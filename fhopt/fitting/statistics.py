"""Statistics from calibration: second moments of keys and values, and metrics of their errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fhopt.plan.segment_rotation import SegmentRotation
from fhopt.plan.site import AttentionSite

MIX_LIMIT = 1024  # max width (heads x channels) that one basis mixes
PLAIN_LIMIT = 2048  # for keys without RoPE, where the layout `input` may halve the cache without loss


def latent_groups(site: AttentionSite) -> int:
    """Return J: the fewest latent heads that keep the mixed width within the limit."""
    dim, limit = max(site.key_dim, site.value_dim), PLAIN_LIMIT if site.rope is None else MIX_LIMIT
    return next(
        j
        for j in range(1, site.kv_heads + 1)
        if (site.kv_heads % j == 0 and site.kv_heads // j * dim <= limit) or j == site.kv_heads
    )


def concatenate_heads(x: Tensor, groups: int) -> Tensor:
    """Concatenate the n = G/J heads of a latent head, as `ops.encode` expects: [B,G,T,D] -> [J, B, T, n*D]."""
    b, g, t, d = x.shape
    return x.reshape(b, groups, g // groups, t, d).permute(1, 0, 3, 2, 4).flatten(3)


def differences(
    site: AttentionSite, k: Tensor, v: Tensor, sinks: int, mean_tokens: int, later: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Subtract the means from keys and values [B,G,T,D], as a cache with `mean_tokens` encodes them.

    Each sequence has its own means, over the first `mean_tokens` tokens after `sinks`. Keys with a softcap and cross
    attention have none. later: as in `turned`, by how many positions the tokens come later than those of the means.
    """
    seen = k if later is None else turned(site, k, later)
    if not mean_tokens or site.kind != "self":
        return seen, v
    first = slice(sinks, sinks + mean_tokens)
    k_mean, v_mean = (x[:, :, first].mean(2, keepdim=True) for x in (k, v))
    return seen if site.softcap else seen - k_mean, v - v_mean


def segment_of(site: AttentionSite, segment: int, sliding: Mapping[str, int]) -> int:
    """Return the segment length at a site; 0 if keys are encoded at their own positions.

    segment: that of a plan. sliding: sliding-window tokens of each site's layer by site name. A sliding window gets no
    segments, because its tokens are never far apart.
    """
    return 0 if not site.rotates or site.slides or sliding.get(site.name) else segment


def relative_to_segments(segment: int, tokens: int, sinks: int = 0) -> Tensor | None:
    """Return the position offsets, float64 [1,T], 0 or less, that make keys relative to segments.

    sinks: number of tokens before the first segment. None if no token moves.
    """
    if not segment or tokens - sinks <= segment:
        return None
    return -((torch.arange(tokens) - sinks).clamp(min=0) // segment * segment).double().unsqueeze(0)


def placed(segment: int, span: int, tokens: int, first: int | None = None, batch: int = 1) -> Tensor | None:
    """Return the position offsets under which keys are counted: float64 [1,T] or [B,1]; None: at their own positions.

    segment: keys are relative to segments of this many tokens, with offsets of 0 or less; a segment longer than the
    sequence counts as a span. span: offsets are below this. Without `first` each token has its own offset (`spread`);
    with it all tokens of a sequence share one, the `first`-th and later offsets for the sequences of a batch.
    """
    if segment and tokens >= segment:
        return relative_to_segments(segment, tokens)
    span = max(0, segment - tokens) if segment else span
    if not span:
        return None
    return spread(tokens, 0, span).unsqueeze(0) if first is None else spread(batch, first, span).unsqueeze(1)


def turned(site: AttentionSite, x: Tensor, later: Tensor) -> Tensor:
    """Rotate keys or their gradients [B,G,T,D] to `later` positions on, by RoPE; later: float64 [B,1] or [1,T].

    Unchanged for keys without RoPE. Attention depends only on position differences, so rotated keys and gradients are
    those of the same tokens later in a sequence.
    """
    if not site.rotates or site.rope is None:
        return x
    return SegmentRotation.on(site.rope, 1, x.device).rotate(x, later.to(x.device).unsqueeze(1))


def spread(count: int, first: int, span: int) -> Tensor:
    """Return offsets `first` to `first + count` of a low-discrepancy sequence in [0, span), float64.

    They are cubes of uniform points: half of them lie in the first eighth, because plans also serve short contexts, and
    every context has a beginning. The points are the additive recurrence of the golden ratio (Niederreiter 1992).
    """
    golden = (5**0.5 - 1) / 2
    return span * ((torch.arange(first, first + count, dtype=torch.float64) + 1) * golden).frac() ** 3


# --------------------------------------------------------------------------------------------------- moments


def empty_statistics(
    sites: Iterable[AttentionSite], segment: int = 0, sliding: Mapping[str, int] | None = None
) -> dict[str, SiteStatistics]:
    """Return zero statistics by site name. segment, sliding: as in `segment_of`."""
    out = {}
    for site in sites:
        groups = latent_groups(site)
        sides = []
        for dim in (site.key_dim, site.value_dim):
            width = site.kv_heads // groups * dim
            zero = torch.zeros(groups, width, width, dtype=torch.float64)
            sides.append(SideStatistics(groups, zero, zero.clone()))
        out[site.name] = SiteStatistics(site, sides[0], sides[1], segment=segment_of(site, segment, sliding or {}))
        if site.rope is None and groups == 1:
            cross = torch.zeros(site.kv_heads * site.key_dim, site.kv_heads * site.value_dim, dtype=torch.float64)
            out[site.name].cross, out[site.name].cross_metric = cross, cross.clone()
    return out


# --------------------------------------------------------------------------------------------------- statistics


@dataclass
class SideStatistics:
    """Second moments of one side (keys or values) of one site, float64, summed over tokens.

    `moment` [J, c, c], c = n*D: x x^T of the n = G/J concatenated kv heads of a latent head, as a cache would store
    them (keys after norm and RoPE). `metric` [J, c, c]: g g^T, where g is the gradient of a random score with respect
    to x, so `metric / count` is the Fisher information: the cost of a unit of error.
    """

    groups: int  # J
    moment: Tensor
    metric: Tensor
    count: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))


@dataclass
class SiteStatistics:
    """Second moments of the keys and values of one site.

    `cross` and `cross_metric` [G*D, G*E] are the sums of k v^T and of the product of their gradients, collected if keys
    and values may be maps of one narrower input (no RoPE), else None. segment: keys are relative to segments of this
    many tokens (fhopt/plan/segment_rotation.py); 0: at their own positions.
    """

    site: AttentionSite
    key: SideStatistics
    value: SideStatistics
    cross: Tensor | None = None
    cross_metric: Tensor | None = None
    segment: int = 0
