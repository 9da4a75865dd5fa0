"""Statistics that calibration collects: second moments of keys and values, metrics of their errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fhopt.plan.segment_rotation import SegmentRotation
from fhopt.plan.site import AttentionSite

MIX_LIMIT = 1024  # widest real space (heads x channels) that one basis mixes
PLAIN_LIMIT = 2048  # for keys that do not rotate, where the layout `input` may halve the cache without loss


def latent_groups(site: AttentionSite) -> int:
    """Return J: as few latent heads as keep the mixed space within the limit."""
    dim, limit = max(site.key_dim, site.value_dim), PLAIN_LIMIT if site.rope is None else MIX_LIMIT
    return next(
        j
        for j in range(1, site.kv_heads + 1)
        if (site.kv_heads % j == 0 and site.kv_heads // j * dim <= limit) or j == site.kv_heads
    )


def joined(x: Tensor, groups: int) -> Tensor:
    """Join the n = G/J heads of a latent head side by side, as `ops.encode` reads them: [B,G,T,D] -> [J, B, T, n*D]."""
    b, g, t, d = x.shape
    return x.reshape(b, groups, g // groups, t, d).permute(1, 0, 3, 2, 4).flatten(3)


def differences(
    site: AttentionSite, k: Tensor, v: Tensor, sinks: int, mean_tokens: int, later: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return keys and values [B,G,T,D] less their means, as a cache with `mean_tokens` encodes them.

    The means are of the first `mean_tokens` tokens behind `sinks`, one for each sequence; keys whose logits are capped,
    and what is read of an encoder, have none. later: as of `turned`, by how many positions the tokens stand later than
    those of the means.
    """
    seen = k if later is None else turned(site, k, later)
    if not mean_tokens or site.kind != "self":
        return seen, v
    first = slice(sinks, sinks + mean_tokens)
    k_mean, v_mean = (x[:, :, first].mean(2, keepdim=True) for x in (k, v))
    return seen if site.softcap else seen - k_mean, v - v_mean


def segment_of(site: AttentionSite, segment: int, sliding: Mapping[str, int]) -> int:
    """Return the tokens of a segment at a site, 0 where keys are encoded as they are.

    segment: that of a plan. sliding: tokens of the sliding window of a site's layer by the site's name, where it has
    one: its tokens are dropped, and never far apart.
    """
    return 0 if not site.rotates or site.slides or sliding.get(site.name) else segment


def relative_to_segments(segment: int, tokens: int, sinks: int = 0) -> Tensor | None:
    """Return by how many positions later keys count that are relative to segments: float64 [1,T], 0 or less.

    sinks: so many tokens stand before the first segment. None: no token has another position.
    """
    if not segment or tokens - sinks <= segment:
        return None
    return -((torch.arange(tokens) - sinks).clamp(min=0) // segment * segment).double().unsqueeze(0)


def placed(segment: int, span: int, tokens: int, first: int | None = None, batch: int = 1) -> Tensor | None:
    """Return by how many positions later keys count than they stand: float64 [1,T] or [B,1]; None: as they are.

    segment: they are relative to segments of so many tokens, and stand earlier; of a longer one than there are tokens
    they count as anywhere in it. Otherwise they count as up to `span` positions later: each as another number
    (`spread`), or all of a sequence alike, as numbers from `first` on for the sequences of a batch.
    """
    if segment and tokens >= segment:
        return relative_to_segments(segment, tokens)
    span = max(0, segment - tokens) if segment else span
    if not span:
        return None
    return spread(tokens, 0, span).unsqueeze(0) if first is None else spread(batch, first, span).unsqueeze(1)


def turned(site: AttentionSite, x: Tensor, later: Tensor) -> Tensor:
    """Return keys, or their gradients, [B,G,T,D] as they would be `later` positions on: [B,1] or [1,T], float64.

    The same where keys do not turn. Attention depends on differences of positions alone: turned like this, keys and
    gradients are those of the same tokens further on in a sequence.
    """
    if not site.rotates or site.rope is None:
        return x
    return SegmentRotation.on(site.rope, 1, x.device).rotate(x, later.to(x.device).unsqueeze(1))


def spread(count: int, first: int, span: int) -> Tensor:
    """Return `count` positions of [0, span), float64, from the `first`-th of all on, well spread whatever their count.

    Cubes of evenly spread numbers: half of them lie in the first eighth, since a plan serves short contexts as well,
    and every context has a beginning. Source of the numbers: the additive recurrence of the golden ratio (Niederreiter
    1992).
    """
    golden = (5**0.5 - 1) / 2
    return span * ((torch.arange(first, first + count, dtype=torch.float64) + 1) * golden).frac() ** 3


# --------------------------------------------------------------------------------------------------- moments


def empty_statistics(
    sites: Iterable[AttentionSite], segment: int = 0, sliding: Mapping[str, int] | None = None
) -> dict[str, SiteStatistics]:
    """Return statistics with nothing collected yet, by site name. segment, sliding: as of `segment_of`."""
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
    """Streamed second moments of one side (keys or values) of one site, float64, summed over tokens.

    `moment` [J, c, c], c = n*D: x x^T of the n = G/J kv heads of a latent head, side by side, as a cache would hold
    them (keys with norm and rotation). `metric` [J, c, c]: g g^T, where g is the gradient of a sampled label's
    log-likelihood with respect to x, so `metric / count` is the Fisher information: what a unit of error costs.
    """

    groups: int  # J
    moment: Tensor
    metric: Tensor
    count: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))


@dataclass
class SiteStatistics:
    """Second moments of the keys and values of one site.

    `cross` and `cross_metric` [G*D, G*E] are the sums of k v^T and of their gradients' product, kept where keys and
    values may be maps of one narrower input (no rotation), else None. segment: keys are relative to segments of so many
    tokens (fhopt/plan/segment_rotation.py); 0: as they are.
    """

    site: AttentionSite
    key: SideStatistics
    value: SideStatistics
    cross: Tensor | None = None
    cross_metric: Tensor | None = None
    segment: int = 0
