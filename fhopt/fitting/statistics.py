"""Statistics that calibration collects: second moments of keys and values, metrics of their errors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

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


def turned(site: AttentionSite, x: Tensor, later: Tensor) -> Tensor:
    """Return keys, or their gradients, [B,G,T,D] as they would be `later` positions on: [B,1] or [1,T], float64.

    The same where keys do not turn. Attention depends on differences of positions alone: turned like this, keys and
    gradients are those of the same tokens further on in a sequence.
    """
    if site.kind != "self" or site.rope is None or site.rope.positions != "sequence":
        return x
    real, imaginary = torch.tensor(site.rope.pairs, device=x.device).unbind(1)
    angles = torch.tensor(site.rope.angles, dtype=torch.float64)
    phase = (later.unsqueeze(-1) * angles).unsqueeze(1)  # [B or 1, 1, T or 1, F]
    cos, sin = phase.cos().to(x), phase.sin().to(x)
    out, a, b = x.clone(), x[..., real], x[..., imaginary]
    out[..., real], out[..., imaginary] = a * cos - b * sin, b * cos + a * sin
    return out


def spread(count: int, first: int, span: int) -> Tensor:
    """Return `count` positions of [0, span), float64, from the `first`-th of all on, well spread whatever their count.

    Cubes of evenly spread numbers: half of them lie in the first eighth, since a plan serves short contexts as well,
    and every context has a beginning. Source of the numbers: the additive recurrence of the golden ratio (Niederreiter
    1992).
    """
    golden = (5**0.5 - 1) / 2
    return span * ((torch.arange(first, first + count, dtype=torch.float64) + 1) * golden).frac() ** 3


# --------------------------------------------------------------------------------------------------- moments


def empty_statistics(sites: Iterable[AttentionSite]) -> dict[str, SiteStatistics]:
    """Return statistics with nothing collected yet, by site name."""
    out = {}
    for site in sites:
        groups = latent_groups(site)
        sides = []
        for dim in (site.key_dim, site.value_dim):
            width = site.kv_heads // groups * dim
            zero = torch.zeros(groups, width, width, dtype=torch.float64)
            sides.append(SideStatistics(groups, zero, zero.clone()))
        out[site.name] = SiteStatistics(site, sides[0], sides[1])
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
    values may be maps of one narrower input (no rotation), else None.
    """

    site: AttentionSite
    key: SideStatistics
    value: SideStatistics
    cross: Tensor | None = None
    cross_metric: Tensor | None = None
