"""Bases from second moments: optimal transform coding in the metric of the KL.

Per block of channels that may mix, with C the moment and F the metric per token:

    encode = U^T F^{1/2}, decode = F^{-1/2} U,  where  F^{1/2} C F^{1/2} = U diag(lambda) U^T

In these coordinates an error costs the same in every direction. lambda_c / 2 is the cost of dropping channel c, in
nats/token, if errors of tokens are independent. The layout decides which channels may mix (J latent heads over G kv
heads):

| layout | J | mixes |
|---|---|---|
| `band` | as few as fit | all channels of the heads of a latent head |
| `freq` | as few as fit | each rotary frequency across heads, as complex numbers; all else (2-D rotations too) freely |
| `head` | G | all channels of one head |
| `identity` | G | nothing: channels are scaled and ordered |
| `input` | 1 | keys and values of all heads together, in the subspace that they span |

Keys are encoded after RoPE, so every basis is exact at full width, rotated or not. RoPE affects only which basis is
*efficient*: a `band` basis is fitted to keys at any position up to the plan's context length. The average of R(t) C
R(t)^T over positions t has a closed form. It preserves products of channels with the same frequency, and attenuates the
others the more their phases drift apart within the context. Fast frequencies thus become separate complex blocks
(TransMLA's RoRoPE, 2502.07864) and slow ones mix freely, without a threshold. Keys relative to segments
(fhopt/plan/segment_rotation.py) have only the positions within a segment, as calibration sees them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fhopt.fitting.statistics import SiteStatistics
from fhopt.plan.site import AttentionSite, Rope

SHRINKAGE = 0.01
# Of the mean variance. Channels below it get less than unit variance: a few thousand tokens do not estimate them well,
# and a channel that is much larger on other text would spoil the scale of the whole token.
FAINT = 1e-4
RANK_CUT = 1e-12  # of the largest eigenvalue of the joint moment; float32 keys and values are exact to 1e-7


@dataclass(frozen=True, eq=False)
class Basis:
    """Encoder and decoder matrices before bits are chosen, channels in descending order of cost.

    encode [J, R, n*D], decode [J, n*D, R], float64, with the same R for all latent heads. Channels have unit variance,
    faint ones less. variance [J, R]: twice the nats/token that dropping a channel costs if errors of tokens are
    independent.
    """

    encode: Tensor
    decode: Tensor
    variance: Tensor

    @property
    def groups(self) -> int:
        """Number of latent heads, J."""
        return int(self.encode.shape[0])


# site -> layout -> bases of keys and of values; a single basis for the layout `input`
CandidateBases = Mapping[str, Mapping[str, tuple[Basis, ...]]]
Candidates = CandidateBases  # public alias


def fit_basis(statistics: SiteStatistics, side: str, layout: str, tokens: int, context: int) -> Basis:
    """Fit the basis of one side ("key" or "value") in a layout other than `input`.

    tokens: target context length of the plan. context: tokens of a calibration sequence.
    """
    site = statistics.site
    which, dim = (statistics.key, site.key_dim) if side == "key" else (statistics.value, site.value_dim)
    count = max(1, int(which.count))
    moment, metric = which.moment / count, which.metric / count
    rope = site.rope if side == "key" and site.rope is not None and site.rope.positions == "sequence" else None
    if layout in ("head", "identity"):
        moment, metric = _per_head(moment, dim), _per_head(metric, dim)
    if layout == "identity":
        return _scaled(moment, metric)
    if rope is not None:
        span = float("inf") if layout == "freq" else max(0, (statistics.segment or tokens) - context)
        average = _Average(rope, moment.shape[-1] // dim, dim, span)
        moment, metric = average(moment), average(metric)
    return _transform(moment, metric)


def fit_joint(statistics: SiteStatistics) -> Basis | None:
    """Fit the basis of the layout `input`; None if `joint_basis` finds none.

    Its matrices are [1, R, G*(D+E)] and [1, G*(D+E), R]. If keys and values are linear maps of an input of half their
    joint width, each input element is cached twice; the joint latent gives it twice the bits.
    """
    rows = joint_basis(statistics)
    if rows is None or statistics.cross is None or statistics.cross_metric is None:
        return None
    key, value, order = statistics.key, statistics.value, _head_order(statistics.site)
    moment = rows @ _joined(key.moment[0], statistics.cross, value.moment[0], order) @ rows.T
    metric = rows @ _joined(key.metric[0], statistics.cross_metric, value.metric[0], order) @ rows.T
    count = int(key.count)
    inner = _transform((moment / count).unsqueeze(0), (metric / count).unsqueeze(0))
    return Basis(inner.encode @ rows, rows.T @ inner.decode, inner.variance)


def _joined(key: Tensor, cross: Tensor, value: Tensor, order: Tensor) -> Tensor:
    """Return one matrix over the keys and values of all heads."""
    joint = torch.cat([torch.cat([key, cross], 1), torch.cat([cross.T, value], 1)])
    return joint[order][:, order]


def joint_basis(statistics: SiteStatistics) -> Tensor | None:
    """Return orthonormal rows [R, G*(D+E)] that span all keys and values of the site: the layout `input`.

    Columns are ordered by head, the key of each head before its value. None if the statistics have no cross moments or
    too few tokens, or if the rank exceeds half the width.
    """
    if statistics.cross is None or not int(statistics.key.count):
        return None
    order = _head_order(statistics.site)
    joint = _joined(statistics.key.moment[0], statistics.cross, statistics.value.moment[0], order)
    values, vectors = torch.linalg.eigh(joint)
    rank = int((values > float(values[-1]) * RANK_CUT).sum())
    if rank > len(values) // 2 or rank >= int(statistics.key.count):
        return None
    vectors = vectors[:, -rank:].flip(1)
    vectors = vectors * _signs(vectors.unsqueeze(0))[0]
    return vectors.T.contiguous()


def _head_order(site: AttentionSite) -> Tensor:
    """Order columns [all keys | all values] as [key of head 0, value of head 0, key of head 1, ...]."""
    keys = torch.arange(site.kv_heads * site.key_dim).view(site.kv_heads, -1)
    values = torch.arange(site.kv_heads * site.value_dim).view(site.kv_heads, -1) + keys.numel()
    return torch.cat([keys, values], 1).flatten()


def _per_head(matrix: Tensor, dim: int) -> Tensor:
    """Extract the diagonal block of each head: [J, n*D, n*D] -> [G, D, D]."""
    groups, width, _ = matrix.shape
    heads = width // dim
    blocks = matrix.view(groups, heads, dim, heads, dim)
    return torch.stack([blocks[:, i, :, i] for i in range(heads)], 1).flatten(0, 1)


class _Average:
    """The map M -> mean over t in [0, span] of R(t) M R(t)^T, for concatenated keys of `heads` heads of `dim` channels.

    R(t) rotates the pair (a, b) of a frequency by its angle times t: x_a' = x_a cos - x_b sin, x_b' = x_b cos + x_a
    sin. Channels without RoPE have angle 0. With an infinite span only products of equal frequency remain.
    """

    def __init__(self, rope: Rope, heads: int, dim: int, span: float) -> None:
        partner, angle, sign = torch.arange(dim), torch.zeros(dim, dtype=torch.float64), torch.ones(dim)
        for (a, b), theta in zip(rope.pairs, rope.angles, strict=True):
            partner[a], partner[b], sign[a] = b, a, -1.0
            angle[a] = angle[b] = theta
        self.partner = (torch.arange(heads).unsqueeze(1) * dim + partner).flatten()
        angle, sign = angle.repeat(heads), sign.double().repeat(heads)
        less, more = angle.unsqueeze(1) - angle, angle.unsqueeze(1) + angle
        cos_less, cos_more = _mean_cos(less, span), _mean_cos(more, span)
        sin_less, sin_more = _mean_sin(less, span), _mean_sin(more, span)
        self.cos_cos = (cos_less + cos_more) / 2
        self.sin_sin = (cos_less - cos_more) / 2 * sign.unsqueeze(1) * sign
        self.cos_sin = (sin_more - sin_less) / 2 * sign  # cos of the row, sin of the column

    def __call__(self, matrix: Tensor) -> Tensor:
        swap = self.partner
        turned = self.cos_cos * matrix + self.sin_sin * matrix[:, swap][:, :, swap]
        return turned + self.cos_sin * matrix[:, :, swap] + self.cos_sin.T * matrix[:, swap]


def _mean_cos(speed: Tensor, span: float) -> Tensor:
    """Return the mean of cos(speed t) over t in [0, span]."""
    if span == float("inf"):
        return (speed.abs() < 1e-12).double()
    return torch.sinc(speed * span / torch.pi)


def _mean_sin(speed: Tensor, span: float) -> Tensor:
    """Return the mean of sin(speed t) over t in [0, span]."""
    if span == float("inf"):
        return torch.zeros_like(speed)
    half = speed * span / 2
    return torch.sin(half) * torch.sinc(half / torch.pi)


def _transform(moment: Tensor, metric: Tensor) -> Basis:
    root, inverse = _square_roots(_shrunk(metric))
    values, vectors = torch.linalg.eigh(root @ moment @ root)
    vectors = vectors * _signs(vectors)
    return _sorted(vectors.mT @ root, inverse @ vectors, values.clamp_min(0))


def _signs(vectors: Tensor) -> Tensor:
    """Return signs [J, 1, R] that make the largest entry of every column positive, so that all machines agree."""
    largest = vectors.abs().argmax(1, keepdim=True)
    return torch.sign(vectors.gather(1, largest))


def _scaled(moment: Tensor, metric: Tensor) -> Basis:
    power, cost = moment.diagonal(dim1=1, dim2=2), _shrunk(metric).diagonal(dim1=1, dim2=2)
    root = cost.clamp_min(1e-300).sqrt()
    return _sorted(torch.diag_embed(root), torch.diag_embed(1 / root), power * cost)


def _sorted(encode: Tensor, decode: Tensor, variance: Tensor) -> Basis:
    """Sort channels by descending variance within each latent head, and scale them to unit variance."""
    order = torch.argsort(variance, dim=1, descending=True, stable=True)  # [J, R]
    variance = variance.gather(1, order)
    deviation = torch.maximum(variance, FAINT * variance.mean(1, keepdim=True) + 1e-300).sqrt()
    encode = encode.gather(1, order.unsqueeze(2).expand_as(encode)) / deviation.unsqueeze(2)
    decode = decode.gather(2, order.unsqueeze(1).expand_as(decode)) * deviation.unsqueeze(1)
    return Basis(encode, decode, variance)


def _shrunk(matrix: Tensor) -> Tensor:
    """Return (1 - s) A + s tr(A)/c I per block, plus a floor far below the largest block: never singular."""
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)  # [J]
    floor = mean.max() * 1e-9 + 1e-300
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return (1 - SHRINKAGE) * matrix + (SHRINKAGE * mean + floor)[:, None, None] * eye


def _square_roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return A^{1/2} and A^{-1/2} of positive symmetric blocks."""
    values, vectors = torch.linalg.eigh(matrix)
    root = values.clamp_min(1e-300).sqrt().unsqueeze(-2)
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT
