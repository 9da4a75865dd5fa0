"""Page selection in torch operations: expected weights of pages, thresholds, lists, value-mean fill."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from fhopt.ops import packing

TILE = 4096  # tokens whose sketches are made numbers at a time
FEWEST = 4  # pages that are listed where no page weighs enough


# --------------------------------------------------------------------------------------------------- plain torch


def sketch_logits(
    weights: Tensor, constant: Tensor, codes: Tensor, scale: Tensor, bits: Sequence[int], widths: Sequence[int],
    steps: Sequence[float],
) -> Tensor:  # fmt: skip
    """constant + scale (weights . value of the codes): [B,J,M,r], [B,J,M] and sketches of T tokens -> [B,J,M,T]."""
    tiles = []
    for tile, factor in zip(codes.split(TILE, 2), scale.split(TILE, 2), strict=True):
        units = packing.unscaled(tile, bits, widths, steps).to(weights.dtype)
        tiles.append(weights @ units.mT * factor.to(weights.dtype).unsqueeze(2))
    return torch.cat(tiles, -1) + constant.unsqueeze(-1)


def factors(query: Tensor, mean: Tensor, deviation: Tensor, channels: Tensor) -> tuple[Tensor, Tensor]:
    """What channels of a sketch and 1 are multiplied by, for absorbed queries: [B,H,S,R], and mean and deviation [J,R]
    and kept channels [J,r] of the latents -> [B,J,H/J*S,r], [B,J,H/J*S], float32 or more exact."""
    rows = grouped(query, mean.shape[0])
    weighted = rows * deviation.unsqueeze(1)
    index = channels.unsqueeze(1).expand(*rows.shape[:-1], -1)
    return weighted.gather(-1, index), (rows * mean.unsqueeze(1)).sum(-1)


def grouped(query: Tensor, heads: int) -> Tensor:
    """[B,H,S,R] -> [B,J,H/J*S,R], J = `heads`, float32 or more exact."""
    b, h, s, width = query.shape
    return query.to(torch.promote_types(query.dtype, torch.float32)).reshape(b, heads, h // heads * s, width)


@overload
def pages_read(count: int, share: float, least: int) -> int: ...


@overload
def pages_read(count: Tensor, share: float, least: int) -> Tensor: ...


def pages_read(count: Tensor | int, share: float, least: int) -> Tensor | int:
    """How many of `count` pages are read at most."""
    if isinstance(count, Tensor):
        return torch.minimum(count, (count.double() * share).long().clamp(min=least))
    return min(count, max(least, int(count * share)))


def expected_weights(logits: Tensor, units: int, near: Tensor | None = None) -> Tensor:
    """The share that each unit expects of each page in the weight of all: [B,H,S,P] -> [B,U,S,P].

    near [B,H,S]: log of the weight of what is read in any case; None: nothing is. Zeros where nothing has weight.
    """
    all_pages = logits.logsumexp(-1)
    total = all_pages if near is None else torch.logaddexp(all_pages, near.to(logits.dtype))
    weights = (logits - total.masked_fill(total == -math.inf, 0.0).unsqueeze(-1)).exp()
    return weights.unflatten(1, (units, -1)).mean(2)


@dataclass(frozen=True)
class Threshold:
    """Which pages weigh enough to be read: enough that those that are not have at most 1 - `mass` of the weight, and
    `lift` times the mean share, 1 / `pages`, or more; FEWEST of them in any case. pages: a number, or integers
    broadcastable to [B,U,S,1]."""

    mass: float
    lift: float
    pages: Tensor | int


def best_of(weights: Tensor, most: int, read: Tensor | int, threshold: Threshold) -> Tensor:
    """The pages that weigh most: weights [B,U,S,P] -> bool [B,U,S,P].

    The first `read` of `most` places, and no more than weigh enough. Never those without any weight.
    """
    best, order = weights.topk(most, -1)
    place = torch.arange(most, device=weights.device)
    kept = (place < read) & (best > 0)
    if threshold.mass < 1:  # what comes before does not suffice
        kept &= weights.sum(-1, keepdim=True) - (best.cumsum(-1) - best) > 1 - threshold.mass
    if threshold.lift > 0:
        kept &= (best * threshold.pages >= threshold.lift) | (place < FEWEST)
    return torch.zeros(weights.shape, dtype=torch.bool, device=weights.device).scatter(-1, order, kept)


def page_lists(chosen: Tensor, length: int) -> Tensor:
    """Lists of chosen pages, ascending, -1 behind them. bool [B,U,P] -> int32 [B,U,N], N = `length`."""
    count = chosen.shape[-1]
    numbers = torch.where(chosen, torch.arange(count, device=chosen.device), count)
    lists = numbers.topk(length, -1, largest=False, sorted=True).values if length < count else numbers.sort(-1).values
    return torch.where(lists < count, lists, -1).to(torch.int32)


def stand_in(
    output: Tensor, lse: Tensor, mean: Tensor | None, odds: Tensor, fill: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What was read, (output [B,H,S,R], lse [B,H,S]), with a mean of values [B,n,S or 1,R] for what was not,
    n a divisor of H; without a mean or a fill as it was.

    odds [B,H,S]: log of the weight that was left out over that which was read, as sketches have it. By itself, what
    sketches give may be wrong by a common factor, where keys of a text have another mean than those of the calibration.
    fill [H]: log of the part of it that the mean takes.
    """
    if mean is None or fill is None:
        return output, lse
    share = odds + fill.unsqueeze(-1)
    part = torch.sigmoid(share).unsqueeze(-1).to(output.dtype)
    every = mean.to(output.dtype).repeat_interleave(output.shape[1] // mean.shape[1], 1).expand_as(output)
    return torch.lerp(output, every, part), lse + torch.nn.functional.softplus(share)


def list_counts(chosen: Tensor, available: Tensor | int) -> Tensor:
    """What is added to the counters of a `PageIndex` for chosen pages, bool [B,U,S,P], of so many, a number or one for
    each sequence: int64 [4]."""
    lists = chosen.shape[0] * chosen.shape[1] * chosen.shape[2]
    there = torch.as_tensor(available, device=chosen.device).expand(chosen.shape[0], 1, 1, 1).sum()
    made = there.new_tensor(lists)
    return torch.stack([made, made * 0, chosen.sum(), there * (lists // max(1, chosen.shape[0]))]).to(torch.int64)


def odds_left_out(logits: Tensor, chosen: Tensor) -> Tensor:
    """Log of the weight of pages that are not chosen over that of those that are: [B,H,S,P], bool [B,U,S,P] -> [B,H,S];
    -inf where there are none of either."""
    taken = chosen.repeat_interleave(logits.shape[1] // chosen.shape[1], 1)
    left, read = (logits.masked_fill(mask, -math.inf).logsumexp(-1) for mask in (taken, ~taken))
    return torch.where(read > -math.inf, left - read, -math.inf)
