"""Page selection in torch operations: page weights from sketches, selection of pages, value-mean fill.

    sketches  ->  token logits           sketch_logits
    logits    ->  log page weights       page_logits
    weights   ->  selected pages         select_pages, by a `SelectionRule`
    pages     ->  lists for an op        page_lists
    output    ->  with value-mean fill   fill_with_mean

Letters: B batch, H query heads, J latent heads, M query rows of a latent head, U units, S queries, T quantized tokens,
P pages, N pages of a list, R latent width, r channels of a sketch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from fhopt.ops import packing

TILE = 4096  # tokens whose sketches are unpacked at a time
FEWEST = 4  # pages listed if no page has enough weight


# --------------------------------------------------------------------------------------------------- weights


def sketch_logits(
    weights: Tensor, constant: Tensor, codes: Tensor, scale: Tensor, bits: Sequence[int], widths: Sequence[int],
    steps: Sequence[float],
) -> Tensor:  # fmt: skip
    """Compute token logits from sketches: constant + scale (weights . quantized values).

    weights [B,J,M,r], constant [B,J,M] as from `factors`; codes uint8 [B,J,T,bytes] in bit groups of `bits`, `widths`
    and `steps`; scale [B,J,T] -> [B,J,M,T].
    """
    tiles = []
    for tile, factor in zip(codes.split(TILE, 2), scale.split(TILE, 2), strict=True):
        units = packing.unscaled(tile, bits, widths, steps).to(weights.dtype)
        tiles.append(weights @ units.mT * factor.to(weights.dtype).unsqueeze(2))
    return torch.cat(tiles, -1) + constant.unsqueeze(-1)


def factors(query: Tensor, mean: Tensor, deviation: Tensor, channels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the factors of a query that map sketches to logits: one per channel, and a constant.

    query [B,H,S,R] is absorbed; mean and deviation [J,R] and the sketched channels [J,r] are of a `SketchPlan` ->
    [B,J,H/J*S,r], [B,J,H/J*S], float32 or float64.
    """
    rows = grouped(query, mean.shape[0])
    weighted = rows * deviation.unsqueeze(1)
    index = channels.unsqueeze(1).expand(*rows.shape[:-1], -1)
    return weighted.gather(-1, index), (rows * mean.unsqueeze(1)).sum(-1)


def grouped(query: Tensor, heads: int) -> Tensor:
    """Group queries by latent head: [B,H,S,R] -> [B,J,H/J*S,R], J = `heads`, float32 or float64."""
    b, h, s, width = query.shape
    return query.to(torch.promote_types(query.dtype, torch.float32)).reshape(b, heads, h // heads * s, width)


def page_logits(logits: Tensor, tokens: int) -> Tensor:
    """Compute the log weight of each page of `tokens` tokens: [B,H,S,T] -> [B,H,S,P]; the last may be partial."""
    short = -logits.shape[-1] % tokens
    padded = torch.nn.functional.pad(logits, (0, short), value=-math.inf) if short else logits
    return padded.unflatten(-1, (-1, tokens)).logsumexp(-1)


def expected_weights(estimates: Tensor, units: int, near: Tensor | None = None) -> Tensor:
    """Compute the fraction of the weight that each unit expects on each page: [B,H,S,P] -> [B,U,S,P].

    estimates: log page weights. near [B,H,S]: log weight of the tokens that are always attended; None: there are none.
    Zeros if nothing has weight.
    """
    all_pages = estimates.logsumexp(-1)
    total = all_pages if near is None else torch.logaddexp(all_pages, near.to(estimates.dtype))
    weights = (estimates - total.masked_fill(total == -math.inf, 0.0).unsqueeze(-1)).exp()
    return weights.unflatten(1, (units, -1)).mean(2)


# --------------------------------------------------------------------------------------------------- selection


@overload
def pages_read(count: int, share: float, least: int) -> int: ...


@overload
def pages_read(count: Tensor, share: float, least: int) -> Tensor: ...


def pages_read(count: Tensor | int, share: float, least: int) -> Tensor | int:
    """Return the maximum number of selected pages of `count`: a share of them, but at least `least`."""
    if isinstance(count, Tensor):
        return torch.minimum(count, (count.double() * share).long().clamp(min=least))
    return min(count, max(least, int(count * share)))


@dataclass(frozen=True)
class SelectionRule:
    """Parameters of page selection.

    units: U, groups of query heads that share a page list. most: N, capacity of a page list. share, least: as in
    `pages_read`. mass: pages are selected until the others have at most 1 - `mass` of the weight. lift: a page is
    selected if its weight is at least `lift` times the mean, or it is among the FEWEST largest.
    """

    units: int
    most: int
    share: float
    least: int
    mass: float
    lift: float


def select_pages(
    estimates: Tensor, rule: SelectionRule, available: Tensor | int, near: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Select pages for each unit: (bool [B,U,S,P], the `list_counts` int64 [4]).

    estimates [B,H,S,P] and near [B,H,S]: as in `expected_weights`. available: number of pages to select from, an int or
    integers broadcastable to [B,U,S,1].
    """
    selected = top_pages(expected_weights(estimates, rule.units, near), rule, available)
    return selected, list_counts(selected, available)


def top_pages(weights: Tensor, rule: SelectionRule, available: Tensor | int) -> Tensor:
    """Select the pages with the largest weight that `rule` allows: weights [B,U,S,P] -> bool [B,U,S,P].

    weights: fractions of the total; available: as in `select_pages`. Pages without weight are never selected.
    """
    best, order = weights.topk(rule.most, -1)
    place = torch.arange(rule.most, device=weights.device)
    kept = (place < pages_read(available, rule.share, rule.least)) & (best > 0)
    if rule.mass < 1:  # larger pages do not reach the mass
        kept &= weights.sum(-1, keepdim=True) - (best.cumsum(-1) - best) > 1 - rule.mass
    if rule.lift > 0:
        kept &= (best * available >= rule.lift) | (place < FEWEST)
    return torch.zeros(weights.shape, dtype=torch.bool, device=weights.device).scatter(-1, order, kept)


def page_lists(selected: Tensor, length: int) -> Tensor:
    """List selected pages in ascending order, padded with -1: bool [B,U,P] -> int32 [B,U,N], N = `length`."""
    count = selected.shape[-1]
    numbers = torch.where(selected, torch.arange(count, device=selected.device), count)
    lists = numbers.topk(length, -1, largest=False, sorted=True).values if length < count else numbers.sort(-1).values
    return torch.where(lists < count, lists, -1).to(torch.int32)


def list_counts(selected: Tensor, available: Tensor | int) -> Tensor:
    """Count a selection for the counters of a `PageIndex`: lists, 0, pages in lists, pages available.

    selected bool [B,U,S,P]; available: number of pages, scalar or one per sequence -> int64 [4].
    """
    lists = selected.shape[0] * selected.shape[1] * selected.shape[2]
    there = torch.as_tensor(available, device=selected.device).expand(selected.shape[0], 1, 1, 1).sum()
    made = there.new_tensor(lists)
    return torch.stack([made, made * 0, selected.sum(), there * (lists // max(1, selected.shape[0]))]).to(torch.int64)


# --------------------------------------------------------------------------------------------------- value-mean fill


def odds_left_out(estimates: Tensor, selected: Tensor) -> Tensor:
    """Compute the log ratio of the weight of unselected to selected pages; -inf if none are selected.

    estimates [B,H,S,P]: log page weights; selected bool [B,U,S,P] -> [B,H,S].
    """
    taken = selected.repeat_interleave(estimates.shape[1] // selected.shape[1], 1)
    left, read = (estimates.masked_fill(mask, -math.inf).logsumexp(-1) for mask in (taken, ~taken))
    return torch.where(read > -math.inf, left - read, -math.inf)


def fill_with_mean(
    output: Tensor, lse: Tensor, mean: Tensor | None, odds: Tensor, fill: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Add a mean of values to attention on selected pages, (output [B,H,S,R], lse [B,H,S]), for the other pages.

    mean [B,n,S or 1,R], n a divisor of H; without a mean or a fill nothing changes. odds [B,H,S]: from `odds_left_out`.
    Estimates may have a common error factor, if a text's keys have another mean than the calibration set; odds cancel
    it. fill [H]: log of the factor of the weight that goes to the mean.
    """
    if mean is None or fill is None:
        return output, lse
    share = odds + fill.unsqueeze(-1)
    part = torch.sigmoid(share).unsqueeze(-1).to(output.dtype)
    every = mean.to(output.dtype).repeat_interleave(output.shape[1] // mean.shape[1], 1).expand_as(output)
    return torch.lerp(output, every, part), lse + torch.nn.functional.softplus(share)
