"""Page selection in torch operations: weights of pages from sketches, the pages to read, value-mean fill.

    sketches  ->  logits of tokens       sketch_logits
    logits    ->  log weights of pages   page_logits
    weights   ->  the pages to read      select_pages, by a `SelectionRule`
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
FEWEST = 4  # pages that are listed where no page has enough weight


# --------------------------------------------------------------------------------------------------- weights


def sketch_logits(
    weights: Tensor, constant: Tensor, codes: Tensor, scale: Tensor, bits: Sequence[int], widths: Sequence[int],
    steps: Sequence[float],
) -> Tensor:  # fmt: skip
    """Compute logits of tokens from their sketches: constant + scale (weights . quantized values).

    weights [B,J,M,r], constant [B,J,M] as from `factors`; codes uint8 [B,J,T,bytes] in bit groups of `bits`, `widths`
    and `steps`; scale [B,J,T] -> [B,J,M,T].
    """
    tiles = []
    for tile, factor in zip(codes.split(TILE, 2), scale.split(TILE, 2), strict=True):
        units = packing.unscaled(tile, bits, widths, steps).to(weights.dtype)
        tiles.append(weights @ units.mT * factor.to(weights.dtype).unsqueeze(2))
    return torch.cat(tiles, -1) + constant.unsqueeze(-1)


def factors(query: Tensor, mean: Tensor, deviation: Tensor, channels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the factors by which a query turns sketches into logits: of each channel, and a constant.

    query [B,H,S,R] is absorbed; mean and deviation [J,R] and channels [J,r], those that are kept, are of a `SketchPlan`
    -> [B,J,H/J*S,r], [B,J,H/J*S], float32 or more exact.
    """
    rows = grouped(query, mean.shape[0])
    weighted = rows * deviation.unsqueeze(1)
    index = channels.unsqueeze(1).expand(*rows.shape[:-1], -1)
    return weighted.gather(-1, index), (rows * mean.unsqueeze(1)).sum(-1)


def grouped(query: Tensor, heads: int) -> Tensor:
    """Group queries by latent head: [B,H,S,R] -> [B,J,H/J*S,R], J = `heads`, float32 or more exact."""
    b, h, s, width = query.shape
    return query.to(torch.promote_types(query.dtype, torch.float32)).reshape(b, heads, h // heads * s, width)


def page_logits(logits: Tensor, tokens: int) -> Tensor:
    """Compute the log of the weight of each page of `tokens` tokens: [B,H,S,T] -> [B,H,S,P]; the last may be short."""
    short = -logits.shape[-1] % tokens
    padded = torch.nn.functional.pad(logits, (0, short), value=-math.inf) if short else logits
    return padded.unflatten(-1, (-1, tokens)).logsumexp(-1)


def expected_weights(estimates: Tensor, units: int, near: Tensor | None = None) -> Tensor:
    """Compute the share of all weight that each unit expects each page to have: [B,H,S,P] -> [B,U,S,P].

    estimates: logs of the weights of pages; near [B,H,S]: log of the weight of what is read in any case; None: nothing
    is. Zeros where nothing has weight.
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
    """Return how many of `count` pages are read at most: a share of them, but at least `least`."""
    if isinstance(count, Tensor):
        return torch.minimum(count, (count.double() * share).long().clamp(min=least))
    return min(count, max(least, int(count * share)))


@dataclass(frozen=True)
class SelectionRule:
    """What decides which pages a query reads.

    units: U, groups of query heads that read the same pages; most: N, pages that a list has room for; share, least: as
    in `pages_read`. mass: pages are read until those left out have at most 1 - `mass` of the weight. lift: a page is
    read if its weight is at least `lift` times the mean, or it is among the FEWEST largest.
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
    """Select the pages that each unit reads: (bool [B,U,S,P], the `list_counts` int64 [4]).

    estimates [B,H,S,P] and near [B,H,S]: as in `expected_weights`. available: how many pages there are to select from,
    a number, or integers broadcastable to [B,U,S,1].
    """
    selected = top_pages(expected_weights(estimates, rule.units, near), rule, available)
    return selected, list_counts(selected, available)


def top_pages(weights: Tensor, rule: SelectionRule, available: Tensor | int) -> Tensor:
    """Select the pages of largest weight that `rule` allows: weights [B,U,S,P] -> bool [B,U,S,P].

    weights: shares of all weight; available: as in `select_pages`. Pages without any weight are never selected.
    """
    best, order = weights.topk(rule.most, -1)
    place = torch.arange(rule.most, device=weights.device)
    kept = (place < pages_read(available, rule.share, rule.least)) & (best > 0)
    if rule.mass < 1:  # what comes before does not suffice
        kept &= weights.sum(-1, keepdim=True) - (best.cumsum(-1) - best) > 1 - rule.mass
    if rule.lift > 0:
        kept &= (best * available >= rule.lift) | (place < FEWEST)
    return torch.zeros(weights.shape, dtype=torch.bool, device=weights.device).scatter(-1, order, kept)


def page_lists(selected: Tensor, length: int) -> Tensor:
    """List selected pages in ascending order, -1 behind them: bool [B,U,P] -> int32 [B,U,N], N = `length`."""
    count = selected.shape[-1]
    numbers = torch.where(selected, torch.arange(count, device=selected.device), count)
    lists = numbers.topk(length, -1, largest=False, sorted=True).values if length < count else numbers.sort(-1).values
    return torch.where(lists < count, lists, -1).to(torch.int32)


def list_counts(selected: Tensor, available: Tensor | int) -> Tensor:
    """Count what was selected, for the counters of a `PageIndex`: lists, 0, pages in lists, pages to select from.

    selected bool [B,U,S,P]; available: a number of pages, or one for each sequence -> int64 [4].
    """
    lists = selected.shape[0] * selected.shape[1] * selected.shape[2]
    there = torch.as_tensor(available, device=selected.device).expand(selected.shape[0], 1, 1, 1).sum()
    made = there.new_tensor(lists)
    return torch.stack([made, made * 0, selected.sum(), there * (lists // max(1, selected.shape[0]))]).to(torch.int64)


# --------------------------------------------------------------------------------------------------- value-mean fill


def odds_left_out(estimates: Tensor, selected: Tensor) -> Tensor:
    """Compute the log of the weight of pages left out over that of the selected ones, -inf where there are none.

    estimates [B,H,S,P]: logs of the weights of pages; selected bool [B,U,S,P] -> [B,H,S].
    """
    taken = selected.repeat_interleave(estimates.shape[1] // selected.shape[1], 1)
    left, read = (estimates.masked_fill(mask, -math.inf).logsumexp(-1) for mask in (taken, ~taken))
    return torch.where(read > -math.inf, left - read, -math.inf)


def fill_with_mean(
    output: Tensor, lse: Tensor, mean: Tensor | None, odds: Tensor, fill: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Add a mean of values to what was read, (output [B,H,S,R], lse [B,H,S]), in place of what was not.

    mean [B,n,S or 1,R], n a divisor of H; without a mean or a fill nothing changes. odds [B,H,S]: as from
    `odds_left_out`. Estimates alone may be wrong by a common factor, where keys of a text have another mean than those
    of the calibration; the odds are free of it. fill [H]: log of the part of the weight that the mean takes.
    """
    if mean is None or fill is None:
        return output, lse
    share = odds + fill.unsqueeze(-1)
    part = torch.sigmoid(share).unsqueeze(-1).to(output.dtype)
    every = mean.to(output.dtype).repeat_interleave(output.shape[1] // mean.shape[1], 1).expand_as(output)
    return torch.lerp(output, every, part), lse + torch.nn.functional.softplus(share)
